"""A run that goes wrong while the teacher walks: seen from s_phi's gradients, told once, and let go of."""

from __future__ import annotations

import copy
import json
import logging
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from ranks import returned
from torch import nn
from worlds import Run, clone, difference

import disback_plugin as disback
from disback_plugin.convergence import GROWTH, DivergenceMonitor
from disback_plugin.errors import StateError
from disback_plugin.weights.network import ScoreNetwork


def monitor_of(gradients, horizon=60):
    """A monitor that has seen these gradients, each two numbers, and was asked whenever it could be."""
    net = nn.Linear(2, 1, bias=False)
    monitor = DivergenceMonitor(ScoreNetwork(net), horizon)
    for gradient in gradients:
        net.weight.grad = torch.tensor([gradient])
        monitor.observe()
        monitor.new_signs()
    return monitor


def turning(sizes):
    """Gradients of these sizes, each against the one before."""
    return [[size * (-1) ** i, size * (-1) ** i] for i, size in enumerate(sizes)]


@given(st.lists(st.floats(0.2, 5.0), max_size=60))
def test_gradients_that_turn_and_keep_their_size_are_no_sign(sizes):
    monitor = monitor_of(turning(sizes))
    assert [monitor.stalled, monitor.diverged] == [False] * 2


@given(st.integers(10, 60))
def test_gradients_that_agree_for_two_windows_are_a_stall(count):
    monitor = monitor_of([[1.0, 1.0]] * count)
    assert (monitor.stalled, monitor.diverged) == (True, False)


@pytest.mark.parametrize("worse", [math.nan, math.inf, 1.1 * GROWTH])
def test_gradients_that_grow_or_are_not_finite_are_a_divergence(worse):
    assert monitor_of(turning([1.0] * 5 + [worse] * 5)).diverged
    assert not monitor_of(turning([1.0] * 5 + [worse] * 4)).diverged  # the window is not over


def test_a_divergence_is_not_taken_back():
    assert monitor_of(turning([1.0] * 5 + [math.nan] * 5 + [1.0] * 20)).diverged


def test_of_a_long_walk_only_the_last_updates_of_a_window_are_looked_at():
    quiet = turning([1.0] * 5)
    assert monitor_of([*quiet, *turning([1e9] * 44 + [1.0] * 6)], horizon=20_000).diverged is False
    assert monitor_of([*quiet, *turning([1.0] * 44 + [1e9] * 6)], horizon=20_000).diverged is True


@pytest.mark.parametrize("stop", [0, 1, 4, 5, 7, 12])
def test_a_monitor_goes_on_from_its_text(stop):
    stream = torch.Generator().manual_seed(0)
    gradients = (torch.randn(20, 2, generator=stream) + 1).tolist()
    first = monitor_of(gradients[:stop])
    net = nn.Linear(2, 1, bias=False)
    second = DivergenceMonitor(ScoreNetwork(net), 60)
    second.load_text(json.loads(json.dumps(first.to_text())))
    for gradient in gradients[stop:]:
        net.weight.grad = torch.tensor([gradient])
        second.observe()
        second.new_signs()
    assert second.to_text() == monitor_of(gradients).to_text()


# -- attached ---------------------------------------------------------------------------------------------------------


class DataRun(Run):
    """The fake score predicts x_0: its loss grows without bound as the student runs away."""

    def fake_step(self):
        x_0 = self.generator(self.randn(16, 2)).detach()
        sigma = self.randn(16, 1).exp()
        self.optimizer_f.zero_grad()
        (self.fake_score(x_0 + sigma * self.randn(16, 2), sigma) - x_0).square().mean().backward()
        self.optimizer_f.step()


def attached(run, folder, **options):
    return disback.attach(**run.roles(), path=folder, **({"record": 60, "every": 20} | options))


def to_the_walk(run, handle):
    while handle.phase == "recording":
        run.step()


class Log:
    def __init__(self):
        self.seen = []

    @disback.hookimpl
    def disback_log(self, values, step):
        self.seen += [(name, step) for name in values if name in ("disback/stalled", "disback/diverged")]


def explode(run):
    """From now on each step throws the student far away."""
    for group in run.optimizer_g.param_groups:
        group["lr"] = 100.0


def test_a_run_that_diverges_is_told_once_and_let_go_of(tmp_path, caplog):
    run, log = DataRun(seed=1), Log()
    before = clone(dict(run.teacher.state_dict()))
    with attached(run, tmp_path, plugins=(log,)) as handle:
        to_the_walk(run, handle)
        run.steps(5)
        assert handle.position > 0
        explode(run)
        run.steps(20)
        assert (handle.phase, handle.position) == ("done", 0.0)
        assert handle.scheduler.gradient_factor == 1.0
        assert handle.generator_updates < handle.scheduler.horizon
        assert f"generator update {log.seen[0][1]}  teacher at position 0: itself" in repr(handle)
        assert difference(dict(run.teacher.state_dict()), before) == []
    assert [name for name, _ in log.seen] == ["disback/diverged"]
    (line,) = [message for message in caplog.messages if "thirtyfold" in message]
    assert "lower the generator's learning rate; the teacher is back at itself for good" in line


def test_a_schedule_that_was_asked_for_is_warned_of_but_kept(tmp_path, caplog):
    run = DataRun(seed=1)
    with attached(run, tmp_path, schedule="fixed:15", record=40) as handle:
        to_the_walk(run, handle)
        run.steps(5)
        explode(run)
        run.steps(5)
        assert handle.position == 1.0
    (line,) = [message for message in caplog.messages if "thirtyfold" in message]
    assert line.endswith("lower the generator's learning rate")


def test_a_fake_score_that_does_not_follow_is_told_of(tmp_path, caplog):
    run = Run(seed=1)
    with attached(run, tmp_path, schedule="ramp:60", record=5, every=5) as handle:
        to_the_walk(run, handle)
        for _ in range(20):
            for weight in run.fake_score.parameters():
                weight.grad = torch.ones_like(weight)
            run.optimizer_f.step()
            run.generator_step()
    assert [message for message in caplog.messages if "does not follow the student" in message]


def test_a_sound_run_is_not_warned_of(tmp_path, caplog):
    for schedule in ("auto", "ramp:60"):
        run = Run(seed=1)
        with attached(run, tmp_path / schedule.replace(":", ""), schedule=schedule) as handle:
            run.steps(120)
            assert handle.phase == "done"
    assert [record for record in caplog.records if record.levelname == "WARNING"] == []


@pytest.mark.parametrize("stop", [1, 4, 6, 9, 14])
def test_a_walk_that_was_stopped_anywhere_ends_as_one_that_was_not(tmp_path, stop):
    whole = DataRun(seed=1)
    with attached(whole, tmp_path / "path") as handle:
        to_the_walk(whole, handle)
        kept = copy.deepcopy((whole.checkpoint(), handle.state_dict()))
        whole.steps(5)
        explode(whole)
        whole.steps(11)
        ended = handle.state_dict()
    run = DataRun(seed=1)
    run.load(kept[0])
    with attached(run, tmp_path / "path", state=kept[1]) as handle:
        for step in range(16):
            if step == 5:
                explode(run)
            if step == stop:
                checkpoint, state = copy.deepcopy((run.checkpoint(), handle.state_dict()))
                break
            run.step()
    again = DataRun(seed=1)
    again.load(checkpoint)
    with attached(again, tmp_path / "path", state=json.loads(json.dumps(state))) as handle:
        for step in range(stop, 16):
            if step == 5:
                explode(again)
            again.step()
        assert handle.state_dict() == ended
    assert difference(again.checkpoint(), whole.checkpoint()) == []


@pytest.mark.parametrize("text", ["", "x", "AAAA", "AACAPwAAAEAAAKBB", "/////w==", "AADAfw=="])
def test_a_damaged_text_in_the_state_of_a_recording_changes_nothing(tmp_path, text):
    run = Run(seed=1)
    with attached(run, tmp_path) as handle:
        run.steps(7)
        state = handle.state_dict()
        with pytest.raises(StateError, match=r"a saved fit .*; to mend it, pass an unedited state"):
            handle.load_state_dict(state | {"fit": text})
        assert handle.state_dict() == state


@pytest.mark.parametrize("text", ["x", "AAAA", "AACAPwAAAEAAAKBB"])
def test_a_damaged_text_in_the_state_of_a_walk_changes_nothing(tmp_path, text):
    run = Run(seed=1)
    with attached(run, tmp_path) as handle:
        to_the_walk(run, handle)
        run.steps(3)
        state = handle.state_dict()
        with pytest.raises(StateError, match="to mend it, pass an unedited state"):
            handle.load_state_dict(state | {"fit": text})
        assert handle.state_dict() == state


def loud(form, folder, who):
    """Some ranks' parts of the gradients grow in the walk; returns when this rank let go, and how often it said so."""
    from test_sharding import Sharded
    from torch import distributed as dist

    run, warned = Sharded(form), []
    handler = logging.Handler()
    handler.emit = lambda record: warned.append(record.getMessage()) if record.levelname == "WARNING" else None
    logging.getLogger("disback_plugin").addHandler(handler)
    original = ScoreNetwork(run.teacher).fingerprint()
    with disback.attach(**run.roles(), path=folder, record=4, every=4) as handle:
        growth = [1.0]
        run.optimizer_f.register_step_pre_hook(
            lambda *_: [p.grad.mul_(growth[0]) for p in run.fake_score.parameters() if p.grad is not None] and None
        )
        for step in range(16):
            growth[0] = 1e4 if step >= 9 and dist.get_rank() in who else 1.0
            run.step()
            if handle.phase == "done":
                break
        ended = [step, handle.phase, handle.position, ScoreNetwork(run.teacher).fingerprint() == original]
        return {"ended": ended, "warned": len([w for w in warned if "thirtyfold" in w])}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("form", "who"), [("fsdp2", [0, 1]), ("fsdp2", [0]), ("fsdp2", [1]), ("ddp", [0, 1])])
def test_all_ranks_let_go_at_the_same_update_as_rank_0_sees_it(nursery, tmp_path, form, who):
    first, second = returned(nursery.play(loud, 2, form, str(tmp_path / "path"), who))
    assert first["ended"] == second["ended"]
    if 0 in who:
        assert first["ended"][1:] == ["done", 0.0, True]
        assert first["ended"][0] < 15
    assert [first["warned"], second["warned"]] == ([1, 0] if 0 in who else [0, 0])
