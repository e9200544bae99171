"""Hooks on a loop's optimizers, through which DisBack takes part in a loop that nobody edits.

generator's optimizers    pre-hook    hide all gradients, so that the step changes nothing, or scale them
                          post-hook   count the update; no autograd graph is pending here
fake score's optimizers   pre-hook    scale the learning rate for this step, while recording
                          post-hook   restore the learning rate and count the update
"""

from __future__ import annotations

from typing import Protocol
from weakref import WeakSet

from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from disback_plugin.errors import RoleError
from disback_plugin.loop import optimizers
from disback_plugin.loop.optimizers import Args, Kwargs
from disback_plugin.weights.network import ScoreNetwork

__all__ = ["OptimizerHooks", "StepListener"]

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
        self._learning_rates = optimizers.LearningRateScale()
        self._hidden: dict[Optimizer, list[tuple[Tensor, Tensor]]] = {}
        self._had_gradients: dict[Optimizer, bool] = {}
        self._hooks: list[RemovableHandle] = []
        self._generator_updates = optimizers.UpdateCounter(generator, listener.after_generator_step)
        self._fake_score_updates = optimizers.UpdateCounter(fake_score, listener.after_fake_score_step)
        if not _HOOKED.isdisjoint((*generator, *fake_score)):
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
            self._hooks.append(optimizer.register_step_post_hook(self._after_generator_step))
        for optimizer in self._fake_score:
            self._hooks.append(optimizer.register_step_pre_hook(self._before_fake_score_step))
            self._hooks.append(optimizer.register_step_post_hook(self._after_fake_score_step))
            # A trainer may save a checkpoint because a step raised.
            self._hooks.append(optimizer.register_state_dict_pre_hook(self._learning_rates.restore))
        _HOOKED.update((*self._generator, *self._fake_score))

    def remove(self) -> None:
        """Remove the hooks; gradients and learning rates are the trainer's again, even after a step that raised."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        for optimizer in self._generator:
            self._show_gradients(optimizer)
        for optimizer in self._fake_score:
            self._learning_rates.restore(optimizer)
        _HOOKED.difference_update((*self._generator, *self._fake_score))

    def _before_generator_step(self, optimizer: Optimizer, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs] | None:
        self._hidden.pop(optimizer, None)  # the last step may have raised
        self._listener.before_step(optimizer)
        # Asked before an update may end here: these gradients were computed with the present teacher.
        factor = self._listener.gradient_factor()
        self._generator_updates.before_step(optimizer)

        def change_gradients() -> None:
            self._had_gradients[optimizer] = optimizers.has_gradients(optimizer)
            if factor is None:
                self._hidden[optimizer] = optimizers.hide_gradients(optimizer)
            elif factor != 1.0:
                optimizers.scale_gradients(optimizer, factor)

        return optimizers.call_with_gradients(args, kwargs, change_gradients)

    def _after_generator_step(self, optimizer: Optimizer, args: Args, kwargs: Kwargs) -> None:
        held_still = optimizer in self._hidden
        self._show_gradients(optimizer)
        self._generator_updates.after_step(optimizer, self._is_update(optimizer) and not held_still)

    def _show_gradients(self, optimizer: Optimizer) -> None:
        """Give hidden gradients back, for the trainer's logs and its own zero_grad()."""
        for parameter, gradient in self._hidden.pop(optimizer, []):
            if parameter.grad is None:
                parameter.grad = gradient

    def _before_fake_score_step(self, optimizer: Optimizer, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs] | None:
        self._learning_rates.restore(optimizer)  # the last step may have raised
        self._listener.before_step(optimizer)
        self._fake_score_updates.before_step(optimizer)
        factor = self._listener.learning_rate_factor()
        if factor != 1:
            self._learning_rates.apply(optimizer, (tensor for _, tensor in self._network.named_tensors()), factor)

        def see_gradients() -> None:
            self._had_gradients[optimizer] = optimizers.has_gradients(optimizer)

        return optimizers.call_with_gradients(args, kwargs, see_gradients)

    def _after_fake_score_step(self, optimizer: Optimizer, args: Args, kwargs: Kwargs) -> None:
        self._learning_rates.restore(optimizer)
        self._fake_score_updates.after_step(optimizer, self._is_update(optimizer))

    def _is_update(self, optimizer: Optimizer) -> bool:
        return self._had_gradients.pop(optimizer, False) and not optimizers.skipped_by_scaler(optimizer)
