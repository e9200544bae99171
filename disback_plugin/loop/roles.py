"""Who plays which role: checks on teacher, fake score and the two optimizers before anything is written."""

from __future__ import annotations

import torch
from torch.optim import Optimizer

from disback_plugin.errors import MismatchError, RoleError
from disback_plugin.loop import optimizers
from disback_plugin.weights.network import ScoreNetwork

__all__ = ["check_apart", "check_roles"]


def check_apart(teacher: ScoreNetwork, fake_score: ScoreNetwork) -> None:
    """Raise unless the two are of one layout and share no memory.

    Raises:
        MismatchError: If they differ in keys, shapes or dtype classes, or in what they tie.
        RoleError: If training one would write the other.
    """
    shared = teacher.storages() & fake_score.storages()
    if shared:
        raise RoleError(
            f"teacher and fake score that share weights ({len(shared)} tensors in the same memory)",
            expected="two networks",
            cure="make the fake score a copy.deepcopy of the teacher",
        )
    try:
        teacher.check_same_layout(fake_score)
    except MismatchError as error:
        raise MismatchError(
            error.found,
            expected=f"{error.expected}, for s_phi starts as the teacher and becomes its nodes",
            cure=f"{error.cure}; with another architecture, record with a copy of the teacher, "
            "disback.record(teacher, sample=..., loss=...), and walk with TrajectoryScheduler(path, teacher)",
        ) from None


def check_roles(
    teacher: ScoreNetwork,
    fake_score: ScoreNetwork,
    generator_optimizers: list[Optimizer],
    fake_score_optimizers: list[Optimizer],
) -> None:
    """Raise unless teacher and fake score are two networks of one layout and each optimizer steps its own network only.

    Raises:
        MismatchError: If the networks differ in keys, shapes or dtype classes.
        RoleError: If they share weights, or an optimizer steps the wrong network or two of them.
    """
    check_apart(teacher, fake_score)
    of_teacher = {id(tensor): name for name, tensor in teacher.named_tensors()}
    of_fake_score = {id(tensor): name for name, tensor in fake_score.named_tensors()}
    of_generator = {id(tensor) for tensor in optimizers.parameters(generator_optimizers)}
    trained = {id(tensor) for tensor in optimizers.parameters(fake_score_optimizers)}
    base = {
        id(weight) for weight in (*teacher.base_parameters(), *fake_score.base_parameters()) if weight.requires_grad
    }
    of_base = base & (of_generator | trained)
    wrong = [
        (of_base, "an optimizer that steps the base of the adapters", "a base that stands still"),
        (
            of_generator & of_teacher.keys(),
            "a generator_optimizer that steps the teacher",
            "a teacher that stands still",
        ),
        (trained & of_teacher.keys(), "a fake_score_optimizer that steps the teacher", "a teacher that stands still"),
        (of_generator & of_fake_score.keys(), "a generator_optimizer that steps the fake score", "the generator only"),
        (
            of_generator & trained,
            "one optimizer's parameters in the other optimizer too",
            "no parameter stepped by both",
        ),
    ]
    if any(isinstance(optimizer, torch.optim.LBFGS) for optimizer in generator_optimizers):
        raise RoleError(
            "LBFGS as generator_optimizer, which evaluates its closure many times a step",
            expected="an optimizer that takes one gradient a step",
            cure="use Adam, AdamW or SGD for the generator",
        )
    for shared, found, expected in wrong:
        if shared:
            names = {**of_teacher, **of_fake_score}
            raise RoleError(
                f"{found} ({len(shared)} tensors, as {names.get(next(iter(shared)), 'one of the generator')})",
                expected=expected,
                cure="pass each role its own network and optimizer",
            )
    if not trained & of_fake_score.keys():
        raise RoleError(
            "a fake_score_optimizer that steps nothing of the fake score",
            expected="the optimizer that trains it",
            cure="pass the very module that the optimizer was built from, or swap the two optimizers back",
        )
