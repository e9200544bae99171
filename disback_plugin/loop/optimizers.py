"""Optimizers and their parameter groups, for every `torch.optim.Optimizer` and for accelerate's wrapper."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from disback_plugin.errors import RoleError

__all__ = ["groups_of", "has_learning_rates", "innermost", "parameters", "set_in_group", "steppers", "unwrap"]


def unwrap(optimizers: Optimizer | Sequence[Optimizer], *, role: str) -> list[Optimizer]:
    """Return the torch optimizers inside one optimizer or a sequence, without accelerate's wrapper.

    Args:
        optimizers: One optimizer, or several that step one network together.
        role: The argument's name, for errors.

    Raises:
        RoleError: If the sequence is empty or holds something else.

    Example:
        >>> from torch import nn
        >>> adam = torch.optim.Adam(nn.Linear(1, 1).parameters())
        >>> unwrap(adam, role="generator_optimizer") == [adam]
        True
    """
    given = list(optimizers) if isinstance(optimizers, Sequence) else [optimizers]
    inner = [innermost(optimizer) for optimizer in given]
    wrong = [optimizer for optimizer in inner if not isinstance(optimizer, Optimizer)]
    if wrong or not inner:
        raise RoleError(
            f"{type(wrong[0]).__name__ if wrong else 'an empty sequence'} as {role}",
            expected="a torch.optim.Optimizer, accelerate's wrapper of one, or a sequence of them",
            cure=f"pass {role}=<the optimizer whose step() the loop calls>",
        )
    return list(dict.fromkeys(inner))


def innermost(optimizer: Any) -> Any:
    """Return the optimizer inside accelerate's wrapper; any other object is returned as it is."""
    # AcceleratedOptimizer is a torch Optimizer by class, but has no hook registry of its own.
    wrapped = getattr(optimizer, "optimizer", None)
    return innermost(wrapped) if isinstance(wrapped, Optimizer) else optimizer


def parameters(optimizers: Iterable[Optimizer]) -> list[Tensor]:
    """Return all parameters that the optimizers step, in the order of their groups."""
    return [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]


def groups_of(optimizer: Optimizer, weights: Iterable[Tensor]) -> list[dict[str, Any]]:
    """Return the parameter groups that hold at least one of these weights."""
    own = {id(weight) for weight in weights}
    return [group for group in optimizer.param_groups if not own.isdisjoint(map(id, group["params"]))]


def steppers(candidates: Iterable[Optimizer], weights: Iterable[Tensor]) -> list[Optimizer]:
    """Return the optimizers that step at least one of these weights."""
    own = [*weights]
    return [optimizer for optimizer in candidates if groups_of(optimizer, own)]


def has_learning_rates(optimizer: Optimizer) -> bool:
    """Return whether every group has a learning rate that is a number, which `LearningRateScale` can multiply."""
    rates = [group.get("lr") for group in optimizer.param_groups]
    return all(rate.numel() == 1 if isinstance(rate, Tensor) else isinstance(rate, int | float) for rate in rates)


def set_in_group(group: dict[str, Any], setting: str, value: Any) -> None:
    """Set a value in a parameter group; a tensor is written in place, because a captured graph may read it.

    Example:
        >>> group = {"lr": torch.tensor(0.5), "momentum": 0.5}
        >>> rate = group["lr"]
        >>> set_in_group(group, "lr", 0.25), set_in_group(group, "momentum", 0.25)
        (None, None)
        >>> rate, group["momentum"]
        (tensor(0.2500), 0.25)
    """
    present = group[setting]
    if isinstance(present, Tensor):
        present.copy_(torch.as_tensor(value))
    else:
        group[setting] = value
