"""Where on the path the teacher stands, as a function of the generator's updates.

Node i of a path with nodes 0 (the teacher) to N is position i; between two nodes the weights are interpolated. A
schedule is a pure function from (generator updates, N) to a `Target`: a position in [0, N] and a factor on the
generator's gradient.

| schedule            | position after u updates              | factor on the gradient          | source            |
|---------------------|---------------------------------------|---------------------------------|-------------------|
| `Fixed(b, c, ...)`  | N - 1 for b, N - 2 for c, ..., then 0 | 1                               | Algorithm 2, B.2  |
| `Auto(F)`           | 0.9 N (1 - u / F)+                    | 1 - 0.9 (1 - u / 3F)+           | ours              |
| `Adaptive(F)`       | the same, u slower while s_phi is behind: it counts a quarter        | ours              |
| `Ramp(K)`           | 0.9 N (1 - u / K)+                    | 1 - position / N (`amplitude`)  | ours              |
| `WarmStart()`       | 0                                     | 1                               | control           |
| `GradientRamp(K)`   | 0                                     | 1 - 0.99 (1 - u / K)+           | control           |

F is what the recording says: the updates in which s' is fitted at the trainer's learning rate (`fitting`). These two
end the recording there, at twice that rate in half as many updates, and let go of the path if the run diverges
(`monitoring`).

All of them start s_phi from s'_N, except that `GradientRamp` needs no path at all.
"""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, replace
from itertools import accumulate
from typing import ClassVar, NamedTuple, Protocol, runtime_checkable

from disback_plugin.errors import OptionError
from disback_plugin.recipes import Recipe, names, recipe

__all__ = [
    "Adaptive",
    "Auto",
    "Fixed",
    "GradientRamp",
    "Ramp",
    "Recipe",
    "Schedule",
    "Settling",
    "Target",
    "WarmStart",
    "parse",
    "recipe",
    "resolve",
]


class Target(NamedTuple):
    """What the next generator update aims at.

    Attributes:
        position: Where the teacher stands, in [0, N]; 0.0 is the teacher s'_0 itself.
        gradient: Factor on the generator's gradient, in [0, 1].

    Example:
        >>> Target(2.0)
        Target(position=2.0, gradient=1.0)
    """

    position: float
    gradient: float = 1.0


class Schedule(Protocol):
    """A function from generator updates to a `Target`; frozen, without state of its own.

    Its repr goes into saved states, so that a run is not resumed under another schedule: make it a frozen dataclass.
    One that stands on nodes, each for a while, says so with a class attribute `discrete = True`: then a plug-in may
    keep or end a node (`hookspecs.Specs.disback_should_advance`). One that waits for s_phi says `braked = True`: while
    s_phi is behind the student (`monitoring`) its updates count a quarter.

    Example:
        >>> @dataclass(frozen=True)
        ... class Halves:
        ...     every: int
        ...
        ...     def __call__(self, updates: int, nodes: int) -> Target:
        ...         return Target(nodes / 2 ** (1 + updates // self.every) if updates < self.horizon(nodes) else 0.0)
        ...
        ...     def horizon(self, nodes: int) -> int:
        ...         return 4 * self.every
        ...
        ...     def check(self, nodes: int) -> None:
        ...         pass
        >>> halves: Schedule = Halves(10)
        >>> [halves(updates, 4).position for updates in (0, 10, 20, 30, 40)]
        [2.0, 1.0, 0.5, 0.25, 0.0]
    """

    def __call__(self, updates: int, nodes: int) -> Target:
        """Return the target of generator update `updates` >= 0 on a path that ends at node `nodes`."""
        ...

    def horizon(self, nodes: int) -> int:
        """Return the updates after which the target is Target(0, 1), on a path that ends at node `nodes`."""
        ...

    def check(self, nodes: int) -> None:
        """Raise OptionError if the schedule does not fit a path that ends at node `nodes` >= 1."""
        ...


@runtime_checkable
class Settling(Schedule, Protocol):
    """A schedule that the recording settles: it ends as soon as s' is fitted, and says what is done then.

    Such a one lets go of the path, for good, if s_phi is seen to diverge while the teacher walks.

    Example:
        >>> auto: Settling = Auto()
        >>> auto.settle(20).horizon(1)
        60
    """

    def settle(self, fitted: int) -> Schedule:
        """Return what is done where s' is fitted in `fitted` >= 1 updates, or was recorded so long without being."""
        ...


@dataclass(frozen=True, init=False)
class Fixed:
    """The paper's schedule (Algorithm 2, B.2): a number of updates on each node N - 1, ..., 1, then the teacher.

    Args:
        budgets: Generator updates on nodes N - 1, N - 2, ..., 1, each >= 1; the last budget repeats down to node 1.
        of: Name of the recipe that the budgets are of (`recipes`): then only paths of its N nodes fit.

    Raises:
        OptionError: If no budget is given, or one is below 1, or there is no such recipe.

    Example:
        >>> plan = Fixed(1_000, 10_000)  # the paper's, for N = 4
        >>> [plan(u, 4).position for u in (0, 999, 1_000, 11_000, 21_000)]
        [3.0, 3.0, 2.0, 1.0, 0.0]
    """

    budgets: tuple[int, ...]
    of: str | None
    discrete: ClassVar[bool] = True

    def __init__(self, *budgets: int, of: str | None = None) -> None:
        if not budgets or min(budgets) < 1:
            raise OptionError(f"Fixed{budgets}", expected="one budget >= 1 or more", cure="pass updates for each node")
        if of is not None:
            recipe(of)
        object.__setattr__(self, "budgets", tuple(budgets))
        object.__setattr__(self, "of", of)

    def __call__(self, updates: int, nodes: int) -> Target:
        """Return the target of update `updates`."""
        passed = sum(updates >= end for end in self._ends(nodes))
        return Target(float(max(nodes - 1 - passed, 0)))

    def horizon(self, nodes: int) -> int:
        """Return the update from which on the teacher stands still, on a path that ends at node `nodes`."""
        return max(self._ends(nodes), default=0)

    def check(self, nodes: int) -> None:
        """Raise OptionError if there are more budgets than nodes to stand on below node `nodes`, or the recipe is of
        another path.
        """
        if self.of is not None and nodes != recipe(self.of).nodes:
            wanted = recipe(self.of)
            raise OptionError(
                f"schedule {self.of!r} for a path whose last node is {nodes}",
                expected=f"the {wanted.nodes} nodes after the teacher that its {wanted.record} iterations make",
                cure=f"record with record={wanted.record}, every={wanted.every}: attach(..., "
                f"**schedules.recipe({self.of!r}).options), or disback run --recipe {self.of}",
            )
        if len(self.budgets) > nodes - 1:
            raise OptionError(
                f"{self!r} for a path whose last node is {nodes}",
                expected=f"at most {nodes - 1} budgets, for nodes {nodes - 1} to 1, below the last",
                cure="record more nodes in another folder (a smaller every=), or use Ramp or WarmStart, which fit any",
            )

    def _ends(self, nodes: int) -> list[int]:
        """Return the update at which each node N - 1, ..., 1 is left."""
        given = self.budgets[: max(nodes - 1, 0)]
        return list(accumulate(given + given[-1:] * (nodes - 1 - len(given))))

    def __repr__(self) -> str:
        named = () if self.of is None else (f"of={self.of!r}",)
        return f"Fixed({', '.join((*map(str, self.budgets), *named))})"


@dataclass(frozen=True)
class Ramp:
    """A straight descent: the position falls from start * N to 0 linearly over `updates`, without dwelling on a node.

    To first order the generator then sees the usual score difference, shrunk, and a fading pull towards the initial
    student. With `amplitude` its gradient is shrunk as well, to 1 - position / N.

    Args:
        updates: Length K of the descent in generator updates, >= 1.
        start: First position over N, in (0, 1].
        amplitude: Whether to shrink the gradient too. Keeps more of the gain when an EMA of the generator is used.

    Raises:
        OptionError: If updates < 1, or start is outside (0, 1].

    Example:
        >>> Ramp(100)(50, 4)
        Target(position=1.8, gradient=0.55)
    """

    updates: int = 100
    _: KW_ONLY
    start: float = 0.9
    amplitude: bool = True

    def __post_init__(self) -> None:
        if self.updates < 1 or not 0 < self.start <= 1:
            raise OptionError(repr(self), expected="updates >= 1 and 0 < start <= 1", cure="correct the arguments")

    def __call__(self, updates: int, nodes: int) -> Target:
        """Return the target of update `updates`."""
        left = self.start * max(1 - updates / self.updates, 0.0) if nodes else 0.0
        return Target(left * nodes, 1 - left if self.amplitude else 1.0)

    def horizon(self, nodes: int) -> int:
        """Return the update from which on the teacher stands still, on a path that ends at node `nodes`."""
        return self.updates if nodes else 0

    def check(self, nodes: int) -> None:
        """Fits every path, whatever its last node `nodes`."""


@dataclass(frozen=True)
class Auto:
    """No setting: the recording says how long the descent is, and ends as soon as it has said so.

    The time that s' takes to fit the student's samples, F updates, is the time in which s_phi follows a change of the
    student, at this network, learning rate and batch. The teacher walks straight back in F generator updates; the
    gradient, shrunk at first, is whole after 3F, which gives s_phi time to catch up. A student that begins near the
    data is fitted at once, and the descent is as short. Both numbers were found on a few small problems
    (`benchmarks/EVIDENCE.md`, which says where it does not help).

    Args:
        fitted: F >= 1; None leaves it to the path's recording. Without a path nothing is done.

    Raises:
        OptionError: If fitted < 1.

    Example:
        >>> Auto(20)(10, 1), Auto(20)(60, 1)
        (Target(position=0.45, gradient=0.25), Target(position=0.0, gradient=1.0))
    """

    fitted: int | None = None

    def __post_init__(self) -> None:
        if self.fitted is not None and self.fitted < 1:
            raise OptionError(repr(self), expected="updates >= 1", cure="leave it to the recording: Auto()")

    def __call__(self, updates: int, nodes: int) -> Target:
        """Return the target of update `updates`."""
        if not nodes or self.fitted is None:
            return Target(0.0)
        position, shrunk = (0.9 * max(1 - updates / end, 0.0) for end in (self.fitted, 3 * self.fitted))
        return Target(position * nodes, 1 - shrunk)

    def horizon(self, nodes: int) -> int:
        """Return the update from which on the teacher stands still and the gradient is whole, with `nodes` >= 1."""
        return 3 * self.fitted if nodes and self.fitted is not None else 0

    def check(self, nodes: int) -> None:
        """Fits every path, whatever its last node `nodes`."""

    def settle(self, fitted: int) -> Auto:
        """Return the same with F = `fitted`, unless it has one already."""
        return self if self.fitted is not None else replace(self, fitted=fitted)


@dataclass(frozen=True)
class Adaptive(Auto):
    """`Auto` in a closed loop: an update counts a quarter while s_phi is behind the student.

    s_phi is behind if its gradients at updates in a row agree, as before it was fitted (`monitoring`). Then the descent
    takes four times as long at most. Not better than `Auto` where it was tried, on one problem worse
    (`benchmarks/EVIDENCE.md`). By hand, without `attach`, set `scheduler.behind`.

    Args:
        fitted: As in `Auto`.

    Example:
        >>> Adaptive(20)(10, 1) == Auto(20)(10, 1)
        True
    """

    braked: ClassVar[bool] = True


@dataclass(frozen=True)
class WarmStart:
    """No descent: s_phi starts from s'_N, the teacher stays the teacher. The control that every path has to beat.

    Example:
        >>> WarmStart()(0, 4)
        Target(position=0.0, gradient=1.0)
    """

    def __call__(self, updates: int, nodes: int) -> Target:
        """Return the target of update `updates`."""
        return Target(0.0)

    def horizon(self, nodes: int) -> int:
        """Return the update from which on the teacher stands still, on a path that ends at node `nodes`."""
        return 0

    def check(self, nodes: int) -> None:
        """Fits every path, whatever its last node `nodes`."""


@dataclass(frozen=True)
class GradientRamp:
    """No path: the generator's gradient is multiplied by 1 - depth (1 - u / K)+. The other control.

    Args:
        updates: Length K of the ramp in generator updates, >= 1.
        depth: What is taken away at first, in [0, 1].

    Raises:
        OptionError: If updates < 1, or depth is outside [0, 1].

    Example:
        >>> GradientRamp(100)(50, 0)
        Target(position=0.0, gradient=0.505)
    """

    updates: int = 100
    _: KW_ONLY
    depth: float = 0.99

    def __post_init__(self) -> None:
        if self.updates < 1 or not 0 <= self.depth <= 1:
            raise OptionError(repr(self), expected="updates >= 1 and 0 <= depth <= 1", cure="correct the arguments")

    def __call__(self, updates: int, nodes: int) -> Target:
        """Return the target of update `updates`."""
        return Target(0.0, 1 - self.depth * max(1 - updates / self.updates, 0.0))

    def horizon(self, nodes: int) -> int:
        """Return the update from which on the teacher stands still, on a path that ends at node `nodes`."""
        return self.updates

    def check(self, nodes: int) -> None:
        """Fits every path, whatever its last node `nodes`, and none."""


def resolve(schedule: Schedule | str) -> Schedule:
    """Return a schedule from an object of this module, or any of its kind, or a text for `parse`.

    Raises:
        OptionError: If it is neither.

    Example:
        >>> resolve("warm"), resolve(Ramp(7))
        (WarmStart(), Ramp(updates=7, start=0.9, amplitude=True))
    """
    if isinstance(schedule, str):
        return parse(schedule)
    fits = all(callable(getattr(schedule, name, None)) for name in ("__call__", "horizon", "check"))
    if isinstance(schedule, type) or not fits:
        raise OptionError(
            f"schedule={schedule!r}",
            expected="a name, or an object of disback_plugin.schedules",
            cure='pass schedule="auto", or Ramp(100) with its arguments',
        )
    return schedule


def parse(text: str) -> Schedule:
    """Return the schedule that a short text names, as on a command line.

    Args:
        text: "warm", "ramp[:K]", "plain-ramp[:K]" (without amplitude), "grad-ramp[:K]", "fixed:b,c,...", the name of
            one of the paper's settings (`recipes`), which is Fixed and fits the path of its own recording, "auto", or
            "adaptive".

    Raises:
        OptionError: If the text names none of them.

    Example:
        >>> parse("ramp:50"), parse("fixed:1000,10000")
        (Ramp(updates=50, start=0.9, amplitude=True), Fixed(1000, 10000))
    """
    if text in names():
        return Fixed(*recipe(text).budgets, of=text)
    name, _, arguments = text.partition(":")
    try:
        numbers = [int(number) for number in arguments.split(",") if arguments]
        match name, numbers:
            case ("auto", []):
                return Auto()
            case ("adaptive", []):
                return Adaptive()
            case ("warm", []):
                return WarmStart()
            case (("ramp" | "plain-ramp"), ([] | [_])):
                return Ramp(*numbers[:1], amplitude=name == "ramp")
            case "grad-ramp", ([] | [_]):
                return GradientRamp(*numbers[:1])
            case "fixed", [_, *_]:
                return Fixed(*numbers)
    except ValueError as error:
        if isinstance(error, OptionError):
            raise
    raise OptionError(
        f"schedule {text!r}",
        expected="auto, adaptive, warm, ramp[:K], plain-ramp[:K], grad-ramp[:K], fixed:b,c,... with whole numbers, or "
        + ", ".join(names()),
        cure="pass one of these, or an object of disback_plugin.schedules",
    )
