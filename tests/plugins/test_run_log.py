"""The log of a run, and what is read from it after kills, resumes and second runs."""

from __future__ import annotations

import errno
import json
import logging
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import returned
from sharded_runs import Sharded
from worlds import Run, difference

import disback_plugin as disback
from disback_plugin.errors import OptionError, PathError
from disback_plugin.plugins.log_reader import find, last_run, read
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
    assert first["networks"]["teacher"].startswith("Score, ")
    assert first["optimizers"] == dict.fromkeys(("generator", "fake score"), "Adam, learning rate 0.01")
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


def test_a_run_goes_on_from_one_of_its_own_path_not_from_the_last_one():
    def begin(path, resumed):
        return {"update": 5 if resumed else 0, "begin": "attach", "resumed": resumed, "path": path}

    ours, another = ({"update": 9, "loss": loss} for loss in (1.0, 2.0))
    early, early_of_another = ({"update": 4, "loss": loss} for loss in (3.0, 4.0))
    lines = [begin("a", False), early, ours, begin("b", False), early_of_another, another, begin("a", True)]
    assert last_run(lines).curves() == {"loss": [(4, 3.0)]}


def test_a_line_that_a_killed_process_left_half_does_not_hide_the_next(tmp_path):
    log = RunLog(tmp_path / "x.log.jsonl")
    log.begin("test")
    log.log({"loss": 1.0}, 1)
    log.file.write_text(log.file.read_text()[:-7])
    again = RunLog(log.file)
    again.begin("test", update=1, resumed=True)
    again.log({"loss": 2.0}, 2)
    history = read(log.file)
    assert history.curves() == {"loss": [(2, 2.0)]}
    assert history.torn == 1


def test_pandas_and_people_can_read_it(logged):
    for line in lines_of(logged[0]):
        assert list(line)[:2] == ["time", "update"]
        assert isinstance(line["update"], int)


@pytest.mark.parametrize("name", ["path", "path.log.jsonl", ""])
def test_a_run_is_named_by_its_log_its_path_or_a_folder(logged, name):
    file, _ = logged
    assert find(file.parent / name) == [file]


def test_a_path_whose_log_has_another_name_is_found_by_what_the_logs_beside_it_say(tmp_path):
    for name in ("path", "other"):
        run = Run()
        with disback.attach(**run.roles(), path=tmp_path / name, **OPTIONS, log=tmp_path / f"on {name}.log.jsonl"):
            run.step()
    RunLog(tmp_path / "plain.log.jsonl").begin("plain")
    (tmp_path / "damaged.log.jsonl").write_text("[1]")
    assert find(tmp_path / "path") == [tmp_path / "on path.log.jsonl"]
    with pytest.raises(PathError, match="no log of a run"):
        find(tmp_path / "pa")


@pytest.mark.parametrize("text", [None, "", "not json\n", '{"loss": 1}\n', '{"update": -1}\n', "[1]\n"])
def test_what_is_no_log_is_refused(text, tmp_path):
    file = tmp_path / "x.log.jsonl"
    if text is None:
        with pytest.raises(PathError, match="no log of a run"):
            find(file)
    else:
        file.write_text(text)
    with pytest.raises(PathError):
        read(file)


def test_only_the_first_rank_writes(tmp_path, monkeypatch):
    run = Run()
    with monkeypatch.context() as patch:
        patch.setattr("disback_plugin.distributed.is_main_process", lambda: False)
        with disback.attach(**run.roles(), path=tmp_path / "path", **OPTIONS) as handle:
            run.steps(12)
            handle.log({"loss": 1.0})
    assert [file.name for file in tmp_path.iterdir()] == ["path"]


# A process: how it begins, how far it then gets, and which of the updates so far it leaves a checkpoint of.
PROCESSES = st.lists(
    st.tuples(st.sampled_from(["anew", "loaded", "given"]), st.integers(0, 12), st.floats(0, 1)), min_size=1, max_size=6
)


@settings(deadline=None, max_examples=60)
@given(PROCESSES)
def test_whatever_is_killed_and_resumed_reads_as_one_run(processes):
    """Each process logs its number; the history has one number an update, the last process's that came there."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "x.log.jsonl"
        checkpoint, counts = None, {}
        for number, (kind, steps, part) in enumerate(processes):
            log = RunLog(file)
            resumed = kind != "anew" and checkpoint is not None
            update = checkpoint if resumed else 0
            given_state = resumed and kind == "given"
            log.begin("attach", update=update if given_state else 0, resumed=given_state, path="the same")
            if resumed and kind == "loaded":
                log.log({"by": -1}, 0)  # attached before the state is loaded: it stands at the start for a moment
                log.resume(update=update)
            counts = {at: by for at, by in counts.items() if at <= update} if resumed else {}
            for at in range(update if not resumed else update + 1, update + steps + 1):
                log.log({"by": number}, at)
                counts[at] = number
            reached = max(counts, default=0)
            checkpoint = round(part * reached)
        curve = read(file).curves().get("by", [])
    assert [at for at, _ in curve] == sorted({at for at, _ in curve})
    assert dict(curve) == counts


@settings(deadline=None, max_examples=60)
@given(st.lists(st.dictionaries(st.sampled_from(["update", "recording", "begin", "resume", "resumed", "path", "x"]),
                                st.integers(0, 9)), max_size=12))  # fmt: skip
def test_any_lines_at_all_read_as_a_history_whose_updates_only_grow(lines):
    history = last_run([{"update": 0} | line for line in lines])
    for recording in (False, True):
        for curve in history.curves(recording=recording).values():
            assert [at for at, _ in curve] == sorted({at for at, _ in curve})


def on_each_rank(folder):
    run = Sharded("fsdp2")
    with disback.attach(**run.roles(), path=f"{folder}/path", **OPTIONS) as handle:
        for _ in range(14):
            run.step()
            handle.log({"loss": torch.tensor(1.0)})
        return handle.generator_updates


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
