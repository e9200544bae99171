"""Wrong roles, folders and loops are refused, and nothing is left half done."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn
from worlds import Run, Score, clone, difference, everything, hooks

import disback_plugin as disback
from disback_plugin.errors import MismatchError, OptionError, PathError, RoleError, TrainingError
from disback_plugin.schedules import Fixed, Ramp


def _swap_optimizers(run):
    return run.roles() | {"generator_optimizer": run.optimizer_f, "fake_score_optimizer": run.optimizer_g}


def _one_optimizer(run):
    return run.roles() | {"generator_optimizer": run.optimizer_f}


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
    "one optimizer of the fake score for both": (
        _one_optimizer,
        RoleError,
        "generator_optimizer that steps no generator",
    ),
    "an optimizer of two networks": (_greedy, RoleError, "one optimizer's parameters in the other"),
    "an optimizer of the teacher": (
        lambda r: r.roles() | {"fake_score_optimizer": torch.optim.Adam(r.teacher.requires_grad_(True).parameters())},
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
    "a schedule's class": (lambda r: r.roles() | {"schedule": Ramp}, OptionError, "schedule <class"),
    "no schedule": (lambda r: r.roles() | {"schedule": None}, OptionError, "schedule None"),
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


def test_a_loop_that_never_updates_the_fake_score_trains_its_student_and_is_warned_of_once(tmp_path, caplog):
    run = Run()
    with disback.attach(**run.roles(), path=tmp_path, record=4, every=2) as handle:
        run.generator_step()
        before = clone(dict(run.generator.state_dict()))
        for _ in range(150):
            run.generator_step()
        assert difference(dict(run.generator.state_dict()), before) != []
        assert (handle.phase, handle.generator_updates) == ("recording", 0)
    assert [r.levelname for r in caplog.records if "none of the fake score" in r.message] == ["WARNING"]


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


def test_a_fake_score_that_its_optimizer_does_not_move_is_refused(tmp_path):
    run = Run()
    run.optimizer_f = torch.optim.SGD(run.fake_score.inner[0].parameters(), lr=0.0)
    run.fake_score.eval()  # or the running statistics would move
    with (
        disback.attach(**run.roles(), path=tmp_path, record=4, every=2),
        pytest.raises(TrainingError, match="did not move"),
    ):
        run.steps(4)


def test_the_text_of_a_handle_has_its_phase_and_position(tmp_path):
    run = Run()
    with disback.attach(**run.roles(), path=tmp_path, record=2, every=1, schedule=Ramp(4)) as handle:
        assert "recording" in repr(handle)
        run.steps(3)
        assert "position 1.35 (N = 2" in repr(handle)
        assert "Ramp(updates=4" in repr(handle)
