"""Adapt diffusers' LCM scripts, and train LCM-LoRA students by score distillation. These are two separate things:

* `student` is the paper's own setting (appendix A): an LCM-LoRA is the one-step generator of Eq. 8. It is a trainer of
  this package: `accelerate launch -m disback_adapters.lcm_lora student --teacher ... --output ...`
* `teacher_schedule` is an extension inside diffusers' scripts and is **not Eq. 8**, because their teacher solves an ODE
  on noised data and no score difference is taken. `disback run --adapter lcm_lora train_lcm_distill_lora_sd_wds.py ...`
  starts that teacher as s'_{N-1}, which was fitted to the student's own samples, and moves it back to s'_0. The paper
  does not do this, and whether it helps is not known.

The scripts (`examples/consistency_distillation` of huggingface/diffusers) keep everything in local variables of `main`:
`teacher_unet` (`train_lcm_distill_lora_sd_wds.py:961`), the student `unet` (:1013) and its `optimizer` (:1108);
`train_lcm_distill_lora_sdxl_wds.py`, `train_lcm_distill_sd_wds.py` and `train_lcm_distill_sdxl_wds.py` are alike.
They have no fake score. During the recording a copy of the teacher is fitted to the student's samples for the script's
prompts, while the student is held still (`teacher_schedule`). The adapter attaches at the first `backward` (:1399). A
script that was stopped starts backtracking again, on the path that it recorded.
In `train_lcm_distill_lora_sdxl.py` the teacher is the student with its LoRA off (:1297), so a node would change the
student: that script, and every other consistency distillation whose variables differ, is refused.
"""

from __future__ import annotations

import logging
from importlib import import_module
from typing import Any

from disback_plugin import Adapter, Watch, hookimpl
from disback_plugin.errors import RoleError

logger = logging.getLogger(f"disback_plugin.{__name__}")

NEEDS = ("teacher_unet", "unet", "optimizer", "noise_scheduler")

WATCH = Watch(
    "accelerate.accelerator:Accelerator.backward",
    frame="main",
    needs=NEEDS,
    knows="the LCM scripts of diffusers at 58eb52c (August 2026) that have a teacher_unet",
)


@hookimpl
def disback_adapter(trainer: Any) -> Adapter | None:
    """Return the roles in the variables of an LCM script's `main`, as attributes; None for anything else.

    Raises:
        RoleError: If it is a consistency distillation without the variables of these scripts.
    """
    known, other = (("teacher_unet", "unet"), ("fake_unet", "fake_score"))
    if not all(hasattr(trainer, name) for name in known) or any(hasattr(trainer, name) for name in other):
        return None
    missing = [name for name in NEEDS if not hasattr(trainer, name)]
    if missing:
        raise RoleError(
            f"a consistency distillation (LCM), which has no fake score, without {', '.join(missing)}",
            expected=f"a trainer with a fake score, or a script of diffusers that has {', '.join(NEEDS)}",
            cure="train with score distillation, as DMD2, SiD or `python -m disback_adapters.lcm_lora student`",
        )
    logger.warning(
        "a schedule moves the teacher of a consistency distillation here; its loss is not Eq. 8, and the paper does "
        "not do this. The paper's LCM-LoRA is `python -m disback_adapters.lcm_lora student`"
    )
    return Adapter(
        teacher=trainer.teacher_unet,
        fake_score=None,
        generator_optimizer=trainer.optimizer,
        fake_score_optimizer=None,
        # The import loads torch and diffusers, which an adapter must not load before it is used.
        stand_in=lambda: import_module(f"{__name__}.teacher_schedule").StandIn(trainer),
    )
