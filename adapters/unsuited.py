"""Trainers that cannot have DisBack: known by their names, and refused with what would work instead.

* flash-diffusion (gojasper/flash-diffusion, `src/flash/models/flash/flash_diffusion_model.py`): `teacher_denoiser` and
  `student_denoiser`. There is no fake score; the student itself takes its place in the DMD term (:446), and the teacher
  is also the discriminator's backbone (:100).
* consistency distillation of diffusers (`train_lcm_distill_*.py`): `teacher_unet` is an ODE solver on noised data
  (`train_lcm_distill_lora_sd_wds.py:1313-1368`), and the student never samples. Where it is `unet` with its adapters
  off (`train_lcm_distill_lora_sdxl.py:1297`), a node would even change the student.
"""

from __future__ import annotations

from typing import Any

from disback_plugin import Adapter, hookimpl
from disback_plugin.errors import RoleError

CURE = (
    "train with score distillation: DMD2, SiD, Diff-Instruct, FastGen's DMD2, or a loop of your own with a fake score"
)

# Names that a trainer has, names that it must not have, and why it cannot have DisBack.
UNSUITED = (
    (
        ("teacher_denoiser", "student_denoiser"),
        ("fake_score", "fake_denoiser"),
        "a flash-diffusion model, which has no fake score: its student stands in for it, and s'_N would overwrite that",
    ),
    (
        ("teacher_unet", "unet"),
        ("fake_score", "fake_unet"),
        "a consistency distillation (LCM), which has no fake score: its teacher solves an ODE on noised data, where "
        "nodes, fitted to the generator's samples, say nothing",
    ),
)


@hookimpl(trylast=True)
def disback_adapter(trainer: Any) -> Adapter | None:
    """Return None; it never finds roles.

    Raises:
        RoleError: If it is a trainer that cannot have DisBack.
    """
    for has, has_not, found in UNSUITED:
        if all(hasattr(trainer, name) for name in has) and not any(hasattr(trainer, name) for name in has_not):
            raise RoleError(found, expected="a network s_phi of its own, trained on the generator's samples", cure=CURE)
    return None
