"""FastGen: its callback resumes with its own checkpoint, and its discriminator keeps the features of the teacher."""

from __future__ import annotations

import copy

import pytest
import torch

import disback_plugin as disback
from disback_plugin.errors import RoleError
from disback_plugin.testing import check_adapter


def test_fastgens_model_needs_one_statement(fastgen, tmp_path):
    model = fastgen.DMD2Model()
    model.init_optimizers()
    options = {"path": tmp_path, "record": 4, "every": 2, "schedule": "fixed:3"}
    with disback.attach(model, adapter="fastgen", **options) as handle:
        for iteration in range(1, 9):
            model.step(iteration)
        assert (handle.phase, handle.position) == ("backtracking", 1.0)
        for iteration in range(9, 17):
            model.step(iteration)
        assert handle.phase == "done"


def test_fastgens_callback_resumes_with_fastgens_own_checkpoint(fastgen, tmp_path):
    from disback_adapters.fastgen import callback

    options = {"record": 4, "every": 2, "schedule": "fixed:9"}
    model = fastgen.DMD2Model()
    original = disback.ScoreNetwork(model.teacher).fingerprint()
    saved = fastgen.Trainer(callback(str(tmp_path), **options)).run(model, 12)
    assert disback.ScoreNetwork(model.teacher).fingerprint() == original
    (state,) = saved["callbacks"]
    assert (state["phase"], state["generator_updates"]) == ("backtracking", 2)
    second = callback(str(tmp_path), **options)
    fastgen.Trainer(second).run(fastgen.DMD2Model(), 16, saved)
    assert second.handle.generator_updates == 4


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda model: setattr(model.config, "student_update_freq", 1), "never trains the fake score"),
        (lambda model: delattr(model, "fake_score_optimizer"), "LADD"),
        (lambda model: setattr(model, "teacher", None), "no score difference to backtrack"),
    ],
)
def test_a_fastgen_model_that_cannot_have_disback_is_refused_with_the_reason(fastgen, tmp_path, break_it, message):
    model = fastgen.DMD2Model()
    model.init_optimizers()
    break_it(model)
    with pytest.raises(RoleError, match=message):
        disback.attach(model, adapter="fastgen", path=tmp_path)


def walked(fastgen, tmp_path, plugins=()):
    """A model with a discriminator, half-way; its original teacher; the handle."""
    model = fastgen.DMD2Model(gan=0.5)
    model.init_optimizers()
    original = copy.deepcopy(model.teacher)
    handle = disback.attach(
        model, adapter="fastgen", path=tmp_path, record=4, every=2, schedule="fixed:3", plugins=plugins
    )
    return model, original, handle


def test_fastgens_discriminator_sees_the_original_teacher_while_the_score_walks(fastgen, tmp_path):
    model, original, handle = walked(fastgen, tmp_path)
    away = 0
    with handle:
        for iteration in range(1, 21):
            model.seen.clear()
            position = handle.position
            model.step(iteration)
            for noised, sigma, features in model.seen:
                assert torch.equal(features, original(noised, sigma, return_features_early=True)[0]), iteration
            if position and iteration % 2 == 0:
                noised, sigma, score = model.score
                assert not torch.equal(score, original(noised, sigma)), "the score is the active node's"
                away += 1
            assert ("forward" in vars(model.teacher)) is (handle.position > 0), "the copy is there only on the walk"
        assert (away, handle.phase) == (3, "done")


def test_fastgens_second_teacher_is_gone_after_detach_on_the_walk(fastgen, tmp_path):
    model, _, handle = walked(fastgen, tmp_path)
    plain = model.teacher.forward.__func__
    for iteration in range(1, 6):
        model.step(iteration)
    assert handle.position == 0.0
    for iteration in range(6, 10):
        model.step(iteration)
    assert handle.position == 1.0
    assert model.teacher.forward is vars(model.teacher)["forward"]
    handle.detach()
    assert "forward" not in vars(model.teacher)
    assert model.teacher.forward.__func__ is plain


def test_fastgens_second_teacher_is_there_again_after_a_resume_on_the_walk(fastgen, tmp_path):
    from disback_adapters.fastgen import callback

    options = {"record": 4, "every": 2, "schedule": "fixed:9"}
    model = fastgen.DMD2Model(gan=0.5)
    original = copy.deepcopy(model.teacher)
    saved = fastgen.Trainer(callback(str(tmp_path), **options)).run(model, 12)
    resumed = fastgen.DMD2Model(gan=0.5)
    fastgen.Trainer(callback(str(tmp_path), **options)).run(resumed, 16, saved)
    assert len(resumed.seen) == 4
    for noised, sigma, features in resumed.seen:
        assert torch.equal(features, original(noised, sigma, return_features_early=True)[0])
    assert "forward" not in vars(resumed.teacher)


def test_fastgens_discriminator_sees_the_active_node_if_the_copy_is_blocked(fastgen, tmp_path):
    model, original, handle = walked(fastgen, tmp_path, plugins=("no:teacher_features",))
    with handle:
        for iteration in range(1, 10):
            model.step(iteration)
        assert handle.position == 1.0
        model.seen.clear()
        model.step(10)
        noised, sigma, features = model.seen[0]
        assert not torch.equal(features, original(noised, sigma, return_features_early=True)[0])


def test_a_second_teacher_costs_a_run_without_recording_nothing(made):
    check_adapter("fastgen", made(gan=0.5))


def test_a_compiled_teacher_whose_features_are_read_is_refused_with_the_way_out(fastgen, tmp_path):
    model = fastgen.DMD2Model(gan=0.5)
    model.init_optimizers()
    model.teacher.compile()
    with pytest.raises(RoleError, match="no:teacher_features"):
        disback.attach(model, adapter="fastgen", path=tmp_path / "p")
    assert not (tmp_path / "p").exists()
