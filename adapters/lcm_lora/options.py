"""Declare the trainer's options once: as a frozen dataclass, from which the command line is made."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from disback_plugin import schedules
from disback_plugin.errors import OptionError

__all__ = ["LOSSES", "Options", "read"]

# Generator losses of disback_plugin.kernels, and the weight w(t) of their authors as a function of alpha_t and sigma_t.
LOSSES = {
    "diff_instruct": lambda alpha, sigma: (sigma / alpha) ** 2,
    "vsd": lambda alpha, sigma: sigma**2,
    "dmd": lambda alpha, sigma: 1.0,
}


def _option(help: str, default: Any = dataclasses.MISSING, choices: Sequence[str] | None = None) -> Any:
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass(frozen=True)
class Options:
    """Hold the arguments of the trainer, which have the same names on the command line.

    Raises:
        OptionError: If a value is out of its domain, or a recipe is given with one of the options that it sets.

    Example:
        >>> Options(teacher="sd15", prompts="prompts.txt", output="out", recipe="sdxl").recording["record"]
        1000
    """

    teacher: str = _option("folder or hub id of the teacher's pipeline")
    prompts: str | Sequence[str] = _option("text file with one prompt a line")
    output: str = _option("folder for weights, card, path, embeddings and checkpoints")
    student: str = _option("train a LoRA of the student, or all of its weights", "lora", ("lora", "full"))
    student_lora: str | None = _option("a LoRA to start from, as latent-consistency/lcm-lora-sdv1-5", None)
    fake_score: str = _option("s_phi and nodes as LoRA on the teacher, or as full copies", "lora", ("lora", "full"))
    fake_score_layers: str = _option("layers of s_phi's LoRA; all are the student's", "attention", ("attention", "all"))
    prediction: str | None = _option("the prediction that the teacher's scheduler must state, to be checked", None)
    rank: int = _option("rank of every LoRA", 64)
    timestep: int | None = _option("timestep of the one step; 399 for SDXL (the paper's), else the first", None)
    resolution: int | None = _option("height and width of the images in pixels; the teacher's own unless given", None)
    guidance: float = _option("scale of the teacher's classifier-free guidance; 1 is none", 7.5)
    loss: str = _option("generator loss: Eq. 8 with the weights of its authors", "diff_instruct", tuple(LOSSES))
    steps: int = _option("updates of the generator, recording not counted", 10_000)
    fake_score_updates: int = _option("updates of s_phi for each of the generator", 1)
    batch_size: int = _option("samples of an update, on each process", 4)
    learning_rate: float = _option("learning rate of the generator's Adam", 1e-4)
    fake_score_learning_rate: float = _option("learning rate of s_phi's Adam", 1e-4)
    ema_decay: float = _option("decay of the average of the student's weights that is exported; 0 is none", 0.0)
    record: int | None = _option("recording iterations at most; 0 for no DisBack (200)", None)
    every: int | None = _option("recording iterations between two nodes (50)", None)
    schedule: str | None = _option("auto, warm, ramp:K, fixed:b,c,... (auto)", None)
    recipe: str | None = _option("instead of these three: a setting of the paper, sdxl or lcm-lora", None)
    path: str | None = _option("folder of the path; OUTPUT/path unless given", None)
    mixed_precision: str = _option("precision of frozen weights and forwards", "no", ("no", "bf16"))
    gradient_checkpointing: bool = _option("trade time for memory", False)
    checkpoint_every: int = _option("generator updates between two checkpoints; 0 for none", 0)
    resume: str | None = _option("folder of a checkpoint, or latest", None)
    sample_every: int = _option("generator updates between two grids of samples; 0 for none", 0)
    sample_count: int = _option("samples in a grid, of the first prompts", 4)
    report_to: str | None = _option("a tracker of accelerate: tensorboard, wandb, ...", None)
    seed: int = _option("seed of weights, prompts and noise", 0)
    push_to_hub: bool = _option("publish the output folder's weights and card", False)
    hub_id: str | None = _option("repository to publish to; the output folder's name unless given", None)

    def __post_init__(self) -> None:
        if self.recipe is not None and (given := self._given()):
            raise OptionError(
                f"--recipe {self.recipe} and {', '.join(f'--{name}' for name in given)}",
                expected="a recipe, which sets all three, or these",
                cure="omit one",
            )
        for name in ("rank", "steps", "fake_score_updates", "batch_size"):
            if getattr(self, name) < 1:
                raise OptionError(f"--{name} {getattr(self, name)}", expected="at least 1", cure="correct it")
        if not 0 <= self.ema_decay < 1:
            raise OptionError(f"--ema_decay {self.ema_decay}", expected="a number in [0, 1)", cure="correct it")
        if self.student == "full" and self.student_lora is not None:
            raise OptionError("--student full and --student_lora", expected="one of them", cure="omit one")

    @property
    def recording(self) -> dict[str, Any]:
        """Return the arguments `record`, `every` and `schedule` of `attach` that were given."""
        return self._given() if self.recipe is None else schedules.recipe(self.recipe).options

    def _given(self) -> dict[str, Any]:
        values = {name: getattr(self, name) for name in ("record", "every", "schedule")}
        return {name: value for name, value in values.items() if value is not None}


def read(arguments: Sequence[str]) -> Options:
    """Return the options of a command line.

    Example:
        >>> read(["--teacher", "sd15", "--prompts", "prompts.txt", "--output", "out", "--rank", "8"]).rank
        8
    """
    parser = argparse.ArgumentParser(prog="python -m disback_adapters.lcm_lora student", allow_abbrev=False)
    for each in dataclasses.fields(Options):
        help, kind = each.metadata["help"], str(each.type).partition(" ")[0]
        if each.default is dataclasses.MISSING:
            parser.add_argument(f"--{each.name}", required=True, help=help)
        elif kind == "bool":
            parser.add_argument(f"--{each.name}", action="store_true", help=help)
        else:
            parser.add_argument(
                f"--{each.name}",
                type={"int": int, "float": float}.get(kind, str),
                choices=each.metadata["choices"],
                default=each.default,
                help=help if each.default is None else f"{help} (%(default)s)",
            )
    return Options(**vars(parser.parse_args(arguments)))
