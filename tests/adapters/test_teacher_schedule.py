"""The extension inside diffusers' LCM scripts: a path recorded without a fake score, and a teacher that walks back."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import disback_plugin as disback
from disback_plugin.errors import RoleError
from disback_plugin.launch.run import ScriptRunner

TRAINERS = Path(__file__).parents[1] / "trainers"
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
