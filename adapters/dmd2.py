"""DMD2 (arXiv 2405.14867): the trainers of `main/train_sd.py` and `main/edm/train_edm.py`.

Both keep teacher and fake score as `real_unet` and `fake_unet` inside one guidance model, which accelerate may have
wrapped in DDP, and step the whole of it with `optimizer_guidance` (`main/train_sd.py:229`,
`main/edm/train_edm.py:126`).
"""

from __future__ import annotations

from typing import Any

from disback_plugin import Adapter, ScoreNetwork, hookimpl
from disback_plugin.errors import RoleError

OPTIMIZERS = ("optimizer_generator", "optimizer_guidance")


@hookimpl
def disback_adapter(trainer: Any) -> Adapter | None:
    """Return the roles of a DMD2 `Trainer`; None for anything else."""
    guidance = getattr(getattr(trainer, "model", None), "guidance_model", None)
    if guidance is None or not all(hasattr(trainer, name) for name in OPTIMIZERS):
        return None
    inner = getattr(guidance, "module", guidance)
    if not hasattr(inner, "real_unet"):
        raise RoleError(
            "a DMD2 trainer without model.guidance_model.real_unet, as --gan_alone leaves it",
            expected="a teacher",
            cure="train without --gan_alone: there is no score distillation that DisBack could help",
        )
    return Adapter(
        teacher=ScoreNetwork(guidance, prefix="real_unet", role="teacher"),
        fake_score=ScoreNetwork(guidance, prefix="fake_unet", role="fake score"),
        generator_optimizer=trainer.optimizer_generator,
        fake_score_optimizer=trainer.optimizer_guidance,
    )
