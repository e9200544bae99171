"""Measure the cost of plug-ins and the scheduler in a step: none, one, and eight plug-ins with every hook.

Goal: hooks and scheduler together under 25 us for a step that moves no weights, with eight plug-ins. A move decodes a
node, in milliseconds; the cost of its plug-ins is measured apart, against the same limit. All hooks and checks of an
attached loop together: under one percent of a step of the small U-Net loop.
"""

from __future__ import annotations

import copy
import statistics
import time

import pytest
import torch
from torch import nn

import disback_plugin as disback
from disback_plugin.plugins.manager import PluginManager
from disback_plugin.schedules import Fixed

LIMIT = 25e-6  # seconds
STEPS = 2_000
ROUNDS = 15
NAMES = ("generator", "fake_score")


class Listener:
    """A plug-in that implements every hook and returns no answer."""

    @disback.hookimpl
    def disback_after_node_recorded(self, path, node):
        pass

    @disback.hookimpl
    def disback_after_path_completed(self, path):
        pass

    @disback.hookimpl
    def disback_should_advance(self, scheduler, position, updates_in_node, signal):
        return None

    @disback.hookimpl
    def disback_after_node_swapped(self, scheduler, position, previous, update):
        pass

    @disback.hookimpl
    def disback_log(self, values, step):
        pass


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A teacher, a fake score, and their path of nodes 0 to 4."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        teacher, fake, x = nn.Linear(8, 8), nn.Linear(8, 8), torch.randn(4, 8)
    fake.load_state_dict(teacher.state_dict())
    optimizer = torch.optim.Adam(fake.parameters())

    def fake_step():
        optimizer.zero_grad()
        (fake(x) - x).square().mean().backward()
        optimizer.step()

    path = disback.record(teacher, fake, fake_step, path=tmp_path_factory.mktemp("path"), iterations=4, every=1)
    return teacher, path


def on_node_3(recorded, plug_ins):
    """Return a scheduler that stays on node 3 for longer than this benchmark lasts."""
    teacher, path = recorded
    plugins = PluginManager(*(Listener() for _ in range(plug_ins)), autoload=False)
    scheduler = disback.TrajectoryScheduler(path, copy.deepcopy(teacher), schedule=Fixed(10**9), plugins=plugins)
    scheduler.start()
    return scheduler, plugins


def a_step(scheduler, plugins):
    scheduler.step()


def the_calls_of_a_move(scheduler, plugins):
    plugins.call("disback_after_node_swapped", scheduler=scheduler, position=2.0, previous=3.0, update=7)
    if plugins.listens("disback_log"):
        values = {"disback/position": 2.0, "disback/node": 2, "disback/swap_ms": 1.0, "disback/delta_norm": 1.0}
        plugins.call("disback_log", values=values, step=7)


@pytest.mark.parametrize("call", [a_step, the_calls_of_a_move])
def bench_eight_plug_ins_cost_less_than_25_us(benchmark, recorded, call):
    benchmark.group = f"hooks: {call.__name__.replace('_', ' ')}"
    cases = {count: on_node_3(recorded, count) for count in (0, 1, 8)}
    seconds = {count: [] for count in cases}

    def interleaved():
        for count, case in cases.items():
            start = time.perf_counter()
            for _ in range(STEPS):
                call(*case)
            seconds[count].append((time.perf_counter() - start) / STEPS)

    benchmark.pedantic(interleaved, rounds=ROUNDS, warmup_rounds=1)
    median = {count: statistics.median(values[1:]) for count, values in seconds.items()}
    print(f"\n{benchmark.group}\n| plug-ins | us |\n|---|---|")
    for count, value in median.items():
        print(f"| {count} | {1e6 * value:.2f} |")
        benchmark.extra_info[f"{count} plug-ins"] = value
    assert median[8] < LIMIT, f"{1e6 * median[8]:.2f} us"


def bench_hooks_and_checks_cost_less_than_one_percent_of_a_step(benchmark, tmp_path, monkeypatch):
    """Time every hook of ours in a step of the small U-Net loop, as a part of that step."""
    from small_unet_loop import Loop

    from disback_plugin.loop.optimizer_hooks import OptimizerHooks
    from disback_plugin.loop.watches import UnseenUpdates

    spent = [0.0]

    def timed(function):
        def call(*args):
            began = time.perf_counter()
            result = function(*args)
            spent[0] += time.perf_counter() - began
            return result

        return call

    for owner, names in {
        OptimizerHooks: ("_before_any_step", "_before_step", "_after_step"),
        UnseenUpdates: ("_after_backward",),
    }.items():
        for name in names:
            monkeypatch.setattr(owner, name, timed(getattr(owner, name)))
    loop = Loop()
    roles = {"teacher": loop.teacher, "fake_score": loop.fake}
    roles |= {
        "generator_optimizer": loop.optimizers[loop.generator],
        "fake_score_optimizer": loop.optimizers[loop.fake],
    }
    with disback.attach(**roles, path=tmp_path, record=2, every=1, schedule=Fixed(10**6)) as handle:
        for _ in range(8):  # recorded, and past the updates in which weights are compared
            loop.step()
        assert (handle.phase, handle.position) == ("backtracking", 1.0)
        parts = []

        def step():
            spent[0], began = 0.0, time.perf_counter()
            loop.step()
            parts.append(spent[0] / (time.perf_counter() - began))

        benchmark.pedantic(step, rounds=ROUNDS)
    part = statistics.median(parts)
    benchmark.extra_info["part of a step"] = part
    print(f"\nhooks and checks: {100 * part:.2f} % of a step of the small U-Net loop")
    assert part < 0.01
