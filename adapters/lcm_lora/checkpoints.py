"""Checkpoints: accelerate's own for optimizers and random streams, and beside them what was trained, and the handle.

Only trained weights are saved: a student's and a fake score's adapters, not the network below them, and never the
teacher, which the path holds.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file, save_file

from disback_plugin import Handle, ScoreNetwork
from disback_plugin.errors import OptionError

if TYPE_CHECKING:
    from disback_adapters.lcm_lora.training import Trainer

__all__ = ["load", "register", "save"]

STATE = "disback.json"


def register(trainer: Trainer) -> None:
    """Let the accelerator's checkpoints hold the average of the student's weights as well."""
    if trainer.ema is not None:
        trainer.ema.to(trainer.accelerator.device)
        trainer.accelerator.register_for_checkpointing(trainer.ema)


def save(trainer: Trainer, handle: Handle) -> None:
    """Save a checkpoint; on every process."""
    folder = trainer.output / f"checkpoint-{handle.generator_updates}"
    trainer.accelerator.save_state(str(folder))
    if trainer.accelerator.is_main_process:
        for name, weights in _trained(trainer).items():
            save_file({key: value.contiguous() for key, value in weights.state_dict().items()}, folder / name)
        (folder / STATE).write_text(json.dumps(handle.state_dict()))  # last: a folder without it is not whole
    trainer.accelerator.wait_for_everyone()


def load(trainer: Trainer) -> dict[str, Any] | None:
    """Load the checkpoint that the options name; return the handle's state at that moment, or None.

    Raises:
        OptionError: If there is none.
        MismatchError: If it is of another teacher, or of adapters of another rank.
    """
    if trainer.options.resume is None:
        return None
    folder = _find(trainer.output, trainer.options.resume)
    for name, weights in _trained(trainer).items():
        weights.load_state_dict(load_file(folder / name))
    trainer.accelerator.load_state(str(folder))
    state: dict[str, Any] = json.loads((folder / STATE).read_text())
    return state


def _trained(trainer: Trainer) -> dict[str, ScoreNetwork]:
    cast = trainer.cast
    return {"student.safetensors": cast.student.role.weights, "fake_score.safetensors": cast.fake_score.weights}


def _find(output: Path, name: str) -> Path:
    if name == "latest":
        whole = [file.parent for file in output.glob(f"checkpoint-*/{STATE}")]
        folder = max(whole, key=lambda each: int(each.name.partition("-")[2]), default=output / "checkpoint-*")
    else:
        folder = Path(name)
    if not (folder / STATE).exists():
        raise OptionError(
            f"--resume {name}, and no {STATE} in {folder}",
            expected="a folder that --checkpoint_every wrote",
            cure="correct the name, or leave --resume out",
        )
    return folder
