"""Adapt FastVideo (hao-ai-lab/FastVideo, `fastvideo/train`): DMD2, Self-Forcing and its other methods with a critic.

Add one entry to the run's YAML, or run `disback run --adapter fastvideo fastvideo/train/entrypoint/train.py ...`:

    callbacks:
      disback: {_target_: disback_adapters.fastvideo.callback, path: runs/path}

Teacher, critic and student are `ModelBase` objects, each with a `transformer`
(`methods/distribution_matching/dmd2.py:41-54`). Both optimizers step after both backwards, the critic's first, the
student's at every `generator_update_interval`-th iteration (`dmd2.py:180-190`). The checkpoint holds student and
critic, both optimizers and the callbacks' states, and is loaded between `on_train_start` and the first
`on_validation_begin` (`trainer.py:117-134`), at which DisBack attaches. Its parts are loaded in the order of their
names, callbacks first, so the state waits for the critic's weights. A checkpoint from before DisBack has no entry for
the callback; torch refuses to load it with one.
"""

from __future__ import annotations

import json
import logging
import sys
from typing import Any

from disback_plugin import Adapter, Handle, Watch, attach, hookimpl
from disback_plugin.errors import RoleError

logger = logging.getLogger(f"disback_plugin.{__name__}")

OPTIMIZERS = ("_student_optimizer", "_critic_optimizer")

WATCH = Watch(
    "fastvideo.train.trainer:Trainer._iter_dataloader",
    frame="run",
    take="method",
    needs=("teacher.transformer", "critic.transformer", *OPTIMIZERS),
    knows="hao-ai-lab/FastVideo at 2f3d407 (August 2026)",
    saves=("fastvideo.train.utils.checkpoint:CheckpointManager.save",),
)


@hookimpl
def disback_adapter(trainer: Any) -> Adapter | None:
    """Return the roles of a FastVideo method; None for anything else.

    Raises:
        RoleError: If the method has no critic.
    """
    if not all(hasattr(trainer, name) for name in ("student", "role_modules", OPTIMIZERS[0])):
        return None
    if not all(hasattr(trainer, name) for name in ("teacher", "critic", OPTIMIZERS[1])):
        raise RoleError(
            f"a {type(trainer).__name__} without teacher or critic",
            expected="score distillation: DMD2Method or one that inherits from it, as SelfForcingMethod",
            cure="use one of these methods; fine-tuning and consistency distillation have no score difference",
        )
    return Adapter(
        teacher=trainer.teacher.transformer,
        fake_score=trainer.critic.transformer,
        generator_optimizer=trainer._student_optimizer,
        fake_score_optimizer=trainer._critic_optimizer,
    )


def callback(path: str, **options: Any) -> Any:
    """Return a FastVideo callback that attaches, and saves and loads its state with FastVideo's own checkpoints.

    Args:
        path: Folder of the path, as in `attach`.
        options: Further arguments of `attach`: record, every, codec, keep_teacher, schedule.
    """
    base: Any = sys.modules["fastvideo.train.callbacks.callback"].Callback  # FastVideo has imported it

    class DisBack(base):
        handle: Handle | None = None
        state = ""

        def on_validation_begin(self, method: Any, iteration: int = 0) -> None:
            if self.handle is None:
                state = json.loads(self.state or "null")
                self.handle = attach(method, adapter="fastvideo", path=path, state=state, **options)
                logger.info("attached at iteration %d: %r", iteration, self.handle)

        def on_train_end(self, method: Any, iteration: int = 0) -> None:
            if self.handle is not None:
                self.handle.detach()

        def state_dict(self) -> dict[str, Any]:
            # One text, because torch loads only the keys that are here before the state is.
            return {"state": "" if self.handle is None else json.dumps(self.handle.state_dict())}

        def load_state_dict(self, state_dict: dict[str, Any]) -> None:
            self.state = state_dict["state"]

    return DisBack()
