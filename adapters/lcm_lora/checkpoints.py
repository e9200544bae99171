"""Checkpoints: accelerate's own for optimizers and random streams, and beside them what was trained, and the handle.

Only trained weights are saved: a student's and a fake score's adapters, not the network below them, and never the
teacher, which the path holds.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from disback_plugin import Handle
from disback_plugin.errors import MismatchError, OptionError

if TYPE_CHECKING:
    from disback_adapters.lcm_lora.training import Trainer

__all__ = ["load", "register", "save"]

STATE = "disback.json"


def register(trainer: Trainer) -> None:
    """Let the accelerator's checkpoints hold the average of the student's weights as well."""
    if trainer.ema is not None:
        trainer.ema.to(trainer.accelerator.device)
        trainer.accelerator.register_for_checkpointing(trainer.ema)


def save(trainer: Trainer, handle: Handle) -> Path:
    """Save a checkpoint, on every process; return its folder."""
    folder = trainer.output / f"checkpoint-{handle.generator_updates}"
    trainer.accelerator.save_state(str(folder))
    if trainer.accelerator.is_main_process:
        for name, weights in _trained(trainer).items():
            save_file({key: value.detach().contiguous() for key, value in weights.items()}, folder / name)
        (folder / STATE).write_text(json.dumps(handle.state_dict()))  # last: a folder without it is not whole
    trainer.accelerator.wait_for_everyone()
    return folder


def load(trainer: Trainer) -> dict[str, Any] | None:
    """Load the checkpoint that the options name; return the handle's state at that moment, or None.

    Raises:
        OptionError: If there is none.
        MismatchError: If it is of other networks, as of another rank. Then nothing was loaded.
    """
    if trainer.options.resume is None:
        return None
    folder = _find(trainer.output, trainer.options.resume)
    loaded = {name: load_file(folder / name) for name in _trained(trainer)}
    for name, weights in _trained(trainer).items():
        _check(name, loaded[name], weights)
    for name, weights in _trained(trainer).items():
        for key, value in weights.items():
            value.data.copy_(loaded[name][key])
    trainer.accelerator.load_state(str(folder))
    state: dict[str, Any] = json.loads((folder / STATE).read_text())
    return state


def _trained(trainer: Trainer) -> dict[str, dict[str, Tensor]]:
    updates = trainer.updates
    return {"student.safetensors": updates.weights, "fake_score.safetensors": updates.fake_score_weights}


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


def _check(name: str, given: dict[str, Tensor], own: dict[str, Tensor]) -> None:
    shapes = {key: tuple(value.shape) for key, value in given.items()}
    expected = {key: tuple(value.shape) for key, value in own.items()}
    if shapes != expected:
        odd = sorted(key for key in shapes.keys() | expected.keys() if shapes.get(key) != expected.get(key))
        raise MismatchError(
            f"{name} with {odd[0]} of shape {shapes.get(odd[0])}, and {len(odd) - 1} other differences",
            expected=f"{expected.get(odd[0])}, as these options make it",
            cure="resume with the --rank, --student and --fake_score of the run that saved it",
        )
