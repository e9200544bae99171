"""What a session measures after an update of the generator: the fake score, the generator's step, the user's numbers.

All of it happens between two steps, and draws from no random generator of the run.
"""

from __future__ import annotations

import logging
import random
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from disback_plugin import distributed
from disback_plugin.errors import OptionError
from disback_plugin.loop.effective_step import EffectiveStep
from disback_plugin.loop.optimizers import parameters
from disback_plugin.plugins.run_log import valid_values

if TYPE_CHECKING:
    from disback_plugin.scheduler import TrajectoryScheduler
    from disback_plugin.session import Session

logger = logging.getLogger(__name__)

Evaluate: TypeAlias = Callable[[], Mapping[str, Any] | None]


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
        self._step: EffectiveStep | None = None
        self._begins = False  # whether no update was made since `begin`

    def begin(self, scheduler: TrajectoryScheduler, *, resumes: bool) -> None:
        """Say how the schedule changes the generator's step, and measure it where somebody reads the numbers."""
        session, plan = self._session, scheduler.plan
        if session.schedule.effective_step and plan.nodes and not (resumes or scheduler.done):
            logger.info(session.schedule.effective_step, plan.horizon)
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
            self._run()

    def after_update(self) -> None:
        """Measure what is due after an update of the generator."""
        session, update = self._session, self._session.progress.generator_updates
        step = None if self._step is None else self._step.observe(update)
        if step is not None:
            session.plugins.call("disback_log", values={"disback/effective_step": step}, step=update)
        if self._evaluate is not None and update % self._every == 0:
            self._run()

    def read_monitor(self) -> None:
        """Read a finished window of s_phi's gradients, and perhaps end backtracking."""
        session, scheduler = self._session, self._session.scheduler
        if scheduler is None:
            return
        if scheduler.done and session.path is not None:
            session.monitor = None
        if session.monitor is None or session.monitor.updates_left > 0:
            return
        from disback_plugin.monitor import report

        ends = session.path is not None and session.schedule.until_fitted
        update, position = session.progress.generator_updates, scheduler.position
        if report(session.monitor, session.plugins, update=update, position=position, ends=ends):
            scheduler.end_backtracking()
            session.monitor = None

    def _run(self) -> None:
        """Call the user's function with the original teacher in place, and log what it returns."""
        session, update = self._session, self._session.progress.generator_updates
        original = nullcontext() if session.scheduler is None else session.scheduler.original_teacher()
        with torch.no_grad(), _random_states(session), original:
            try:
                values = self._evaluate() if self._evaluate is not None else None
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
    numpy, before = sys.modules.get("numpy"), random.getstate()
    of_numpy = None if numpy is None else numpy.random.get_state()
    try:
        with torch.random.fork_rng([*devices]):
            yield
    finally:
        random.setstate(before)
        if numpy is not None:
            numpy.random.set_state(of_numpy)
