"""Riding on a loop's optimizers, by their own hooks: nothing inside the loop is edited.

generator's optimizer   pre-hook    hide all gradients, so that the step changes nothing, or scale them
                        post-hook   count the update: no graph is pending there
fake score's optimizer  pre-hook    while recording, perhaps scale its learning rate
                        post-hook   put that back, and count the update
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakSet

from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from disback_plugin.errors import RoleError
from disback_plugin.loop import optimizers

__all__ = ["OptimizerHooks"]

Args = tuple[Any, ...]
Kwargs = dict[str, Any]

# Optimizers that somebody rides on: two handles on one loop would fight for the teacher.
_RIDDEN: WeakSet[Optimizer] = WeakSet()


class OptimizerHooks:
    """Hooks on all optimizers of a loop.

    Args:
        generator: The optimizers of the generator.
        fake_score: Those of s_phi.
        before_step: Called before each step, with its optimizer.
        factor: Returns the factor on the generator's gradient, asked before each of its steps; None holds it still.
        haste: What scales the learning rate of s_phi for the length of its steps.
        after_generator: Called after each round of the generator's optimizers, held still or not, with whether it
            changed a weight.
        after_fake_score: Called after each round of those of s_phi, with whether it changed a weight.

    Raises:
        RoleError: If somebody rides on one of them already.

    Example:
        >>> import torch
        >>> a, b = (torch.optim.SGD([torch.ones(1, requires_grad=True)], lr=1.0) for _ in range(2))
        >>> ride = OptimizerHooks(
        ...     [a],
        ...     [b],
        ...     before_step=lambda optimizer: None,
        ...     factor=lambda: 0.5,
        ...     haste=optimizers.LearningRateScale(lambda: 1, lambda: []),
        ...     after_generator=print,
        ...     after_fake_score=print,
        ... )
        >>> ride.begin()
        >>> weight = a.param_groups[0]["params"][0]
        >>> weight.grad = torch.ones(1)
        >>> a.step()
        True
        >>> ride.end()
        >>> weight.item()
        0.5
    """

    def __init__(
        self,
        generator: list[Optimizer],
        fake_score: list[Optimizer],
        *,
        before_step: Callable[[Optimizer], None],
        factor: Callable[[], float | None],
        haste: optimizers.LearningRateScale,
        after_generator: Callable[[bool], None],
        after_fake_score: Callable[[bool], None],
    ) -> None:
        self._generator, self._fake_score = generator, fake_score
        self._before_step, self._factor, self._haste = before_step, factor, haste
        self._hidden: dict[Optimizer, list[tuple[Tensor, Tensor]]] = {}
        self._updates: dict[Optimizer, bool] = {}
        self._hooks: list[RemovableHandle] = []
        self._generator_rounds = optimizers.Rounds(generator, after_generator)
        self._fake_score_rounds = optimizers.Rounds(fake_score, after_fake_score)
        if not _RIDDEN.isdisjoint((*generator, *fake_score)):
            raise RoleError(
                "an optimizer that a handle is attached to already",
                expected="one handle a loop",
                cure="call detach() of the other handle first, or leave its with block",
            )

    def __bool__(self) -> bool:
        """Whether the hooks are there."""
        return bool(self._hooks)

    def begin(self) -> None:
        """Install the hooks."""
        for optimizer in self._generator:
            self._hooks.append(optimizer.register_step_pre_hook(self._before_generator_step))
            self._hooks.append(optimizer.register_step_post_hook(self._after_generator_step))
        for optimizer in self._fake_score:
            self._hooks.append(optimizer.register_step_pre_hook(self._before_fake_score_step))
            self._hooks.append(optimizer.register_step_post_hook(self._after_fake_score_step))
            # A checkpoint that is saved because a step raised.
            self._hooks.append(optimizer.register_state_dict_pre_hook(self._haste.put_back))
        _RIDDEN.update((*self._generator, *self._fake_score))

    def end(self) -> None:
        """Remove them."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        for optimizer in self._generator:
            self._show(optimizer)
        for optimizer in self._fake_score:
            self._haste.put_back(optimizer)
        _RIDDEN.difference_update((*self._generator, *self._fake_score))

    def _before_generator_step(self, optimizer: Optimizer, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs] | None:
        self._hidden.pop(optimizer, None)  # if the last step raised
        # Decided before a round may end: these gradients belong to what was there when they were computed.
        self._before_step(optimizer)
        factor = self._factor()
        self._generator_rounds.begin(optimizer)

        def settle() -> None:
            self._updates[optimizer] = optimizers.has_gradients(optimizer)
            if factor is None:
                self._hidden[optimizer] = optimizers.take_gradients(optimizer)
            elif factor != 1.0:
                optimizers.scale_gradients(optimizer, factor)

        return optimizers.before_step(args, kwargs, settle)

    def _after_generator_step(self, optimizer: Optimizer, args: Args, kwargs: Kwargs) -> None:
        held_still = optimizer in self._hidden
        self._show(optimizer)
        self._generator_rounds.finish(optimizer, self._updated(optimizer) and not held_still)

    def _show(self, optimizer: Optimizer) -> None:
        """Let the trainer find its gradients as it left them, for its logs and its own zero_grad()."""
        for parameter, gradient in self._hidden.pop(optimizer, []):
            if parameter.grad is None:
                parameter.grad = gradient

    def _before_fake_score_step(self, optimizer: Optimizer, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs] | None:
        self._haste.put_back(optimizer)  # if the last step raised
        self._before_step(optimizer)
        self._fake_score_rounds.begin(optimizer)
        self._haste.before_step(optimizer)

        def settle() -> None:
            self._updates[optimizer] = optimizers.has_gradients(optimizer)

        return optimizers.before_step(args, kwargs, settle)

    def _after_fake_score_step(self, optimizer: Optimizer, args: Args, kwargs: Kwargs) -> None:
        self._haste.put_back(optimizer)
        self._fake_score_rounds.finish(optimizer, self._updated(optimizer))

    def _updated(self, optimizer: Optimizer) -> bool:
        return self._updates.pop(optimizer, False) and not optimizers.skipped_by_scaler(optimizer)
