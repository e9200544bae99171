"""The extension inside diffusers' LCM scripts: a path recorded without a fake score, and a teacher that walks back."""

from __future__ import annotations

import copy
import gc
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn

import disback_plugin as disback
from disback_plugin.errors import RoleError
from disback_plugin.launch.run import ScriptRunner

TRAINERS = Path(__file__).parents[1] / "trainers"
SMALL = {
    "sample_size": 8, "block_out_channels": (8, 8), "norm_num_groups": 4, "cross_attention_dim": 8,
    "attention_head_dim": 4, "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}  # fmt: skip
PLAN = {"record": 3, "every": 1, "schedule": "fixed:1,1"}


def run(out, **options):
    """Run the script, alone or under `disback run`; return its losses and its networks."""
    out.mkdir(exist_ok=True)
    script, arguments = TRAINERS / "lcm_train.py", ["--output_path", str(out)]
    if options:
        ScriptRunner("lcm_lora", **{"path": out / "path"} | options).run(script, arguments)
    else:
        subprocess.run([sys.executable, script, *arguments], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    return json.loads((out / "losses.json").read_text()), torch.load(out / "networks.pt", weights_only=True)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return run(tmp_path_factory.mktemp("plain"))


@pytest.mark.slow
def test_the_script_goes_through_both_stages_and_ends_on_its_teacher(plain, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    losses, networks = run(tmp_path / "a", path=tmp_path / "path", **PLAN)
    assert "its loss is not Eq. 8" in caplog.text
    assert "recorded node 3 at iteration 3" in caplog.text
    assert "ended: <disback done: position 0" in caplog.text
    disback.DegradationPath(tmp_path / "path").verify()
    assert all(torch.equal(networks["teacher"][name], value) for name, value in plain[1]["teacher"].items())
    assert losses[0] == plain[0][0], "the first batch, before any step: the same numbers were drawn"
    assert losses[1] != plain[0][1], "the student stands still"

    caplog.clear()
    again, _ = run(tmp_path / "b", path=tmp_path / "path", **PLAN)
    assert "recorded node" not in caplog.text, "a path that is there is walked at once"
    assert "ended: <disback done: position 0" in caplog.text
    assert again[0] == losses[0]


@pytest.mark.slow
def test_without_recording_the_script_is_its_own_bit_for_bit(plain, tmp_path):
    losses, networks = run(tmp_path, record=0)
    assert losses == plain[0]
    assert all(torch.equal(networks["student"][name], value) for name, value in plain[1]["student"].items())


def test_a_script_without_a_teacher_of_its_own_is_still_refused():
    trainer = SimpleNamespace(teacher_unet=nn.Linear(1, 1), unet=nn.Linear(1, 1))
    with pytest.raises(RoleError, match="no fake score"):
        disback.attach(trainer, path="p")


def trainer_of_a_script():
    from diffusers import DDPMScheduler

    unet = UNet2DConditionModel(**SMALL)
    return SimpleNamespace(
        teacher_unet=copy.deepcopy(unet).requires_grad_(False),
        unet=unet,
        optimizer=torch.optim.AdamW(unet.parameters()),
        noise_scheduler=DDPMScheduler(),
    )


def hooks_on(trainer):
    return len(trainer.optimizer._optimizer_step_pre_hooks), len(trainer.unet._forward_pre_hooks)


def step(trainer):
    x, t, c = torch.randn(2, 4, 8, 8), torch.tensor([10, 500]), torch.randn(2, 5, 8)
    trainer.unet(x, t, encoder_hidden_states=c)[0].square().mean().backward()
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()


def copies(trainer):
    return sum(type(each) is UNet2DConditionModel for each in gc.get_objects())


def test_without_recording_no_copy_of_the_teacher_is_made(tmp_path):
    trainer = trainer_of_a_script()
    before = copies(trainer)
    with disback.attach(trainer, adapter="lcm_lora", record=0) as handle:
        step(trainer)
        assert copies(trainer) == before
        assert hooks_on(trainer) == (1, 0), "DisBack's own"
        assert handle.phase == "done"
    assert hooks_on(trainer) == (0, 0)


@pytest.mark.parametrize("steps", [1, 3])
def test_nothing_goes_on_after_detach(tmp_path, steps):
    trainer = trainer_of_a_script()
    handle = disback.attach(trainer, adapter="lcm_lora", path=tmp_path, record=2, every=1, schedule="fixed:4")
    for _ in range(steps):
        step(trainer)
    assert handle.fake_score_updates == min(steps, 2)
    assert handle.phase == ("recording" if steps == 1 else "backtracking")
    handle.detach()
    assert hooks_on(trainer) == (0, 0)
    step(trainer)
    assert handle.fake_score_updates == min(steps, 2)
