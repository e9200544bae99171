from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from worlds import OPTIMIZERS, Run, Score, clone, difference

import disback_plugin as disback
from disback_plugin.errors import MismatchError, OptionError, PathError, RoleError, TrainingError
from disback_plugin.schedules import Fixed, GradientRamp, Ramp
from disback_plugin.weights import ScoreNetwork


def everything(run):
    """All that a run consists of, the teacher included."""
    return run.checkpoint() | {"teacher": clone(dict(run.teacher.state_dict()))}


def hooks(run):
    return [
        len(registry)
        for optimizer in (run.optimizer_g, run.optimizer_f)
        for registry in (optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks)
    ]


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
    with disback.attach(**attached.roles(), path=tmp_path / "b", record=1, every=1):
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


# -- counting ---------------------------------------------------------------------------------------------------------


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


# -- the gradient's factor --------------------------------------------------------------------------------------------


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


# -- resume -----------------------------------------------------------------------------------------------------------


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


# -- what is refused --------------------------------------------------------------------------------------------------


def _swap_optimizers(run):
    return run.roles() | {"generator_optimizer": run.optimizer_f, "fake_score_optimizer": run.optimizer_g}


def _one_optimizer(run):
    both = torch.optim.Adam([*run.generator.parameters(), *run.fake_score.parameters()])
    return run.roles() | {"generator_optimizer": both, "fake_score_optimizer": both}


def _greedy(run):
    both = torch.optim.Adam([*run.generator.parameters(), *run.fake_score.parameters()])
    return run.roles() | {"fake_score_optimizer": both}


def _assigned(run):
    run.fake_score.load_state_dict(run.teacher.state_dict(), assign=True)
    optimizer = torch.optim.Adam(run.fake_score.parameters())
    return run.roles() | {"fake_score_optimizer": optimizer}


def _untied(run):
    weight = run.fake_score.right.weight.detach().clone()
    run.fake_score.right.weight = torch.nn.Parameter(weight)
    optimizer = torch.optim.Adam(run.fake_score.parameters())
    return run.roles() | {"fake_score_optimizer": optimizer}


def _with_nan(run):
    with torch.no_grad():
        run.teacher.left.weight[0, 0] = torch.nan
    return run.roles()


REFUSED = {
    "other shapes": (lambda r: r.roles() | {"fake_score": Score(width=5)}, MismatchError, r"inner\.0\.weight of shape"),
    "other keys": (lambda r: r.roles() | {"fake_score": nn.Linear(2, 2)}, MismatchError, "without 11 keys"),
    "no module": (lambda r: r.roles() | {"teacher": "runs/teacher.pt"}, RoleError, "str as the teacher"),
    "no optimizer": (
        lambda r: r.roles() | {"generator_optimizer": r.generator},
        RoleError,
        "Sequential as generator_opt",
    ),
    "no optimizers": (lambda r: r.roles() | {"fake_score_optimizer": []}, RoleError, "an empty sequence"),
    "one network in two roles": (lambda r: r.roles() | {"fake_score": r.teacher}, RoleError, "share weights"),
    "optimizers swapped": (_swap_optimizers, RoleError, "generator_optimizer that steps the fake score"),
    "one optimizer for both": (_one_optimizer, RoleError, "generator_optimizer that steps the fake score"),
    "an optimizer of two networks": (_greedy, RoleError, "one optimizer's parameters in the other"),
    "an optimizer of the teacher": (
        lambda r: r.roles() | {"fake_score_optimizer": torch.optim.Adam(r.teacher.parameters())},
        RoleError,
        "fake_score_optimizer that steps the teacher",
    ),
    "an optimizer of something else": (
        lambda r: r.roles() | {"fake_score_optimizer": torch.optim.Adam(Score().parameters())},
        RoleError,
        "steps nothing of the fake score",
    ),
    "a meta teacher": (lambda r: r.roles() | {"teacher": Score().to("meta")}, RoleError, "meta device"),
    "no path": (lambda r: r.roles() | {"path": None}, OptionError, "no path="),
    "every 0": (lambda r: r.roles() | {"every": 0}, OptionError, "two whole numbers >= 1"),
    "negative record": (lambda r: r.roles() | {"record": -1}, OptionError, "two whole numbers >= 1"),
    "half a record": (lambda r: r.roles() | {"record": 4.5}, OptionError, "two whole numbers >= 1"),
    "a record that is a text": (lambda r: r.roles() | {"record": "4"}, OptionError, "two whole numbers >= 1"),
    "a record that is a flag": (lambda r: r.roles() | {"record": True}, OptionError, "two whole numbers >= 1"),
    "an empty path": (lambda r: r.roles() | {"path": ""}, OptionError, "no path="),
    "a schedule's class": (lambda r: r.roles() | {"schedule": Ramp}, OptionError, "schedule=<class"),
    "no schedule": (lambda r: r.roles() | {"schedule": None}, OptionError, "schedule=None"),
    "weights in one memory": (_assigned, RoleError, "share weights"),
    "a teacher that ties what the fake score does not": (
        _untied,
        MismatchError,
        "one tensor in the teacher and two in",
    ),
    "a teacher with NaN": (_with_nan, TrainingError, "NaN in left.weight"),
    "LBFGS": (
        lambda r: r.roles() | {"generator_optimizer": torch.optim.LBFGS(r.generator.parameters())},
        RoleError,
        "LBFGS",
    ),
    "a schedule with too many budgets": (lambda r: r.roles() | {"schedule": Fixed(1, 1, 1)}, OptionError, "at most 1"),
    "an unknown schedule": (lambda r: r.roles() | {"schedule": "cosine"}, OptionError, "schedule 'cosine'"),
}


@pytest.mark.parametrize(("roles", "error", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_wrong_roles_are_refused_and_nothing_is_left_half_done(tmp_path, roles, error, message):
    run = Run()
    arguments = {"path": tmp_path / "path", "record": 4, "every": 2} | roles(run)
    before = {name: state for name, state in everything(run).items() if name != "teacher"}
    with pytest.raises(error, match=message) as caught:
        disback.attach(**arguments)
    assert re.fullmatch(r"found .+; expected .+; to mend it, .+\.", str(caught.value))
    after = everything(run)
    assert difference({name: after[name] for name in before}, before) == []
    assert hooks(run) == [0, 0, 0, 0]
    assert not (tmp_path / "path").exists()


def test_a_folder_that_holds_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("years")
    run = Run()
    with pytest.raises(PathError, match=r"thesis\.tex"):
        disback.attach(**run.roles(), path=tmp_path, record=4, every=2)
    assert hooks(run) == [0, 0, 0, 0]
    assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]


def test_record_0_beside_a_recorded_path_is_ambiguous(tmp_path):
    run = Run()
    with disback.attach(**run.roles(), path=tmp_path, record=1, every=1):
        run.step()
    with pytest.raises(OptionError, match="record=0 and a path"):
        disback.attach(**run.roles(), path=tmp_path, record=0)


def test_a_generator_updated_while_the_fake_score_never_is(tmp_path):
    run = Run()
    with disback.attach(**run.roles(), path=tmp_path, record=4, every=2):
        for _ in range(100):
            run.generator_step()
        with pytest.raises(TrainingError, match="101 generator steps and none of the fake score"):
            run.generator_step()


@pytest.mark.parametrize("how", ["positional", "keyword", "idle"])
def test_a_step_with_a_closure_is_held_still_scaled_and_counted(tmp_path, how):
    def step(optimizer, compute):
        def closure():
            optimizer.zero_grad()
            loss = compute()
            loss.backward()
            return loss

        if how == "idle":  # the gradients are there already, as in manual optimisation
            closure()
            optimizer.step(closure=lambda: None)
        elif how == "positional":
            assert optimizer.step(closure).ndim == 0
        else:
            optimizer.step(closure=closure)

    run = Run()
    with disback.attach(**run.roles(), path=tmp_path, record=3, every=3, schedule=Ramp(4)) as handle:
        before = clone(dict(run.generator.state_dict()))
        for updates in (0, 0, 0, 1, 2, 3):
            run.fake_step()
            step(run.optimizer_g, run.generator_loss)
            assert handle.generator_updates == updates
            assert (difference(dict(run.generator.state_dict()), before) == []) is (updates == 0)
    assert handle.fake_score_updates == 6


def test_a_fake_score_that_its_optimizer_does_not_move_is_noticed(tmp_path):
    run = Run()
    run.optimizer_f = torch.optim.SGD(run.fake_score.inner[0].parameters(), lr=0.0)
    run.fake_score.eval()  # or the running statistics would move
    with (
        disback.attach(**run.roles(), path=tmp_path, record=4, every=2),
        pytest.raises(TrainingError, match="did not move"),
    ):
        run.steps(4)


def test_the_handle_says_where_it_is(tmp_path):
    run = Run()
    with disback.attach(**run.roles(), path=tmp_path, record=2, every=1, schedule=Ramp(4)) as handle:
        assert "recording" in repr(handle)
        run.steps(3)
        assert "position 1.35 (N = 2" in repr(handle)
        assert "Ramp(updates=4" in repr(handle)


# -- what real trainers do --------------------------------------------------------------------------------------------


def test_a_teacher_in_train_mode_may_write_its_running_statistics(tmp_path):
    run = Run()
    original = clone(ScoreNetwork(run.teacher).state_dict())
    run.teacher.train()
    with disback.attach(**run.roles(), path=tmp_path, record=3, every=1, schedule=Ramp(4)) as handle:
        run.steps(9)
        assert handle.phase == "done"
    assert difference(ScoreNetwork(run.teacher).state_dict(), original) == []
    assert run.teacher.training


def test_a_teacher_whose_requires_grad_the_trainer_flips_walks_as_any_other(tmp_path):
    # DMD2 turns the gradients of its whole guidance model on and off around each generator's turn
    plain, run = Run(), Run()
    plain.teacher.requires_grad_(False)
    options = {"record": 4, "every": 2, "schedule": Fixed(2)}
    with disback.attach(**plain.roles(), path=tmp_path / "plain", **options):
        plain.steps(9)
    run.teacher.requires_grad_(True)
    with disback.attach(**run.roles(), path=tmp_path / "flipped", **options) as handle:
        for i in range(9):
            run.teacher.requires_grad_(i % 3 != 0)
            run.fake_score.requires_grad_(True)
            run.fake_step()
            run.fake_score.requires_grad_(False)
            run.generator_step()
            assert all(p.requires_grad is (i % 3 != 0) for p in run.teacher.parameters()), "the flag is the trainer's"
        assert handle.phase == "done"
    assert difference(everything(run), everything(plain)) == []


def test_accelerates_optimizers_are_held_still_and_counted(tmp_path):
    from accelerate import Accelerator

    run, plain = Run(optimizer="adamw"), Run(optimizer="adamw")
    run.optimizer_f, run.optimizer_g = Accelerator(cpu=True).prepare(run.optimizer_f, run.optimizer_g)
    results = []
    for each, name in ((run, "a"), (plain, "b")):
        before = clone(dict(each.generator.state_dict()))
        with disback.attach(**each.roles(), path=tmp_path / name, record=3, every=1, schedule=Fixed(1)) as handle:
            each.steps(3)
            assert difference(dict(each.generator.state_dict()), before) == []
            each.steps(4)
            results.append([handle.generator_updates, handle.fake_score_updates, dict(each.generator.state_dict())])
    assert difference(*results) == []


@pytest.mark.parametrize("ratio", [1, 2, 5])
def test_a_generators_turn_that_comes_first_and_every_so_often_is_held_still_until_the_path_is_there(tmp_path, ratio):
    # DMD2: the generator's turn is before the fake score's, at step 0 and then at each multiple of the ratio
    run = Run()
    before = clone(dict(run.generator.state_dict()))
    with disback.attach(**run.roles(), path=tmp_path, record=6, every=2, schedule=Fixed(1)) as handle:
        seen = []
        for step in range(40):
            if step % ratio == 0:
                run.generator_step()
                seen.append((handle.fake_score_updates, handle.generator_updates, handle.position))
            run.fake_step()
            if not handle.generator_updates:
                assert difference(dict(run.generator.state_dict()), before) == []
        handed_over = next(i for i, (_, _, position) in enumerate(seen) if position)
        assert seen[handed_over][0] == -(-6 // ratio) * ratio, "at the first turn after node N"
        assert [row[1:] for row in seen[handed_over : handed_over + 3]] == [(0, 2.0), (1, 1.0), (2, 0.0)]
        assert [node.iteration for node in handle.path.nodes] == [2, 4, 6]


def test_a_fake_forward_may_wait_for_the_generators_step(tmp_path):
    # fake forward, generator step, fake backward: the hand-over must not cut the waiting graph
    run = Run()
    run.fake_score.eval()
    with disback.attach(**run.roles(), path=tmp_path, record=2, every=1, schedule=Fixed(1)) as handle:
        run.steps(1)
        run.fake_step()
        x = torch.ones(4, 2)
        waiting = run.fake_score(x, torch.ones(4, 1)).square().mean()
        run.generator_step()
        assert handle.phase == "backtracking"
        waiting.backward()


def test_an_attention_mask_of_minus_infinity_survives_path_and_mixture(tmp_path):
    run = Run()
    for net in (run.teacher, run.fake_score):
        net.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
    with disback.attach(**run.roles(), path=tmp_path, record=2, every=1, schedule=Ramp(4)):
        run.steps(4)
        assert torch.equal(run.teacher.mask, torch.tensor([0.0, -torch.inf]))


def test_a_run_may_change_its_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = Run()
    with disback.attach(**run.roles(), path="runs/path", record=2, every=1, schedule=Ramp(4)):
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")
        run.steps(4)
    assert (tmp_path / "runs" / "path" / "node-002.safetensors").exists()


def test_a_trainer_that_loads_its_checkpoint_first_gives_the_state_to_attach(tmp_path):
    options = {"path": tmp_path / "path", "record": 4, "every": 2, "schedule": Ramp(6)}
    for moment in (3, 7):
        whole, first = Run(), Run()
        with disback.attach(**whole.roles(), **options | {"path": tmp_path / f"whole{moment}"}):
            whole.steps(12)
            expected = everything(whole)
        handle = disback.attach(**first.roles(), **options | {"path": tmp_path / f"split{moment}"})
        first.steps(moment)
        saved, state = first.checkpoint(), handle.state_dict()

        late = Run()
        late.load(saved)
        late.teacher.load_state_dict(first.teacher.state_dict())  # DMD2's checkpoints hold whichever node was there
        with disback.attach(**late.roles(), **options | {"path": tmp_path / f"split{moment}"}, state=state):
            late.steps(12 - moment)
            assert difference(everything(late), expected) == []


def test_a_path_recorded_again_is_another_path(tmp_path):
    import shutil

    run = Run()
    handle = disback.attach(**run.roles(), path=tmp_path, record=2, every=1, schedule=Ramp(4))
    run.steps(3)
    saved, state = run.checkpoint(), handle.state_dict()
    handle.detach()
    shutil.rmtree(tmp_path)
    again = Run()
    again.stream.manual_seed(5)  # the same teacher, student and plan, other noise
    with disback.attach(**again.roles(), path=tmp_path, record=2, every=1, schedule=Ramp(4)) as other:
        again.steps(3)
        again.load(saved)
        with pytest.raises(disback.DisbackError, match="other nodes"):
            other.load_state_dict(state)


def test_a_detached_handle_says_so_and_harms_nothing(tmp_path):
    run = Run()
    original = clone(ScoreNetwork(run.teacher).state_dict())
    handle = disback.attach(**run.roles(), path=tmp_path, record=2, every=1, schedule=Ramp(9))
    run.steps(4)
    state = handle.state_dict()
    with handle.original_teacher():
        handle.detach()
    assert difference(ScoreNetwork(run.teacher).state_dict(), original) == []
    assert handle.position == 0.0
    with pytest.raises(disback.DisbackError, match="detached"):
        handle.load_state_dict(state)
    assert difference(ScoreNetwork(run.teacher).state_dict(), original) == []


def test_an_evaluation_inside_which_the_generator_moves_ends_at_the_right_place(tmp_path):
    run = Run()
    with disback.attach(**run.roles(), path=tmp_path, record=2, every=1, schedule=Fixed(2)) as handle:
        run.steps(3)
        with handle.original_teacher():
            run.step()
            assert difference(ScoreNetwork(run.teacher).state_dict(), handle.path[0]) == []
        assert (handle.generator_updates, handle.position) == (2, 0.0)
        assert difference(ScoreNetwork(run.teacher).state_dict(), handle.path[0]) == []


def test_detach_puts_the_teacher_back_though_somebody_deleted_the_folder(tmp_path):
    import shutil

    run = Run()
    original = clone(ScoreNetwork(run.teacher).state_dict())
    handle = disback.attach(**run.roles(), path=tmp_path, record=2, every=1, schedule=Ramp(9))
    run.steps(4)
    assert handle.position > 0
    shutil.rmtree(tmp_path)
    handle.detach()
    assert hooks(run) == [0, 0, 0, 0]
    assert difference(ScoreNetwork(run.teacher).state_dict(), original) == []


def test_a_second_handle_on_one_loop_is_refused(tmp_path):
    run = Run()
    with disback.attach(**run.roles(), path=tmp_path / "a", record=2, every=1):
        before = clone(dict(run.fake_score.state_dict()))
        with pytest.raises(RoleError, match="attached to already"):
            disback.attach(**run.roles(), path=tmp_path / "b", record=2, every=1)
        assert difference(dict(run.fake_score.state_dict()), before) == []
    with disback.attach(**run.roles(), path=tmp_path / "a", record=2, every=1):
        pass


def test_a_loop_that_steps_other_optimizers_is_mentioned(tmp_path, caplog):
    with disback.attach(**Run().roles(), path=tmp_path, record=2, every=1):
        Run().steps(2)
    assert "no optimizer step was seen" in caplog.text


def test_a_bf16_teacher_that_swallows_the_nodes_is_mentioned_with_the_figure(tmp_path, caplog):
    run = Run(dtype=torch.bfloat16)
    run.optimizer_f = torch.optim.Adam(run.fake_score.parameters(), lr=1e-6)
    run.fake_score.eval()  # running statistics move a lot
    with disback.attach(**run.roles(), path=tmp_path, record=2, every=1):
        run.steps(2)
    assert "rounds node 2 by" in caplog.text


def test_a_folder_that_cannot_be_written_is_one_error_and_leaves_nothing(tmp_path, monkeypatch):
    from disback_plugin import files

    run = Run()
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(PathError, match="cannot be written"):
        disback.attach(**run.roles(), path=tmp_path / "file" / "path", record=2, every=1)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files, "write_tensors", full)
    with pytest.raises(PathError, match="No space left"):
        disback.attach(**run.roles(), path=tmp_path / "new" / "path", record=2, every=1)
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
    assert hooks(run) == [0, 0, 0, 0]


def test_record_takes_any_whole_number_and_fewer_than_every(tmp_path):
    import numpy as np

    run = Run()
    with disback.attach(**run.roles(), path=tmp_path, record=np.int64(3)) as handle:
        run.steps(3)
        assert [node.iteration for node in handle.path.nodes] == [3]


def test_a_state_is_taken_without_a_path_too(tmp_path):
    run, late = Run(), Run()
    with disback.attach(**run.roles(), record=0, schedule=GradientRamp(50)) as handle:
        run.steps(20)
        saved, state = run.checkpoint(), handle.state_dict()
    late.load(saved)
    with disback.attach(**late.roles(), record=0, schedule=GradientRamp(50), state=state) as handle:
        assert handle.state_dict() == state
    with pytest.raises(disback.DisbackError, match="a state with keys"):
        disback.attach(**Run().roles(), record=0, state={"garbage": 1})


def test_a_state_saved_before_a_crash_in_the_middle_of_a_node(tmp_path):
    run = Run()
    handle = disback.attach(**run.roles(), path=tmp_path, record=4, every=2, schedule=Ramp(4))
    run.steps(3)
    saved, state = run.checkpoint(), handle.state_dict()
    (tmp_path / "node-002.safetensors").write_bytes(b"written, but not yet listed")
    late = Run()
    late.load(saved)
    with disback.attach(**late.roles(), path=tmp_path, state=state, schedule=Ramp(4)) as handle:
        late.steps(2)
        assert handle.phase == "backtracking"
        handle.path.verify()


def test_a_node_that_could_not_be_written_is_due_again(tmp_path, monkeypatch):
    from disback_plugin import files

    run = Run()
    with disback.attach(**run.roles(), path=tmp_path, record=4, every=2, schedule="warm") as handle:
        run.steps(1)
        with monkeypatch.context() as patch:
            patch.setattr(files, "write_tensors", lambda *_, **__: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                run.fake_step()
        run.steps(4)
        assert handle.phase == "done"
    assert [node.iteration for node in disback.DegradationPath(tmp_path).nodes] == [2, 4]
    with pytest.raises(OptionError, match="where"):
        disback.DegradationPath(tmp_path).append({}, iteration=3)


def test_detach_while_recording_leaves_the_teacher_as_it_was(tmp_path):
    run = Run()
    original = clone(ScoreNetwork(run.teacher).state_dict())
    run.teacher.train()
    with disback.attach(**run.roles(), path=tmp_path, record=9, every=3):
        run.steps(3)
    assert difference(ScoreNetwork(run.teacher).state_dict(), original) == []
