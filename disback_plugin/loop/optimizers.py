"""What a hook may know and do about one optimizer step, for every `torch.optim.Optimizer` and accelerate's wrapper.

An *update* is a step that really changed weights: not one of a gradient accumulation (which never reaches the
optimizer), not one without gradients, and not one that a GradScaler skipped.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from disback_plugin.errors import RoleError
from disback_plugin.weights.sharding import has_gradient

__all__ = [
    "LearningRateScale",
    "Rounds",
    "before_step",
    "copied",
    "groups_of",
    "has_gradients",
    "has_rates",
    "innermost",
    "parameters",
    "put",
    "scale_gradients",
    "skipped_by_scaler",
    "steppers",
    "take_gradients",
    "unwrap",
    "watched",
]


def unwrap(optimizers: Optimizer | Sequence[Optimizer], *, role: str) -> list[Optimizer]:
    """Return the torch optimizers inside one optimizer or a sequence, without accelerate's wrapper.

    Args:
        optimizers: One optimizer or several that together step one network.
        role: The argument's name, for errors.

    Raises:
        RoleError: If there is none, or something else is among them.

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
    """Return the optimizer inside accelerate's wrapper, or what it is given."""
    # AcceleratedOptimizer is a torch Optimizer by class, but has no hook registry of its own.
    wrapped = getattr(optimizer, "optimizer", None)
    return innermost(wrapped) if isinstance(wrapped, Optimizer) else optimizer


class Rounds:
    """Makes one update of the steps of several optimizers that share a network, in whatever order they come.

    A round ends when all of them have stepped, or when one is about to step a second time.

    Args:
        optimizers: The optimizers.
        at_end: Called at the end of a round, with whether any weight was updated in it.
    """

    def __init__(self, optimizers: Sequence[Optimizer], at_end: Callable[[bool], None]) -> None:
        self._count, self._at_end = len(optimizers), at_end
        self._stepped: dict[Optimizer, bool] = {}

    def begin(self, optimizer: Optimizer) -> None:
        """Call before a step."""
        if optimizer in self._stepped:
            self._end()

    def finish(self, optimizer: Optimizer, updated: bool) -> None:
        """Call after a step, with whether it updated weights."""
        self._stepped[optimizer] = updated
        if len(self._stepped) == self._count:
            self._end()

    def _end(self) -> None:
        updated = any(self._stepped.values())
        self._stepped.clear()
        self._at_end(updated)


def before_step(
    args: tuple[Any, ...], kwargs: dict[str, Any], settle: Callable[[], None]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Call `settle` when the gradients of a step are there: at once, or at the end of its closure if it has one.

    Args:
        args: Positional arguments of `Optimizer.step` as a step pre-hook gets them, the optimizer first.
        kwargs: Its keyword arguments.
        settle: What to do with the gradients.

    Returns:
        What a pre-hook returns: None, or the arguments with another closure.
    """
    given = args[1] if len(args) > 1 else kwargs.get("closure")
    if given is None:
        settle()
        return None

    def closure() -> Any:
        loss = given()
        settle()
        return loss

    return ((args[0], closure, *args[2:]), kwargs) if len(args) > 1 else (args, kwargs | {"closure": closure})


def parameters(optimizers: Iterable[Optimizer]) -> list[Tensor]:
    """Return all parameters that the optimizers step, in the order of their groups."""
    return [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]


def has_gradients(optimizer: Optimizer) -> bool:
    """Return whether a step would change anything, perhaps on other processes. Stops at the first gradient found."""
    return any(has_gradient(p) for group in optimizer.param_groups for p in group["params"])


def take_gradients(optimizer: Optimizer) -> list[tuple[Tensor, Tensor]]:
    """Set every gradient to None, so that a step changes no weight and no optimizer state; return what was there."""
    taken = [(p, p.grad) for p in parameters([optimizer]) if p.grad is not None]
    for p, _ in taken:
        p.grad = None
    return taken


def scale_gradients(optimizer: Optimizer, factor: float) -> None:
    """Multiply every gradient by `factor`, in place."""
    gradients = [p.grad for p in parameters([optimizer]) if p.grad is not None]
    if gradients:
        torch._foreach_mul_(gradients, factor)


def steppers(candidates: Iterable[Optimizer], weights: Iterable[Tensor]) -> list[Optimizer]:
    """Return the optimizers that step any of these weights."""
    own = [*weights]
    return [optimizer for optimizer in candidates if groups_of(optimizer, own)]


def groups_of(optimizer: Optimizer, weights: Iterable[Tensor]) -> list[dict[str, Any]]:
    """Return the groups of an optimizer that hold any of these weights."""
    own = {id(weight) for weight in weights}
    return [group for group in optimizer.param_groups if not own.isdisjoint(map(id, group["params"]))]


@contextmanager
def watched(weights: Iterable[Tensor], after: Callable[[], None]) -> Iterator[None]:
    """Call `after` at the end of each step of any optimizer that updated one of these weights, gradients still there.

    Example:
        >>> weight = torch.ones(1, requires_grad=True)
        >>> sgd = torch.optim.SGD([weight], lr=0.1)
        >>> with watched([weight], lambda: print(weight.grad)):
        ...     (3 * weight).backward()
        ...     sgd.step()
        ...     sgd.zero_grad()
        tensor([3.])
    """
    own = [*weights]

    def stepped(optimizer: Optimizer, args: object, kwargs: object) -> None:
        if steppers([optimizer], own) and has_gradients(optimizer) and not skipped_by_scaler(optimizer):
            after()

    hook = register_optimizer_step_post_hook(stepped)
    try:
        yield
    finally:
        hook.remove()


def has_rates(optimizer: Optimizer) -> bool:
    """Return whether every group has a learning rate that is a number, which `LearningRateScale` can multiply."""
    rates = [group.get("lr") for group in optimizer.param_groups]
    return all(rate.numel() == 1 if isinstance(rate, Tensor) else isinstance(rate, int | float) for rate in rates)


class LearningRateScale:
    """Multiplies the learning rates of some weights for the length of a step, and puts them back to the last bit.

    Args:
        factor: Returns the factor, asked before each step; with another than 1 the optimizer `has_rates`.
        weights: Returns the weights; groups of an optimizer that hold none of them go on at their own rate.

    Example:
        >>> weight = torch.ones(1)
        >>> sgd = torch.optim.SGD([weight], lr=0.1)
        >>> haste = LearningRateScale(lambda: 4, lambda: [weight])
        >>> haste.before_step(sgd)
        >>> sgd.param_groups[0]["lr"]
        0.4
        >>> haste.put_back(sgd)
        >>> sgd.param_groups[0]["lr"]
        0.1
    """

    def __init__(self, factor: Callable[[], int], weights: Callable[[], Iterable[Tensor]]) -> None:
        self._factor, self._weights = factor, weights
        self._there: dict[Optimizer, list[tuple[dict[str, Any], Any]]] = {}

    def before_step(self, optimizer: Optimizer) -> None:
        """Multiply the rates."""
        factor = self._factor()
        if factor == 1:
            return
        # All are read before one is written: groups may share the tensor that their rate is.
        there = [(group, copied(group["lr"])) for group in groups_of(optimizer, self._weights())]
        self._there[optimizer] = there
        for group, rate in there:
            put(group, "lr", rate * factor)

    def put_back(self, optimizer: Optimizer) -> None:
        """Put them back, if they are not yet: after a step, or later if that raised."""
        for group, rate in self._there.pop(optimizer, ()):
            put(group, "lr", rate)


def copied(value: Any) -> Any:
    """Return a copy of what a group or a state holds."""
    return value.detach().clone() if isinstance(value, Tensor) else copy.deepcopy(value)


def put(group: dict[str, Any], setting: str, value: Any) -> None:
    """Put a value into a group; where it holds a tensor, into that very tensor: a captured graph reads it.

    Example:
        >>> group = {"lr": torch.tensor(0.5), "momentum": 0.5}
        >>> rate = group["lr"]
        >>> put(group, "lr", 0.25), put(group, "momentum", 0.25)
        (None, None)
        >>> rate, group["momentum"]
        (tensor(0.2500), 0.25)
    """
    there = group[setting]
    if not isinstance(there, Tensor):
        group[setting] = value
    elif isinstance(value, Tensor):
        there.copy_(value)
    else:
        there.fill_(value)


def skipped_by_scaler(optimizer: Optimizer) -> bool:
    """Return whether a GradScaler makes this very step a no-op on the device, as it does for fused optimizers.

    Other optimizers are not stepped at all when gradients overflow. Reads one flag of the device, and only under a
    GradScaler with a fused optimizer.
    """
    found_inf = getattr(optimizer, "found_inf", None)
    return found_inf is not None and bool(found_inf.item())
