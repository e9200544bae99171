"""Adapt LightX2V (ModelTC/LightX2V, `lightx2v_train`): its DMD trainers for images and video, SGMD and phased DMD.

    disback run --adapter lightx2v --path runs/path train.py --config configs/train/dmd/wan2_1_t2v_1_3b_dmd.yaml

Teacher and fake score are made by `setup`, inside `train` (`lightx2v_train/trainers/dmd/trainer.py:172-217`), which
also loads the checkpoint; DisBack attaches after it, when `train` asks for its samples (:553). An iteration steps the
generator first and then the fake score `fake_update_ratio` times. The checkpoint holds both, and not the teacher.
With `fake.train_type: lora` the fake score is a copy of the base with a LoRA, and the teacher is a whole copy.
Phased DMD has two experts by noise level, `fake_model` and `fake_2_model` (`trainers/phased_dmd/roles.py`).
"""

from __future__ import annotations

import logging
from typing import Any

from disback_plugin import Adapter, Watch, hookimpl
from disback_plugin.errors import RoleError

logger = logging.getLogger(f"disback_plugin.{__name__}")

WATCH = Watch(
    "lightx2v_train.trainers.dmd.trainer:DmdTrainer._iter_train_samples",
    frame="train",
    take="self",
    needs=("teacher_model", "fake_model", "optimizer", "fake_optimizer"),
    knows="ModelTC/LightX2V at f8aee98 (2026)",
    saves=(
        "lightx2v_train.trainers.dmd.checkpoint:DmdCheckpointManager.save_checkpoint",
        "lightx2v_train.trainers.phased_dmd.checkpoint:PhasedCheckpointManager.save_checkpoint",
    ),
)


@hookimpl
def disback_adapter(trainer: Any) -> Adapter | None:
    """Return the roles of a DMD trainer after its `setup`; None for anything else.

    Raises:
        RoleError: If both experts of phased DMD have one teacher.
    """
    if not all(hasattr(trainer, name) for name in (*WATCH.needs, "ida_trick", "fake_train_type")):
        return None
    phased = getattr(trainer, "fake_2_model", None) is not None
    if phased and trainer.teacher_2_model is trainer.teacher_model:
        raise RoleError(
            "one teacher of two fake scores, as with model.teacher_2.share_with_teacher",
            expected="a teacher for each expert: both move at once, each along nodes of its own",
            cure="set share_with_teacher: false",
        )
    if trainer.ida_trick.enabled and trainer.ida_trick.config.decay < 1:
        logger.warning(
            "training.dmd.ida mixes the student into the fake score after each of the student's steps, also while it "
            "is held still: the nodes are then not those of Algorithm 1. Set ida.enabled: false to record those"
        )
    if getattr(getattr(trainer, "diversity_trick", None), "enabled", False):
        logger.warning(
            "training.dmd.div_loss takes its targets from the teacher, which is at an earlier node while it moves back"
        )
    if getattr(trainer, "fake_low_high_model", None) is not None:
        logger.warning(
            "training.dmd.phased.enable_fake_low_high compares the low expert's student with the high expert's "
            "teacher, whose nodes are of the high expert's samples, and with a third fake score, which is left alone. "
            "Set it to false to have each student follow its own teacher alone"
        )
    if not phased:
        return Adapter(
            teacher=trainer.teacher_model.denoiser_module(),
            fake_score=trainer.fake_model.denoiser_module(),
            generator_optimizer=trainer.optimizer,
            fake_score_optimizer=trainer.fake_optimizer,
        )
    teachers = {"high": trainer.teacher_model, "low": trainer.teacher_2_model}
    fakes = {"high": trainer.fake_model, "low": trainer.fake_2_model}
    return Adapter(
        teacher={name: model.denoiser_module() for name, model in teachers.items()},
        fake_score={name: model.denoiser_module() for name, model in fakes.items()},
        generator_optimizer=[trainer.optimizer, trainer.student_2_optimizer],
        fake_score_optimizer=[trainer.fake_optimizer, trainer.fake_2_optimizer],
    )
