"""Adapters import nothing that they adapt, and refuse with the reason what cannot have DisBack."""

from __future__ import annotations

import ast
import copy
import importlib
import sys
from importlib.metadata import entry_points
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from worlds import Run

import disback_plugin as disback
from disback_plugin.errors import RoleError
from disback_plugin.testing import check_adapter

ADAPTERS = Path(__file__).parents[2] / "adapters"
TRAINERS = Path(__file__).parents[1] / "trainers"
FILES = {file.stem: file for file in ADAPTERS.glob("*.py") if file.stem != "__init__"}
FILES |= {file.parent.name: file for file in ADAPTERS.glob("*/__init__.py")}
# A package has the adapter in its __init__, and beside it a trainer of our own, which may import what it likes.
OWN = sorted(file for file in ADAPTERS.glob("*/*.py") if file.stem != "__init__")


@pytest.fixture
def fastgen(monkeypatch):
    """The stand-in, under the names that FastGen's own modules have."""
    monkeypatch.syspath_prepend(str(TRAINERS))
    import fastgen as module

    monkeypatch.setitem(sys.modules, "fastgen.callbacks.callback", module.callbacks)
    yield module
    for name in ("fastgen", "networks"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize("file", FILES.values(), ids=FILES)
def test_an_adapter_imports_public_names_and_none_of_what_it_adapts(file):
    public = {*disback.__all__, *disback.plugins.__all__, "RoleError"}
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom):
            top = node.module.partition(".")[0]
            assert top in {"disback_plugin", *sys.stdlib_module_names}, node.module
            if top == "disback_plugin":
                assert {alias.name for alias in node.names} <= public
        elif isinstance(node, ast.Import):
            assert all(alias.name in sys.stdlib_module_names for alias in node.names)
    assert len(file.read_text().splitlines()) <= 120


@pytest.mark.parametrize("file", OWN, ids=lambda file: file.stem)
def test_a_trainer_of_our_own_imports_public_names(file):
    public = set(disback.__all__)
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module.partition(".")[0] == "disback_plugin":
            assert node.module in {"disback_plugin", "disback_plugin.errors", "disback_plugin.plugins"}
            assert node.module != "disback_plugin" or {alias.name for alias in node.names} <= public
        elif isinstance(node, ast.Import):
            assert not any(alias.name.startswith("disback_plugin.") for alias in node.names)
    assert len(file.read_text().splitlines()) <= 350


def test_every_adapter_is_found_through_its_entry_point():
    ours = {p.name for p in entry_points(group="disback.adapters") if p.value.startswith("disback_adapters.")}
    assert ours == set(FILES)


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


def test_a_second_teacher_costs_a_run_without_recording_nothing(fastgen):
    check_adapter("fastgen", made(fastgen, gan=0.5))


def test_a_compiled_teacher_whose_features_are_read_is_refused_with_the_way_out(fastgen, tmp_path):
    model = fastgen.DMD2Model(gan=0.5)
    model.init_optimizers()
    model.teacher.compile()
    with pytest.raises(RoleError, match="no:teacher_features"):
        disback.attach(model, adapter="fastgen", path=tmp_path / "p")
    assert not (tmp_path / "p").exists()


def test_a_lora_fake_score_of_dmd2_is_refused_with_the_reason(tmp_path):
    guidance = nn.Module()
    guidance.real_unet, guidance.fake_unet = nn.Linear(2, 2), nn.Module()
    guidance.fake_unet.to_q = nn.ModuleDict({"base_layer": nn.Linear(2, 2), "lora_A": nn.Linear(2, 2)})
    trainer = SimpleNamespace(
        model=SimpleNamespace(guidance_model=guidance),
        optimizer_generator=torch.optim.Adam(nn.Linear(1, 1).parameters()),
        optimizer_guidance=torch.optim.Adam(guidance.fake_unet.parameters()),
    )
    with pytest.raises(RoleError, match="LoRA layers on frozen weights"):
        disback.attach(trainer, adapter="dmd2", path=tmp_path)


# -- the kit ----------------------------------------------------------------------------------------------------------


def made(fastgen, **options):
    def make():
        model = fastgen.DMD2Model(**options)
        model.init_optimizers()
        iterations = iter(range(1, 10**6))
        return model, lambda: model.step(next(iterations))

    return make


def test_the_kit_passes_an_adapter_that_is_right(fastgen):
    check_adapter("fastgen", made(fastgen))


def test_the_kit_names_what_is_wrong(fastgen, monkeypatch):
    from disback_adapters import fastgen as adapter

    def swapped(trainer):
        return disback.Adapter(trainer.fake_score, trainer.teacher, trainer.net_optimizer, trainer.fake_score_optimizer)

    swapped.disback_impl = adapter.disback_adapter.disback_impl
    monkeypatch.setattr(adapter, "disback_adapter", swapped)
    with pytest.raises(RoleError, match="steps the teacher"):
        check_adapter("fastgen", made(fastgen))


def test_the_kit_refuses_a_loop_that_is_not_the_same_twice(fastgen):
    make = made(fastgen)

    def unsteady():
        model, step = make()
        torch.seed()
        return model, step

    with pytest.raises(AssertionError, match="the same run twice"):
        check_adapter("fastgen", unsteady)


NAMES = {
    "sid": {
        "true_score": "teacher",
        "fake_score": "fake_score",
        "g_optimizer": "optimizer_g",
        "fake_score_optimizer": "optimizer_f",
    },
    "diff_instruct": {"net": "teacher", "Sg": "fake_score", "g_optimizer": "optimizer_g", "optimizer": "optimizer_f"},
}


@pytest.mark.parametrize("adapter", NAMES)
def test_the_kit_passes_the_adapters_of_local_variables(adapter):
    def make():
        run = Run()
        return SimpleNamespace(**{name: getattr(run, ours) for name, ours in NAMES[adapter].items()}), run.step

    check_adapter(adapter, make)


@pytest.fixture
def self_forcing(monkeypatch):
    """The class of Self-Forcing's trainer."""
    monkeypatch.syspath_prepend(str(TRAINERS))
    from trainer.distillation import Trainer

    yield Trainer
    for name in [name for name in sys.modules if name.partition(".")[0] in ("trainer", "networks")]:
        del sys.modules[name]


def test_the_kit_passes_self_forcings_trainer(self_forcing):
    def make():
        trainer = self_forcing(SimpleNamespace(generator_ckpt=None, real_width=8))

        def step():
            for optimizer in (trainer.critic_optimizer, trainer.generator_optimizer):
                optimizer.zero_grad()
                trainer.fwdbwd_one_step({"prompts": [""] * 8}, optimizer is trainer.generator_optimizer)
                optimizer.step()

        return trainer, step

    check_adapter("self_forcing", make)


def test_dmd2s_flat_parameters_are_refused_with_the_line_to_change(edm, tmp_path):
    trainer = edm()
    next(trainer.model.guidance_model.parameters())._is_flat_param = True
    with pytest.raises(RoleError, match=r"fsdp_use_orig_params: true.*fsdp_1node_debug.yaml"):
        disback.attach(trainer, adapter="dmd2", path=tmp_path)


@pytest.fixture
def edm(monkeypatch):
    """A maker of DMD2's trainers."""
    monkeypatch.syspath_prepend(str(TRAINERS))
    import train_edm

    yield lambda: train_edm.Trainer(SimpleNamespace(gan_alone=False, checkpoint_path=None))
    for name in [name for name in sys.modules if name.partition(".")[0] in ("main", "networks", "train_edm")]:
        del sys.modules[name]


def test_dmd2s_discriminator_that_trains_the_recorded_fake_score_is_mentioned(edm, tmp_path, caplog):
    trainer = edm()
    disback.attach(trainer, adapter="dmd2", path=tmp_path / "a", record=1, every=1).detach()
    assert "Eq. 7" not in caplog.text
    trainer.gan_classifier = True
    disback.attach(trainer, adapter="dmd2", path=tmp_path / "b", record=1, every=1).detach()
    assert "Eq. 7" in caplog.text


def test_dmd2s_trackers_get_the_numbers_under_the_trainers_own_step(edm, tmp_path):
    trainer, told = edm(), []
    trainer.accelerator.trackers = [SimpleNamespace(log=lambda values, step: told.append((step, values)))]
    with disback.attach(trainer, adapter="dmd2", path=tmp_path, record=2, every=1, schedule="fixed:2"):
        for _ in range(10):
            trainer.train_one_step()
            trainer.step += 1
    moves = [
        (step, v["disback/generator_updates"], v["disback/position"]) for step, v in told if "disback/position" in v
    ]
    assert moves == [(2, 0, 1.0), (6, 2, 0.0)]


DMD2 = {"train_edm": {"gan_alone": False}, "train_sd": {"step": 0, "use_fp16": False, "dfake_gen_update_ratio": 3}}


@pytest.mark.parametrize("script", DMD2)
def test_the_kit_passes_dmd2s_trainers(script, monkeypatch):
    monkeypatch.syspath_prepend(str(TRAINERS))
    module = importlib.import_module(script)
    arguments = SimpleNamespace(checkpoint_path=None, ckpt_only_path=None, **DMD2[script])

    def make():
        more = () if script == "train_edm" else (module.SDUniModel,)
        trainer = module.Trainer(arguments, *more)

        def round_of_the_loop():
            trainer.train_one_step()
            trainer.step += 1

        return trainer, round_of_the_loop

    check_adapter("dmd2", make)
    for name in [name for name in sys.modules if name.partition(".")[0] in ("main", "networks", "sd_trainer", script)]:
        del sys.modules[name]
