"""Optimizers: who steps which weights, and what one step sees of gradients, learning rates and settings."""

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

Args = tuple[Any, ...]
Kwargs = dict[str, Any]


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
        if groups_of(optimizer, own) and has_gradients(parameters([optimizer])) and not skipped_by_scaler(optimizer):
            action()

    hook = register_optimizer_step_post_hook(after_step)
    try:
        yield
    finally:
        hook.remove()


# -- one step ---------------------------------------------------------------------------------------------------------


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


def has_gradients(weights: Iterable[Tensor]) -> bool:
    """Return whether a step would change one of these weights, on this or another rank. Stops at the first gradient."""
    return any(map(has_gradient, weights))


def hide_gradients(weights: Iterable[Tensor]) -> Callable[[], None]:
    """Set the gradients of weights to None, so that a step changes neither them nor their optimizer state.

    Returns:
        A function that gives the gradients back, for the trainer's logs and its own zero_grad().
    """
    hidden = [(p, p.grad) for p in weights if p.grad is not None]
    for p, _ in hidden:
        p.grad = None

    def show() -> None:
        for p, gradient in hidden:
            if p.grad is None:
                p.grad = gradient

    return show


def scale_gradients(weights: Iterable[Tensor], factor: float) -> None:
    """Multiply the gradients of weights by `factor`, in place."""
    gradients = [p.grad for p in weights if p.grad is not None]
    if gradients:
        torch._foreach_mul_(gradients, factor)


def scale_learning_rates(optimizer: Optimizer, weights: Iterable[Tensor], factor: int) -> Callable[[], None]:
    """Multiply the learning rates of the groups that hold one of `weights`; return a function that restores them.

    Example:
        >>> weight = torch.ones(1)
        >>> sgd = torch.optim.SGD([weight], lr=0.1)
        >>> restore = scale_learning_rates(sgd, [weight], 4)
        >>> sgd.param_groups[0]["lr"]
        0.4
        >>> restore()
        >>> sgd.param_groups[0]["lr"]
        0.1
    """
    # All rates are read before one is written: groups may share the tensor that holds their rate.
    saved = [
        (group, group["lr"].detach().clone() if isinstance(group["lr"], Tensor) else group["lr"])
        for group in groups_of(optimizer, weights)
    ]

    def restore() -> None:
        for group, rate in saved:
            set_in_group(group, "lr", rate)

    for group, rate in saved:
        set_in_group(group, "lr", rate * factor)
    return restore


def skipped_by_scaler(optimizer: Optimizer) -> bool:
    """Return whether a GradScaler makes this step a no-op on the device, as it does for fused optimizers.

    Other optimizers are not stepped at all when gradients overflow. Reads one flag of the device, and only under a
    GradScaler with a fused optimizer.
    """
    found_inf = getattr(optimizer, "found_inf", None)
    return found_inf is not None and bool(found_inf.item())


# -- optimizers and their groups --------------------------------------------------------------------------------------


def unwrap(optimizers: Optimizer | Sequence[Optimizer], *, role: str) -> list[Optimizer]:
    """Return the torch optimizers inside one optimizer or a sequence, without the wrappers of accelerate and DeepSpeed.

    Raises RoleError, which names the argument `role`, if the sequence is empty or holds something else, or if DeepSpeed
    steps several groups of one optimizer, each by a call of its own.

    Example:
        >>> adam = torch.optim.Adam([torch.ones(1)])
        >>> unwrap(adam, role="generator_optimizer") == [adam]
        True
    """
    given = optimizers if isinstance(optimizers, Sequence) else [optimizers]
    for optimizer in given:
        groups = len(getattr(optimizer, "param_groups", ()))
        if groups > 1 and "deepspeed" in type(optimizer).__module__:
            raise RoleError(
                f"DeepSpeed (ZeRO) with {groups} parameter groups as {role}, whose steps cannot be counted",
                expected="one group",
                cure="put all parameters into one group, train with DDP, or shard with torch's fully_shard (FSDP2)",
            )
    inner = [*map(innermost, given)]
    wrong = [type(optimizer).__name__ for optimizer in inner if not isinstance(optimizer, Optimizer)]
    if wrong or not inner:
        raise RoleError(
            f"{wrong[0] if wrong else 'an empty sequence'} as {role}",
            expected="a torch.optim.Optimizer, accelerate's wrapper of one, or a sequence of them",
            cure=f"pass {role}=<the optimizer whose step() the loop calls>",
        )
    return [*dict.fromkeys(inner)]


def innermost(optimizer: Any) -> Any:
    """Return the optimizer inside accelerate's and DeepSpeed's wrappers; any other object is returned as it is."""
    # AcceleratedOptimizer is a torch Optimizer by class, but has no hook registry of its own.
    wrapped = getattr(optimizer, "optimizer", None)
    inside = getattr(wrapped, "optimizer", wrapped)  # DeepSpeed's is no torch Optimizer by class
    return innermost(wrapped) if isinstance(inside, Optimizer) else optimizer


def parameters(optimizers: Iterable[Optimizer]) -> list[Tensor]:
    """Return all parameters that the optimizers step, in the order of their groups."""
    return [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]


def groups_of(optimizer: Optimizer, weights: Iterable[Tensor]) -> list[dict[str, Any]]:
    """Return the parameter groups that hold at least one of these weights."""
    own = set(map(id, weights))
    return [group for group in optimizer.param_groups if not own.isdisjoint(map(id, group["params"]))]


def set_in_group(group: dict[str, Any], setting: str, value: Any) -> None:
    """Set a value in a parameter group; a tensor is written in place, because a captured graph may read it."""
    present = group[setting]
    if isinstance(present, Tensor):
        present.copy_(torch.as_tensor(value))
    else:
        group[setting] = value
