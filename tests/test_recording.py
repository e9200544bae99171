"""Recording by `attach` or by `record` with the trainer's own fake-score step."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from worlds import Run, Score, clone, difference

import disback_plugin as disback
from disback_plugin.errors import MismatchError, OptionError, PathError, TrainingError
from disback_plugin.path.degradation_path import DegradationPath
from disback_plugin.weights.network import ScoreNetwork


def record_in_loop(run, folder, **options):
    options = {"iterations": 6, "every": 2, "codec": "exact"} | options
    return disback.record(run.teacher, run.fake_score, run.fake_step, path=folder, **options)


def test_the_nodes_are_the_fake_score_at_its_iterations(tmp_path):
    run, twin = Run(), Run()
    path = record_in_loop(run, tmp_path / "path")
    assert [node.iteration for node in path.nodes] == [2, 4, 6]
    assert difference(path[0], ScoreNetwork(run.teacher).state_dict()) == []
    for node in (1, 2, 3):
        twin.fake_step()
        twin.fake_step()
        assert difference(path[node], ScoreNetwork(twin.fake_score).state_dict()) == [], node
    assert difference(path[-1], ScoreNetwork(run.fake_score).state_dict()) == []
    assert path.complete


def test_recording_moves_neither_teacher_nor_generator(tmp_path):
    run = Run()
    before = clone([run.teacher.state_dict(), run.generator.state_dict()])
    record_in_loop(run, tmp_path / "path")
    assert (
        difference([dict(run.teacher.state_dict()), dict(run.generator.state_dict())], [dict(b) for b in before]) == []
    )


def test_a_fake_score_that_is_not_the_teacher_is_set_to_it_first(tmp_path):
    run = Run()
    run.fake_score.load_state_dict(Score().state_dict())
    path, plain = record_in_loop(run, tmp_path / "a"), record_in_loop(Run(), tmp_path / "b")
    assert [node.sha256 for node in path.nodes] == [node.sha256 for node in plain.nodes]


def test_the_last_node_is_the_end_of_the_recording_even_off_the_grid(tmp_path):
    run = Run()
    path = disback.record(run.teacher, run.fake_score, run.fake_step, path=tmp_path, iterations=5, every=2)
    assert [node.iteration for node in path.nodes] == [2, 4, 5]


def test_a_finished_path_is_reused_without_a_step(tmp_path):
    first = record_in_loop(Run(), tmp_path)
    run = Run()

    def fail():
        raise AssertionError("recorded again")

    again = disback.record(run.teacher, run.fake_score, fail, path=tmp_path, iterations=100, every=7)
    assert again.manifest == first.manifest
    assert difference(first[-1], ScoreNetwork(run.fake_score).state_dict()) == []


def test_an_interrupted_recording_resumes_at_its_last_node(tmp_path):
    run = Run()
    calls = []

    def fake_step():
        if len(calls) == 5:
            raise KeyboardInterrupt
        calls.append(None)
        run.fake_step()

    with pytest.raises(KeyboardInterrupt):
        disback.record(run.teacher, run.fake_score, fake_step, path=tmp_path, iterations=6, every=2)
    assert [n.iteration for n in disback.DegradationPath(tmp_path).nodes] == [2, 4]
    rest = Run()
    steps = []
    path = disback.record(
        rest.teacher,
        rest.fake_score,
        lambda: (steps.append(None), rest.fake_step()),
        path=tmp_path,
        iterations=6,
        every=2,
    )
    assert len(steps) == 2
    assert [n.iteration for n in path.nodes] == [2, 4, 6]


def test_an_unfinished_recording_of_another_plan_is_refused(tmp_path):
    run = Run()
    with pytest.raises(ZeroDivisionError):
        disback.record(run.teacher, run.fake_score, lambda: 1 / 0, path=tmp_path, iterations=6, every=2)
    with pytest.raises(PathError, match="unfinished recording of Recording"):
        disback.record(run.teacher, run.fake_score, run.fake_step, path=tmp_path, iterations=8, every=2)


@pytest.mark.parametrize("way", ["attach", "record"])
def test_a_start_that_fails_leaves_no_hook(tmp_path, monkeypatch, way):
    run = Run()

    def broken(*_):
        raise PathError("a disk that is gone", expected="a disk", cure="mount it again")

    monkeypatch.setattr(disback.DegradationPath, "source", broken)
    start = {
        "attach": lambda: disback.attach(**run.roles(), path=tmp_path / "p", record=4, every=2),
        "record": lambda: record_in_loop(run, tmp_path / "p"),
    }[way]
    with pytest.raises(PathError, match="gone"):
        start()
    assert not run.fake_score._forward_pre_hooks
    assert not run.optimizer_f._optimizer_step_post_hooks


def test_a_path_of_another_teacher_is_refused(tmp_path):
    record_in_loop(Run(seed=0), tmp_path)
    run = Run(seed=1)
    before = clone(dict(run.fake_score.state_dict()))
    with pytest.raises(PathError, match="another teacher"):
        record_in_loop(run, tmp_path)
    assert difference(dict(run.fake_score.state_dict()), before) == []


def test_a_fake_step_that_trains_something_else_is_noticed_at_once(tmp_path):
    run, other = Run(), Run()
    with pytest.raises(TrainingError, match="did not write to the fake score"):
        disback.record(run.teacher, run.fake_score, other.fake_step, path=tmp_path, iterations=4, every=2)


@pytest.mark.parametrize(
    "arguments",
    [{}, {"sample": lambda: None}, {"fake_score": Score()}, {"fake_score": Score(), "loss": lambda net, x_0: None}],
)
def test_half_of_a_pair_is_refused_before_anything_is_written(tmp_path, arguments):
    with pytest.raises(OptionError, match="expected fake_score and fake_step, or sample and loss"):
        disback.record(Score(), **arguments, path=tmp_path / "path")
    assert not (tmp_path / "path").exists()


def test_a_fake_score_of_another_architecture_is_refused_with_the_way_out(tmp_path):
    with pytest.raises(MismatchError, match=r"inner\.0\.weight"):
        disback.record(Score(), Score(width=5), lambda: None, path=tmp_path / "path")
    assert not (tmp_path / "path").exists()


@pytest.mark.parametrize(("iterations", "every"), [(0, 1), (5, 0), (-1, 1), (2.5, 1), (True, 1)])
def test_counts_out_of_their_domain_are_refused(tmp_path, iterations, every):
    run = Run()
    with pytest.raises(OptionError, match="two whole numbers >= 1"):
        disback.record(run.teacher, run.fake_score, run.fake_step, path=tmp_path, iterations=iterations, every=every)


def test_a_path_recorded_on_another_student_is_reused_with_a_warning(tmp_path, caplog):
    with disback.attach(**Run(seed=0).roles(), path=tmp_path, record=1, every=1) as handle:
        assert handle.phase == "recording"
    run = Run(seed=0)
    with disback.attach(**run.roles(), path=tmp_path, record=1, every=1):
        run.steps(2)
    with torch.no_grad():
        run.generator[0].bias += 1
    fresh = Run(seed=0)
    with torch.no_grad():
        fresh.generator[0].bias += 1
    with caplog.at_level(logging.WARNING), disback.attach(**fresh.roles(), path=tmp_path, record=1, every=1):
        assert "another initial generator" in caplog.text


def test_a_crash_between_the_last_node_and_its_mark_is_mended(tmp_path, monkeypatch):
    run = Run()
    with monkeypatch.context() as patch:
        patch.setattr(disback.DegradationPath, "finish", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            record_in_loop(run, tmp_path)
    assert not disback.DegradationPath(tmp_path).complete
    again = Run()
    with disback.attach(**again.roles(), path=tmp_path, record=6, every=2, codec="exact", schedule="warm") as handle:
        again.step()
        assert (handle.phase, handle.path.complete) == ("done", True)


def test_a_step_that_a_scaler_skips_is_no_iteration(tmp_path):
    run, calls = Run(), []

    def fake_step():
        calls.append(None)
        if len(calls) in (1, 3, 4):
            run.fake_score(torch.ones(4, 2), torch.ones(4, 1))  # a forward that writes running statistics only
        else:
            run.fake_step()

    path = disback.record(run.teacher, run.fake_score, fake_step, path=tmp_path, iterations=4, every=2)
    assert len(calls) == 7
    assert [node.iteration for node in path.nodes] == [2, 4]


def test_the_teacher_cannot_be_its_own_fake_score(tmp_path):
    run = Run()
    before = clone(dict(run.teacher.state_dict()))
    with pytest.raises(disback.DisbackError, match="share weights"):
        disback.record(run.teacher, run.teacher, run.fake_step, path=tmp_path / "path", iterations=2, every=1)
    assert difference(dict(run.teacher.state_dict()), before) == []


def test_what_record_returns_can_be_passed_as_a_path(tmp_path):
    run = Run()
    path = record_in_loop(run, tmp_path / "path")
    for form in (path, path.folder, str(path.folder)):
        assert disback.TrajectoryScheduler(form, run.teacher).plan.nodes == 3
    with disback.attach(**Run().roles(), path=path, record=6, every=2, schedule="warm") as handle:
        assert handle.phase == "done"


def test_a_crash_in_the_middle_of_a_node_leaves_nothing_foreign(tmp_path):
    run = Run()
    with pytest.raises(ZeroDivisionError):
        disback.record(run.teacher, run.fake_score, lambda: 1 / 0, path=tmp_path, iterations=6, every=2, codec="exact")
    (tmp_path / "node-001.safetensors").write_bytes(b"written, but not yet listed")
    path = record_in_loop(run, tmp_path)
    path.verify()
    assert len(path) == 4


def test_a_fit_that_is_known_is_not_counted_at_another_rate_when_the_recording_goes_on(tmp_path):
    run = Run(seed=1)

    def stopping():
        run.fake_step()
        if (tmp_path / "path" / "config.json").read_text().count('"fitted": null') == 0:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        disback.record(run.teacher, run.fake_score, stopping, path=tmp_path / "path", iterations=200, every=100)
    before = DegradationPath(tmp_path / "path").manifest
    assert before.fitted < 100
    with disback.attach(**Run(seed=1).roles(), path=tmp_path / "path", record=200, every=100) as handle:
        assert handle.path.manifest.updates_to_fit == before.updates_to_fit == before.fitted
    again = Run(seed=1)
    with disback.attach(**again.roles(), path=tmp_path / "path", record=200, every=100) as handle:
        again.steps(10)
        assert handle.path.manifest.updates_to_fit == before.updates_to_fit


def test_a_recording_logs_its_length_its_size_and_the_cost_of_a_node_once(tmp_path, caplog):
    caplog.set_level("INFO", logger="disback_plugin")
    run = Run()
    with disback.attach(**run.roles(), path=tmp_path / "path", record=4, every=2, schedule="warm") as handle:
        run.steps(6)
        size = sum(entry.bytes for entry in handle.path.manifest.entries)
    (message,) = [r.getMessage() for r in caplog.records if r.getMessage().startswith("recorded 4 iterations")]
    assert f"s' was not seen to be fitted; the path has {size} bytes, and a node took " in message
    lines = [json.loads(line) for line in (tmp_path / "path.log.jsonl").read_text().splitlines()]
    (line,) = [line for line in lines if "path_bytes" in line]
    assert (line["recording"], line["path_bytes"], line["node_seconds"] > 0) == (4, size, True)
