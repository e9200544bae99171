"""Where the walk stands in its schedule: one update further each time, unless a plug-in keeps or ends a node.

A schedule is a pure function of updates; what a plug-in decides moves the update that it is asked for, and nothing
else. Two counts are the whole state, so that a resumed run goes on bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil

from disback_plugin.errors import OptionError
from disback_plugin.schedules import Schedule, Target

__all__ = ["Plan", "length"]


class Plan:
    """A schedule on one path, and how far it is.

    Args:
        schedule: The schedule.
        nodes: N, the index of the path's last node.

    Attributes:
        updates: The update of the schedule that holds now; generator updates, but for what plug-ins overruled.
        node_since: Generator updates at which the present node was come to.
        target: The schedule at `updates`; Target(0, 1) before the start.
        horizon: Updates from which on the target is Target(0, 1).

    Example:
        >>> from disback_plugin.schedules import Fixed
        >>> plan, visited = Plan(Fixed(2, 3), nodes=3), []
        >>> plan.go_to(0, now=0)
        >>> for now, leave in enumerate((False, False, False, None, True, None), start=1):
        ...     visited.append(int(plan.target.position))
        ...     plan.go_to(plan.following(leave), now=now)
        >>> visited, plan.target.position, plan.node_since
        ([2, 2, 2, 2, 1, 0], 0.0, 5)
    """

    def __init__(self, schedule: Schedule, nodes: int) -> None:
        self.schedule, self.nodes = schedule, nodes
        self.horizon = schedule.horizon(nodes)
        self.updates = self.node_since = 0
        self.target = Target(0.0)
        self._discrete = bool(getattr(schedule, "discrete", False))

    @property
    def finished(self) -> bool:
        """Whether the target is Target(0, 1) for good."""
        return self.updates >= self.horizon

    @property
    def on_node(self) -> bool:
        """Whether the walk stands on a node i >= 1 that a plug-in may keep or end."""
        return self._discrete and self.target.position > 0

    def at(self, updates: int) -> Target:
        """Return the target of an update of the schedule.

        Raises:
            OptionError: If it is out of bounds.
        """
        if updates >= self.horizon:
            return Target(0.0)
        target = self.schedule(updates, self.nodes)
        if not (0 <= target.position <= self.nodes and 0 <= target.gradient <= 1):
            raise OptionError(
                f"{target} of {self.schedule!r} at update {updates}",
                expected=f"a position in [0, {self.nodes}] and a gradient factor in [0, 1]",
                cure="correct the schedule",
            )
        return target

    def go_to(self, updates: int, *, now: int) -> None:
        """Let another update of the schedule hold, after `now` generator updates."""
        target = self.at(updates)
        if target.position != self.target.position:
            self.node_since = now
        self.updates, self.target = updates, target

    def following(self, leave: bool | None = None) -> int:
        """Return the update of the schedule that comes next.

        Args:
            leave: None as planned; on a node, False to stay on it, and True to leave it.
        """
        following = self.updates + 1
        if leave is None or not self.on_node:
            return following
        leaves = self.at(following).position != self.target.position
        if leave:
            return following if leaves else self._end_of_node()
        return self.updates if leaves else following

    def _end_of_node(self) -> int:
        """Return the first update of the schedule at another position than now: a bisection."""
        stays, leaves = self.updates, self.horizon
        while leaves - stays > 1:
            middle = (stays + leaves) // 2
            if self.at(middle).position == self.target.position:
                stays = middle
            else:
                leaves = middle
        return leaves

    def stop(self) -> None:
        """End here, at Target(0, 1)."""
        self.horizon, self.target = 0, Target(0.0)

    def stages(self) -> list[tuple[int, Target]]:
        """Return the updates of the schedule at which the walk is level with another node, and the first and last.

        Example:
            >>> from disback_plugin.schedules import Fixed, Ramp
            >>> [(updates, target.position) for updates, target in Plan(Fixed(2, 3), 3).stages()]
            [(0, 2.0), (2, 1.0), (5, 0.0)]
            >>> [updates for updates, _ in Plan(Ramp(100), 2).stages()]
            [0, 45, 100]
        """
        found = {0, self.horizon}
        for node in range(ceil(self.at(0).position)):
            found.add(self._first_at_or_below(node))
        return [(updates, self.at(updates)) for updates in sorted(found)]

    def ahead(self, now: int) -> list[tuple[int, Target]]:
        """Return `stages` in generator updates, at `now` of them; of a plan that was overruled, from the present on.

        Example:
            >>> from disback_plugin.schedules import Fixed
            >>> plan = Plan(Fixed(2, 3), nodes=3)
            >>> plan.go_to(0, now=0)
            >>> plan.go_to(plan.following(True), now=1)  # left after one update instead of two
            >>> [(update, target.position) for update, target in plan.ahead(now=1)]
            [(1, 1.0), (4, 0.0)]
        """
        moved = now - self.updates
        if self.finished and now < self.horizon:  # somebody let go
            return [(self.node_since, self.target)]
        if self.finished:  # and stood still since; without a plug-in it came to an end on time
            moved = self.node_since - self.horizon if self._discrete and self.horizon else 0
        if not moved:
            return self.stages()
        later = [(updates + moved, target) for updates, target in self.stages() if updates > self.updates]
        return [(self.node_since, self.target), *later]

    def _first_at_or_below(self, position: float) -> int:
        above, reached = -1, self.horizon
        while reached - above > 1:
            middle = (above + reached) // 2
            if self.at(middle).position > position:
                above = middle
            else:
                reached = middle
        return reached


def length(delta_norms: Sequence[float], start: float, end: float) -> float:
    """Return how long the path is between two positions, in weight space.

    Args:
        delta_norms: |theta_i - theta_{i-1}| of nodes i = 1, ..., N.
        start: A position in [0, N].
        end: Another, or the same.

    Example:
        >>> length([3.0, 4.0], 1.5, 0.0), length([3.0, 4.0], 0.0, 2.0)
        (5.0, 7.0)
    """
    low, high = sorted((start, end))
    return sum(norm * max(min(high, i + 1) - max(low, i), 0.0) for i, norm in enumerate(delta_norms))
