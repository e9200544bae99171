"""Counts the samples that the losses leave out because they are not finite; reads the count from the device rarely."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, ParamSpec, TypeVar

from disback_plugin import distributed
from disback_plugin.plugins.manager import PluginManager

if TYPE_CHECKING:
    import torch
    from torch import Tensor

logger = logging.getLogger(__name__)

# Generator updates from one report to the next: each waits for the device.
EVERY = 50

P = ParamSpec("P")
R = TypeVar("R")


class MaskedSamples:
    """Counts the samples that the losses of `losses` and `kernels` mask, and reports them as "disback/masked_samples".

    A report goes to the plug-ins that implement `disback_log`; if there is none, a count above 0 is a warning of
    `logging`. Only a report waits for the device. Each process counts its own samples; the main process reports.

    Args:
        plugins: A `PluginManager`, or the names and objects for one.

    Attributes:
        steps: Generator updates so far; set it when a run is resumed.

    Example:
        >>> import torch
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

    def __init__(self, *, plugins: PluginManager | Sequence[object] = ()) -> None:
        self._plugins = PluginManager.of(plugins)
        self.steps = 0
        self._counts: dict[torch.device, Tensor] = {}

    def watch(self, loss: Callable[P, R]) -> Callable[P, R]:
        """Return a loss of the same signature whose masked samples are counted here."""
        from disback_plugin._loss_formulas import FINITE_LISTENER  # imports the losses, which `attach` does not need

        @functools.wraps(loss)
        def watched(*args: P.args, **kwargs: P.kwargs) -> R:
            token = FINITE_LISTENER.set(self._count)
            try:
                return loss(*args, **kwargs)
            finally:
                FINITE_LISTENER.reset(token)

        return watched

    def step(self) -> None:
        """Count a finished generator update, and report every 50 updates."""
        self.steps += 1
        if self.steps % EVERY == 0:
            self.report()

    def report(self) -> int:
        """Read the count, which waits for the device, report it and restart from 0; call this method at the end.

        Without a loss since the last report nothing is reported.

        Returns:
            The count of this process since the last report.
        """
        if not self._counts:
            return 0
        masked = sum(int(count.item()) for count in self._counts.values())
        self._counts.clear()
        if distributed.is_main_process():
            self._plugins.call("disback_log", values={"disback/masked_samples": masked}, step=self.steps)
            if masked and not self._plugins.listens("disback_log"):
                logger.warning(
                    "%d samples were not finite and got no gradient, up to update %d: look at the outputs of teacher "
                    "and fake score, and at their dtype",
                    masked,
                    self.steps,
                )
        return masked

    def _count(self, finite: Tensor) -> None:
        masked = finite.logical_not().sum()
        self._counts[finite.device] = self._counts.get(finite.device, 0) + masked
