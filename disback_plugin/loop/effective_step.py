"""The generator's effective step: how far an update moves its weights, in units of the learning rate.

    RMS over weights and updates of (w_u - w_{u-1}) / rate

A settled Adam's is near 1. It is larger where the second moments are older and smaller than the present gradient,
as after gradients that were scaled down, and then stands for a higher learning rate.
"""

from __future__ import annotations

from itertools import chain, count
from typing import Any

import torch
from torch import Tensor

from disback_plugin.loop.optimizer_hooks import UpdateCounter
from disback_plugin.weights.marks import WeightSample

# Updates that a value is the mean of.
WINDOW = 5


def is_due(update: int) -> bool:
    """Return whether a value is read at an update: every five, and from 100 updates on every tenth part of a run.

    Example:
        >>> [update for update in range(131) if is_due(update)][-6:]
        [90, 95, 100, 110, 120, 130]
    """
    return update > 0 and update % (WINDOW * max(update // 50, 1)) == 0


class EffectiveStep:
    """Measures the effective step on a sample of the weights, in the five updates before each value.

    Args:
        counter: The generator's optimizers and weights.

    Example:
        >>> weight = torch.zeros(2, requires_grad=True)
        >>> sgd = torch.optim.SGD([weight], lr=0.1)
        >>> step = EffectiveStep(UpdateCounter("generator", [sgd], lambda *_: None))
        >>> for update in range(6):
        ...     if update:
        ...         weight.grad = torch.full((2,), 3.0)
        ...         sgd.step()
        ...     value = step.observe(update)
        >>> round(value, 4)
        3.0
    """

    def __init__(self, counter: UpdateCounter) -> None:
        self._counter = counter
        self._due = self._begins = -1  # updates at which the next value is read, and its window begins
        self._last: Tensor | None = None  # the sample after the update before; None outside a window
        self._squares: list[Tensor] = []  # of each update of the window

    @torch.no_grad()
    def observe(self, update: int) -> float | None:
        """Observe the weights after an update; return the value if one is due, which alone is read from the device."""
        if update < self._begins:
            return None
        if self._last is None:
            self._begin_window()
        else:
            last, self._last = self._last, self._sample.weights()
            if len(last) == len(self._last):
                self._add(self._last - last)
        if update < self._due:
            return None
        value = float(torch.stack(self._squares).mean().sqrt()) if self._squares else None
        self._squares = []
        self._due = next(filter(is_due, count(update + 1)))
        self._begins = self._due - WINDOW
        if update < self._begins:
            self._last = None
        return value

    def _begin_window(self) -> None:
        """Take the first sample of a window, of the weights that the optimizers step by now."""
        groups: list[tuple[dict[str, Any], list[Tensor]]] = []
        for optimizer in self._counter.optimizers:
            own = set(map(id, self._counter.weights(optimizer)))
            groups += [(group, [p for p in group["params"] if id(p) in own]) for group in optimizer.param_groups]
        self._sample = WeightSample(chain.from_iterable(weights for _, weights in groups))
        counts = {id(weight): number for weight, _, number in self._sample.parts}
        self._groups = [(group, sum(counts.get(id(weight), 0) for weight in weights)) for group, weights in groups]
        self._last = self._sample.weights()

    def _add(self, step: Tensor) -> None:
        """Add the mean square of a step in units of each group's learning rate; a rate of 0 says nothing."""
        parts = zip(self._groups, torch.split(step, [number for _, number in self._groups]), strict=True)
        moved = [(group["lr"], part) for (group, _), part in parts if len(part) and group.get("lr") is not None]
        moved = [(rate, part) for rate, part in moved if isinstance(rate, Tensor) or rate]
        if moved:
            squares = torch.stack([(part / rate).square().sum().reshape(()) for rate, part in moved])
            self._squares.append(squares.sum() / sum(len(part) for _, part in moved))
