"""Optimizers: who steps which weights, and what one step sees of gradients, learning rates and settings.

Gradients are hidden from a step that holds its weights still. Many optimizers count all the same, in their groups
(schedule-free's k and lr_max, Prodigy's d and k), in their state or in an attribute; some decay weights that have no
gradient.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from traceback import walk_stack
from types import FrameType
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor
from torch.optim import Optimizer

from disback_plugin.errors import RoleError
from disback_plugin.weights.sharding import has_gradient

logger = logging.getLogger(__name__)

Args = tuple[Any, ...]
Kwargs = dict[str, Any]
# Optimizers of which a warning has said that their state cannot be restored.
_NAMED: WeakSet[Optimizer] = WeakSet()


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


# -- a step that holds its weights still, and one that must not be held ------------------------------------------------


def keep_settings(optimizer: Optimizer, weights: Iterable[Tensor]) -> Callable[[], None]:
    """Set the learning rates of weights to 0 for one step that has no gradients of them.

    Args:
        optimizer: The optimizer that is about to step.
        weights: The weights that the step holds still. Groups with other weights are left alone.

    Returns:
        A function that restores, after the step, the learning rates and what the step has counted: plain numbers and
        tensors of one element in the groups and in the state of the weights, new entries, and numbers that are
        attributes of the optimizer. It warns once if the step changed a larger tensor of the state, as a momentum.

    Example:
        >>> weight = torch.ones(1)
        >>> sgd = torch.optim.SGD([weight], lr=0.1)
        >>> restore = keep_settings(sgd, [weight])
        >>> group = sgd.param_groups[0]
        >>> group["lr"], group["k"] = group["lr"] + 0.0, 1  # an optimizer that counts in its groups
        >>> restore()
        >>> group["lr"], "k" in group
        (0.1, False)
    """
    own = set(map(id, weights))
    groups = [group for group in optimizer.param_groups if own.issuperset(map(id, group["params"]))]
    held = set(map(id, groups))
    whole = len(groups) == len(optimizer.param_groups)
    state = {key: entry for key, entry in optimizer.state.items() if whole or id(key) in own}
    entries = [*groups, *(entry for entry in state.values() if isinstance(entry, dict))]
    saved = [(entry, dict(entry)) for entry in entries]
    tensors = [value for _, values in saved for value in values.values() if isinstance(value, Tensor)]
    versions = [(each, each._version, each.detach().clone() if each.numel() == 1 else None) for each in tensors]
    counters = {name: value for name, value in vars(optimizer).items() if whole and type(value) in (int, float)}
    for group in groups:
        rate = group.get("lr")
        others = (each.get("lr") for each in optimizer.param_groups if id(each) not in held)
        if isinstance(rate, Tensor) and any(rate is other for other in others):
            group["lr"] = rate * 0  # other weights read the same tensor
        elif rate is not None:
            set_in_group(group, "lr", rate * 0)

    @torch.no_grad()
    def restore() -> None:
        for key in [key for key in optimizer.state if key not in state and (whole or id(key) in own)]:
            del optimizer.state[key]
        optimizer.state.update(state)
        for entry, values in saved:
            for name in entry.keys() - values.keys():
                del entry[name]
            entry.update(values)
        vars(optimizer).update(counters)
        for tensor, version, number in versions:
            if tensor._version != version and number is not None:
                tensor.copy_(number)
            elif tensor._version != version and optimizer not in _NAMED:
                _NAMED.add(optimizer)
                logger.warning(
                    "%s changes its state in a step without gradients: what the recording changes in it is not "
                    "restored, unless the optimizer takes its first step after attach()",
                    type(optimizer).__name__,
                )

    return restore


def is_initialization(optimizer: Optimizer) -> bool:
    """Return whether the step that begins only initialises the state of an optimizer, and changes no weight.

    `torch.distributed.checkpoint.state_dict` takes such a step, with learning rates of 0 and gradients of 0, when it
    reads or loads the state of an optimizer that has none (`_init_optim_state`). It is neither held still nor counted.
    Rates and gradients of 0 alone say nothing: a warm-up from 0 begins so where s_phi is still the teacher. Nothing is
    read from a device.

    Example:
        >>> from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
        >>> net = torch.nn.Linear(1, 1)
        >>> adam = torch.optim.Adam(net.parameters(), lr=0.1)
        >>> _ = adam.register_step_pre_hook(lambda *_: print(is_initialization(adam)))
        >>> adam.step()
        False
        >>> _ = get_optimizer_state_dict(net, adam)
        True
    """
    rates = (group.get("lr") for group in optimizer.param_groups)
    if optimizer.state or any(rate for rate in rates if not isinstance(rate, Tensor)):
        return False
    return any(True for _ in _checkpoint_frames())


def initialize_for_checkpoint(optimizer: Optimizer) -> None:
    """Let torch initialise the state of an optimizer if torch's distributed checkpoint is about to read an empty one.

    Torch does so itself unless there are gradients, by which it concludes that steps were taken; here they were held.
    Without a state the checkpoint could not be loaded, because loading initialises the optimizer.
    """
    for frame in () if optimizer.state else _checkpoint_frames():
        show = hide_gradients(parameters([optimizer]))
        frame.f_globals["_init_optim_state"](optimizer)
        show()
        return


def _checkpoint_frames() -> Iterator[FrameType]:
    """Yield the callers that are functions of torch's distributed checkpoint."""
    for frame, _ in walk_stack(sys._getframe()):
        if frame.f_globals.get("__name__") == "torch.distributed.checkpoint.state_dict":
            yield frame


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
