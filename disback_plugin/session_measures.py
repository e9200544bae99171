"""What a session measures after an update of the generator: the fake score, the generator's step, the user's numbers.

All of it happens between two steps, and draws from no random generator of the run. The generator's *effective step* is
how far an update moves its weights, in units of the learning rate:

    RMS over weights and updates of (w_u - w_{u-1}) / rate

A settled Adam's is near 1. It is larger where the second moments are older and smaller than the present gradient,
as after gradients that were scaled down, and then stands for a higher learning rate.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from disback_plugin import distributed
from disback_plugin.convergence import DivergenceMonitor
from disback_plugin.errors import OptionError
from disback_plugin.loop.optimizer_hooks import UpdateCounter
from disback_plugin.loop.optimizers import parameters
from disback_plugin.plugins.run_log import valid_values
from disback_plugin.weights.marks import WeightSample

if TYPE_CHECKING:
    from disback_plugin.scheduler import TrajectoryScheduler
    from disback_plugin.session import Session

logger = logging.getLogger(__name__)

Evaluate: TypeAlias = Callable[[], Mapping[str, Any] | None]

# Updates that a value of the effective step is the mean of.
WINDOW = 5
# Signs of a run that goes wrong (`convergence`), and the warnings.
SIGNS = {
    "stalled": "the fake score does not follow the student, its gradients at updates in a row agree: give it a higher "
    "learning rate or more updates per generator update, unless its rate is still warming up",
    "diverged": "the fake score's gradients have grown thirtyfold or are not finite: the student runs away from it; "
    "lower the generator's learning rate",
}


def log_values(session: Session, values: Mapping[str, Any]) -> None:
    """Log numbers and pictures under the present update, as `Handle.log` does; on the main process only."""
    if not distributed.is_main_process():
        return
    update, recorded, found = session.progress.generator_updates, session.recorded, valid_values(values)
    pictures = {name: value for name, value in found.items() if isinstance(value, Path)}
    numbers = {f"disback/{name.removeprefix('disback/')}": found[name] for name in found if name not in pictures}
    if numbers:
        now = {} if recorded is None else {"disback/recording": recorded}
        session.plugins.call("disback_log", values=now | numbers, step=update)
    if pictures and session.log is not None:
        session.log.log(pictures, update, recording=recorded)


class Measures:
    """The measures of one session, from the start of backtracking on.

    Args:
        session: The session.
        evaluate: The user's function, or None.
        every: Generator updates between two of its calls, >= 1.

    Attributes:
        monitor: What s_phi's gradients show while backtracking, else None.

    Raises:
        OptionError: If `evaluate` cannot be called, or `every` is out of its domain.
    """

    def __init__(self, session: Session, evaluate: Evaluate | None, every: int) -> None:
        if not (evaluate is None or callable(evaluate)) or type(every) is not int or every < 1:
            raise OptionError(
                f"evaluate={evaluate!r:.60}, evaluate_every={every!r}",
                expected="a function without arguments, and a number of updates >= 1",
                cure="pass evaluate=lambda: {'distance': ...}, evaluate_every=1_000",
            )
        self._session, self._evaluate, self._every = session, evaluate, every
        self.monitor: DivergenceMonitor | None = None
        self._step: EffectiveStep | None = None
        self._begins = False  # whether no update was made since `begin`

    def begin(self, scheduler: TrajectoryScheduler, *, resumes: bool) -> None:
        """Say how the schedule changes the generator's step, and measure it where somebody reads the numbers."""
        session, plan = self._session, scheduler.plan
        moves = plan.nodes and not scheduler.done
        if session.schedule.effective_step and moves and not resumes:
            logger.info(session.schedule.effective_step, plan.horizon)
        monitored = moves or (session.path is None and session.monitors)
        self.monitor = DivergenceMonitor(session.fake_score, plan.horizon) if monitored else None
        reads = session.log is not None or session.plugins.listens("disback_log")
        self._step = EffectiveStep(session.hooks.generator) if reads and distributed.is_main_process() else None
        self._begins = True

    def before_generator_step(self) -> None:
        """Before the first update since `begin`: sample the weights, and evaluate the initial student."""
        if not self._begins or self._session.scheduler is None:
            return
        self._begins, update = False, self._session.progress.generator_updates
        if self._step is not None:
            self._step.observe(update)
        if self._evaluate is not None and not update:
            self._run(self._evaluate)

    def after_update(self) -> None:
        """Measure what is due after an update of the generator."""
        session, update = self._session, self._session.progress.generator_updates
        step = None if self._step is None else self._step.observe(update)
        if step is not None:
            session.plugins.call("disback_log", values={"disback/effective_step": step}, step=update)
        if self._evaluate is not None and update % self._every == 0:
            self._run(self._evaluate)

    def read_monitor(self, scheduler: TrajectoryScheduler) -> None:
        """Read a window of s_phi's gradients that has ended: log the mean cosine, and warn once of each sign.

        Backtracking ends if the run has diverged and its schedule wants that. All ranks must call.
        """
        session = self._session
        if scheduler.done and session.path is not None:
            self.monitor = None
        if self.monitor is None or self.monitor.updates_left > 0:
            return
        signs, agreement = self.monitor.new_signs(), self.monitor.agreement
        ends = "diverged" in self.monitor.signs and session.path is not None and session.schedule.until_fitted
        update = scheduler.generator_updates
        if distributed.is_main_process():
            values = {f"disback/{sign}": 1.0 for sign in signs}
            values |= {} if agreement is None else {"disback/agreement": agreement}
            if values:
                session.plugins.call("disback_log", values=values, step=update)
            for sign in signs:
                ending = "; the teacher is s'_0 for good" if sign == "diverged" and ends else ""
                logger.warning("update %d, position %g: %s%s", update, scheduler.position, SIGNS[sign], ending)
        if ends:
            scheduler.end_backtracking()
            self.monitor = None

    def _run(self, evaluate: Evaluate) -> None:
        """Call the user's function with the original teacher in place, and log what it returns."""
        session, update = self._session, self._session.progress.generator_updates
        original = nullcontext() if session.scheduler is None else session.scheduler.original_teacher()
        with torch.no_grad(), _random_states(session), original:
            try:
                values = evaluate()
            except Exception as error:
                if hasattr(error, "add_note"):  # from Python 3.11 on
                    error.add_note(f"raised by attach(evaluate=...) at generator update {update}")
                raise
        if values is not None and not isinstance(values, Mapping):
            raise OptionError(
                f"an evaluation that returned a {type(values).__name__}",
                expected="a mapping from names to numbers, or None",
                cure="return {'distance': value}",
            )
        if values and distributed.is_main_process():
            log_values(session, values)
            shown = ", ".join(f"{name} {value}" for name, value in valid_values(values).items())
            logger.info("update %d: %s", update, shown)


@contextmanager
def _random_states(session: Session) -> Iterator[None]:
    """Restore the global random states of python, numpy and torch, there on the devices of the networks."""
    weights = [session.teacher.first_parameter(), session.fake_score.first_parameter()]
    weights += parameters(session.generator_optimizers)
    devices = {weight.device.index for weight in weights if weight.device.type == "cuda"}
    before = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng([*devices]):
            yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])


# -- the effective step -----------------------------------------------------------------------------------------------


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
        self._last: Tensor | None = None  # the sample after the update before; None outside a window
        self._squares: list[Tensor] = []  # of each update of the window

    @torch.no_grad()
    def observe(self, update: int) -> float | None:
        """Observe the weights after an update; return the value if one is due, which alone is read from the device."""
        if self._last is not None:
            last, self._last = self._last, self._sample.weights()
            if len(last) == len(self._last):
                self._add(self._last - last)
        value = None
        if is_due(update) and self._squares:
            value = float(torch.stack(self._squares).mean().sqrt())
            self._squares = []
        if not any(map(is_due, range(update + 1, update + WINDOW + 1))):
            self._last = None
        elif self._last is None:
            self._begin_window()
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
