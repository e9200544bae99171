"""The generator's effective step in the log, against a computation of its own over all weights in float64."""

from __future__ import annotations

import logging

import pytest
import torch
from worlds import Run

import disback_plugin as disback
from disback_plugin import schedules
from disback_plugin.loop.optimizer_hooks import UpdateCounter
from disback_plugin.plugins.log_reader import read
from disback_plugin.session_measures import EffectiveStep, is_due


class Spied(Run):
    """Keeps, for each round, the mean square of the generator's step over the rate of each weight."""

    def __init__(self, build):
        super().__init__()
        inner, outer = [*self.generator[0].parameters()], [*self.generator[2].parameters()]
        self.optimizers, self.scheduler, self.seen = build(inner, outer), None, []

    def roles(self):
        return super().roles() | {"generator_optimizer": self.optimizers}

    def generator_step(self):
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        self.generator_loss().backward()
        groups = [group for optimizer in self.optimizers for group in optimizer.param_groups]
        before = [[p.detach().double() for p in group["params"]] for group in groups]
        for optimizer in self.optimizers:
            optimizer.step()
        rates = [float(group["lr"]) for group in groups]  # those of the step: the first may have restored them
        if self.scheduler is not None:
            self.scheduler.step()
        steps = [
            (p.detach().double() - old).flatten() / rate
            for group, weights, rate in zip(groups, before, rates, strict=True)
            for p, old in zip(group["params"], weights, strict=True)
        ]
        self.seen.append(torch.cat(steps).square().mean().item())


ADAM, SGD = torch.optim.Adam, torch.optim.SGD
BUILDS = {
    "Adam": lambda a, b: [ADAM(a + b, lr=1e-2)],
    "two rates": lambda a, b: [ADAM([{"params": a, "lr": 1e-3}, {"params": b, "lr": 3e-2}])],
    "rates in tensors": lambda a, b: [ADAM([{"params": p, "lr": torch.tensor(r)} for p, r in ((a, 0.1), (b, 0.02))])],
    "two optimizers": lambda a, b: [ADAM(a, lr=1e-2), SGD(b, lr=1e-3, momentum=0.9)],
}


@pytest.mark.parametrize("build", BUILDS.values(), ids=[*BUILDS])
@pytest.mark.parametrize("options", [{"record": 0, "path": None}, {"record": 4, "every": 2, "schedule": "ramp:6"}])
def test_each_value_is_the_root_mean_square_of_five_steps_over_the_learning_rate(tmp_path, build, options):
    run, log = Spied(build), tmp_path / "run.log.jsonl"
    run.scheduler = torch.optim.lr_scheduler.ExponentialLR(run.optimizers[0], 0.99)
    with disback.attach(**run.roles(), **{"path": tmp_path / "path"} | options, log=log) as handle:
        while handle.generator_updates < 130:
            run.step()
    found = dict(read(log).curves()["effective_step"])
    assert [*found] == [*range(5, 101, 5), 110, 120, 130]
    updates = run.seen[-130:]
    expected = {update: (sum(updates[update - 5 : update]) / 5) ** 0.5 for update in found}
    assert found == pytest.approx(expected, rel=2e-3)


def test_a_settled_adams_is_at_most_one_and_grows_where_its_moments_saw_small_gradients():
    weight, stream = torch.zeros(2_000, requires_grad=True), torch.Generator().manual_seed(0)
    adam = torch.optim.Adam([weight], lr=1e-3, betas=(0.0, 0.999))
    step = EffectiveStep(UpdateCounter("generator", [adam], lambda *_: None))
    found = {0: step.observe(0)}
    for update in range(1, 1201):
        weight.grad = torch.randn(2_000, generator=stream) * (0.1 if update < 1000 else 1.0)
        adam.step()
        found[update] = step.observe(update)
    assert [update for update, value in found.items() if value is not None] == [u for u in range(1201) if is_due(u)]
    assert found[900] == pytest.approx(1.0, abs=0.05)
    assert found[1000] > 1.5
    assert found[1100] > found[1200] > 1.5


def test_of_many_weights_a_sample_is_enough_and_a_rate_of_zero_says_nothing():
    weights = [torch.zeros(n, requires_grad=True) for n in (50_000, 7, 300_000)]
    sgd = torch.optim.SGD([{"params": weights[:2], "lr": 0.0}, {"params": weights[2:], "lr": 0.5}], lr=1.0)
    step, stream = EffectiveStep(UpdateCounter("generator", [sgd], lambda *_: None)), torch.Generator().manual_seed(0)
    for update in range(6):
        if update:
            for weight in weights:
                weight.grad = 3 * torch.randn(weight.shape, generator=stream)
            sgd.step()
        value = step.observe(update)
    assert value == pytest.approx(3.0, rel=0.03)
    for group in sgd.param_groups:
        group["lr"] = 0.0
    values = []
    for update in range(6, 11):
        sgd.step()
        values.append(step.observe(update))
    assert values == [None] * 5


def test_nothing_is_measured_where_nobody_reads_it(tmp_path, monkeypatch):
    monkeypatch.setattr(EffectiveStep, "observe", lambda *_: pytest.fail("measured"))
    run = Run()
    with disback.attach(**run.roles(), record=0):
        run.steps(3)
    with disback.attach(**run.roles(), path=tmp_path / "p", record=2, every=1, plugins=("no:run_log",)):
        run.steps(6)


@pytest.mark.parametrize(("schedule", "said"), [("auto", 1), (schedules.Auto(4), 1), ("ramp:4", 0), ("warm", 0)])
def test_the_default_says_once_how_it_changes_the_effective_step(tmp_path, caplog, schedule, said):
    run = Run()
    with (
        caplog.at_level(logging.INFO),
        disback.attach(**run.roles(), path=tmp_path, record=12, schedule=schedule) as it,
    ):
        run.steps(30)
        assert it.phase != "recording"
        horizon = it.scheduler.plan.horizon
    lines = [record.getMessage() for record in caplog.records if "effective_step" in record.getMessage()]
    assert len(lines) == said
    assert all(f"the first {horizon} updates" in line for line in lines)
