"""DMD2: what its trainers cannot have is refused with the reason, and its trackers get the numbers."""

from __future__ import annotations

import importlib
import sys
from types import SimpleNamespace

import pytest
import torch
from scripts import TRAINERS
from torch import nn

import disback_plugin as disback
from disback_plugin.errors import RoleError
from disback_plugin.testing import check_adapter


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
