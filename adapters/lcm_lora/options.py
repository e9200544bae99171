"""What the trainer may be told: one frozen dataclass, and the command line made from it."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from disback_plugin import schedules
from disback_plugin.errors import OptionError

__all__ = ["LOSSES", "Options", "parser", "read"]

# Generator losses of disback_plugin.kernels, and the weight w(t) of their authors as a function of alpha_t and sigma_t.
LOSSES = {
    "diff_instruct": lambda alpha, sigma: (sigma / alpha) ** 2,
    "vsd": lambda alpha, sigma: sigma**2,
    "dmd": lambda alpha, sigma: 1.0,
}


def _said(text: str, default: Any = dataclasses.MISSING, **more: Any) -> Any:
    return field(default=default, metadata={"help": text, **more})


@dataclass(frozen=True)
class Options:
    """Arguments of the trainer; the same by name on the command line.

    Example:
        >>> Options(teacher="sd15", prompts="prompts.txt", output="out", recipe="sdxl").recording["record"]
        1000
    """

    teacher: str = _said("folder or hub id of the teacher's pipeline")
    prompts: str | Sequence[str] = _said("text file with a prompt a line, or id of a dataset (--prompt_column)")
    output: str = _said("folder for weights, card, path, embeddings and checkpoints")
    prompt_column: str = _said("column of the dataset that holds the prompts", "text")
    student: str = _said("what is trained of the student", "lora", choices=("lora", "full"))
    student_lora: str | None = _said("a LoRA to start from, as latent-consistency/lcm-lora-sdv1-5", None)
    fake_score: str = _said("s_phi and nodes: LoRA on the teacher, or full copies", "lora", choices=("lora", "full"))
    fake_score_layers: str = _said("of s_phi's LoRA; all are the student's", "attention", choices=("attention", "all"))
    prediction: str | None = _said("what the teacher shall predict, if its scheduler is to be held to that", None)
    rank: int = _said("rank of every LoRA", 64)
    timestep: int | None = _said("of the one step; 399 for SDXL (the paper's), else the scheduler's first", None)
    resolution: int | None = _said("of the images, in pixels; the teacher's own unless given", None)
    guidance: float = _said("scale of the teacher's classifier-free guidance; 1 is none", 7.5)
    loss: str = _said("of the generator: Eq. 8 with the weights of its authors", "diff_instruct", choices=tuple(LOSSES))
    steps: int = _said("updates of the generator, recording not counted", 10_000)
    fake_score_updates: int = _said("updates of s_phi for each of the generator", 1)
    batch_size: int = _said("samples of an update, on each process", 4)
    learning_rate: float = _said("of the generator, Adam", 1e-4)
    fake_score_learning_rate: float = _said("of s_phi, Adam", 1e-4)
    ema_decay: float = _said("of the average of the student's weights that is exported; 0 is none", 0.0)
    record: int | None = _said("recording iterations at most; 0 for no DisBack (200)", None)
    every: int | None = _said("updates between two nodes (50)", None)
    schedule: str | None = _said("auto, warm, ramp:K, fixed:b,c,... (auto)", None)
    recipe: str | None = _said("instead of these three: a setting of the paper, sdxl or lcm-lora", None)
    path: str | None = _said("folder of the path; OUTPUT/path unless given", None)
    mixed_precision: str = _said("what frozen weights and forwards are in", "no", choices=("no", "bf16"))
    gradient_checkpointing: bool = _said("trade time for memory", False)
    checkpoint_every: int = _said("generator updates; 0 for never", 0)
    resume: str | None = _said("a checkpoint's folder, or latest", None)
    sample_every: int = _said("generator updates between two grids of samples; 0 for never", 0)
    sample_count: int = _said("samples in a grid, of the first prompts", 4)
    report_to: str | None = _said("a tracker of accelerate: tensorboard, wandb, ...", None)
    seed: int = _said("of weights, prompts and noise", 0)
    push_to_hub: bool = _said("publish the output folder's weights and card", False)
    hub_id: str | None = _said("repository to publish to; the output folder's name unless given", None)

    def __post_init__(self) -> None:
        given = {name: getattr(self, name) for name in ("record", "every", "schedule")}
        both = [name for name, value in given.items() if value is not None]
        if self.recipe is not None and both:
            raise OptionError(
                f"--recipe {self.recipe} and {', '.join(f'--{name}' for name in both)}",
                expected="a recipe, which says all three, or these",
                cure="leave one out",
            )
        for name in ("rank", "steps", "fake_score_updates", "batch_size"):
            if getattr(self, name) < 1:
                raise OptionError(f"--{name} {getattr(self, name)}", expected="at least 1", cure="correct it")
        if not 0 <= self.ema_decay < 1:
            raise OptionError(f"--ema_decay {self.ema_decay}", expected="in [0, 1)", cure="correct it")

    @property
    def recording(self) -> dict[str, Any]:
        """The arguments `record`, `every` and `schedule` of `attach`, as far as they were given."""
        if self.recipe is not None:
            return schedules.recipe(self.recipe).options
        given = {name: getattr(self, name) for name in ("record", "every", "schedule")}
        return {name: value for name, value in given.items() if value is not None}


def parser() -> argparse.ArgumentParser:
    """Return the command line of `student`."""
    made = argparse.ArgumentParser(prog="python -m disback_adapters.lcm_lora student", allow_abbrev=False)
    for each in dataclasses.fields(Options):
        kind = str(each.type).partition(" ")[0]
        more: dict[str, Any] = {"choices": each.metadata["choices"]} if "choices" in each.metadata else {}
        if kind == "bool":
            more["action"] = "store_true"
        else:
            more["type"] = {"int": int, "float": float}.get(kind, str)
        required = each.default is dataclasses.MISSING
        shown = "" if required or each.default in (None, False) else " (%(default)s)"
        default = {} if required else {"default": each.default}
        made.add_argument(f"--{each.name}", required=required, help=each.metadata["help"] + shown, **default, **more)
    return made


def read(arguments: Sequence[str]) -> Options:
    """Return the options that a command line gives.

    Example:
        >>> read(["--teacher", "sd15", "--prompts", "prompts.txt", "--output", "out", "--rank", "8"]).rank
        8
    """
    return Options(**vars(parser().parse_args(arguments)))
