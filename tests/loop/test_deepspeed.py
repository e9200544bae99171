"""DeepSpeed's ZeRO-1 and ZeRO-2, by a stand-in: the optimizer steps flat float32 partitions, and copies them back.

`deepspeed/runtime/zero/stage_1_and_2.py` of 0.19.8: `_optimizer_step` (:2967) steps one group at a time, `step` (:3013)
then copies the partition into the weights, which `link_hp_params` (:841) has marked.
"""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch
from torch import nn
from worlds import Run, clone, difference

import disback_plugin as disback
from disback_plugin.errors import RoleError


class ZeroOptimizer:
    def __init__(self, optimizer):
        self.optimizer, self.weights = optimizer, [group["params"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            flat = torch.cat([p.detach().float().reshape(-1) for p in group["params"]])
            for p in group["params"]:
                p._hp_mapping = flat
            group["params"] = [flat.requires_grad_()]

    @property
    def param_groups(self):
        return self.optimizer.param_groups

    def zero_grad(self):
        for p in (p for weights in self.weights for p in weights):
            p.grad = None

    def step(self):
        groups = self.optimizer.param_groups
        for group, weights in zip(groups, self.weights, strict=True):
            (flat,) = group["params"]
            flat.grad = torch.cat([p.grad.float().reshape(-1) for p in weights])
            self.optimizer.param_groups = [group]
            self.optimizer.step()
            self.optimizer.param_groups, flat.grad, at = groups, None, 0
            for p in weights:
                p.data.copy_(flat[at : at + p.numel()].view(p.shape))
                at += p.numel()


class Engine(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module = module

    def forward(self, *args):
        return self.module(*args)


class Wrapper(torch.optim.Optimizer):
    """accelerate's: a torch optimizer by class, whose `step` does nothing because the engine steps."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    param_groups = property(lambda self: self.optimizer.param_groups)
    state = property(lambda self: self.optimizer.optimizer.state)

    def step(self, closure=None): ...


ZeroOptimizer.__module__ = "deepspeed.runtime.zero.stage_1_and_2"
Engine.__module__, Engine.__name__ = "deepspeed.runtime.engine", "DeepSpeedEngine"
Wrapper.__module__ = "accelerate.utils.deepspeed"


@pytest.mark.parametrize("form", ["plain", "bare", "accelerate"])
def test_a_student_under_zero_is_held_still_and_counted_as_another(form, tmp_path):
    run = Run()
    if form != "plain":
        run.optimizer_g = ZeroOptimizer(run.optimizer_g)
    given = Wrapper(run.optimizer_g) if form == "accelerate" else run.optimizer_g
    before = clone(dict(run.generator.state_dict()))
    with disback.attach(
        **run.roles() | {"generator_optimizer": given}, path=tmp_path, record=4, every=2, schedule="fixed:3"
    ) as handle:
        for updates in (0, 0, 0, 0, 1, 2, 3):
            run.step()
            assert handle.generator_updates == updates
            assert (difference(dict(run.generator.state_dict()), before) == []) is (updates == 0)
        assert handle.phase == "done"


def test_several_groups_of_a_student_under_zero_are_refused(tmp_path):
    run = Run()
    first, *rest = run.generator.parameters()
    zero = ZeroOptimizer(torch.optim.Adam([{"params": [first]}, {"params": rest}]))
    for given in (zero, Wrapper(zero)):
        with pytest.raises(RoleError, match=r"DeepSpeed \(ZeRO\) with 2 parameter groups as generator_optimizer"):
            disback.attach(**run.roles() | {"generator_optimizer": given}, path=tmp_path)


@pytest.mark.parametrize("form", ["engine", "module", "inner", "accelerate"])
def test_a_fake_score_under_zero_is_refused_with_the_way_out(form, tmp_path):
    run = Run()
    run.optimizer_f = ZeroOptimizer(run.optimizer_f)
    roles = run.roles()
    if form == "inner":
        roles["fake_score_optimizer"] = run.optimizer_f.optimizer
    if form == "accelerate":
        roles["fake_score_optimizer"] = Wrapper(run.optimizer_f)
    if form in ("engine", "accelerate"):
        roles["fake_score"] = Engine(run.fake_score)
    with pytest.raises(RoleError, match=r"fake score is trained by DeepSpeed \(ZeRO-1, ZeRO-2\).*fully_shard"):
        disback.attach(**roles, path=tmp_path / "path")
    assert not (tmp_path / "path").exists()


def test_a_fake_score_in_half_precision_without_zero_is_refused_with_the_way_out(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", ModuleType("deepspeed"))
    run = Run()  # as DeepSpeed's stage 0 in bf16: the optimizer steps float32 copies, and nothing marks the weights
    run.optimizer_f = torch.optim.Adam([p.detach().clone().requires_grad_() for p in run.fake_score.parameters()])
    with pytest.raises(RoleError, match=r"steps nothing of the fake score.*DeepSpeed in half precision.*fully_shard"):
        disback.attach(**run.roles() | {"fake_score": Engine(run.fake_score)}, path=tmp_path / "path")


def test_an_engine_without_zero_is_seen_through(tmp_path):
    run = Run()
    with disback.attach(**run.roles() | {"fake_score": Engine(run.fake_score)}, path=tmp_path, record=2, every=1):
        run.steps(3)
