"""The numbers of a run in accelerate's trackers: TensorBoard, Weights & Biases, and whatever else it knows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from disback_plugin.errors import OptionError
from disback_plugin.plugins.hookspecs import hookimpl

__all__ = ["Trackers"]


class Trackers:
    """A plug-in that sends what a run reports to the trackers of an `accelerate.Accelerator`.

    Args:
        accelerator: One whose `init_trackers` was called.
        step: Returns the step under which the trainer itself logs, for trackers that want steps in order, as Weights &
            Biases does; None: generator updates. These are logged as "disback/generator_updates" too.

    Raises:
        OptionError: If the accelerator has no tracker.

    Example:
        >>> class Tracker:
        ...     def log(self, values, step):
        ...         print(step, values)
        >>> class Accelerator:
        ...     trackers = [Tracker()]
        >>> Trackers(Accelerator()).disback_log({"disback/position": 2.0}, 40)
        40 {'disback/position': 2.0, 'disback/generator_updates': 40}
    """

    def __init__(self, accelerator: Any, *, step: Callable[[], int] | None = None) -> None:
        if not getattr(accelerator, "trackers", None):
            raise OptionError(
                f"a {type(accelerator).__name__} without trackers",
                expected="accelerate's Accelerator(log_with=...)",
                cure="call accelerator.init_trackers(name) before attach()",
            )
        self._accelerator, self._step = accelerator, step

    @hookimpl
    def disback_log(self, values: Mapping[str, float], step: int) -> None:
        """Send `values` to each tracker, at `step` generator updates; the host calls it on the main process only."""
        at = step if self._step is None else self._step()
        for tracker in self._accelerator.trackers:
            tracker.log({**values, "disback/generator_updates": step}, step=at)
