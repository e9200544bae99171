"""The base of every schedule, a schedule on one path, and the text under which a saved state knows a schedule.

A schedule is a pure function of generator updates. A plug-in that keeps or ends a node changes only the *schedule step*
(the number of updates that the schedule is asked for), so that the step and the path are the whole state.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left, bisect_right
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass, fields, is_dataclass
from functools import cached_property
from math import ceil
from typing import TYPE_CHECKING, Any, NamedTuple

from disback_plugin.errors import OptionError, StateError
from disback_plugin.progress import Phase, Progress

if TYPE_CHECKING:
    from disback_plugin.path.manifest import Manifest


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
    resumed only under the same ones.

    Attributes:
        discrete: Whether the teacher stays on each node for several updates. Only then may a plug-in keep or end a node
            (`disback_should_advance`).
        until_fitted: Whether recording ends as soon as s' is fitted. The schedule then takes its length from the
            recording (`settle`), and backtracking ends for good if s_phi diverges.
        effective_step: How the schedule changes the generator's effective step, in a sentence for the log with a %d for
            the schedule's length; "" if it does not.
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
    effective_step: str = ""
    version: int = 1

    def __call__(self, updates: int, nodes: int) -> Target:
        """Return the target after `updates` >= 0 generator updates on a path whose last node is `nodes`."""
        raise NotImplementedError

    def horizon(self, nodes: int) -> int:
        """Return the number of updates after which the target is Target(0, 1) for good, on a path to node `nodes`."""
        raise NotImplementedError

    def validate(self, nodes: int) -> None:
        """Raise OptionError if the schedule does not fit a path whose last node is `nodes` >= 1; by default it fits."""

    def settle(self, fitted: int) -> Schedule:
        """Return the schedule to run where s' was fitted in `fitted` >= 1 updates; by default the schedule itself.

        If s' was not fitted, `fitted` is the length of the whole recording.
        """
        return self


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
        """Return the plan of a schedule on a recorded path, or on none.

        Raises:
            OptionError: If the schedule does not fit the path.
        """
        if manifest is None or not manifest.nodes:
            return cls(schedule, 0)
        schedule.validate(len(manifest.nodes))
        return cls(schedule.settle(manifest.updates_to_fit), len(manifest.nodes))

    @cached_property
    def horizon(self) -> int:
        """Number of steps after which the target is Target(0, 1) for good."""
        return int(self.schedule.horizon(self.nodes))  # numpy's numbers are taken, too

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
        if leave:
            return bisect_right(range(self.horizon), -position, lo=step, key=self._descent)
        return step if self.target(step + 1).position != position else step + 1

    def timeline(self, progress: Progress) -> list[tuple[int, Target]]:
        """Return the generator updates at which the teacher reaches another node, the first and the last, with targets.

        After a plug-in's decision they begin at the present node; once backtracking is over, only its end is left.

        Example:
            >>> from disback_plugin.schedules import Fixed, Ramp
            >>> [(update, target.position) for update, target in Plan(Fixed(2, 3), 3).timeline(Progress())]
            [(0, 2.0), (2, 1.0), (5, 0.0)]
            >>> [update for update, _ in Plan(Ramp(100), 2).timeline(Progress())]
            [0, 45, 100]
            >>> left_early = Progress(Phase.BACKTRACKING, generator_updates=1, schedule_step=2, node_since=1)
            >>> [(update, target.position) for update, target in Plan(Fixed(2, 3), 3).timeline(left_early)]
            [(1, 1.0), (4, 0.0)]
        """
        if progress.phase is Phase.DONE:
            return [(progress.node_since, Target(0.0))]
        nodes, steps = range(ceil(self.target(0).position)), range(self.horizon)
        reached = {bisect_left(steps, float(-node), key=self._descent) for node in nodes}
        planned = [(step, self.target(step)) for step in sorted({0, self.horizon, *reached})]
        now, ahead = progress.schedule_step, progress.generator_updates - progress.schedule_step
        if not ahead:
            return planned
        later = [(step + ahead, target) for step, target in planned if step > now]
        return [(progress.node_since, self.target(now)), *later]

    def _descent(self, step: int) -> float:
        """Return the negative position at a step: it never falls, so that a bisection finds the step of a node."""
        return -self.target(step).position


def to_config(schedule: Schedule, *, omit: Collection[str] = ()) -> str:
    """Return the JSON text under which a saved state knows a schedule: its name, arguments and version.

    Args:
        schedule: The schedule.
        omit: Arguments that the text does not name.

    Example:
        >>> from disback_plugin.schedules import Ramp
        >>> to_config(Ramp(7))
        '{"arguments": {"amplitude": true, "start": 0.9, "updates": 7}, "name": "Ramp", "version": 1}'
    """
    config = {"name": type(schedule).__name__, "arguments": _arguments(schedule, omit), "version": schedule.version}
    # The numbers of numpy and torch are equal by value.
    return json.dumps(config, sort_keys=True, default=lambda value: getattr(value, "tolist", value.__repr__)())


def validate_config(schedule: Schedule, text: str) -> None:
    """Raise StateError unless a saved text names this schedule. An argument that it omits had the default of the class.

    Args:
        schedule: The schedule at hand.
        text: The text that `to_config` returned, or a schedule's repr, which states of version 1 hold.

    Example:
        >>> from disback_plugin.schedules import Ramp
        >>> for text in (to_config(Ramp(7)), "Ramp(updates=7, start=0.9, amplitude=True)", "Ramp(updates=7)"):
        ...     validate_config(Ramp(7), text)
    """
    kind = type(schedule)
    unnamed = [name for name in _arguments(schedule) if not re.search(rf'\b{name}(": |=)', text)]
    omit = [name for name in unnamed if getattr(kind, name, ...) == getattr(schedule, name, None)]  # the default
    named = ", ".join(f"{name}={value!r}" for name, value in _arguments(schedule, omit).items())
    plain = [_without_numpy(each) for each in (repr(schedule), f"{kind.__qualname__}({named})")]
    if _without_numpy(text) in (*plain, json.loads(to_config(schedule, omit=omit))):
        return
    cure = "attach with the schedule that the state was saved under, in a version that knows its arguments"
    if text.startswith("Adaptive("):
        cure = "finish the run with disback-plugin 0.1.0, the last version that has Adaptive"
    raise StateError(f"a state of another schedule ({text:.200})", expected=f"{schedule!r:.100}", cure=cure)


def _without_numpy(text: str) -> Any:
    """Return the content of a saved text, numbers by value: earlier versions saved numpy's as "np.int64(30)"."""
    plain = re.sub(r'"?\b(?:np\.\w+|tensor)\(([^()]*)\)"?', r"\1", text)
    with suppress(ValueError):
        return json.loads(plain)
    return plain


def _arguments(schedule: Schedule, omit: Collection[str] = ()) -> dict[str, Any]:
    if not is_dataclass(schedule):
        return {"repr": repr(schedule)}
    return {f.name: getattr(schedule, f.name) for f in fields(schedule) if f.name not in omit}
