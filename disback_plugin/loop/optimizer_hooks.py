"""Hooks on a loop's optimizers, through which DisBack takes part in a loop that nobody edits.

generator's optimizers    pre-hook    hide all gradients, so that the step changes nothing, or scale them
                          post-hook   count the update; no autograd graph is pending here
fake score's optimizers   pre-hook    scale the learning rate for this step, while recording
                          post-hook   restore the learning rate and count the update

An *update* is a step that changed weights. A backward without a step (gradient accumulation), a step without gradients
and a step that a GradScaler skipped are none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol
from weakref import WeakSet

from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from disback_plugin.errors import RoleError
from disback_plugin.loop.held_steps import initialize_for_checkpoint, is_initialization, keep_settings
from disback_plugin.loop.optimizers import (
    Args,
    Kwargs,
    call_with_gradients,
    has_gradients,
    hide_gradients,
    parameters,
    scale_gradients,
    scale_learning_rates,
    skipped_by_scaler,
)
from disback_plugin.weights.network import ScoreNetwork

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
        self._kept: dict[Optimizer, Callable[[], None]] = {}  # restores what a held step has used up
        self._held: set[Optimizer] = set()  # which have been held still
        self._initializing: set[Optimizer] = set()  # whose present step only initialises their state
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
            self._hooks.append(optimizer.register_state_dict_pre_hook(self._before_state_dict))
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
        self._undo_changes(optimizer)
        if self._initializes(optimizer):
            return None
        self._listener.before_step(optimizer)
        # Asked before an update may end here: these gradients were computed with the present teacher.
        factor = self._listener.gradient_factor()
        self._counters[optimizer].before_step(optimizer)

        def change_gradients() -> None:
            self._had_gradients[optimizer] = factor is not None and has_gradients(optimizer)
            if factor is None:
                self._undo[optimizer] = hide_gradients(optimizer)
                self._held.add(optimizer)
                self._kept[optimizer] = keep_settings(optimizer, parameters([optimizer]))
            elif factor != 1.0:
                scale_gradients(optimizer, factor)

        return call_with_gradients(args, kwargs, change_gradients)

    def _before_fake_score_step(self, optimizer: Optimizer, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs] | None:
        self._undo_changes(optimizer)  # the last step may have raised
        if self._initializes(optimizer):
            return None
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
        if optimizer in self._initializing:
            return
        updated = self._had_gradients.pop(optimizer, False) and not skipped_by_scaler(optimizer)
        self._counters[optimizer].after_step(optimizer, updated)

    def _initializes(self, optimizer: Optimizer) -> bool:
        found = is_initialization(optimizer)
        (self._initializing.add if found else self._initializing.discard)(optimizer)
        return found

    def _before_state_dict(self, optimizer: Optimizer) -> None:
        self._undo_changes(optimizer)
        if optimizer in self._held:
            initialize_for_checkpoint(optimizer)

    def _undo_changes(self, optimizer: Optimizer) -> None:
        for changes in (self._undo, self._kept):
            changes.pop(optimizer, lambda: None)()


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
