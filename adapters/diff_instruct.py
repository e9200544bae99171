"""Adapt Diff-Instruct (arXiv 2305.18455): the trainer of `di_train.py`, pkulwj1994/diff_instruct.

Everything is a local variable of `training_loop` (`training/di_training_loop.py:94`): the teacher `net` (:151), the
fake score `Sg` (:153), the generator `G` (:154), `optimizer` of `Sg` and `g_optimizer` (:168-169). Weights are loaded
after the copies in DDP were made (:171-200). The loss is built by class name (:167) and first called with the fake
score, before any step (:254); there the loop's variables are read. A round is one update of the fake score (:267), then
one of the generator (:298). Inside the generator's loss the teacher is in train mode, with dropout
(`training/di_loss.py:44`).

The trainer saves no optimizer and cannot resume: after a stop only the path is used again.
"""

from __future__ import annotations

from typing import Any

from disback_plugin import Adapter, Watch, hookimpl

ROLES = ("net", "Sg", "optimizer", "g_optimizer")

WATCH = Watch(
    "training.di_loss:DI_EDMLoss.__call__",
    frame="training_loop",
    needs=ROLES,
    knows="pkulwj1994/diff_instruct at 0c37389 (January 2025)",
)


@hookimpl
def disback_adapter(trainer: Any) -> Adapter | None:
    """Return the roles in the variables of Diff-Instruct's `training_loop`, as attributes; None for anything else."""
    if not all(hasattr(trainer, name) for name in ROLES):
        return None
    return Adapter(
        teacher=trainer.net,
        fake_score=trainer.Sg,
        generator_optimizer=trainer.g_optimizer,
        fake_score_optimizer=trainer.optimizer,
    )
