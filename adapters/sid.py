"""Adapt SiD (arXiv 2404.04057): the trainer of `sid_train.py`, mingyuanzhou/SiD.

Everything is a local variable of `training_loop` (`training/sid_training_loop.py:117`): `true_score` (:177),
`fake_score` (:181), their optimizers (:196-197), the copies in DDP (:226-235). The loss is built by class name (:195)
and first called with the fake score, before any step (:305); there the loop's variables are read. A round is one update
of the fake score (:317), then one of the generator (:343). The `requires_grad` of both is off when their optimizers
step (:311, :337), so it identifies no role. The gradient of the generator's loss flows through the teacher
(`training/sid_loss.py:36-55`), so the teacher may only be written between a step and the next forward.

`training-state-*.pt` holds fake score, generator and both optimizers, never the teacher (:415).
"""

from __future__ import annotations

from typing import Any

from disback_plugin import Adapter, Watch, hookimpl

ROLES = ("true_score", "fake_score", "fake_score_optimizer", "g_optimizer")

WATCH = Watch(
    "training.sid_loss:SID_EDMLoss.__call__",
    frame="training_loop",
    needs=ROLES,
    knows="mingyuanzhou/SiD at 01fbb13 (March 2025)",
    saves=("training.sid_training_loop:save_pt",),
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
