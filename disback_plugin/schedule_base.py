"""The base of every schedule, a schedule on one path, and the text under which a saved state knows a schedule.

A schedule is a pure function of generator updates. A plug-in that keeps or ends a node changes only the *schedule step*
(the number of updates that the schedule is asked for), so that the step and the path are the whole state.
"""

from __future__ import annotations

import ast
import json
import logging
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cached_property
from math import ceil
from typing import TYPE_CHECKING, Any, NamedTuple

from disback_plugin.errors import OptionError, StateError
from disback_plugin.progress import Phase, Progress

if TYPE_CHECKING:
    from disback_plugin.path.manifest import Manifest

__all__ = ["Plan", "Schedule", "Target", "WrappedSchedule", "same", "to_config", "validate_config"]

logger = logging.getLogger(__name__)


class Target(NamedTuple):
    """The teacher's position and the factor on the gradient for the next generator update.

    Attributes:
        position: The teacher's position in [0, N]; 0.0 is the teacher s'_0 itself.
        gradient: Factor on the generator's gradient, in [0, 1].

    Example:
        >>> Target(2.0)
        Target(position=2.0, gradient=1.0)
    """

    position: float
    gradient: float = 1.0


class Schedule:
    """A pure function from generator updates to a `Target`: the base class of every schedule.

    Make a subclass a frozen dataclass: a saved state holds its name, arguments and version (`to_config`), and a run is
    resumed only under the same ones. An object that does not inherit from this class needs `__call__` and `horizon`.

    Attributes:
        discrete: Whether the teacher stays on each node for several updates. Only then may a plug-in keep or end a node
            (`disback_should_advance`).
        until_fitted: Whether recording ends as soon as s' is fitted. The schedule then takes its length from the
            recording (`settle`), and backtracking ends for good if s_phi diverges.
        version: Version of the arguments' meaning. A state of another version is refused.

    Example:
        >>> @dataclass(frozen=True)
        ... class Halves(Schedule):
        ...     every: int
        ...
        ...     def __call__(self, updates: int, nodes: int) -> Target:
        ...         return Target(nodes / 2 ** (1 + updates // self.every) if updates < self.horizon(nodes) else 0.0)
        ...
        ...     def horizon(self, nodes: int) -> int:
        ...         return 4 * self.every
        >>> [Halves(10)(updates, 4).position for updates in (0, 10, 20, 30, 40)]
        [2.0, 1.0, 0.5, 0.25, 0.0]
    """

    discrete: bool = False
    until_fitted: bool = False
    version: int = 1

    def __call__(self, updates: int, nodes: int) -> Target:
        """Return the target after `updates` >= 0 generator updates on a path whose last node is `nodes`."""
        raise NotImplementedError

    def horizon(self, nodes: int) -> int:
        """Return the number of updates after which the target is Target(0, 1) for good."""
        raise NotImplementedError

    def validate(self, nodes: int) -> None:
        """Raise OptionError if the schedule does not fit a path whose last node is `nodes` >= 1; by default it fits."""

    def settle(self, fitted: int) -> Schedule:
        """Return the schedule to run where s' was fitted in `fitted` >= 1 updates; by default the schedule itself.

        If s' was not fitted, `fitted` is the length of the whole recording.
        """
        return self


class WrappedSchedule(Schedule):
    """A user's schedule that does not inherit from `Schedule`, with the defaults for what it lacks."""

    def __init__(self, schedule: Any) -> None:
        self.wrapped = schedule
        self.until_fitted = hasattr(schedule, "settle")
        for name in ("discrete", "until_fitted", "version", "horizon", "validate"):
            if hasattr(schedule, name):
                setattr(self, name, getattr(schedule, name))

    def __call__(self, updates: int, nodes: int) -> Target:
        """Return the target after `updates` generator updates."""
        return Target(*self.wrapped(updates, nodes))

    def settle(self, fitted: int) -> Schedule:
        """Return the schedule to run where s' was fitted in `fitted` updates."""
        settled = self.wrapped.settle(fitted) if self.until_fitted else self
        return settled if isinstance(settled, Schedule) else WrappedSchedule(settled)

    def __repr__(self) -> str:
        return repr(self.wrapped)


@dataclass(frozen=True)
class Plan:
    """A schedule on one path: what to do at each step, as pure functions of the step.

    Args:
        schedule: The schedule.
        nodes: N, the index of the path's last node.

    Example:
        >>> from disback_plugin.schedules import Fixed
        >>> plan, step, visited = Plan(Fixed(2, 3), nodes=3), 0, []
        >>> for leave in (False, False, False, None, True, None):  # the answers of plug-ins
        ...     visited.append(int(plan.target(step).position))
        ...     step = plan.next_step(step, leave)
        >>> visited, plan.target(step).position
        ([2, 2, 2, 2, 1, 0], 0.0)
    """

    schedule: Schedule
    nodes: int

    @classmethod
    def on_path(cls, schedule: Schedule, manifest: Manifest | None) -> Plan:
        """Return the plan of a schedule on a recorded path, or on none, and log what the recording made of it.

        Raises:
            OptionError: If the schedule does not fit the path.
        """
        if manifest is None or not manifest.nodes:
            return cls(schedule, 0)
        nodes = len(manifest.nodes)
        schedule.validate(nodes)
        if not schedule.until_fitted:
            return cls(schedule, nodes)
        plan = cls(schedule.settle(manifest.updates_to_fit), nodes)
        logger.info(
            "%s: s_phi %s %d updates at its learning rate; the teacher moves back from the last node in %d, and the "
            "gradient grows to its full size in %d",
            repr(schedule).partition("(")[0].lower(),
            "is fitted in" if manifest.fitted else "was not fitted in",
            manifest.updates_to_fit,
            next(step for step, target in plan.timeline() if target.position == 0),
            plan.horizon,
        )
        return plan

    @cached_property
    def horizon(self) -> int:
        """Number of steps after which the target is Target(0, 1) for good."""
        return self.schedule.horizon(self.nodes)

    def target(self, step: int) -> Target:
        """Return the target at a step.

        Raises:
            OptionError: If the schedule returns a value out of bounds.
        """
        if step >= self.horizon:
            return Target(0.0)
        target = self.schedule(step, self.nodes)
        if not (0 <= target.position <= self.nodes and 0 <= target.gradient <= 1):
            raise OptionError(
                f"{target} of {self.schedule!r} at update {step}",
                expected=f"a position in [0, {self.nodes}] and a gradient factor in [0, 1]",
                cure="correct the schedule",
            )
        return target

    def may_be_overruled(self, step: int) -> bool:
        """Return whether the teacher stays on a node i >= 1 at this step, which a plug-in may keep or end."""
        return self.schedule.discrete and self.target(step).position > 0

    def next_step(self, step: int, leave: bool | None = None) -> int:
        """Return the step that follows.

        Args:
            step: The present step.
            leave: None as planned; on a node, False to stay on the node and True to leave it.
        """
        if leave is None or not self.may_be_overruled(step):
            return step + 1
        position = self.target(step).position
        if not leave:
            return step if self.target(step + 1).position != position else step + 1
        return self._first(step, lambda target: target.position != position)

    def timeline(self) -> list[tuple[int, Target]]:
        """Return the first step, the last one, and those at which the teacher reaches another node, with their targets.

        Example:
            >>> from disback_plugin.schedules import Fixed, Ramp
            >>> [(step, target.position) for step, target in Plan(Fixed(2, 3), 3).timeline()]
            [(0, 2.0), (2, 1.0), (5, 0.0)]
            >>> [step for step, _ in Plan(Ramp(100), 2).timeline()]
            [0, 45, 100]
        """
        nodes = range(ceil(self.target(0).position))
        reached = {self._first(-1, lambda target, node=node: target.position <= node) for node in nodes}  # type: ignore[misc]
        return [(step, self.target(step)) for step in sorted({0, self.horizon, *reached})]

    def timeline_from(self, progress: Progress) -> list[tuple[int, Target]]:
        """Return the `timeline` in generator updates; after a plug-in's decision only from the present node on.

        Example:
            >>> from disback_plugin.schedules import Fixed
            >>> left_early = Progress(Phase.BACKTRACKING, generator_updates=1, schedule_step=2, node_since=1)
            >>> [(update, target.position) for update, target in Plan(Fixed(2, 3), 3).timeline_from(left_early)]
            [(1, 1.0), (4, 0.0)]
        """
        now, step = progress.generator_updates, progress.schedule_step
        if progress.phase is Phase.DONE:
            if now < self.horizon:  # backtracking was ended early
                return [(progress.node_since, Target(0.0))]
            now, step = (progress.node_since, self.horizon) if self.schedule.discrete and self.horizon else (0, 0)
        if now == step:
            return self.timeline()
        later = [(update + now - step, target) for update, target in self.timeline() if update > step]
        return [(progress.node_since, self.target(step)), *later]

    def _first(self, before: int, reached: Callable[[Target], bool]) -> int:
        """Return the first step after `before` whose target fulfils a condition that stays fulfilled: a bisection."""
        after = self.horizon
        while after - before > 1:
            middle = (before + after) // 2
            if reached(self.target(middle)):
                after = middle
            else:
                before = middle
        return after


def to_config(schedule: Schedule) -> str:
    """Return the JSON text under which a saved state knows a schedule: its name, arguments and version.

    Example:
        >>> from disback_plugin.schedules import Ramp
        >>> to_config(Ramp(7))
        '{"arguments": {"amplitude": true, "start": 0.9, "updates": 7}, "name": "Ramp", "version": 1}'
    """
    own = getattr(schedule, "wrapped", schedule)
    arguments = {f.name: getattr(own, f.name) for f in fields(own)} if is_dataclass(own) else {"repr": repr(own)}
    config = {"name": type(own).__name__, "arguments": arguments, "version": schedule.version}
    return json.dumps(config, sort_keys=True, default=repr)


def same(schedule: Schedule, text: str) -> bool:
    """Return whether a saved text names this schedule. An argument that it omits had the default of the class.

    Args:
        schedule: The schedule at hand.
        text: The text that `to_config` returned, or a schedule's repr, which states of version 1 hold.

    Example:
        >>> from disback_plugin.schedules import Ramp
        >>> same(Ramp(7), to_config(Ramp(7))), same(Ramp(7), "Ramp(updates=7)"), same(Ramp(7), "Ramp(updates=8)")
        (True, True, False)
    """
    own = getattr(schedule, "wrapped", schedule)
    known = fields(own) if is_dataclass(own) else ()
    defaults = json.loads(json.dumps({f.name: f.default for f in known if f.default is not MISSING}, default=repr))
    saved, wanted = _read(text), json.loads(to_config(schedule))
    if saved is not None:
        saved["arguments"] = defaults | saved["arguments"]
    return text == repr(schedule) or (saved is not None and all(saved.get(key) == wanted[key] for key in wanted))


def validate_config(schedule: Schedule, text: str) -> None:
    """Raise StateError unless a saved text names this schedule (`same`)."""
    if not same(schedule, text):
        raise StateError(
            f"a state of another schedule ({text:.200})",
            expected=f"{schedule!r:.100}",
            cure="attach with the schedule that the state was saved under, in a version that knows its arguments",
        )


def _read(text: str) -> dict[str, Any] | None:
    """Return name, arguments and version from a saved text; None if it cannot be read."""
    try:
        if text.startswith("{"):
            config = json.loads(text)
            return config if isinstance(config["arguments"], dict) else None
        name, _, arguments = text.partition("(")
        call = ast.parse(f"_({arguments}", mode="eval").body
        if not isinstance(call, ast.Call):
            return None
        given = {str(keyword.arg): ast.literal_eval(keyword.value) for keyword in call.keywords}
        if call.args:  # only Fixed has shown arguments without their name
            given["budgets"] = [ast.literal_eval(value) for value in call.args]
        return {"name": name.rpartition(".")[2], "arguments": json.loads(json.dumps(given)), "version": 1}
    except (SyntaxError, ValueError, TypeError, KeyError, RecursionError, MemoryError):
        return None
