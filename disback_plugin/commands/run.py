"""`disback run`: the command line of `launch`."""

from __future__ import annotations

import argparse

from disback_plugin.commands import Commands, command
from disback_plugin.launch import command_line

__all__ = ["add"]


def add(commands: Commands[argparse.ArgumentParser]) -> None:
    """Add `disback run` to the commands."""
    run = command(
        commands,
        "run",
        help="run a trainer's script with DisBack, its files untouched",
        description="Run a Python script with both stages of DisBack on the trainer in it, whose files are not "
        "touched. Under torchrun and accelerate launch use `-m disback_plugin.launch` with the same arguments.",
        examples="""
        disback run --adapter sid --path runs/path sid_train.py --outdir runs ...
        torchrun --nproc_per_node=8 -m disback_plugin.launch --adapter dmd2 --path runs/path main/edm/train_edm.py ...
        """,
    )
    command_line.add_arguments(run)
    run.set_defaults(run=command_line.launch)
