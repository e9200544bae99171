"""LCM and LCM-LoRA, two things with two names.

* `student`, the paper's own setting (appendix A): an LCM-LoRA is the one-step generator of score distillation, Eq. 8;
  a trainer of our own, `accelerate launch -m disback_adapters.lcm_lora student --teacher ... --output ...`
* `teacher_schedule`, an extension inside diffusers' scripts, and **not Eq. 8**: there the teacher solves an ODE on
  noised data, and no score difference is taken. `disback run --adapter lcm_lora train_lcm_distill_lora_sd_wds.py ...`
  lets that teacher begin as s'_{N-1}, which knows the student's own samples, and walk back. Whether this helps is not
  known; the paper does not do it.

The scripts (`examples/consistency_distillation` of huggingface/diffusers) have all in local variables of `main`:
`teacher_unet` (`train_lcm_distill_lora_sd_wds.py:961`), the student `unet` (:1013) and its `optimizer` (:1108);
`train_lcm_distill_lora_sdxl_wds.py`, `train_lcm_distill_sd_wds.py` and `train_lcm_distill_sdxl_wds.py` are alike.
There is no fake score: a copy of the teacher is one for as long as the path is recorded (`teacher_schedule`), on the
student's samples for the script's own prompts, while the student is held still. The moment is the first `backward`
(:1399). A script that is stopped begins the walk anew, on the path that it has.
In `train_lcm_distill_lora_sdxl.py` the teacher is the student with its adapter off (:1297): it is not supported.
"""

from __future__ import annotations

import logging
from importlib import import_module
from typing import Any

from disback_plugin import Adapter, Watch, hookimpl

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
    """Return the roles in the variables of an LCM script's `main`, as attributes; None for anything else."""
    if not all(hasattr(trainer, name) for name in NEEDS) or hasattr(trainer, "fake_unet"):
        return None
    logger.warning(
        "the teacher of a consistency distillation walks back by a schedule here; its loss is not Eq. 8, and the paper "
        "does not do this. The paper's LCM-LoRA is `python -m disback_adapters.lcm_lora student`"
    )
    # Imports torch and diffusers, which an adapter must not.
    recording = import_module(f"{__name__}.teacher_schedule").Recording(trainer)
    return Adapter(
        teacher=trainer.teacher_unet,
        fake_score=recording.fake_score,
        generator_optimizer=trainer.optimizer,
        fake_score_optimizer=recording.optimizer,
        plugins={"lcm_recording": lambda: recording},
    )
