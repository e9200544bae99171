"""Adapters are found through their entry points, a third party's exactly as our own."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn
from worlds import Run, difference

import disback_plugin as disback
from disback_plugin.errors import OptionError, RoleError
from disback_plugin.weights import ScoreNetwork


class Dmd2Trainer:
    """A stand-in with the names of DMD2's trainers (main/train_sd.py:229-260, main/sd_guidance.py:45-58)."""

    def __init__(self, wrapper=lambda module: module):
        self.run = Run()
        guidance = nn.Module()
        guidance.real_unet, guidance.fake_unet = self.run.teacher, self.run.fake_score
        guidance.cls_pred_branch = nn.Linear(2, 1)
        self.model = nn.Module()
        self.model.guidance_model = wrapper(guidance)
        self.model.feedforward_model = self.run.generator
        self.optimizer_generator = self.run.optimizer_g
        # The guidance optimizer steps the discriminator's head too.
        trained = [p for p in guidance.parameters() if p.requires_grad]
        self.optimizer_guidance = self.run.optimizer_f = torch.optim.AdamW(trained, lr=1e-2)

    def train(self, steps):
        for step in range(steps):
            if step % 2 == 0:  # dfake_gen_update_ratio = 2, the generator's turn first
                self.run.generator_step()
            # sd_unified_model.py:304-310 flips the flags of the whole guidance model, the teacher's with them
            self.model.guidance_model.requires_grad_(True)
            self.run.fake_step()


@pytest.mark.parametrize("adapter", ["dmd2", None])
@pytest.mark.parametrize("wrapper", [lambda m: m, nn.DataParallel, lambda m: torch.compile(m, backend="eager")])
def test_a_dmd2_trainer_needs_one_statement(tmp_path, adapter, wrapper):
    trainer = Dmd2Trainer(wrapper)
    original = ScoreNetwork(trainer.run.teacher).fingerprint()
    with disback.attach(
        trainer, adapter=adapter, path=tmp_path, record=4, every=2, schedule=disback.schedules.Fixed(2)
    ) as handle:
        generator = {k: v.clone() for k, v in trainer.run.generator.state_dict().items()}
        trainer.train(4)
        assert difference(dict(trainer.run.generator.state_dict()), generator) == []
        trainer.train(2)
        assert (handle.phase, handle.position) == ("backtracking", 1.0)
        trainer.train(6)
        assert handle.phase == "done"
    assert ScoreNetwork(trainer.run.teacher).fingerprint() == original


def test_a_dmd2_trainer_without_a_teacher_is_refused_with_the_reason(tmp_path):
    trainer = Dmd2Trainer()
    del trainer.model.guidance_model.real_unet
    with pytest.raises(RoleError, match="--gan_alone"):
        disback.attach(trainer, path=tmp_path)


def test_an_unknown_trainer_names_who_was_asked(tmp_path):
    with pytest.raises(RoleError, match=r"builtins\.dict that no adapter understands \(asked .*dmd2"):
        disback.attach({}, path=tmp_path)


def test_an_unknown_adapter_lists_the_installed_ones(tmp_path):
    with pytest.raises(OptionError, match=r"adapter='dmd3'; expected one of \[.*'dmd2'"):
        disback.attach(Dmd2Trainer(), adapter="dmd3", path=tmp_path)


@pytest.mark.parametrize("arguments", [{}, {"adapter": "dmd2"}, {"teacher": nn.Linear(1, 1)}])
def test_half_of_the_roles_are_refused(tmp_path, arguments):
    with pytest.raises(OptionError, match="one or the other, completely"):
        disback.attach(**arguments, path=tmp_path)


def test_a_trainer_and_roles_are_one_too_many(tmp_path):
    trainer = Dmd2Trainer()
    with pytest.raises(OptionError, match=r"attach\(trainer, teacher, "):
        disback.attach(trainer, **trainer.run.roles(), path=tmp_path)


def third_party(tmp_path, monkeypatch, name, source):
    """Install a distribution with one adapter, as pip would leave it."""
    (tmp_path / f"{name}_adapter.py").write_text(source)
    info = tmp_path / f"disback_{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: disback-{name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[disback.adapters]\n{name} = {name}_adapter\n")
    monkeypatch.syspath_prepend(str(tmp_path))


MINE = """
from disback_plugin import Adapter, hookimpl

@hookimpl
def disback_adapter(trainer):
    if isinstance(trainer, dict) and "s_theta" in trainer:
        return Adapter(trainer["s_theta"], trainer["s_phi"], trainer["opt_g"], trainer["opt_f"])
"""


def test_a_third_partys_adapter_is_found_like_our_own(tmp_path, monkeypatch):
    third_party(tmp_path, monkeypatch, "mine", MINE)
    run = Run()
    trainer = {"s_theta": run.teacher, "s_phi": run.fake_score, "opt_g": run.optimizer_g, "opt_f": run.optimizer_f}
    with disback.attach(trainer, path=tmp_path / "path", record=1, every=1) as handle:
        run.steps(2)
        assert handle.generator_updates == 1


def test_a_broken_adapter_stops_nobody_who_did_not_ask_for_it(tmp_path, monkeypatch):
    third_party(tmp_path, monkeypatch, "broken", "raise RuntimeError('no GPU here')")
    with disback.attach(Dmd2Trainer(), path=tmp_path / "path", record=1, every=1):
        pass
    with pytest.raises(RoleError, match=r"broken of disback-broken \(RuntimeError: no GPU here\)"):
        disback.attach({}, path=tmp_path / "none")


def test_only_the_adapter_that_is_asked_for_is_imported(tmp_path, monkeypatch):
    third_party(tmp_path, monkeypatch, "other", "raise RuntimeError('imported')")
    with disback.attach(Dmd2Trainer(), adapter="dmd2", path=tmp_path / "path", record=1, every=1):
        assert "other_adapter" not in sys.modules
