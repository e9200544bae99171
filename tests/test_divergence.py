"""A run whose fake score stalls or diverges while the teacher moves back."""

from __future__ import annotations

import copy
import json
import logging

import pytest
import torch
from ranks import returned
from worlds import Run, clone, difference

import disback_plugin as disback
from disback_plugin.errors import StateError
from disback_plugin.weights.network import ScoreNetwork


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


def record_all(run, handle):
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


def test_a_divergence_is_logged_once_and_ends_backtracking(tmp_path, caplog):
    run, log = DataRun(seed=1), Log()
    before = clone(dict(run.teacher.state_dict()))
    with attached(run, tmp_path, plugins=(log,)) as handle:
        record_all(run, handle)
        run.steps(5)
        assert handle.position > 0
        explode(run)
        run.steps(10)
        assert (handle.phase, handle.position) == ("done", 0.0)
        assert handle.generator_updates < handle.scheduler.plan.horizon
        assert f"generator update {log.seen[0][1]}  teacher at position 0" in repr(handle)
        assert difference(dict(run.teacher.state_dict()), before) == []
    assert [name for name, _ in log.seen] == ["disback/diverged"]
    (line,) = [message for message in caplog.messages if "thirtyfold" in message]
    assert "lower the generator's learning rate; the teacher is s'_0 for good" in line


def test_a_schedule_without_until_fitted_only_warns_of_a_divergence(tmp_path, caplog):
    run = DataRun(seed=1)
    with attached(run, tmp_path, schedule="fixed:15", record=40) as handle:
        record_all(run, handle)
        run.steps(5)
        explode(run)
        run.steps(5)
        assert handle.position == 1.0
    (line,) = [message for message in caplog.messages if "thirtyfold" in message]
    assert line.endswith("lower the generator's learning rate")


def test_a_fake_score_that_does_not_follow_is_warned_of(tmp_path, caplog):
    run = Run(seed=1)
    with attached(run, tmp_path, schedule="ramp:60", record=5, every=5) as handle:
        record_all(run, handle)
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


@pytest.mark.parametrize("stop", [1, 6, 9, 14])
def test_a_diverging_run_that_resumes_anywhere_ends_as_the_uninterrupted_one(tmp_path, stop):
    whole = DataRun(seed=1)
    with attached(whole, tmp_path / "path") as handle:
        record_all(whole, handle)
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


@pytest.mark.parametrize("phase", ["recording", "backtracking"])
def test_a_damaged_text_in_a_state_changes_nothing(tmp_path, phase):
    run = Run(seed=1)
    with attached(run, tmp_path) as handle:
        run.steps(7)
        if phase == "backtracking":
            record_all(run, handle)
            run.steps(3)
        assert handle.phase == phase
        state = handle.state_dict()
        with pytest.raises(StateError, match="to mend it, pass an unedited state"):
            handle.load_state_dict(state | {"fit": "AAAA"})
        assert handle.state_dict() == state


def loud(form, folder, who):
    """Grow some ranks' parts of the gradients; return when this rank ended backtracking, and how often it warned."""
    from sharded_runs import Sharded
    from torch import distributed as dist

    run, warned = Sharded(form), []
    handler = logging.Handler()
    handler.emit = lambda record: warned.append(record.getMessage()) if record.levelname == "WARNING" else None
    logging.getLogger("disback_plugin").addHandler(handler)
    original = ScoreNetwork(run.teacher).fingerprint()
    schedule = disback.schedules.Auto(20)  # which does not end by itself before
    with disback.attach(**run.roles(), path=folder, record=4, every=4, schedule=schedule) as handle:
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
@pytest.mark.parametrize(
    ("form", "who"),
    [
        ("fsdp2", [1]),
        pytest.param("fsdp2", [0], marks=pytest.mark.slow),
        *(pytest.param(form, [0, 1], marks=pytest.mark.slow) for form in ("fsdp2", "ddp")),
    ],
)
def test_all_ranks_end_backtracking_at_the_update_at_which_rank_0_detects_a_divergence(nursery, tmp_path, form, who):
    first, second = returned(nursery.play(loud, 2, form, str(tmp_path / "path"), who))
    assert first["ended"] == second["ended"]
    if 0 in who:
        assert first["ended"][1:] == ["done", 0.0, True]
        assert first["ended"][0] < 15
    assert [first["warned"], second["warned"]] == ([1, 0] if 0 in who else [0, 0])
