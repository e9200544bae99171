"""`attach` on a live loop: both stages, the way out, and resuming."""

from __future__ import annotations

import pytest
import torch
from worlds import OPTIMIZERS, Run, clone, difference, everything, hooks

import disback_plugin as disback
from disback_plugin.schedules import Fixed, GradientRamp, Ramp
from disback_plugin.weights.network import ScoreNetwork


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_while_recording_the_generator_and_its_optimizer_do_not_move_by_a_bit(tmp_path, optimizer):
    run = Run(optimizer=optimizer)
    run.steps(2)  # an optimizer that already has a state
    before = clone([dict(run.generator.state_dict()), run.optimizer_g.state_dict()])
    with disback.attach(**run.roles(), path=tmp_path, record=5, every=2, schedule="warm") as handle:
        for _ in range(5):
            assert handle.phase == "recording"
            run.step()
            assert difference([dict(run.generator.state_dict()), run.optimizer_g.state_dict()], before) == []
        assert handle.phase == "done"  # the warm start has no descent
        run.step()
        assert difference([dict(run.generator.state_dict())], before[:1]) != []


def test_a_fresh_optimizer_gets_no_state_while_recording(tmp_path):
    run = Run()
    with disback.attach(**run.roles(), path=tmp_path, record=3, every=3):
        run.steps(3)
        assert not run.optimizer_g.state


def test_the_trainer_finds_its_gradients_after_a_muted_step(tmp_path):
    run = Run()
    with disback.attach(**run.roles(), path=tmp_path, record=3, every=3):
        run.generator_loss().backward()
        gradients = [p.grad for p in run.generator.parameters()]
        run.optimizer_g.step()
        assert all(p.grad is g for p, g in zip(run.generator.parameters(), gradients, strict=True))


@pytest.mark.parametrize("schedule", ["auto", Fixed(5), Ramp(5)], ids=repr)
def test_record_0_changes_nothing_in_a_run_bit_for_bit(tmp_path, schedule):
    plain, attached = Run(), Run()
    plain.steps(12)
    with disback.attach(**attached.roles(), path=tmp_path / "path", record=0, schedule=schedule) as handle:
        attached.steps(12)
        assert (handle.phase, handle.position, handle.generator_updates) == ("done", 0.0, 12)
    assert difference(everything(attached), everything(plain)) == []
    assert not (tmp_path / "path").exists()


def test_the_recorded_path_is_the_one_of_record(tmp_path):
    by_hand, attached = Run(), Run()
    path = disback.record(
        by_hand.teacher, by_hand.fake_score, by_hand.fake_step, path=tmp_path / "a", iterations=1, every=1
    )
    with disback.attach(**attached.roles(), path=tmp_path / "b", record=1, every=1, schedule="warm"):
        attached.step()
    assert path.nodes == disback.DegradationPath(tmp_path / "b").nodes


def test_the_whole_of_algorithm_2(tmp_path):
    run = Run()
    original = clone(ScoreNetwork(run.teacher).state_dict())
    handle = disback.attach(**run.roles(), path=tmp_path, record=6, every=2, codec="exact", schedule=Fixed(2, 3))
    run.steps(6)
    path = disback.DegradationPath(tmp_path)
    # Its parameters; running statistics have moved since, in the very forwards of the generator's loss.
    assert all(torch.equal(p, path[-1][name]) for name, p in run.fake_score.named_parameters()), "s_phi is not s'_N"
    visited = []
    for _ in range(7):
        visited.append(handle.position)
        node = ScoreNetwork(run.teacher).state_dict()
        assert difference(node, path[int(handle.position)]) == []
        run.step()
    assert visited == [2, 2, 1, 1, 1, 0, 0]
    assert (handle.phase, handle.generator_updates, handle.fake_score_updates) == ("done", 7, 13)
    assert difference(ScoreNetwork(run.teacher).state_dict(), original) == []
    handle.detach()


def test_a_reused_path_gives_the_run_that_recorded_it(tmp_path):
    first, second = Run(), Run()
    with disback.attach(**first.roles(), path=tmp_path, record=4, every=2, schedule=Ramp(6)):
        first.steps(4)
        at_start = first.checkpoint()
        first.steps(8)
    with disback.attach(**second.roles(), path=tmp_path, record=4, every=2, schedule=Ramp(6)) as handle:
        assert handle.phase == "backtracking"
        second.load(at_start)
        second.steps(8)
    assert difference(everything(second), everything(first)) == []


@pytest.mark.parametrize("moment", [0, 2, 4, 7, 30])
def test_detach_leaves_no_trace(tmp_path, moment):
    run = Run()
    original = clone(ScoreNetwork(run.teacher).state_dict())
    flags = [(p.requires_grad, id(p)) for p in run.teacher.parameters()]
    handle = disback.attach(**run.roles(), path=tmp_path, record=4, every=2, schedule=Fixed(5))
    run.steps(moment)
    handle.detach()
    assert difference(ScoreNetwork(run.teacher).state_dict(), original) == []
    assert hooks(run) == [0, 0, 0, 0]
    assert [(p.requires_grad, id(p)) for p in run.teacher.parameters()] == flags
    assert not run.teacher.training
    moved = clone(dict(run.generator.state_dict()))
    run.step()
    assert difference(dict(run.generator.state_dict()), moved) != [], "the generator is free again"
    handle.detach()


def test_an_exception_in_the_loop_detaches(tmp_path):
    run = Run()
    original = clone(ScoreNetwork(run.teacher).state_dict())

    def loop():
        run.steps(4)
        assert difference(ScoreNetwork(run.teacher).state_dict(), original) != []
        raise KeyboardInterrupt

    with (
        pytest.raises(KeyboardInterrupt),
        disback.attach(**run.roles(), path=tmp_path, record=2, every=1, schedule="ramp:9"),
    ):
        loop()
    assert difference(ScoreNetwork(run.teacher).state_dict(), original) == []
    assert hooks(run) == [0, 0, 0, 0]


def test_nothing_draws_from_the_global_generators(tmp_path, global_random_state):
    run = Run()
    with disback.attach(**run.roles(), path=tmp_path, record=4, every=2, schedule=Ramp(3)) as handle:
        run.steps(9)
        handle.load_state_dict(handle.state_dict())


# -- the gradient's factor -------------------------------------------------------------------------------------------


def test_a_gradient_ramp_scales_the_gradient_that_the_optimizer_sees():
    run = Run(optimizer="sgd-momentum")
    with disback.attach(**run.roles(), record=0, schedule=GradientRamp(4)):
        for updates in range(6):
            run.generator.zero_grad()
            run.generator_loss().backward()
            gradient = run.generator[0].weight.grad.clone()
            run.optimizer_g.step()
            factor = 1 - 0.99 * max(1 - updates / 4, 0)
            torch.testing.assert_close(run.generator[0].weight.grad, gradient * factor)


def test_amplitude_shrinks_the_step_of_sgd_by_the_position(tmp_path):
    moves = {}
    for amplitude in (False, True):
        run = Run()
        run.optimizer_g = torch.optim.SGD(run.generator.parameters(), lr=0.1)
        with disback.attach(
            **run.roles(), path=tmp_path / str(amplitude), record=1, every=1, schedule=Ramp(10, amplitude=amplitude)
        ):
            run.step()
            before = run.generator[0].weight.detach().clone()
            run.step()
            moves[amplitude] = run.generator[0].weight.detach() - before
    torch.testing.assert_close(moves[True], 0.1 * moves[False])


# -- resume ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("moment", range(0, 15))
def test_a_resumed_run_equals_the_uninterrupted_one_bit_for_bit(tmp_path, moment):
    options = {"record": 5, "every": 2, "schedule": Ramp(6)}
    whole = Run()
    with disback.attach(**whole.roles(), path=tmp_path / "whole", **options):
        whole.steps(15)
        expected = everything(whole)

    first = Run()
    handle = disback.attach(**first.roles(), path=tmp_path / "split", **options)
    first.steps(moment)
    saved, state = first.checkpoint(), handle.state_dict()
    first.steps(3)  # lost work: more nodes may be on disk than the checkpoint knows
    handle.path.lock.release()  # as the end of a process does

    second = Run()
    resumed = disback.attach(**second.roles(), path=tmp_path / "split", **options)
    second.load(saved)
    resumed.load_state_dict(state)
    assert resumed.state_dict() == state
    second.steps(15 - moment)
    assert difference(everything(second), expected) == []
    whole_path, split_path = (disback.DegradationPath(tmp_path / name) for name in ("whole", "split"))
    assert whole_path.manifest == split_path.manifest
    split_path.verify()


def test_the_wrong_order_on_resume_is_refused(tmp_path):
    run = Run()
    handle = disback.attach(**run.roles(), path=tmp_path, record=2, every=1, schedule=Ramp(6))
    run.steps(4)
    saved, state = run.checkpoint(), handle.state_dict()
    late = Run()
    late.load(saved)  # before attach, which then overwrites the fake score
    resumed = disback.attach(**late.roles(), path=tmp_path, record=2, every=1, schedule=Ramp(6))
    with pytest.raises(disback.DisbackError, match=r"call attach\(\) first, then load"):
        resumed.load_state_dict(state)
    assert resumed.generator_updates == 0


def test_a_state_of_another_path_is_refused(tmp_path):
    run, other = Run(), Run(seed=1)
    state = disback.attach(**run.roles(), path=tmp_path / "a", record=2, every=1).state_dict()
    handle = disback.attach(**other.roles(), path=tmp_path / "b", record=2, every=1)
    with pytest.raises(disback.DisbackError, match="another path"):
        handle.load_state_dict(state)


def test_the_state_is_plain_scalars(tmp_path):
    import json

    state = disback.attach(**Run().roles(), path=tmp_path, record=2, every=1).state_dict()
    assert json.loads(json.dumps(state)) == state
