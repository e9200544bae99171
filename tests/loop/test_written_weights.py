"""Weights of s_phi that are rewritten, or put back by its optimizer, are noticed."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from worlds import Run, weights_of

import disback_plugin as disback
from disback_plugin.errors import StateError


class Masters(torch.optim.Optimizer):
    """Keep float64 copies of the weights, train them, and write them back: apex, Megatron, rCM's FusedAdam."""

    def __init__(self, parameters, where):
        super().__init__(parameters, {"lr": 1e-2})
        self.where, self.inner = where, None

    @torch.no_grad()
    def step(self, closure=None):
        low = [p for group in self.param_groups for p in group["params"]]
        if self.inner is None:
            high = [nn.Parameter(p.detach().double()) for p in low]
            self.inner = torch.optim.Adam(high, lr=1e-2)
            if self.where == "state":
                for p, master in zip(low, high, strict=True):
                    self.state[p] = {"step": 1, "master_param": master, "exp_avg": torch.zeros_like(p)}
            elif self.where == "list":
                self.masters = high
            elif self.where == "hidden":
                self.inner = _Hidden(self.inner)
        high = self.inner.param_groups[0]["params"]
        for master, p in zip(high, low, strict=True):
            master.grad = None if p.grad is None else p.grad.double()
        self.inner.step()
        for master, p in zip(high, low, strict=True):
            p.copy_(master)


class _Hidden:
    """An optimizer that nobody can look into."""

    __slots__ = ("_inner",)

    def __init__(self, inner):
        self._inner = inner

    def __getattr__(self, name):
        return getattr(self._inner, name)


@pytest.mark.parametrize("where", ["state", "list", "inner optimizer"])
def test_master_copies_that_an_optimizer_keeps_are_written_with_the_weights(recorded, where):
    run = Run()
    run.optimizer_f = Masters(run.fake_score.parameters(), where)
    for _ in range(30):
        run.fake_step()
    with disback.attach(**run.roles(), path=recorded, schedule="fixed:3") as handle:
        written = weights_of(run.fake_score)
        run.fake_step()
        moved = [
            (weights_of(run.fake_score)[name] - value).abs().max()
            for name, value in written.items()
            if value.is_floating_point() and "running" not in name
        ]
        assert max(moved) < 0.011  # one step of Adam
        assert all(not state["exp_avg"].any() for state in run.optimizer_f.state.values() if "exp_avg" in state)
        assert handle.phase == "backtracking"


def test_master_copies_that_cannot_be_found_are_refused_at_the_second_step(recorded):
    run = Run()
    run.optimizer_f = Masters(run.fake_score.parameters(), "hidden")
    for _ in range(60):
        run.fake_step()
    with disback.attach(**run.roles(), path=recorded, schedule="fixed:3"):
        run.fake_step()
        with pytest.raises(StateError, match="its optimizer has put back"):
            run.fake_step()


@pytest.mark.parametrize("change", ["checkpoint", "average"])
def test_a_fake_score_that_is_changed_after_the_write_is_warned_of_once(recorded, change, caplog):
    run, other = Run(), Run(seed=3)
    with disback.attach(**run.roles(), path=recorded, schedule="fixed:9"):
        for _ in range(5):
            if change == "checkpoint":
                run.fake_score.load_state_dict(other.fake_score.state_dict())
            else:  # IDA: s_phi <- 0.97 s_phi + 0.03 G
                with torch.no_grad():
                    for own, its in zip(run.fake_score.parameters(), other.fake_score.parameters(), strict=True):
                        own.lerp_(its, 0.03)
            run.step()
    assert sum("was changed between two steps" in record.message for record in caplog.records) == 1
