"""The log of a run, and what is read from it after kills, resumes and second runs."""

from __future__ import annotations

import errno
import json
import logging
from pathlib import Path

import pytest
import torch
from ranks import returned
from sharded_runs import Sharded
from worlds import Run, difference

import disback_plugin as disback
from disback_plugin.errors import OptionError, PathError
from disback_plugin.plugins.log_reader import find, read
from disback_plugin.plugins.run_log import RunLog

OPTIONS = {"record": 10, "every": 5, "schedule": "ramp:4"}


def lines_of(file):
    return [json.loads(text) for text in file.read_text().splitlines() if text]


@pytest.fixture(scope="module")
def logged(tmp_path_factory):
    """A run of ten updates and its recording, and its handle."""
    folder, run = tmp_path_factory.mktemp("logged"), Run()
    with disback.attach(**run.roles(), path=folder / "path", **OPTIONS) as handle:
        for _ in range(20):
            run.step()
            handle.log({"loss": torch.tensor(2.0), "disback/distance": 4})
        handle.log({"samples": folder / "pictures" / "last.png"})
    return folder / "path.log.jsonl", handle


def test_a_run_writes_what_it_is_beside_its_path(logged):
    file, handle = logged
    first = lines_of(file)[0]
    assert (first["begin"], first["update"], first["recording"], first["resumed"]) == ("attach", 0, 0, False)
    manifest = handle.path.manifest
    assert (first["teacher"], first["generator"]) == (manifest.teacher.fingerprint, manifest.generator)
    assert first["settings"]["schedule"] == repr(disback.schedules.Ramp(4))
    assert (first["settings"]["record"], first["settings"]["codec"]) == (10, "int8")
    assert first["roles"]["teacher"].startswith("Score, ")
    assert all(first["roles"][role].endswith("; Adam, learning rate 0.01") for role in ("generator", "fake score"))
    assert torch.__version__.startswith(first["versions"]["torch"].partition("+")[0])


def test_the_history_has_each_node_each_move_and_what_the_loop_logged(logged):
    file, handle = logged
    history = read(file)
    assert [(node["index"], node["iteration"]) for node in history.nodes()] == [(1, 5), (2, 10)]
    assert [node["weight_error"] for node in history.nodes()] == [node.weight_error for node in handle.path.nodes]
    assert history.completed() == {"iterations": 10, "fitted": handle.path.manifest.fitted, "ended": None}
    curves, recording = history.curves(), history.curves(recording=True)
    assert [update for update, _ in curves["position"]] == [0, 1, 2, 3, 4]
    assert curves["position"][-1] == (4, 0.0)
    assert curves["gradient"][-1] == (4, 1.0)
    assert all(ms > 0 for _, ms in curves["swap_ms"])
    assert curves["loss"] == [(update, 2.0) for update in range(11)]
    assert curves["distance"][-1] == (10, 4.0)
    assert recording["loss"] == [(iteration, 2.0) for iteration in range(1, 10)]
    assert [iteration for iteration, _ in recording["agreement"]] == list(range(2, 11))
    assert history.pictures() == {"samples": [(10, file.parent / "pictures" / "last.png")]}
    assert (history.name, history.updates, history.recorded, history.torn) == ("path", 10, 10, 0)


def test_a_run_with_a_log_is_the_run_without_bit_for_bit(tmp_path):
    ends = []
    for plugins in ((), ("no:run_log",)):
        run, folder = Run(), tmp_path / str(len(plugins))
        with disback.attach(**run.roles(), path=folder / "path", **OPTIONS, plugins=plugins) as handle:
            for _ in range(20):
                run.step()
                handle.log({"loss": 1.0, "samples": Path("x.png")})
        ends.append(run.checkpoint())
        assert (folder / "path.log.jsonl").exists() == (plugins == ())
    assert difference(*ends) == []


def test_a_run_that_is_refused_leaves_no_log(tmp_path):
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "thesis.tex").write_text("mine")
    run = Run()
    with pytest.raises(PathError):
        disback.attach(**run.roles(), path=tmp_path / "path", **OPTIONS)
    assert [file.name for file in tmp_path.iterdir()] == ["path"]


def test_without_a_path_a_run_is_logged_where_it_is_told(tmp_path):
    run = Run()
    with disback.attach(**run.roles(), record=0, log=tmp_path / "plain.log.jsonl") as handle:
        run.steps(3)
        handle.log({"distance": 1.5})
    history = read(tmp_path / "plain.log.jsonl")
    assert history.curves() == {"distance": [(3, 1.5)]}
    assert history.begun[-1]["settings"]["record"] == 0


def test_a_recording_of_its_own_is_logged_and_goes_on_in_the_same_log(tmp_path):
    run = Run()
    calls = iter(range(100))

    def interrupted():
        if next(calls) == 7:
            raise KeyboardInterrupt
        run.fake_step()

    plan = {"path": tmp_path / "path", "iterations": 10, "every": 3}
    with pytest.raises(KeyboardInterrupt):
        disback.record(run.teacher, run.fake_score, interrupted, **plan)
    disback.record(run.teacher, run.fake_score, run.fake_step, **plan)
    history = read(tmp_path / "path.log.jsonl")
    assert [(begin["begin"], begin["recording"], begin["resumed"]) for begin in history.begun] == [
        ("record", 0, False),
        ("record", 6, True),
    ]
    assert [node["iteration"] for node in history.nodes()] == [3, 6, 9, 10]
    assert history.completed()["iterations"] == 10


def test_a_resumed_run_is_one_history_and_a_second_run_on_its_path_another(tmp_path):
    def a_run():
        run = Run()
        return run, disback.attach(**run.roles(), path=tmp_path / "path", **OPTIONS)

    run, handle = a_run()
    run.steps(10 + 2)
    saved, checkpoint = handle.state_dict(), run.checkpoint()
    run.steps(6)  # and then it is killed
    handle.log({"loss": 8.0})
    resumed, second = a_run()
    resumed.load(checkpoint)
    second.load_state_dict(saved)
    resumed.steps(3)
    second.log({"loss": 5.0})
    history = read(tmp_path / "path.log.jsonl")
    assert history.curves()["loss"] == [(5, 5.0)], "the killed run's update 8 does not count"
    assert [line["update"] for line in history.lines if "resume" in line] == [2]
    assert [update for update, _ in history.curves()["position"]] == [0, 1, 2, 3, 4]
    assert len(history.nodes()) == 2
    handle.detach()
    second.detach()

    run, third = a_run()
    run.steps(1)
    third.detach()
    history = read(tmp_path / "path.log.jsonl")
    assert set(history.curves()) == {"position", "node", "gradient", "swap_ms", "delta_norm"}
    assert history.updates == 1
    assert len(history.nodes()) == 2, "the recording is the path's, and so of every run on it"


def test_a_full_disk_is_one_warning_and_the_run_goes_on(tmp_path, caplog):
    run = Run()
    with disback.attach(**run.roles(), path=tmp_path / "path", **OPTIONS, log="/dev/full") as handle:
        run.steps(14)
        handle.log({"loss": 1.0})
        assert handle.phase == "done"
    (warning,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert "continues without its log: /dev/full cannot be written" in warning.getMessage()
    assert str(errno.ENOSPC) in warning.getMessage()


@pytest.mark.parametrize("values", [{"update": 1.0}, {"": 1.0}, {"loss": "low"}, {"loss": torch.zeros(2)}, {"x": None}])
def test_what_is_no_number_or_picture_is_refused(values, tmp_path):
    run = Run()
    with disback.attach(**run.roles(), path=tmp_path / "path", **OPTIONS) as handle:
        run.step()
        with pytest.raises(OptionError):
            handle.log(values)


def test_what_is_not_finite_is_null_and_every_line_is_strict_json(tmp_path):
    log = RunLog(tmp_path / "x.log.jsonl")
    log.begin("test")
    log.log({"loss": float("nan"), "other": float("inf")}, 3)
    texts = [text for text in log.file.read_text().splitlines() if text]
    parsed = [json.loads(text, parse_constant=lambda name: pytest.fail(name)) for text in texts]
    assert (parsed[1]["loss"], parsed[1]["other"]) == (None, None)
    assert read(log.file).curves() == {"loss": [(3, None)], "other": [(3, None)]}


def test_pandas_and_people_can_read_it(logged):
    for line in lines_of(logged[0]):
        assert list(line)[:2] == ["time", "update"]
        assert isinstance(line["update"], int)


@pytest.mark.parametrize("name", ["path", "path.log.jsonl", ""])
def test_a_run_is_named_by_its_log_its_path_or_a_folder(logged, name):
    file, _ = logged
    assert find(file.parent / name) == [file]


def test_only_the_first_rank_writes(tmp_path, monkeypatch):
    run = Run()
    with monkeypatch.context() as patch:
        patch.setattr("disback_plugin.distributed.is_main_process", lambda: False)
        with disback.attach(**run.roles(), path=tmp_path / "path", **OPTIONS) as handle:
            run.steps(12)
            handle.log({"loss": 1.0})
    assert [file.name for file in tmp_path.iterdir()] == ["path"]


def on_each_rank(folder):
    run = Sharded("fsdp2")
    with disback.attach(**run.roles(), path=f"{folder}/path", **OPTIONS) as handle:
        for _ in range(14):
            run.step()
            handle.log({"loss": torch.tensor(1.0)})
        return handle.generator_updates


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_ranks_of_a_sharded_run_leave_one_log(nursery, tmp_path):
    assert returned(nursery.play(on_each_rank, 2, str(tmp_path))) == [4, 4]
    history = read(tmp_path / "path.log.jsonl")
    assert len(history.begun) == 1
    assert history.curves()["loss"] == [(update, 1.0) for update in range(5)]
    assert len(lines_of(history.file)) == len(history.lines) + 1
    assert [node["index"] for node in history.nodes()] == [1, 2]


def test_a_path_given_as_what_record_returned_has_its_log_beside_it(tmp_path):
    run = Run()
    path = disback.record(run.teacher, run.fake_score, run.fake_step, path=tmp_path / "path", iterations=4, every=2)
    with disback.attach(**run.roles(), path=path, schedule="warm"):
        run.step()
    assert [begin["begin"] for begin in read(tmp_path / "path.log.jsonl").begun] == ["record", "attach"]
