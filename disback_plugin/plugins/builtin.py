"""Plug-ins that come with the package: trackers, a count of masked samples, and features of the original teacher.

Imports no torch.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from disback_plugin import distributed
from disback_plugin.errors import OptionError, RoleError
from disback_plugin.plugins.hookspecs import hookimpl
from disback_plugin.plugins.manager import PluginManager

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from disback_plugin.scheduler import TrajectoryScheduler

logger = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")

# Trackers of accelerate with one step for all values, which ignore or reorder values of an earlier step.
ORDERED = ("wandb", "comet_ml", "dvclive")
# Generator updates from one report of masked samples to the next: each waits for the device.
EVERY = 50


class Trackers:
    """A plug-in that sends the numbers of a run to the trackers of an `accelerate.Accelerator`.

    Args:
        accelerator: An accelerator whose `init_trackers` was called.
        step: A function that returns the step to log under; None: generator updates, or with a tracker that ignores
            steps out of order, as Weights & Biases does, the last step of the loop's own reports, which are observed.
            Generator updates are logged as "disback/generator_updates" too, and are the x axis there.

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
        self._step = step
        self._logs = [(tracker.log, _last_step(tracker)) for tracker in accelerator.trackers]

    @hookimpl
    def disback_log(self, values: Mapping[str, float], step: int) -> None:
        """Send the `values` at `step` generator updates to each tracker; called on the main process only."""
        row = {**values, "disback/generator_updates": step}
        for log, last_step in self._logs:
            log(row, step=last_step(step) if self._step is None else self._step())


def _last_step(tracker: Any) -> Callable[[int], int]:
    """Return a function from generator updates to the step to log under; where it matters, observe the loop's own."""
    if getattr(tracker, "name", "") not in ORDERED:
        return lambda updates: updates
    run: Any = getattr(tracker, "run", None)
    log, seen = tracker.log, list[int]()
    if hasattr(run, "define_metric"):
        run.define_metric("disback/*", step_metric="disback/generator_updates")

    @functools.wraps(log)
    def observed(values: Any, step: int | None = None, **options: Any) -> Any:
        if step is not None:
            seen[:] = [step]
        return log(values, step=step, **options)

    tracker.log = observed
    return lambda updates: max([*seen, getattr(run, "step", 0)]) or updates


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


class OriginalFeatures:
    """A plug-in that gives every call of the teacher access to the active node and to s'_0.

    The input of a discriminator that reads the teacher's features (DMD2 in FastGen and DiffSynth-Studio, f-distill,
    LADD) would change at each move of the teacher. This plug-in computes the features with s'_0 instead, from a second,
    frozen copy of the teacher in memory, or of its shards, while the position is above 0.

    Args:
        teacher: The teacher's module, plain, in DDP or sharded by FSDP2; not compiled in place.
        forward: `forward(active, original, *args, **kwargs)` replaces the teacher's forward while the position is above
            0, and returns the same kind of output. `active` is the teacher's own forward, `original` is a module with
            the weights s'_0, through which gradients reach the arguments.
        place: Object and attribute of another function to replace, of a trainer that calls the teacher's parts.

    Raises:
        RoleError: If the teacher is in FSDP1 or compiled in place, so that it can be neither copied nor redirected.

    Example:
        >>> def forward(active, original, x, *, features=False):
        ...     return original(x, features=True) if features else active(x)
        >>> from torch import nn
        >>> teacher = nn.Linear(2, 2)
        >>> plugins = (OriginalFeatures(teacher, forward),)  # of attach(...)
    """

    def __init__(
        self, teacher: nn.Module, forward: Callable[..., Any], *, place: tuple[object, str] | None = None
    ) -> None:
        kinds = {kind.__name__ for module in teacher.modules() for kind in type(module).__mro__}
        fsdp1 = "FullyShardedDataParallel" in kinds
        if fsdp1 or getattr(teacher, "_compiled_call_impl", None) is not None:
            raise RoleError(
                f"a teacher {'in FSDP1' if fsdp1 else 'compiled in place'} whose features a discriminator reads",
                expected="a teacher that can be copied: plain, in DDP or in FSDP2 (fully_shard)",
                cure="let the discriminator see the active node's features: disback run -p no:teacher_features ..., or "
                'attach(..., plugins=("no:teacher_features",))',
            )
        logger.info(
            "the discriminator keeps the features of the original teacher, of which a second copy is held during "
            "backtracking; no:teacher_features gives it those of the active node instead"
        )
        self._teacher, self._forward = teacher, forward
        self._owner, self._name = place or (teacher, "forward")
        self._attributes: dict[str, Any] | None = None  # the owner's own function, if it has one, while replaced

    @hookimpl
    def disback_after_node_swapped(self, scheduler: TrajectoryScheduler, position: float) -> None:
        """Replace the function while `position` is above 0; s'_0 is read from the path of `scheduler`."""
        if position and self._attributes is None and scheduler.path is not None:
            from disback_plugin.weights.modules import frozen_copy
            from disback_plugin.weights.network import ScoreNetwork

            original = frozen_copy(self._teacher)
            ScoreNetwork(original).write(scheduler.path.teacher_source())
            self._replace(original)
        elif not position and self._attributes is not None:
            delattr(self._owner, self._name)
            vars(self._owner).update(self._attributes)
            self._attributes = None

    def _replace(self, original: nn.Module) -> None:
        teacher, active, forward = self._teacher, getattr(self._owner, self._name), self._forward

        def both(*args: Any, **kwargs: Any) -> Any:
            if original.training is not teacher.training:
                original.train(teacher.training)
            return forward(active, original, *args, **kwargs)

        self._attributes = {name: value for name, value in vars(self._owner).items() if name == self._name}
        setattr(self._owner, self._name, both)
