"""DMD2 (arXiv 2405.14867): the trainers of `main/edm/train_edm.py` and `main/train_sd.py`, and their forks.

Teacher and fake score are `real_unet` and `fake_unet` inside one guidance model (`main/edm/edm_guidance.py:27-35`,
`main/sd_guidance.py:45-58`), which accelerate may have wrapped in DDP as a whole (`main/edm/train_edm.py:126-132`,
`main/train_sd.py:229-233`); `optimizer_guidance` steps it, with the discriminator's head if there is one. The unified
model is called twice a step, first for the generator's turn (`main/edm/train_edm.py:237`, `main/train_sd.py:386`): at
its first call, before any step, the trainer is the `self` of `train_one_step`.

What to know of these trainers:

* The generator's turn comes first, at step 0 and then every `dfake_gen_update_ratio` steps. Recording counts updates of
  the fake score, backtracking those of the generator, and the second stage begins at the end of a generator's turn.
* Each turn sets `requires_grad` of the whole guidance model, the teacher with it (`main/sd_unified_model.py:304-310`),
  so a teacher with `requires_grad` is no sign of anything. No optimizer holds the teacher's parameters.
* Both learning-rate schedules go on at every step (`main/train_sd.py:383`); a recording would use up most of their 500
  steps of warm-up, so they are put back after it (`restore=` of `attach`).
* The teacher is part of the trainer's own checkpoint (`accelerator.save_state`). Under `disback run` it is s'_0 there.
* `--use_fp16` keeps the SD teacher in bfloat16, which may round the steps between nodes away: that is logged.
* With a discriminator (`gan_classifier`, `main/edm/train_edm.py:281`, `cls_on_clean_image`, `main/train_sd.py:400`)
  its loss trains s_phi while recording too, unlike Eq. 7: that is logged. It is the trainer's own update of
  s_phi all the same, so the nodes lead to where s_phi really is when the walk begins.
* What it passed to `Accelerator(log_with=...)` gets the numbers of the walk, under the trainer's own step.
"""

from __future__ import annotations

import logging
from typing import Any

from disback_plugin import Adapter, ScoreNetwork, Trackers, Watch, hookimpl
from disback_plugin.errors import RoleError

logger = logging.getLogger(f"disback_plugin.{__name__}")

OPTIMIZERS = ("optimizer_generator", "optimizer_guidance")

WATCH = tuple(
    Watch(
        call,
        frame="train_one_step",
        take="self",
        needs=("model.guidance_model", *OPTIMIZERS),
        knows="tianweiy/DMD2 at 8d8fa55 (March 2025) and its fork SYZhang0805/DisBack at d015b5e",
        saves=("accelerate.accelerator:Accelerator.save_state",),
    )
    for call in (
        "main.edm.edm_unified_model:EDMUniModel.forward",
        "main.sd_unified_model:SDUniModel.forward",
        "sd_unified_model:SDUniModel.forward",  # the official DisBack's fork (main/train_sd.py:9)
    )
)


@hookimpl
def disback_adapter(trainer: Any) -> Adapter | None:
    """Return the roles of a DMD2 `Trainer`; None for anything else.

    Raises:
        RoleError: If its teacher is gone, or its fake score is the teacher's weights plus LoRA layers.
    """
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
    if any(".lora_" in name for name, _ in inner.fake_unet.named_parameters()):
        raise RoleError(
            "a fake score that is LoRA layers on frozen weights",
            expected="one of the teacher's own layers, since s_phi starts as s'_N and s'_N becomes the first target",
            cure="train the whole fake_unet, without LoRA; a loop of your own can have both as adapters on one base "
            "(disback_plugin.weights.lora)",
        )
    if getattr(trainer, "gan_classifier", False) or getattr(trainer, "cls_on_clean_image", False):
        logger.warning(
            "the discriminator's loss goes on training the fake score while it is recorded, which Eq. 7 does not have: "
            "for nodes of the denoising loss alone record without it"
        )
    tracked = bool(getattr(getattr(trainer, "accelerator", None), "trackers", None))
    return Adapter(
        teacher=ScoreNetwork(guidance, prefix="real_unet", role="teacher"),
        fake_score=ScoreNetwork(guidance, prefix="fake_unet", role="fake score"),
        generator_optimizer=trainer.optimizer_generator,
        fake_score_optimizer=trainer.optimizer_guidance,
        plugins={"trackers": lambda: Trackers(trainer.accelerator, step=lambda: int(trainer.step))} if tracked else {},
    )
