from __future__ import annotations

import inspect

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from worlds import Run, Score, clone, difference

import disback_plugin as disback
from disback_plugin import schedules
from disback_plugin.errors import OptionError, PathError, StateError
from disback_plugin.schedule_base import to_config
from disback_plugin.schedules import Fixed, Ramp, WarmStart
from disback_plugin.weights.network import ScoreNetwork


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A path of nodes 0 to 4."""
    run = Run()
    return disback.record(
        run.teacher, run.fake_score, run.fake_step, path=tmp_path_factory.mktemp("recorded"), iterations=8, every=2
    )


def holding(path):
    """A run whose teacher is node 0 of the path."""
    run = Run()
    assert difference(path[0], ScoreNetwork(run.teacher).state_dict()) == []
    return run


def state(net):
    return clone(ScoreNetwork(net).state_dict())


def test_the_nodes_come_in_order_and_every_key_is_copied(recorded):
    run = holding(recorded)
    scheduler = disback.TrajectoryScheduler(recorded, run.teacher, run.fake_score, schedule=Fixed(1, 2, 1))
    scheduler.start()
    assert difference(state(run.fake_score), recorded[-1]) == []
    seen = []
    for _ in range(6):
        assert difference(state(run.teacher), recorded[int(scheduler.position)]) == []
        seen.append(scheduler.position)
        scheduler.step()
    assert seen == [3, 2, 2, 1, 0, 0]
    assert scheduler.done


@given(
    schedule=st.one_of(
        st.lists(st.integers(1, 4), min_size=1, max_size=3).map(lambda b: Fixed(*b)),
        st.builds(Ramp, st.integers(1, 12), start=st.floats(0.05, 1)),
        st.just(WarmStart()),
    ),
    extra=st.integers(0, 2),
)
def test_the_last_position_is_the_teacher_bit_for_bit(recorded, schedule, extra):
    run = holding(recorded)
    before = state(run.teacher)
    scheduler = disback.TrajectoryScheduler(recorded, run.teacher, schedule=schedule)
    scheduler.start()
    for _ in range(schedule.horizon(4) + extra):
        scheduler.step()
    assert scheduler.position == 0.0
    assert scheduler.done
    assert difference(state(run.teacher), before) == []


def test_a_scheduler_shows_where_it_stands(recorded):
    run = holding(recorded)
    scheduler = disback.TrajectoryScheduler(recorded, run.teacher, run.fake_score, schedule="fixed:3")
    assert repr(scheduler).startswith("<TrajectoryScheduler not started: position 0 (N = 4, ")
    scheduler.start()
    scheduler.step()
    assert repr(scheduler).startswith("<TrajectoryScheduler backtracking: position 3 ")
    assert repr(scheduler).endswith("Fixed(3), 1 generator updates>")
    assert "no path" in repr(disback.TrajectoryScheduler(None, run.teacher))


def test_a_position_between_two_nodes_is_their_mixture(recorded):
    run = holding(recorded)
    scheduler = disback.TrajectoryScheduler(recorded, run.teacher, schedule=Ramp(4, start=0.9))
    scheduler.start()  # 3.6
    a, b = recorded[3]["left.weight"], recorded[4]["left.weight"]
    torch.testing.assert_close(run.teacher.left.weight, 0.4 * a + 0.6 * b)
    assert run.teacher.right.weight is run.teacher.left.weight


def test_a_wrapped_loss_keeps_its_signature_and_evaluates_the_right_node(recorded):
    run = holding(recorded)
    scheduler = disback.TrajectoryScheduler(recorded, run.teacher, run.fake_score, schedule=Fixed(1))

    def loss(x, *, scale=2.0):
        """How bad it is."""
        return run.teacher.left.weight.sum() * scale

    wrapped = scheduler.wrap(loss)
    assert inspect.signature(wrapped) == inspect.signature(loss)
    assert wrapped.__wrapped__ is loss
    assert wrapped.__doc__ == loss.__doc__
    with pytest.raises(StateError, match=r"scheduler\.start\(\)"):
        wrapped(None)
    scheduler.start()
    for node in (3, 2, 1, 0, 0):
        assert wrapped(None, scale=1.0).item() == recorded[node]["left.weight"].sum().item()
        scheduler.step()


def test_original_teacher_holds_node_0_inside_and_the_active_node_after(recorded):
    run = holding(recorded)
    scheduler = disback.TrajectoryScheduler(recorded, run.teacher, schedule=Ramp(10))
    scheduler.start()
    scheduler.step()
    active = state(run.teacher)

    def evaluate():
        assert difference(state(run.teacher), recorded[0]) == []
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), scheduler.original_teacher():
        evaluate()
    assert difference(state(run.teacher), active) == []


def test_a_teacher_written_by_somebody_else_is_noticed(recorded):
    run = holding(recorded)
    scheduler = disback.TrajectoryScheduler(recorded, run.teacher, schedule=Fixed(2))
    loss = scheduler.wrap(lambda: None)
    scheduler.start()
    loss()
    run.teacher.load_state_dict(Score().state_dict())
    with pytest.raises(StateError, match="somebody else has written"):
        loss()
    with pytest.raises(StateError, match="somebody else has written"):
        scheduler.step()


def test_a_write_of_equal_values_is_allowed(recorded):
    run = holding(recorded)
    scheduler = disback.TrajectoryScheduler(recorded, run.teacher, schedule=Fixed(2))
    scheduler.start()
    run.teacher.load_state_dict(state(run.teacher))  # as a DDP broadcast does
    scheduler.step()
    assert scheduler.position == 3


def test_the_state_is_plain_scalars_and_restores_the_position(recorded):
    run = holding(recorded)
    scheduler = disback.TrajectoryScheduler(recorded, run.teacher, run.fake_score, schedule=Ramp(7))
    scheduler.start()
    for _ in range(3):
        scheduler.step()
    saved, active = scheduler.state_dict(), state(run.teacher)
    assert all(isinstance(value, (str, int, bool)) for value in saved.values())

    other = holding(recorded)
    fake_before = state(other.fake_score)
    resumed = disback.TrajectoryScheduler(recorded, other.teacher, other.fake_score, schedule=Ramp(7))
    other.teacher.load_state_dict(Score().state_dict())  # a trainer's checkpoint may hold anything
    resumed.load_state_dict(saved)
    assert resumed.state_dict() == saved
    assert difference(state(other.teacher), active) == []
    assert difference(state(other.fake_score), fake_before) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"path": "0" * 64}, "another path"),
        ({"nodes": "0" * 64}, "another nodes"),
        ({"schedule": "Fixed(1)"}, "another schedule"),
        ({"schedule": to_config(Ramp(8))}, "another schedule"),
        ({"schedule": "Adaptive(fitted=None)"}, "disback-plugin 0.1.0, the last version that has Adaptive"),
        ({"generator_updates": "3"}, "expected a int"),
        ({"generator_updates": -3}, "generator_updates=-3"),
        ({"version": 3}, "of version 3"),
        ({"phase": "asleep"}, "phase='asleep'"),
    ],
)
def test_a_state_of_another_run_is_refused_and_changes_nothing(recorded, change, message):
    run = holding(recorded)
    scheduler = disback.TrajectoryScheduler(recorded, run.teacher, schedule=Ramp(7))
    scheduler.start()
    before, weights = scheduler.state_dict(), state(run.teacher)
    with pytest.raises(StateError, match=message):
        scheduler.load_state_dict(before | change)
    assert scheduler.state_dict() == before
    assert difference(state(run.teacher), weights) == []


def test_an_unfinished_path_is_refused(tmp_path):
    run = Run()
    with pytest.raises(ZeroDivisionError):
        disback.record(run.teacher, run.fake_score, lambda: 1 / 0, path=tmp_path, iterations=2, every=1)
    with pytest.raises(PathError, match="unfinished"):
        disback.TrajectoryScheduler(disback.DegradationPath(tmp_path), run.teacher)


def test_another_teacher_is_refused_and_not_written(recorded):
    run = Run(seed=3)
    before = state(run.teacher)
    with pytest.raises(PathError, match="another teacher"):
        disback.TrajectoryScheduler(recorded, run.teacher)
    assert difference(state(run.teacher), before) == []


def test_a_schedule_that_does_not_fit_is_refused_at_once(recorded):
    with pytest.raises(OptionError, match="at most 3 budgets"):
        disback.TrajectoryScheduler(recorded, holding(recorded).teacher, schedule=Fixed(1, 1, 1, 1))


def test_a_step_before_the_start_is_refused(recorded):
    with pytest.raises(StateError, match="has not started"):
        disback.TrajectoryScheduler(recorded, holding(recorded).teacher).step()


def test_a_bf16_teacher_follows_an_fp32_path_and_is_restored_exactly(tmp_path):
    run = Run(dtype=torch.bfloat16)
    before = state(run.teacher)
    path = disback.record(run.teacher, run.fake_score, run.fake_step, path=tmp_path, iterations=4, every=2)
    assert path[1]["left.weight"].dtype == torch.float32
    scheduler = disback.TrajectoryScheduler(path, run.teacher, run.fake_score, schedule=Fixed(1))
    scheduler.start()
    assert run.teacher.left.weight.dtype == torch.bfloat16
    assert torch.equal(run.teacher.left.weight, path[1]["left.weight"].bfloat16())
    scheduler.step()
    assert difference(state(run.teacher), before) == []


def test_without_a_path_nothing_is_ever_written():
    run = Run()
    version = run.teacher.left.weight._version
    scheduler = disback.TrajectoryScheduler(None, run.teacher, run.fake_score, schedule=Ramp(3))
    scheduler.start()
    scheduler.step()
    with scheduler.original_teacher():
        pass
    scheduler.restore_teacher()
    assert (scheduler.position, scheduler.gradient_factor, scheduler.done) == (0.0, 1.0, True)
    assert run.teacher.left.weight._version == version


def test_a_wrapped_loss_can_run_its_losses_fused(recorded):
    from disback_plugin import _loss_formulas as formulas
    from disback_plugin import kernels

    run = holding(recorded)
    scheduler = disback.TrajectoryScheduler(recorded, run.teacher, run.fake_score)
    scheduler.start()
    runners = []
    plain = scheduler.wrap(lambda: runners.append(formulas.RUNNER.get()))
    fused = scheduler.wrap(kernels.fuse(lambda: runners.append(formulas.RUNNER.get())))
    plain()
    fused()
    assert runners == [formulas.run_plain, kernels._RUNNERS["auto"]]


def test_a_second_start_and_one_after_a_resume_change_nothing(recorded):
    run = holding(recorded)
    scheduler = disback.TrajectoryScheduler(recorded, run.teacher, run.fake_score, schedule=Fixed(2))
    scheduler.start()
    scheduler.step()
    run.fake_step()
    before = [state(run.fake_score), state(run.teacher)]
    scheduler.start()
    assert difference([state(run.fake_score), state(run.teacher)], before) == []


@pytest.mark.parametrize("target", [(-0.5, 1.0), (4.5, 1.0), (float("nan"), 1.0), (1.0, -1.0), (1.0, float("nan"))])
def test_a_schedule_out_of_bounds_never_reaches_the_teacher(recorded, target):
    class Wild(Fixed):
        def __call__(self, updates, nodes):
            return schedules.Target(*target)

    run = holding(recorded)
    before = [state(run.teacher), state(run.fake_score)]
    with pytest.raises(OptionError, match="expected a position in"):
        disback.TrajectoryScheduler(recorded, run.teacher, run.fake_score, schedule=Wild(1)).start()
    assert difference([state(run.teacher), state(run.fake_score)], before) == []


def test_a_state_of_version_1_is_loaded(recorded):
    run = holding(recorded)
    scheduler = disback.TrajectoryScheduler(recorded, run.teacher, schedule=Ramp(7))
    old = {
        "path": recorded.identity,
        "nodes": recorded.nodes_digest(), "schedule": "Ramp(updates=7, start=0.9, amplitude=True)",
        "generator_updates": 3, "plan_updates": 3, "node_since": 3, "started": True,
    }  # fmt: skip
    scheduler.load_state_dict(old)
    assert (scheduler.position, scheduler.generator_updates) == (Ramp(7)(3, 4).position, 3)
    scheduler.load_state_dict(old | {"schedule": "Ramp(updates=7)"})  # from before the class had its other arguments
    scheduler.load_state_dict(old | {"started": False})
    assert (scheduler.position, scheduler.started) == (0.0, False)


def test_a_move_that_fails_counts_nothing(recorded, monkeypatch):
    run = holding(recorded)
    scheduler = disback.TrajectoryScheduler(recorded, run.teacher, schedule=Ramp(7))
    scheduler.wrap(lambda: None)
    scheduler.start()
    scheduler.step()
    before = scheduler.state_dict()

    def broken(*_):
        raise PathError("a disk that is gone", expected="a disk", cure="mount it again")

    with monkeypatch.context() as patch:
        patch.setattr(disback.DegradationPath, "source", broken)
        with pytest.raises(PathError, match="a disk that is gone"):
            scheduler.step()
    assert scheduler.state_dict() == before
    assert scheduler._masked.steps == 1
    with pytest.raises(StateError, match="last move failed"):
        scheduler.step()
    scheduler.load_state_dict(before)
    scheduler.step()
    assert scheduler.generator_updates == 2
