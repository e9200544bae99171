"""Updates are counted where they happen, whatever the loop does around them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from worlds import Run, clone, difference

import disback_plugin as disback
from disback_plugin.schedules import Fixed, Ramp
from disback_plugin.weights.network import ScoreNetwork


@settings(max_examples=10)
@given(events=st.lists(st.sampled_from(["fake", "generator", "accumulate", "empty"]), max_size=25))
def test_only_finished_updates_count(tmp_path_factory, events):
    run = Run()
    folder = tmp_path_factory.mktemp("counting")
    with disback.attach(**run.roles(), path=folder, record=1, every=1) as handle:
        run.step()
        assert (handle.generator_updates, handle.fake_score_updates) == (0, 1)
        for event in events:
            if event == "fake":
                run.fake_step()
            elif event == "generator":
                run.generator_step()
            elif event == "accumulate":  # a backward without a step
                run.generator_loss().backward()
            else:  # a step without gradients
                run.optimizer_g.zero_grad()
                run.optimizer_g.step()
        assert handle.generator_updates == events.count("generator")
        assert handle.fake_score_updates == 1 + events.count("fake")


def test_accumulated_gradients_are_one_update(tmp_path):
    from accelerate import Accelerator

    run, accelerator = Run(), Accelerator(cpu=True, gradient_accumulation_steps=4)
    generator, optimizer = accelerator.prepare(run.generator, run.optimizer_g)
    run.generator = generator
    roles = run.roles() | {"generator_optimizer": optimizer}
    with disback.attach(**roles, path=tmp_path, record=1, every=1) as handle:
        run.fake_step()
        run.generator_step()  # starts the second stage
        for _ in range(8):
            with accelerator.accumulate(generator):
                accelerator.backward(run.generator_loss())
                optimizer.step()
                optimizer.zero_grad()
        assert handle.generator_updates == 2


@pytest.mark.parametrize("optimizer", ["adam", "adam-fused"])
def test_a_step_that_a_grad_scaler_skips_is_no_update(tmp_path, optimizer):
    run, scaler = Run(optimizer=optimizer), torch.amp.GradScaler("cpu", init_scale=4.0)
    with disback.attach(**run.roles(), path=tmp_path, record=1, every=1, schedule=Ramp(3)) as handle:
        run.step()
        for overflow, expected in ((False, 1), (True, 1), (True, 1), (False, 2)):
            before = clone(dict(run.generator.state_dict()))
            run.optimizer_g.zero_grad()
            scaler.scale(run.generator_loss() * (float("inf") if overflow else 1.0)).backward()
            scaler.step(run.optimizer_g)
            scaler.update()
            moved = difference(dict(run.generator.state_dict()), before) != []
            assert moved is not overflow
            assert handle.generator_updates == expected


ORDERS = {
    "in turn": lambda i: (0, 1),
    "reversed": lambda i: (1, 0),
    "alternating": lambda i: (0, 1) if i % 2 else (1, 0),
    "the first only": lambda i: (0,),
    "the last only": lambda i: (1,),
}


@pytest.mark.parametrize("order", ORDERS.values(), ids=ORDERS.keys())
def test_several_optimizers_in_any_order_are_one_update_and_all_are_held_still(tmp_path, order):
    run = Run()
    optimizers = [torch.optim.Adam(layer.parameters(), lr=0.01) for layer in (run.generator[0], run.generator[2])]
    roles = run.roles() | {"generator_optimizer": [*optimizers, optimizers[0]]}
    before = clone(dict(run.generator.state_dict()))
    late = 2 if len(order(0)) == 1 else 1  # a round of one of the two ends when the next begins
    with disback.attach(**roles, path=tmp_path, record=2, every=1, schedule="warm") as handle:
        for i in range(5):
            run.fake_step()
            run.generator.zero_grad()
            run.generator_loss().backward()
            for which in order(i):
                optimizers[which].step()
            assert handle.generator_updates == max(i - late, 0)
            assert (difference(dict(run.generator.state_dict()), before) != []) is (i >= 2)
    assert handle.scheduler is not None


def test_a_discriminators_optimizer_may_step_when_it_likes(tmp_path):
    run, discriminator = Run(), nn.Linear(2, 1)
    adversary = torch.optim.Adam(discriminator.parameters())
    roles = run.roles() | {"fake_score_optimizer": [run.optimizer_f, adversary]}
    with disback.attach(**roles, path=tmp_path, record=2, every=1, schedule="warm") as handle:
        run.steps(3)
        discriminator(torch.ones(1, 2)).sum().backward()
        adversary.step()
        assert (handle.phase, handle.fake_score_updates, handle.generator_updates) == ("done", 3, 1)


def test_fake_score_updates_in_any_ratio_are_recorded_as_they_come(tmp_path):
    run = Run()
    with disback.attach(**run.roles(), path=tmp_path, record=6, every=3, schedule=Fixed(1)) as handle:
        for _ in range(2):
            for _ in range(5):
                run.fake_step()
            run.generator_step()
        assert handle.phase == "backtracking"
        path = disback.DegradationPath(tmp_path)
        assert [node.iteration for node in path.nodes] == [3, 6]
        assert difference(ScoreNetwork(run.fake_score).state_dict(), path[-1]) == []


def test_a_step_that_raises_while_the_generator_is_held_still_costs_no_gradient(tmp_path):
    run = Run()
    with disback.attach(**run.roles(), path=tmp_path, record=9, every=9):
        run.fake_step()
        run.generator_loss().backward()
        before = [weight.grad.clone() for weight in run.generator.parameters()]
        run.optimizer_g.register_step_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run.optimizer_g.step()
    assert all(map(torch.equal, before, [weight.grad for weight in run.generator.parameters()]))
