"""The teacher's pipeline: checked, loaded, and without the parts whose work is done."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel
from disback_adapters.lcm_lora import pipelines
from disback_adapters.lcm_lora.options import Options
from torch import nn

from disback_plugin import Prediction
from disback_plugin.errors import MismatchError, OptionError, RoleError

__all__ = ["check", "forget_text", "load", "pixels_of"]

TEXT = ("text_encoder", "tokenizer")


def load(options: Options, *, with_text: bool, device: torch.device) -> Any:
    """Load the teacher's pipeline onto a device, all but the VAE, with the text encoders if they are needed.

    Raises:
        RoleError: If it is quantised, or no diffusion model.
        MismatchError: If it predicts something else than it shall.
    """
    config = DiffusionPipeline.load_config(options.teacher)
    for component in {"unet", "transformer"} & config.keys():
        if "quantization_config" in UNet2DConditionModel.load_config(options.teacher, subfolder=component):
            raise _quantised(component)
    unneeded = [] if with_text else [name for name in config if name.startswith(TEXT)]
    pipeline = DiffusionPipeline.from_pretrained(options.teacher, **dict.fromkeys(unneeded))
    half = options.mixed_precision == "bf16" and options.fake_score == options.student == "lora"
    for name, part in pipeline.components.items():
        if isinstance(part, nn.Module):
            part.requires_grad_(False)
            part.to("cpu" if name == "vae" else device, **({"dtype": torch.bfloat16} if half else {}))
    check(pipelines.denoiser(pipeline), options.prediction)
    return pipeline


def check(found: pipelines.Denoiser, prediction: str | None) -> None:
    """Raise unless a denoiser can be a teacher.

    Raises:
        RoleError: If it is quantised or was distilled before.
        MismatchError: If it predicts something else than `prediction`, where that is not None.
    """
    if not all(parameter.is_floating_point() for parameter in found.network.parameters()):
        raise _quantised(found.component)
    embedded = [name for name in ("timestep_cond", "guidance") if name in found.conditions]
    if embedded:
        raise RoleError(
            f"a {found.component} that takes a guidance scale as input ({embedded[0]}), so one distilled before",
            expected="a diffusion model: what a consistency model returns is no score (the paper's appendix A)",
            cure="pass the model that it was distilled from as --teacher, and its LoRA as --student_lora",
        )
    if prediction is not None and Prediction(prediction) is not found.prediction:
        raise MismatchError(
            f"--prediction {prediction}, and a teacher whose scheduler says {found.prediction.value}",
            expected="one of the two",
            cure="leave --prediction out, or correct prediction_type in the teacher's scheduler_config.json",
        )


def forget_text(pipeline: Any) -> None:
    """Let go of the text encoders."""
    pipeline.register_modules(**{name: None for name in pipeline.components if name.startswith(TEXT)})


def pixels_of(pipeline: Any, resolution: int | None) -> int:
    """Return height and width of the images: what was asked for, or the teacher's own.

    Raises:
        OptionError: If they are no multiple of the VAE's factor.
    """
    own = pipelines.denoiser(pipeline).network.config.sample_size * pipeline.vae_scale_factor
    if resolution is not None and resolution % pipeline.vae_scale_factor:
        raise OptionError(
            f"--resolution {resolution}", expected=f"a multiple of {pipeline.vae_scale_factor}", cure=f"pass {own}"
        )
    return resolution or own


def _quantised(component: str) -> RoleError:
    return RoleError(
        f"a quantised {component}",
        expected="floating-point weights, on which LoRA is trained and into which nodes are written",
        cure="load the teacher without quantisation; --mixed_precision bf16 halves its memory",
    )
