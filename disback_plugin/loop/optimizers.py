"""One optimizer step as a hook sees it, for every `torch.optim.Optimizer` and for accelerate's wrapper.

An *update* is a step that changed weights. A backward without a step (gradient accumulation), a step without gradients
and a step that a GradScaler skipped are none.
"""

from __future__ import annotations

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
    "UpdateCounter",
    "after_updates",
    "call_with_gradients",
    "groups_of",
    "has_gradients",
    "has_learning_rates",
    "hide_gradients",
    "innermost",
    "parameters",
    "scale_gradients",
    "set_in_group",
    "skipped_by_scaler",
    "steppers",
    "unwrap",
]

Args = tuple[Any, ...]
Kwargs = dict[str, Any]


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


# -- gradients --------------------------------------------------------------------------------------------------------


def call_with_gradients(args: Args, kwargs: Kwargs, action: Callable[[], None]) -> tuple[Args, Kwargs] | None:
    """Call `action` once the gradients of a step are there: at once, or at the end of the step's closure.

    Args:
        args: Positional arguments of `Optimizer.step` as a step pre-hook gets them, the optimizer first.
        kwargs: Its keyword arguments.
        action: A function that may change the gradients.

    Returns:
        The pre-hook's return value: None, or the arguments with another closure.
    """
    given = args[1] if len(args) > 1 else kwargs.get("closure")
    if given is None:
        action()
        return None

    def closure() -> Any:
        loss = given()
        action()
        return loss

    return ((args[0], closure, *args[2:]), kwargs) if len(args) > 1 else (args, kwargs | {"closure": closure})


def has_gradients(optimizer: Optimizer) -> bool:
    """Return whether a step would change a weight, on this or another rank. Stops at the first gradient found."""
    return any(has_gradient(p) for group in optimizer.param_groups for p in group["params"])


def hide_gradients(optimizer: Optimizer) -> list[tuple[Tensor, Tensor]]:
    """Set every gradient to None, so that a step changes neither weights nor optimizer state.

    Returns:
        Each parameter with the gradient that it had.
    """
    hidden = [(p, p.grad) for p in parameters([optimizer]) if p.grad is not None]
    for p, _ in hidden:
        p.grad = None
    return hidden


def scale_gradients(optimizer: Optimizer, factor: float) -> None:
    """Multiply every gradient by `factor`, in place."""
    gradients = [p.grad for p in parameters([optimizer]) if p.grad is not None]
    if gradients:
        torch._foreach_mul_(gradients, factor)


def skipped_by_scaler(optimizer: Optimizer) -> bool:
    """Return whether a GradScaler makes this step a no-op on the device, as it does for fused optimizers.

    Other optimizers are not stepped at all when gradients overflow. Reads one flag of the device, and only under a
    GradScaler with a fused optimizer.
    """
    found_inf = getattr(optimizer, "found_inf", None)
    return found_inf is not None and bool(found_inf.item())


# -- updates ----------------------------------------------------------------------------------------------------------


class UpdateCounter:
    """Combines the steps of several optimizers that share a network, in any order, into one update.

    An update ends when all of them have stepped, or when one is about to step for a second time.

    Args:
        optimizers: The optimizers.
        at_end: Called at the end, with whether a weight was updated.
    """

    def __init__(self, optimizers: Sequence[Optimizer], at_end: Callable[[bool], None]) -> None:
        self._count, self._at_end = len(optimizers), at_end
        self._stepped: dict[Optimizer, bool] = {}

    def before_step(self, optimizer: Optimizer) -> None:
        """End the present update if this optimizer has already stepped in it."""
        if optimizer in self._stepped:
            self._end()

    def after_step(self, optimizer: Optimizer, updated: bool) -> None:
        """Count a step, with whether it updated weights."""
        self._stepped[optimizer] = updated
        if len(self._stepped) == self._count:
            self._end()

    def _end(self) -> None:
        updated = any(self._stepped.values())
        self._stepped.clear()
        self._at_end(updated)


@contextmanager
def after_updates(weights: Iterable[Tensor], action: Callable[[], None]) -> Iterator[None]:
    """Call `action` after each step of any optimizer that updated one of these weights, before gradients are cleared.

    Example:
        >>> weight = torch.ones(1, requires_grad=True)
        >>> sgd = torch.optim.SGD([weight], lr=0.1)
        >>> with after_updates([weight], lambda: print(weight.grad)):
        ...     (3 * weight).backward()
        ...     sgd.step()
        ...     sgd.zero_grad()
        tensor([3.])
    """
    own = [*weights]

    def after_step(optimizer: Optimizer, args: object, kwargs: object) -> None:
        if groups_of(optimizer, own) and has_gradients(optimizer) and not skipped_by_scaler(optimizer):
            action()

    hook = register_optimizer_step_post_hook(after_step)
    try:
        yield
    finally:
        hook.remove()


# -- learning rates ---------------------------------------------------------------------------------------------------


def has_learning_rates(optimizer: Optimizer) -> bool:
    """Return whether every group has a learning rate that is a number, which `LearningRateScale` can multiply."""
    rates = [group.get("lr") for group in optimizer.param_groups]
    return all(rate.numel() == 1 if isinstance(rate, Tensor) else isinstance(rate, int | float) for rate in rates)


class LearningRateScale:
    """Multiplies the learning rates of some weights for one step, and restores them bit for bit.

    Example:
        >>> weight = torch.ones(1)
        >>> sgd, scale = torch.optim.SGD([weight], lr=0.1), LearningRateScale()
        >>> scale.apply(sgd, [weight], 4)
        >>> sgd.param_groups[0]["lr"]
        0.4
        >>> scale.restore(sgd)
        >>> sgd.param_groups[0]["lr"]
        0.1
    """

    def __init__(self) -> None:
        self._saved: dict[Optimizer, list[tuple[dict[str, Any], Any]]] = {}

    def apply(self, optimizer: Optimizer, weights: Iterable[Tensor], factor: int) -> None:
        """Multiply the rates of the groups that hold one of `weights`; every group has a rate that is a number."""
        # All rates are read before one is written: groups may share the tensor that holds their rate.
        saved = [
            (group, group["lr"].detach().clone() if isinstance(group["lr"], Tensor) else group["lr"])
            for group in groups_of(optimizer, weights)
        ]
        self._saved[optimizer] = saved
        for group, rate in saved:
            set_in_group(group, "lr", rate * factor)

    def restore(self, optimizer: Optimizer) -> None:
        """Restore the rates unless they are restored: after a step, or later if the step raised."""
        for group, rate in self._saved.pop(optimizer, ()):
            set_in_group(group, "lr", rate)


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
