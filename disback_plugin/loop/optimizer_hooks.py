"""Hooks on a loop's optimizers, through which DisBack takes part in a loop that nobody edits.

generator's optimizers    pre-hook    hide all gradients, so that the step changes nothing, or scale them
                          post-hook   count the update; no autograd graph is pending here
fake score's optimizers   pre-hook    scale the learning rate for this step, while recording
                          post-hook   restore the learning rate and count the update

An *update* is a step that changed weights. A backward without a step (gradient accumulation), a step without gradients
and a step that a GradScaler skipped are none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol
from weakref import WeakSet

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle

from disback_plugin.errors import RoleError
from disback_plugin.weights.network import ScoreNetwork
from disback_plugin.weights.sharding import has_gradient

Args = tuple[Any, ...]
Kwargs = dict[str, Any]

# Optimizers with hooks: two handles on one loop would both move the teacher.
_HOOKED: WeakSet[Optimizer] = WeakSet()


class StepListener(Protocol):
    """The object that the hooks ask and notify: the session."""

    def before_step(self, optimizer: Optimizer) -> None:
        """Prepare for a step of any of the optimizers."""

    def gradient_factor(self) -> float | None:
        """Return the factor on the generator's gradient in its next step; None holds the generator still."""

    def learning_rate_factor(self) -> int:
        """Return the factor on the fake score's learning rate in its next step."""

    def after_generator_step(self, updated: bool) -> None:
        """Handle a finished step of the generator, with whether it changed a weight."""

    def after_fake_score_step(self, updated: bool) -> None:
        """Handle a finished step of s_phi, with whether it changed a weight."""


class OptimizerHooks:
    """Hooks on all optimizers of a loop.

    Args:
        generator: Optimizers of the generator.
        fake_score: Optimizers of s_phi.
        network: s_phi. Groups of other weights keep their own learning rate.
        listener: The object that the hooks ask and notify.

    Raises:
        RoleError: If one of the optimizers has hooks of another handle.
    """

    def __init__(
        self, generator: list[Optimizer], fake_score: list[Optimizer], network: ScoreNetwork, listener: StepListener
    ) -> None:
        self._generator, self._fake_score, self._network, self._listener = generator, fake_score, network, listener
        self._counters = dict.fromkeys(generator, UpdateCounter(len(generator), listener.after_generator_step))
        self._counters |= dict.fromkeys(fake_score, UpdateCounter(len(fake_score), listener.after_fake_score_step))
        self._undo: dict[Optimizer, Callable[[], None]] = {}  # restores what a pre-hook changed for one step
        self._had_gradients: dict[Optimizer, bool] = {}
        self._hooks: list[RemovableHandle] = []
        if not _HOOKED.isdisjoint(self._counters):
            raise RoleError(
                "an optimizer that a handle is attached to already",
                expected="one handle a loop",
                cure="call detach() of the other handle first, or leave its with block",
            )

    @property
    def installed(self) -> bool:
        """Whether the hooks are installed."""
        return bool(self._hooks)

    def install(self) -> None:
        """Install the hooks."""
        for optimizer in self._generator:
            self._hooks.append(optimizer.register_step_pre_hook(self._before_generator_step))
        for optimizer in self._fake_score:
            self._hooks.append(optimizer.register_step_pre_hook(self._before_fake_score_step))
            # A trainer may save a checkpoint because a step raised.
            self._hooks.append(optimizer.register_state_dict_pre_hook(self._undo_changes))
        self._hooks += [optimizer.register_step_post_hook(self._after_step) for optimizer in self._counters]
        _HOOKED.update(self._counters)

    def remove(self) -> None:
        """Remove the hooks; gradients and learning rates are the trainer's again, even after a step that raised."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        for optimizer in self._counters:
            self._undo_changes(optimizer)
        _HOOKED.difference_update(self._counters)

    def _before_generator_step(self, optimizer: Optimizer, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs] | None:
        self._undo.pop(optimizer, None)  # the last step may have raised: its gradients are too old
        self._listener.before_step(optimizer)
        # Asked before an update may end here: these gradients were computed with the present teacher.
        factor = self._listener.gradient_factor()
        self._counters[optimizer].before_step(optimizer)

        def change_gradients() -> None:
            self._had_gradients[optimizer] = factor is not None and has_gradients(optimizer)
            if factor is None:
                self._undo[optimizer] = hide_gradients(optimizer)
            elif factor != 1.0:
                scale_gradients(optimizer, factor)

        return call_with_gradients(args, kwargs, change_gradients)

    def _before_fake_score_step(self, optimizer: Optimizer, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs] | None:
        self._undo_changes(optimizer)  # the last step may have raised
        self._listener.before_step(optimizer)
        self._counters[optimizer].before_step(optimizer)
        factor = self._listener.learning_rate_factor()
        if factor != 1:
            weights = (tensor for _, tensor in self._network.named_tensors())
            self._undo[optimizer] = scale_learning_rates(optimizer, weights, factor)

        def observe_gradients() -> None:
            self._had_gradients[optimizer] = has_gradients(optimizer)

        return call_with_gradients(args, kwargs, observe_gradients)

    def _after_step(self, optimizer: Optimizer, args: Args, kwargs: Kwargs) -> None:
        self._undo_changes(optimizer)
        updated = self._had_gradients.pop(optimizer, False) and not skipped_by_scaler(optimizer)
        self._counters[optimizer].after_step(optimizer, updated)

    def _undo_changes(self, optimizer: Optimizer) -> None:
        self._undo.pop(optimizer, lambda: None)()


class UpdateCounter:
    """Combines the steps of several optimizers that share a network, in any order, into one update.

    An update ends when all of them have stepped, or when one is about to step for a second time.

    Args:
        count: Number of optimizers.
        at_end: Called at the end, with whether a weight was updated.
    """

    def __init__(self, count: int, at_end: Callable[[bool], None]) -> None:
        self._count, self._at_end = count, at_end
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


def has_gradients(optimizer: Optimizer) -> bool:
    """Return whether a step would change a weight, on this or another rank. Stops at the first gradient found."""
    return any(map(has_gradient, parameters([optimizer])))


def hide_gradients(optimizer: Optimizer) -> Callable[[], None]:
    """Set every gradient to None, so that a step changes neither weights nor optimizer state.

    Returns:
        A function that gives the gradients back, for the trainer's logs and its own zero_grad().
    """
    hidden = [(p, p.grad) for p in parameters([optimizer]) if p.grad is not None]
    for p, _ in hidden:
        p.grad = None

    def show() -> None:
        for p, gradient in hidden:
            if p.grad is None:
                p.grad = gradient

    return show


def scale_gradients(optimizer: Optimizer, factor: float) -> None:
    """Multiply every gradient by `factor`, in place."""
    gradients = [p.grad for p in parameters([optimizer]) if p.grad is not None]
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
    """Return the torch optimizers inside one optimizer or a sequence, without accelerate's wrapper.

    Raises RoleError, which names the argument `role`, if the sequence is empty or holds something else.

    Example:
        >>> adam = torch.optim.Adam([torch.ones(1)])
        >>> unwrap(adam, role="generator_optimizer") == [adam]
        True
    """
    inner = [*map(innermost, optimizers if isinstance(optimizers, Sequence) else [optimizers])]
    wrong = [type(optimizer).__name__ for optimizer in inner if not isinstance(optimizer, Optimizer)]
    if wrong or not inner:
        raise RoleError(
            f"{wrong[0] if wrong else 'an empty sequence'} as {role}",
            expected="a torch.optim.Optimizer, accelerate's wrapper of one, or a sequence of them",
            cure=f"pass {role}=<the optimizer whose step() the loop calls>",
        )
    return [*dict.fromkeys(inner)]


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
    own = set(map(id, weights))
    return [group for group in optimizer.param_groups if not own.isdisjoint(map(id, group["params"]))]


def set_in_group(group: dict[str, Any], setting: str, value: Any) -> None:
    """Set a value in a parameter group; a tensor is written in place, because a captured graph may read it."""
    present = group[setting]
    if isinstance(present, Tensor):
        present.copy_(torch.as_tensor(value))
    else:
        group[setting] = value
