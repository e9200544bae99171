"""A step that holds the generator still uses nothing up, and a step that only initialises a state is not held."""

from __future__ import annotations

import logging

import pytest
import torch
from worlds import Run, clone, difference

import disback_plugin as disback


class Counting(torch.optim.Optimizer):
    """SGD that counts every step, with gradients or without, wherever optimizers count."""

    def __init__(self, params, where):
        super().__init__(params, {"lr": 0.01, "weight_decay": 0.1, "k": 0, "largest": torch.zeros(())})
        self.where, self.counted = where, 0

    @torch.no_grad()
    def step(self, closure=None):
        self.counted += self.where == "attribute"
        if self.where == "state":
            self.state["step"] = self.state.get("step", 0) + 1
        for group in self.param_groups:
            group["k"] += self.where == "group"
            if self.where == "new entry":
                group["scheduled"] = group["lr"]
            if self.where == "tensor":
                group["largest"] += 1
            for p in group["params"]:
                if self.where == "weights":  # as Muon, which also takes a missing gradient for zeros
                    self.state[p]["momentum"] = torch.zeros_like(p)
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                if p.grad is not None:
                    p.sub_(group["lr"] * p.grad)


@pytest.mark.parametrize("where", ["group", "new entry", "tensor", "state", "attribute", "weights"])
def test_what_an_optimizer_counts_is_the_same_after_held_steps(tmp_path, where):
    run = Run()
    run.optimizer_g = Counting(run.generator.parameters(), where)
    before = clone(run.optimizer_g.state_dict()), clone(dict(run.generator.state_dict()))
    with disback.attach(**run.roles(), path=tmp_path, record=4, every=2):
        run.steps(4)
        after = clone(run.optimizer_g.state_dict()), clone(dict(run.generator.state_dict()))
        assert difference(list(before), list(after)) == []
        assert run.optimizer_g.counted == 0
        run.steps(2)
    counts = {"group": "k", "new entry": "scheduled", "tensor": "largest"}
    if where in counts:
        assert run.optimizer_g.param_groups[0][counts[where]] == (0.01 if where == "new entry" else 2)
    assert where != "attribute" or run.optimizer_g.counted == 2


def test_a_held_step_that_raises_uses_nothing_up_either(tmp_path):
    run = Run()
    run.optimizer_g = Counting(run.generator.parameters(), "group")
    run.optimizer_g.register_step_post_hook(lambda *_: (_ for _ in ()).throw(ArithmeticError("overflow")))
    with disback.attach(**run.roles(), path=tmp_path, record=4, every=2):
        with pytest.raises(ArithmeticError):
            run.step()
        group = run.optimizer_g.state_dict()["param_groups"][0]
        assert (group["lr"], group["k"]) == (0.01, 0)


def test_a_momentum_that_decays_without_gradients_is_named_once(tmp_path, caplog):
    class Decaying(Counting):
        @torch.no_grad()
        def step(self, closure=None):
            for p in self.param_groups[0]["params"]:
                self.state[p].setdefault("momentum", torch.ones_like(p)).mul_(0.9)

    run = Run()
    run.optimizer_g = Decaying(run.generator.parameters(), "")
    run.generator_step()
    with disback.attach(**run.roles(), path=tmp_path, record=4, every=2), caplog.at_level(logging.WARNING):
        run.steps(3)
    assert caplog.text.count("Decaying changes its state in a step without gradients") == 1


def test_a_first_step_of_a_warm_up_from_zero_is_held_like_any_other(tmp_path):
    run = Run()
    warmup = torch.optim.lr_scheduler.LambdaLR(run.optimizer_g, lambda step: step / 10)
    with disback.attach(**run.roles(), path=tmp_path, record=4, every=2) as handle:
        run.fake_step()
        for p in run.generator.parameters():
            p.grad = torch.zeros_like(p)  # as where s_phi is still the teacher
        run.optimizer_g.step()
        assert not run.optimizer_g.state
        warmup.step()
        run.step()
        assert not run.optimizer_g.state
        assert handle.generator_updates == 0
