"""Measure a student while it trains: the Frechet distance of its samples from the teacher's, for prompts held out.

The features are a timm model's, so that the distance is NOT the FID. The references are samples of the original teacher
under its guidance, in many steps: no data set is needed, and the teacher is what the student is distilled from.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from torch import Tensor

from disback_plugin import metrics, noise

if TYPE_CHECKING:
    from disback_adapters.lcm_lora.training import Trainer

STEPS = 25  # of the teacher's sampler


class FrechetDistance:
    """A function for `attach(evaluate=)`: it draws the same noise for the same prompts at each call.

    Args:
        trainer: The trainer; the last `evaluate_count` of its prompts are the held-out ones.
        model: Name of the timm model, whose weights are downloaded.

    Raises:
        OptionError: If timm has no such model.
    """

    def __init__(self, trainer: Trainer, model: str) -> None:
        self._trainer, device = trainer, trainer.accelerator.device
        self._features = metrics.features(model, device=device)
        self._references: Tensor | None = None
        count, first = trainer.options.evaluate_count, trainer.prompts
        self._prompts = range(first, first + count)
        self._z = torch.randn(
            (count, *trainer.shape[1:]), generator=torch.Generator().manual_seed(trainer.options.seed)
        )

    def __call__(self) -> dict[str, float]:
        """Return the distance on the main process, and nothing on the others."""
        if not self._trainer.accelerator.is_main_process:
            return {}
        if self._references is None:
            self._references = self._extract(teacher=True)
        with self._trainer.averaged():
            samples = self._extract(teacher=False)
        return {"distance_frechet": metrics.frechet_distance(samples, self._references)}

    def _extract(self, *, teacher: bool) -> Tensor:
        """Return the features of samples, some prompts at a time."""
        trainer, found = self._trainer, []
        for rows in torch.arange(len(self._z)).split(trainer.options.batch_size):
            device = trainer.accelerator.device
            conditions = trainer.embeddings.rows([self._prompts[row] for row in rows.tolist()])
            conditions = {name: value.to(device) for name, value in conditions.items()}
            z = self._z[rows].to(device)
            with torch.no_grad(), trainer.accelerator.autocast():
                x = (
                    teacher_samples(trainer, z, conditions)
                    if teacher
                    else trainer.roles.student.generate(z, conditions)
                )
                found.append(self._features(trainer.decode(x).clamp(-1, 1)))
        return torch.cat(found)


def teacher_samples(trainer: Trainer, z: Tensor, conditions: dict[str, Tensor]) -> Tensor:
    """Return the teacher's samples from unit noise z under its guidance: DDIM, or Euler for flow matching."""
    teacher, config = trainer.roles.teacher, trainer.pipeline.scheduler.config
    if isinstance(teacher.noise, noise.RectifiedFlow):
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(config, use_dynamic_shifting=False)
    else:
        scheduler = DDIMScheduler.from_config(config, clip_sample=False)
    scheduler.set_timesteps(STEPS, device=z.device)
    x = z
    for time in scheduler.timesteps:
        output, guidance = trainer.run_teacher(x, (time / teacher.time_scale).expand(len(x)), conditions)
        if guidance is not None:
            unconditional, conditional = output.chunk(2)
            output = unconditional + guidance * (conditional - unconditional)
        x = scheduler.step(output, time, x, return_dict=False)[0]
    return x
