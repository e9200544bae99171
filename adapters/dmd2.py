"""Adapt DMD2 (arXiv 2405.14867): the trainers of `main/edm/train_edm.py` and `main/train_sd.py`, and their forks.

Teacher and fake score are `real_unet` and `fake_unet` inside one guidance model (`main/edm/edm_guidance.py:27-35`,
`main/sd_guidance.py:45-58`), which accelerate may have wrapped in DDP as a whole (`main/edm/train_edm.py:126-132`,
`main/train_sd.py:229-233`); `optimizer_guidance` steps it, with the discriminator's head if there is one. The unified
model is called twice a step, first for the generator's turn (`main/edm/train_edm.py:237`, `main/train_sd.py:386`): at
its first call, before any step, the trainer is the `self` of `train_one_step`.

Properties of these trainers that matter here:

* The generator's turn comes first, at step 0 and then every `dfake_gen_update_ratio` steps. Recording counts updates of
  the fake score, backtracking those of the generator, and the second stage begins at the end of a generator's turn.
* Each turn sets `requires_grad` of the whole guidance model, the teacher with it (`main/sd_unified_model.py:304-310`),
  so `requires_grad` does not tell the teacher from the fake score. No optimizer holds the teacher's parameters.
* Both learning-rate schedulers advance at every step (`main/train_sd.py:383`). A recording would use up most of their
  500 steps of warm-up, so `attach` resets them after it.
* The teacher is part of the trainer's own checkpoint: of `accelerator.save_state`, or with `--fsdp` of a full state
  dict without optimizers (`main/train_sd.py:281-292`). Under `disback run` it is s'_0 there.
* Its FSDP configurations have `fsdp_use_orig_params: false` (`fsdp_configs/fsdp_1node_debug.yaml:15`,
  `main/sdxl/create_sdxl_fsdp_configs.py:21`), which is refused: set it to true there.
* `--use_fp16` keeps the SD teacher in bfloat16, which may round the differences between nodes away; a warning says so.
* With a discriminator (`gan_classifier`, `main/edm/train_edm.py:281`, `cls_on_clean_image`, `main/train_sd.py:400`)
  the adversarial loss trains s_phi during the recording as well, unlike Eq. 7; a warning says so. The nodes still end
  at the s_phi with which backtracking begins.
* The trackers that the trainer passed to `Accelerator(log_with=...)` receive DisBack's values under the trainer's step.

flash-diffusion (gojasper/flash-diffusion) is the nearest trainer that cannot have DisBack. Its student takes the fake
score's place in the DMD term (`src/flash/models/flash/flash_diffusion_model.py:446`), so s'_N would overwrite it.
"""

from __future__ import annotations

import logging
from typing import Any

from disback_plugin import Adapter, ScoreNetwork, Watch, hookimpl
from disback_plugin.errors import RoleError
from disback_plugin.plugins import Trackers

logger = logging.getLogger(f"disback_plugin.{__name__}")

OPTIMIZERS = ("optimizer_generator", "optimizer_guidance")

WATCH = tuple(
    Watch(
        call,
        frame="train_one_step",
        take="self",
        needs=("model.guidance_model.fake_unet", *OPTIMIZERS),
        knows="tianweiy/DMD2 at 8d8fa55 (March 2025) and its fork SYZhang0805/DisBack at d015b5e",
        saves=("__main__:Trainer.save",),
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
        RoleError: If the trainer has no teacher, or is a flash-diffusion model.
    """
    flash = hasattr(trainer, "teacher_denoiser") and hasattr(trainer, "student_denoiser")
    if flash and not hasattr(trainer, "fake_score"):
        raise RoleError(
            "a flash-diffusion model, which has no fake score: its student takes the fake score's place in the DMD "
            "term, and s'_N would overwrite the student",
            expected="a network s_phi of its own, trained on the generator's samples",
            cure="train with score distillation: DMD2, SiD, Diff-Instruct, FastGen's DMD2, or your own loop with a "
            "fake score",
        )
    guidance = getattr(getattr(trainer, "model", None), "guidance_model", None)
    if guidance is None or not all(hasattr(trainer, name) for name in OPTIMIZERS):
        return None
    if getattr(getattr(trainer, "args", None), "gan_alone", False):
        raise RoleError(
            "a DMD2 trainer without a teacher, as --gan_alone makes it",
            expected="model.guidance_model.real_unet",
            cure="train without --gan_alone, which has no score distillation that DisBack could help",
        )
    if getattr(trainer, "gan_classifier", False) or getattr(trainer, "cls_on_clean_image", False):
        logger.warning(
            "the discriminator's loss also trains the fake score during the recording, unlike Eq. 7; switch the "
            "discriminator off to record nodes of the denoising loss alone"
        )
    tracked = bool(getattr(getattr(trainer, "accelerator", None), "trackers", None))
    return Adapter(
        teacher=ScoreNetwork(guidance, prefix="real_unet", role="teacher"),
        fake_score=ScoreNetwork(guidance, prefix="fake_unet", role="fake score"),
        generator_optimizer=trainer.optimizer_generator,
        fake_score_optimizer=trainer.optimizer_guidance,
        plugins={"trackers": lambda: Trackers(trainer.accelerator, step=lambda: int(trainer.step))} if tracked else {},
    )
