"""The stand-ins of public trainers in `trainers/`, run in this process as the command line runs them."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, GradientState

from disback_plugin import cli
from disback_plugin.weights.network import ScoreNetwork

TRAINERS = Path(__file__).parent / "trainers"
# A recording of six iterations with three nodes, and a schedule of two generator updates a node.
PLAN = ("--record", "6", "--every", "2", "--codec", "exact", "--schedule", "fixed:2,2")


def forget_trainers():
    """Remove what a script leaves in this process: its modules, whose names the stand-ins share, and accelerate's."""
    for name, module in list(sys.modules.items()):
        if TRAINERS in Path(getattr(module, "__file__", None) or "/").parents:
            del sys.modules[name]
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def disback_run(*arguments):
    """Return the exit code of `disback run`, that of the script included."""
    try:
        return cli.main(["run", *map(str, arguments)])
    except SystemExit as reason:
        return reason.code
    finally:
        forget_trainers()


def run_plain(script, *arguments):
    """Run a script as it is, without DisBack."""
    argv = sys.argv[:]
    sys.argv[:] = [str(script), *map(str, arguments)]
    try:
        runpy.run_path(str(script), run_name="__main__")
    finally:
        sys.argv[:] = argv
        forget_trainers()


def python(*arguments, cwd, **environment):
    """Return the exit code and the standard error of a process of its own, which finds the trainers' modules."""
    variables = os.environ | {"PYTHONPATH": str(TRAINERS), "OMP_NUM_THREADS": "1"} | environment
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=variables, cwd=cwd)
    return done.returncode, done.stderr


def networks(folder):
    """Return the states of teacher, fake score and generator at the end of a run."""
    found = torch.load(folder / "networks.pt", weights_only=False)
    forget_trainers()
    return [ScoreNetwork(network).state_dict() for network in found]
