"""Adapt SiD (arXiv 2404.04057) and what its authors made from it: SiDA (arXiv 2410.14919) and SiD-LSG (2406.01561).

In SiD everything is a local variable of `training_loop` (`training/sid_training_loop.py:117`): `true_score` (:177),
`fake_score` (:181), their optimizers (:196-197), the copies in DDP (:226-235). The loss is built by class name (:195)
and first called with the fake score, before any step (:305); there the loop's variables are read. A round is one update
of the fake score (:317), then one of the generator (:343). The `requires_grad` of both is off when their optimizers
step (:311, :337), so it identifies no role. The gradient of the generator's loss flows through the teacher
(`training/sid_loss.py:36-55`), so the teacher may only be written between a step and the next forward.

`training-state-*.pt` holds fake score, generator and both optimizers, never the teacher (:415).

The other two trainers keep these names. SiD-LSG has no class for its loss: `sid_sd_denoise` is first called with the
fake score, before any step (`training/sid_training_loop.py:418`). SiDA (branch `sida`) has a discriminator in the fake
score's encoder, whose loss also trains s_phi during the recording, unlike Eq. 7, and its generator makes no step in the
first 100,000 images (`sida_training/sida_training_loop.py:425`): backtracking begins with its first one.
"""

from __future__ import annotations

from typing import Any

from disback_plugin import Adapter, Watch, hookimpl

ROLES = ("true_score", "fake_score", "fake_score_optimizer", "g_optimizer")

WATCH = tuple(
    Watch(
        call,
        frame="training_loop",
        needs=ROLES,
        knows="mingyuanzhou/SiD at 01fbb13 (March 2025), its branch sida at a5510fd, and SiD-LSG at 709fc22",
        saves=("training.sid_training_loop:save_pt", "sida_training.sida_training_loop:save_pt"),
    )
    for call in (
        "training.sid_loss:SID_EDMLoss.__call__",
        "training.sid_training_loop:sid_sd_denoise",  # SiD-LSG
        "sida_training.sida_loss:SIDA_EDMLoss.fakescore_discriminator_share_encoder_loss",
        "sida_training.sida_loss:SIDA_EDMLoss.__call__",  # SiDA with --use_gan 0
    )
)


@hookimpl
def disback_adapter(trainer: Any) -> Adapter | None:
    """Return the roles in the variables of SiD's `training_loop`, as attributes; None for anything else."""
    if not all(hasattr(trainer, name) for name in ROLES):
        return None
    return Adapter(
        teacher=trainer.true_score,
        fake_score=trainer.fake_score,
        generator_optimizer=trainer.g_optimizer,
        fake_score_optimizer=trainer.fake_score_optimizer,
    )
