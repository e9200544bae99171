"""Adapt FastGen (NVlabs/FastGen): DMD2, f-distill, CausVid and Self-Forcing, which share `DMD2Model`'s names.

Add one entry to the config, or run `disback run --adapter fastgen train.py --config=...`, or call
`attach(model, adapter="fastgen", ...)` after `model.init_optimizers()`:

    from disback_adapters.fastgen import callback
    config.trainer.callbacks["disback"] = L(callback)(path="runs/path", record=200, every=50)

`model.teacher` (`fastgen/methods/model.py:195`), `model.fake_score` (`methods/distribution_matching/dmd2.py:48`) and
the student `model.net` have optimizers of their own (`model.py:533`, `dmd2.py:462`). The generator is updated at every
`student_update_freq`-th iteration, the fake score at the others (`dmd2.py:448`). The fake score starts as the teacher
only if a pretrained path is given; `attach` sets it in any case. The checkpoint does not contain the teacher. It
contains the state of callbacks, which is loaded before `on_load_checkpoint_end` (`fastgen/trainer.py:141-152`).
A discriminator reads features of the teacher, and trains neither teacher nor fake score. It keeps the features of s'_0,
in DDP and FSDP2 alike.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping
from typing import Any

from disback_plugin import Adapter, Handle, Watch, attach, hookimpl
from disback_plugin.errors import RoleError
from disback_plugin.plugins import OriginalFeatures

logger = logging.getLogger(f"disback_plugin.{__name__}")

WATCH = Watch(
    "fastgen.trainer:Trainer.train_step",
    frame="run",
    take="model",
    needs=("net", "net_optimizer"),
    knows="NVlabs/FastGen at 34f30e8 (February 2026)",
    saves=("fastgen.trainer:Trainer.save_checkpoint",),
)


@hookimpl
def disback_adapter(trainer: Any) -> Adapter | None:
    """Return the roles of a FastGen model that has its optimizers; None for anything else.

    Raises:
        RoleError: If the method has no fake score, or the config never trains the fake score.
    """
    if not all(hasattr(trainer, name) for name in ("net", "net_optimizer", "config")):
        return None
    if getattr(trainer, "teacher", None) is None or not hasattr(trainer, "fake_score_optimizer"):
        raise RoleError(
            f"a {type(trainer).__name__} without teacher or fake score",
            expected="score distillation: DMD2, f-distill, CausVid or Self-Forcing",
            cure="use one of these methods; consistency models, LADD, KD and SFT have no score difference to backtrack",
        )
    if trainer.config.student_update_freq == 1:
        raise RoleError(
            "student_update_freq = 1, with which FastGen never trains the fake score",
            expected="at least 2",
            cure="set model.student_update_freq=5",
        )
    adversarial = trainer.config.gan_loss_weight_gen > 0
    return Adapter(
        teacher=trainer.teacher,
        fake_score=trainer.fake_score,
        generator_optimizer=trainer.net_optimizer,
        fake_score_optimizer=trainer.fake_score_optimizer,
        plugins={"teacher_features": lambda: OriginalFeatures(trainer.teacher, features_of)} if adversarial else {},
    )


def features_of(active: Callable[..., Any], original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Answer a call of the teacher with the score of the active node and the features of the original teacher.

    FastGen asks for features alone (`dmd2.py:277`, `:307`, `:369`), or for score and features (`dmd2.py:138`,
    `f_distill.py:146`), which are returned as a list with the score first (`networks/EDM/network.py:963-970`).
    """
    if not kwargs.get("feature_indices"):
        return active(*args, **kwargs)
    answer = original(*args, **kwargs)
    if kwargs.get("return_features_early"):
        return answer
    score = active(*args, **{name: value for name, value in kwargs.items() if name != "feature_indices"})
    return type(answer)([score, *answer[1:]])


def callback(path: str, **options: Any) -> Any:
    """Return a FastGen callback that attaches, and saves and loads its state with FastGen's own checkpoints.

    Args:
        path: Folder of the path, as in `attach`.
        options: Further arguments of `attach`: record, every, codec, keep_teacher, schedule.
    """
    base: Any = sys.modules["fastgen.callbacks.callback"].Callback  # FastGen has imported it

    class DisBack(base):
        handle: Handle | None = None
        state: dict[str, Any] | None = None

        def on_load_checkpoint_end(self, model: Any, iteration: int = 0) -> None:
            self.handle = attach(model, adapter="fastgen", path=path, state=self.state, **options)
            logger.info("attached at iteration %d: %r", iteration, self.handle)

        def on_train_end(self, model: Any, iteration: int = 0) -> None:
            if self.handle is not None:
                self.handle.detach()

        def state_dict(self) -> dict[str, Any]:
            return {} if self.handle is None else self.handle.state_dict()

        def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
            self.state = dict(state_dict) or None

    return DisBack()
