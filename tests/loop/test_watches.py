"""What goes wrong in a loop without an error is noticed, by name and at once."""

from __future__ import annotations

import copy

import pytest
import torch
import torch._dynamo.utils
from torch import nn
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode
from worlds import Run, difference, weights_of

import disback_plugin as disback
import disback_plugin.convergence
import disback_plugin.recorder
import disback_plugin.session_measures
from disback_plugin.errors import DisbackError, RoleError, StateError, TrainingError
from disback_plugin.plugins import OriginalFeatures

# -- optimizers that nobody steps -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.SGD], ids=["same kind", "another kind"])
@pytest.mark.parametrize("stage", ["recording", "backtracking"])
def test_an_optimizer_made_anew_is_followed_in_both_stages(tmp_path, kind, stage):
    run = Run()
    with disback.attach(**run.roles(), path=tmp_path, record=4, every=2, schedule="fixed:3") as handle:
        run.steps(2 if stage == "recording" else 6)
        assert handle.phase == stage
        run.optimizer_g, run.optimizer_f = (kind(n.parameters(), lr=1e-3) for n in (run.generator, run.fake_score))
        still = weights_of(run.generator)
        if stage == "recording":
            run.step()
            assert difference(weights_of(run.generator), still) == []
        run.steps(12)
        assert (handle.phase, handle.fake_score_updates) == ("done", 15 if stage == "recording" else 18)


def test_an_optimizer_inside_another_one_is_no_update_of_its_own(tmp_path):
    class Lookahead(torch.optim.Optimizer):
        def __init__(self, inner):
            super().__init__(inner.param_groups, {})
            self.inner = inner

        def step(self, closure=None):
            self.inner.step()

    run = Run()
    run.optimizer_g, run.optimizer_f = Lookahead(run.optimizer_g), Lookahead(run.optimizer_f)
    with disback.attach(**run.roles(), path=tmp_path, record=4, every=2, schedule="fixed:3") as handle:
        run.steps(6)
        assert (handle.fake_score_updates, handle.generator_updates) == (6, 2)


def test_a_step_inside_the_backward_is_refused_at_once(tmp_path):
    run = Run()
    inner = {p: torch.optim.SGD([p], lr=0.1) for p in run.fake_score.parameters()}
    for parameter in inner:
        parameter.register_post_accumulate_grad_hook(lambda p: inner[p].step())
    with (
        disback.attach(**run.roles(), path=tmp_path, record=4, every=2),
        pytest.raises(TrainingError, match="SGD that steps weights inside a backward"),
    ):
        run.step()


@pytest.mark.parametrize("role", ["generator", "fake_score"])
def test_weights_that_change_without_a_step_end_a_recording_with_an_error_that_names_them(tmp_path, role):
    run = Run()
    optimizer = run.optimizer_g if role == "generator" else run.optimizer_f
    step = optimizer.step.__func__.__wrapped__  # as a fused kernel of somebody's own
    optimizer.step = lambda: step(optimizer)
    with (
        disback.attach(**run.roles(), path=tmp_path, record=40, every=20),
        pytest.raises(TrainingError, match=f"weights of the {role} that change although no step"),
    ):
        run.steps(10)


def test_weights_that_change_without_a_step_end_backtracking_with_the_original_teacher_and_a_warning(recorded, caplog):
    run = Run()
    original = weights_of(run.teacher)
    with disback.attach(**run.roles(), path=recorded, schedule="fixed:100") as handle:
        step = run.optimizer_g.step.__func__.__wrapped__
        run.optimizer_g.step = lambda: step(run.optimizer_g)
        assert difference(weights_of(run.teacher), original) != []
        run.steps(10)
        assert (handle.phase, handle.position) == ("done", 0.0)
        assert difference(weights_of(run.teacher), original) == []
    assert sum("change although no step" in record.message for record in caplog.records) == 1


def test_a_swap_of_averaged_weights_for_an_evaluation_is_no_unseen_update(tmp_path):
    run = Run()
    with disback.attach(**run.roles(), path=tmp_path, record=4, every=2, schedule="fixed:3") as handle:
        for _ in range(12):
            with torch.no_grad():
                for weight in run.generator.parameters():
                    weight.copy_(weight.clone())
            run.step()
        assert handle.phase == "done"


# -- a teacher that the loop does not run -----------------------------------------------------------------------------


def test_a_teacher_that_runs_is_not_warned_of(recorded, caplog):
    run = Run()
    with disback.attach(**run.roles(), path=recorded, schedule="fixed:9"):
        run.steps(6)
        assert not any(module._forward_pre_hooks for module in run.teacher.modules())
    assert not any("no forward of it" in record.message for record in caplog.records)


@pytest.mark.parametrize("how", ["a copy", "other tensors"])
def test_a_loop_that_runs_something_else_than_the_teacher_is_warned_once(recorded, how, caplog):
    torch._dynamo.utils.counters.clear()  # where something was compiled, the loop may run a graph of the teacher
    run = Run()
    plain, frozen = run.teacher, weights_of(run.teacher)
    with disback.attach(**run.roles(), path=recorded, schedule="fixed:9"):
        run.teacher = copy.deepcopy(plain)
        if how == "other tensors":
            run.teacher.forward = lambda *args: functional_call(plain, frozen, args, tie_weights=False)
        run.steps(8)
        assert not any(module._forward_pre_hooks for module in plain.modules())
    assert sum("no forward of it was seen" in record.message for record in caplog.records) == 1


class SecondJob(Run):
    """A loop whose teacher does more than one thing in a generator update."""

    def __init__(self, jobs):
        super().__init__()
        self.jobs, self.count = jobs, 0

    def generator_loss(self):
        x, sigma, total = self.generator(self.randn(16, 2)), self.randn(16, 1).exp(), 0.0
        self.count += 1
        for job in self.jobs:
            with torch.set_grad_enabled(job != "score" and (job != "evaluation" or self.count == 7)):
                output = self.teacher(x, sigma)
            total = total + (output.square().mean() if job != "score" else (x * output.detach()).mean())
        return total


@pytest.mark.parametrize(
    ("jobs", "kept", "told"),
    [
        (["score", "features"], False, 1),
        (["score", "score", "features", "features"], False, 1),
        (["score", "features"], True, 0),  # by OriginalFeatures
        (["score", "score"], False, 0),  # with and without a condition
        (["SiD's gradient", "SiD's gradient"], False, 0),
        (["score", "evaluation"], False, 0),  # once
    ],
)
def test_a_teacher_with_a_second_job_is_named_once(recorded, caplog, jobs, kept, told):
    run = SecondJob(jobs)
    plugins = (OriginalFeatures(run.teacher, lambda active, original, *args: active(*args)),) if kept else ()
    with disback.attach(**run.roles(), path=recorded, schedule="fixed:30", plugins=plugins):
        run.steps(8)
        assert not any(module._forward_pre_hooks for module in run.teacher.modules())
    assert sum("features to a discriminator" in record.message for record in caplog.records) == told


@pytest.mark.parametrize("part", ["all", "the last layer"])
def test_a_teacher_that_is_assigned_anew_while_it_moves_is_noticed(recorded, part):
    run = Run()
    with disback.attach(**run.roles(), path=recorded, schedule="fixed:9"):
        run.step()
        if part == "all":
            run.teacher.load_state_dict(Run(seed=5).teacher.state_dict(), assign=True)
        else:
            run.teacher.inner[3].weight = nn.Parameter(torch.zeros(2, 8))
        with pytest.raises(StateError, match="a teacher that somebody else has replaced"):
            run.step()


@pytest.mark.parametrize("how", ["options", "config"])
def test_a_teacher_compiled_with_its_weights_as_constants_is_refused(tmp_path, how):
    import torch._inductor.config

    run = Run()
    compiled = torch.compile(run.teacher, options={"freezing": True} if how == "options" else None)
    everywhere = torch._inductor.config.patch(freezing=how == "config")
    with everywhere, pytest.raises(RoleError, match="weights as constants"):
        disback.attach(**run.roles() | {"teacher": compiled}, path=tmp_path, record=2, every=1)


# -- one teacher, one handle ------------------------------------------------------------------------------------------


def test_a_teacher_belongs_to_one_handle(tmp_path):
    run, second = Run(), Run(seed=1)
    roles = second.roles() | {"teacher": run.teacher}
    handle = disback.attach(**run.roles(), path=tmp_path / "first", record=2, every=1)
    with pytest.raises(RoleError, match="a teacher that a handle is attached to already"):
        disback.attach(**roles, path=tmp_path / "second", record=2, every=1)
    assert not (tmp_path / "second").exists()
    handle.detach()
    disback.attach(**roles, path=tmp_path / "second", record=2, every=1).detach()


def test_handles_without_a_path_may_share_a_teacher():
    run, second = Run(), Run(seed=1)
    with disback.attach(**run.roles(), record=0), disback.attach(**second.roles() | {"teacher": run.teacher}, record=0):
        run.step()


# -- a student that trains first --------------------------------------------------------------------------------------


def test_a_student_that_trains_first_is_its_own_and_its_warm_up_is_kept(tmp_path):
    run = Run()
    warm_up = torch.optim.lr_scheduler.LambdaLR(run.optimizer_g, lambda step: (step + 1) / 100)
    with disback.attach(**run.roles(), path=tmp_path, record=4, every=2, schedule="fixed:2") as handle:
        for _ in range(20):
            run.generator_step()
            warm_up.step()
        alone = weights_of(run.generator)
        for _ in range(4):
            run.fake_step()
            run.generator_step()
            warm_up.step()
            assert difference(weights_of(run.generator), alone) == []
        run.step()
        assert handle.generator_updates == 1
        assert warm_up.get_last_lr()[0] == pytest.approx(1e-2 * 20 / 100)


def test_a_loop_that_steps_the_generator_first_holds_it_still_from_its_first_step(tmp_path):
    run = Run()
    before = weights_of(run.generator)
    with disback.attach(**run.roles(), path=tmp_path, record=4, every=2, schedule="fixed:2") as handle:
        for _ in range(4):
            run.generator_step()
            run.fake_step()
        assert difference(weights_of(run.generator), before) == []
        run.generator_step()
        assert handle.phase == "backtracking"


def test_a_broken_role_still_says_so_before_anything_is_written(tmp_path):
    run = Run()
    run.fake_score.load_state_dict(run.teacher.state_dict(), assign=True)
    with pytest.raises(DisbackError):
        disback.attach(**run.roles(), path=tmp_path / "path", record=2, every=1)
    assert not (tmp_path / "path").exists()


# -- what it costs ----------------------------------------------------------------------------------------------------


class Waits(TorchDispatchMode):
    """Counts the operations that make the host wait for a device."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.__name__.split(".")[0] in ("_local_scalar_dense", "is_nonzero", "equal", "nonzero")
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("stage", ["recording", "backtracking"])
def test_the_hooks_and_checks_never_wait_for_the_device(tmp_path, stage, monkeypatch):
    for module in (disback_plugin.convergence, disback_plugin.recorder):  # the fit is read every so many updates
        monkeypatch.setattr(module, "EVERY", 10**6)
    monkeypatch.setattr(disback_plugin.session_measures, "is_due", lambda update: update == 1000)

    def waits(attached):
        run = Run(optimizer="sgd-momentum")  # Adam on a CPU reads its counters
        record, every = (100, 50) if stage == "recording" else (2, 1)
        options = {"path": tmp_path, "record": record, "every": every, "schedule": "fixed:900"}
        handle = disback.attach(**run.roles(), **options) if attached else None
        run.steps(6)  # past the updates in which weights are compared
        with Waits() as mode:
            run.steps(20)
        if handle is not None:
            assert handle.phase == stage
            handle.detach()
        return mode.count

    assert waits(attached=True) == waits(attached=False)
