"""DMD2: which networks its trainers may have, and what its trackers get."""

from __future__ import annotations

import copy
import importlib
import sys
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from scripts import TRAINERS
from torch import nn

import disback_plugin as disback
from disback_plugin.errors import RoleError
from disback_plugin.testing import check_adapter


class Guidance(nn.Module):
    """A guidance model whose fake score is a LoRA on weights of its own."""

    def __init__(self):
        super().__init__()
        self.real_unet = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 2)).requires_grad_(False)
        self.fake_unet = inject_adapter_in_model(
            LoraConfig(r=1, target_modules=["0", "2"]), copy.deepcopy(self.real_unet)
        )


def test_the_fake_score_of_a_fork_may_be_a_lora(tmp_path):
    guidance, generator = Guidance(), nn.Linear(2, 2)
    original = disback.ScoreNetwork(guidance, prefix="real_unet").checksum()
    optimizers = {
        "optimizer_generator": torch.optim.Adam(generator.parameters(), lr=1e-2),
        "optimizer_guidance": torch.optim.Adam([p for p in guidance.parameters() if p.requires_grad], lr=1e-2),
    }
    trainer = SimpleNamespace(model=SimpleNamespace(guidance_model=guidance), **optimizers)
    with disback.attach(trainer, adapter="dmd2", path=tmp_path, record=4, every=2, schedule="fixed:2") as handle:
        for _ in range(7):
            x = generator(torch.randn(8, 2))
            optimizers["optimizer_guidance"].zero_grad()
            (guidance.fake_unet(x.detach()) - x.detach()).square().mean().backward()
            optimizers["optimizer_guidance"].step()
            optimizers["optimizer_generator"].zero_grad()
            ((guidance.fake_unet(x) - guidance.real_unet(x)).detach() * x).sum().backward()
            optimizers["optimizer_generator"].step()
        assert handle.phase == "done"
    assert disback.ScoreNetwork(guidance, prefix="real_unet").checksum() == original


def test_dmd2s_flat_parameters_are_refused_with_what_to_change(edm, tmp_path):
    trainer = edm()
    next(trainer.model.guidance_model.real_unet.parameters())._is_flat_param = True
    with pytest.raises(RoleError, match=r"several weights in one.*use_orig_params=True"):
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
