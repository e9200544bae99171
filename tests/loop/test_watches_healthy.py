"""The watches and hooks leave a healthy run alone, and nothing behind."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn
from worlds import Run, clone, difference

import disback_plugin as disback

PLAN = {"record": 4, "every": 2, "schedule": "fixed:3"}


class Normalised(nn.Linear):
    """A layer that normalises its own weights in each training forward, as EDM2's."""

    def forward(self, x):
        if self.training:
            with torch.no_grad():
                self.weight.copy_(nn.functional.normalize(self.weight, dim=1))
        return super().forward(x)


def test_a_generator_that_normalises_its_weights_under_accumulation_raises_no_alarm(tmp_path):
    run = Run()
    run.generator = nn.Sequential(Normalised(2, 8), nn.Tanh(), Normalised(8, 2))
    run.optimizer_g = torch.optim.Adam(run.generator.parameters(), lr=1e-2)
    with disback.attach(**run.roles(), path=tmp_path, **PLAN) as handle:
        for _ in range(10):
            run.fake_step()
            run.optimizer_g.zero_grad()
            for _ in range(6):
                run.generator_loss().backward()
            run.optimizer_g.step()
        assert handle.phase == "done"


def test_one_optimizer_whose_groups_share_a_tensor_learning_rate_holds_the_generator_still_alone(tmp_path):
    run = Run()
    rate = torch.tensor(0.01)
    groups = [{"params": [*net.parameters()]} for net in (run.generator, run.fake_score)]
    both = torch.optim.Adam(groups, lr=rate)
    run.optimizer_g = run.optimizer_f = both
    still, moves = clone(dict(run.generator.state_dict())), clone(dict(run.fake_score.state_dict()))
    with disback.attach(**run.roles(), path=tmp_path, **PLAN | {"schedule": "warm"}) as handle:
        run.fake_step()
        assert (handle.phase, handle.fake_score_updates) == ("recording", 1)
        assert difference(dict(run.generator.state_dict()), still) == []
        assert difference(dict(run.fake_score.state_dict()), moves) != []
    assert [group["lr"].item() for group in both.param_groups] == pytest.approx([0.01, 0.01])


def test_replaced_optimizers_are_freed(tmp_path):
    run = Run()
    with disback.attach(**run.roles(), path=tmp_path, **PLAN):
        run.steps(2)
        old = [weakref.ref(optimizer) for optimizer in (run.optimizer_g, run.optimizer_f)]
        run.optimizer_g, run.optimizer_f = (torch.optim.Adam(n.parameters()) for n in (run.generator, run.fake_score))
        run.step()
        gc.collect()
        assert [reference() for reference in old] == [None, None]


def test_an_optimizer_made_after_a_step_that_raised_is_followed(tmp_path):
    class Fails(torch.optim.Adam):
        def step(self, closure=None):
            raise RuntimeError("out of memory")

    run = Run()
    run.optimizer_f = Fails(run.fake_score.parameters())
    with disback.attach(**run.roles(), path=tmp_path, **PLAN) as handle:
        with pytest.raises(RuntimeError, match="out of memory"):
            run.fake_step()
        run.optimizer_f = torch.optim.Adam(run.fake_score.parameters())
        run.steps(3)
        assert handle.fake_score_updates == 3


class Ramp:
    """An object to be restored that cannot be loaded."""

    def state_dict(self):
        return {"step": 1}

    def load_state_dict(self, state):
        raise RuntimeError("no")


def test_detach_does_the_rest_although_a_part_of_it_raises(tmp_path):
    run = Run()
    handle = disback.attach(**run.roles(), path=tmp_path, **PLAN, restore=("schedulers", Ramp()))
    run.step()
    with pytest.raises(RuntimeError, match="no"):
        handle.detach()
    assert not any(optimizer._optimizer_step_pre_hooks for optimizer in (run.optimizer_g, run.optimizer_f))
    disback.attach(**run.roles(), path=tmp_path, **PLAN).detach()  # no lock is left


def test_attach_that_fails_at_its_end_leaves_nothing(tmp_path, monkeypatch):
    run = Run()

    def fails(self):
        raise OSError("late")

    with monkeypatch.context() as patched:
        patched.setattr("disback_plugin.session.Session.install", fails)
        with pytest.raises(OSError, match="late"):
            disback.attach(**run.roles(), path=tmp_path, **PLAN)
    disback.attach(**run.roles(), path=tmp_path, **PLAN).detach()


@pytest.mark.slow
@pytest.mark.parametrize("compiled_first", [True, False])
def test_a_compiled_region_around_the_teacher_is_neither_broken_nor_warned_of(tmp_path, compiled_first, caplog):
    run = Run()
    plain, _ = run.teacher, torch.compiler.reset()
    run.teacher.forward_once = torch.compile(lambda *args: plain(*args), fullgraph=True, backend="eager")

    def loss():
        x = run.generator(run.randn(16, 2))
        eps, sigma = run.randn(16, 2), run.randn(16, 1).exp()
        with torch.no_grad():
            x_t = x.detach() + sigma * eps
            difference = run.teacher.forward_once(x_t, sigma) - run.fake_score(x_t, sigma)
        return (difference * x).mean()

    run.generator_loss = loss
    if compiled_first:
        loss()
    with disback.attach(**run.roles(), path=tmp_path, **PLAN) as handle:
        run.steps(9)
        assert handle.phase == "done"
    assert not any("no forward of it" in record.message for record in caplog.records)
