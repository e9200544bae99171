"""Samples that the losses leave out because they are not finite: counted on their device, reported now and then."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

from disback_plugin import distributed
from disback_plugin.errors import OptionError
from disback_plugin.plugins.manager import PluginManager
from disback_plugin.terms.batches import LISTENER

__all__ = ["MaskedSamples"]

logger = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")

# Batches that are kept before they are added up.
PENDING = 64


class MaskedSamples:
    """Counts the samples that the losses of `losses` and `kernels` mask, and reports them as "disback/masked_samples".

    A report goes to the plug-ins that implement `disback_log`, or, where there is none, into a warning of `logging` if
    the count is not 0. Only a report waits for the device. Each process counts its own samples; the main one reports.

    Args:
        every: Steps from one report to the next, >= 50.
        plugins: Who hears of it: a `hooks.Plugins`, or names and objects for one.

    Attributes:
        steps: Generator updates so far; set it where a run resumes.

    Raises:
        OptionError: If `every` is smaller.

    Example:
        >>> from disback_plugin import losses
        >>> from disback_plugin.prediction import Prediction
        >>> masked = MaskedSamples()
        >>> loss = masked.watch(losses.diff_instruct)
        >>> x, broken = torch.zeros(2, 3), torch.full((2, 3), float("nan"))
        >>> loss(x, broken, x, alpha=1.0, sigma=1.0, prediction=Prediction.SCORE).item()
        0.0
        >>> masked.step()
        >>> masked.report()
        2
    """

    def __init__(self, every: int = 50, *, plugins: PluginManager | Sequence[object] = ()) -> None:
        if every < 50:
            raise OptionError(f"every={every}", expected="50 or more", cure="leave it away for 50: a report is a sync")
        self._plugins = PluginManager.of(plugins)
        self.every = every
        self.steps = 0
        self._finite: list[Tensor] = []
        self._counts: dict[torch.device, Tensor] = {}

    def watch(self, loss: Callable[P, R]) -> Callable[P, R]:
        """Return the loss with the same signature; what it masks is counted here."""

        @functools.wraps(loss)
        def watched(*args: P.args, **kwargs: P.kwargs) -> R:
            token = LISTENER.set(self._take)
            try:
                return loss(*args, **kwargs)
            finally:
                LISTENER.reset(token)

        return watched

    def step(self) -> None:
        """Count one finished generator update, and report if it is time to."""
        self.steps += 1
        if self.steps % self.every == 0:
            self.report()

    def report(self) -> int:
        """Read the count, a sync, report it, and begin anew; call it at the end. Without a new loss nothing happens.

        Returns:
            The count on this process since the last report.
        """
        self._add_up()
        if not self._counts:
            return 0
        masked = sum(int(count.item()) for count in self._counts.values())
        self._counts.clear()
        if not distributed.is_main_process():
            return masked
        self._plugins.log({"disback/masked_samples": masked}, self.steps)
        if masked and not self._plugins.listens("disback_log"):
            logger.warning(
                "%d samples were not finite and had no gradient, up to update %d: look at the outputs of teacher and "
                "fake score, and at their dtype",
                masked,
                self.steps,
            )
        return masked

    def _take(self, finite: Tensor) -> None:
        self._finite.append(finite)
        if len(self._finite) >= PENDING:
            self._add_up()

    def _add_up(self) -> None:
        for device in {finite.device for finite in self._finite}:
            batches = [finite for finite in self._finite if finite.device == device]
            masked = torch.cat(batches).logical_not().sum()
            self._counts[device] = self._counts[device] + masked if device in self._counts else masked
        self._finite.clear()
