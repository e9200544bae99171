"""Adapt the DMD2 task of DiffSynth-Studio (modelscope/DiffSynth-Studio), as for FLUX.2.

One training module holds all networks as attributes of its `pipe`, under names that the module itself gives
(`examples/flux2/model_training/special/dmd2/train.py`): the student `dit`, its copies `dit_teacher` and
`dit_fake_score`, and a discriminator if `--dmd2_gan_loss_weight` is above 0. The loop of `launch_dmd2_training_task`
(`diffsynth/diffusion/dmd2.py:489`) keeps the prepared module in `model` and the optimizers in a dictionary. At every
`student_update_freq`-th iteration, the first included, it steps the student's, at the others the fake score's and the
discriminator's (`dmd2.py:478`); the latter is left alone. The loss is called inside the module's forward, before any
forward of the networks (`dmd2.py:462`): there DisBack attaches.

`model_fn_flux2_dmd2` computes the score of the network that it is given or, with `return_features=True`, features for
the discriminator, through which the gradient reaches the student (`dmd2.py:372`). It keeps those of s'_0.
`ModelLogger.save_model` writes the student alone, unless the logger is built with `remove_prefix_in_ckpt=None`, which
the task's own options cannot say. A run that goes on from it continues an unfinished recording; on a finished path its
student goes on, and backtracking begins again at s'_N, as the trainer's own fake score begins again at the teacher.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from disback_plugin import Adapter, ScoreNetwork, Watch, hookimpl
from disback_plugin.errors import RoleError
from disback_plugin.plugins import OriginalFeatures

NAMES = ("dmd2_teacher_model_name", "dmd2_fake_score_model_name", "dmd2_config", "dmd2_model_fn_teacher")

WATCH = Watch(
    "diffsynth.diffusion.dmd2:DMD2Loss.__call__",
    frame="launch_dmd2_training_task",
    needs=("model", "optimizers.student", "optimizers.fake_score"),
    knows="modelscope/DiffSynth-Studio at fed7b18 (August 2026)",
    saves=("diffsynth.diffusion.logger:ModelLogger.save_model",),
)


@hookimpl
def disback_adapter(trainer: Any) -> Adapter | None:
    """Return the roles in the variables of `launch_dmd2_training_task`, as attributes; None for anything else.

    Raises:
        RoleError: If the options never train the fake score.
    """
    model = getattr(trainer, "model", None)
    module = getattr(model, "module", model)
    if not hasattr(trainer, "optimizers") or not all(hasattr(module, name) for name in NAMES):
        return None
    config = module.dmd2_config
    if config.student_update_freq == 1:
        raise RoleError(
            "--dmd2_student_update_freq 1, with which the fake score is never trained",
            expected="at least 2",
            cure="pass --dmd2_student_update_freq 5",
        )
    teacher = getattr(module.pipe, module.dmd2_teacher_model_name)
    adversarial, place = config.gan_loss_weight > 0, (module, "dmd2_model_fn_teacher")
    return Adapter(
        teacher=ScoreNetwork(model, prefix=f"pipe.{module.dmd2_teacher_model_name}", role="teacher"),
        fake_score=ScoreNetwork(model, prefix=f"pipe.{module.dmd2_fake_score_model_name}", role="fake score"),
        generator_optimizer=trainer.optimizers["student"],
        fake_score_optimizer=trainer.optimizers["fake_score"],
        plugins={"teacher_features": lambda: OriginalFeatures(teacher, features_of, place=place)}
        if adversarial
        else {},
    )


def features_of(active: Callable[..., Any], original: Any, pipe: Any, network: Any, *args: Any, **kwargs: Any) -> Any:
    """Call `dmd2_model_fn_teacher` on the original teacher if a discriminator asks for features, else on `network`."""
    return active(pipe, original if kwargs.get("return_features") else network, *args, **kwargs)
