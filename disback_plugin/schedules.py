"""Schedules: the teacher's position on the path as a pure function of generator updates.

Node i of a path with nodes 0 (the teacher) to N is position i; between two nodes the weights are interpolated. A
schedule maps (generator updates u, N) to a `Target`: a position in [0, N] and a factor on the generator's gradient.

| schedule          | position after u updates              | factor on the gradient         | source            |
|-------------------|---------------------------------------|--------------------------------|-------------------|
| `Fixed(b, c, ..)` | N - 1 for b, N - 2 for c, ..., then 0 | 1                              | Algorithm 2, B.2  |
| `Auto(F)`         | 0.9 N (1 - u / F)+                    | 1                              | ours              |
| `Ramp(K)`         | 0.9 N (1 - u / K)+                    | 1 - position / N (`amplitude`) | ours              |
| `WarmStart()`     | 0                                     | 1                              | control           |
| `GradientRamp(K)` | 0                                     | 1 - 0.99 (1 - u / K)+          | control           |

F is the number of updates in which s' was fitted at the trainer's learning rate (`convergence`). Every schedule starts
s_phi from s'_N, except `GradientRamp`, which needs no path.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, replace
from functools import cache, partial
from importlib.resources import files
from itertools import accumulate
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

from disback_plugin.errors import OptionError
from disback_plugin.schedule_base import Schedule, Target

__all__ = ["Auto", "Fixed", "GradientRamp", "Ramp", "Recipe", "Schedule", "Target", "WarmStart"]
__all__ += ["parse", "recipe", "recipes"]


@dataclass(frozen=True, init=False)
class Fixed(Schedule):
    """The paper's schedule (Algorithm 2, B.2): a number of updates on each node N - 1, ..., 1, then the teacher.

    Args:
        budgets: Generator updates on nodes N - 1, N - 2, ..., 1, each >= 1; the last budget repeats down to node 1.
        of: Name of the recipe that the budgets come from: then only paths of its N nodes fit.

    Raises:
        OptionError: If no budget is given, a budget is below 1, or the recipe is unknown.

    Example:
        >>> paper = Fixed(1_000, 10_000)  # for N = 4
        >>> [paper(u, 4).position for u in (0, 999, 1_000, 11_000, 21_000)]
        [3.0, 3.0, 2.0, 1.0, 0.0]
    """

    budgets: tuple[int, ...]
    of: str | None = None
    discrete = True

    def __init__(self, *budgets: int, of: str | None = None) -> None:
        if not budgets or min(budgets) < 1:
            raise OptionError(f"Fixed{budgets}", expected="one budget >= 1 or more", cure="pass updates for each node")
        if of is not None:
            recipe(of)
        object.__setattr__(self, "budgets", tuple(budgets))
        object.__setattr__(self, "of", of)

    def __call__(self, updates: int, nodes: int) -> Target:
        """Return the target after `updates` generator updates."""
        passed = sum(updates >= end for end in self._ends(nodes))
        return Target(float(max(nodes - 1 - passed, 0)))

    def horizon(self, nodes: int) -> int:
        """Return the update at which the teacher leaves node 1 of a path whose last node is `nodes`."""
        return max(self._ends(nodes), default=0)

    def validate(self, nodes: int) -> None:
        """Raise OptionError if there are more budgets than nodes N - 1, ..., 1, or if the recipe has another N."""
        if self.of is not None and nodes != len(self.budgets) + 1:
            record, every = recipe(self.of).record, recipe(self.of).every
            raise OptionError(
                f"schedule {self.of!r} for a path whose last node is {nodes}",
                expected=f"the {len(self.budgets) + 1} nodes of its own recording, record={record}, every={every}",
                cure=f"attach(..., **schedules.recipe({self.of!r}).options), or disback run --recipe {self.of}",
            )
        if len(self.budgets) > nodes - 1:
            raise OptionError(
                f"{self!r} for a path whose last node is {nodes}",
                expected=f"at most {nodes - 1} budgets, for nodes {nodes - 1} to 1, below the last",
                cure="record more nodes in another folder (a smaller every=), or use Ramp or WarmStart, which fit any",
            )

    def _ends(self, nodes: int) -> list[int]:
        given = self.budgets[: max(nodes - 1, 0)]
        return list(accumulate(given + given[-1:] * (nodes - 1 - len(given))))

    def __repr__(self) -> str:
        return f"Fixed({', '.join(map(str, self.budgets))}" + (")" if self.of is None else f", of={self.of!r})")


@dataclass(frozen=True)
class Ramp(Schedule):
    """A linear descent from position start * N to 0 over `updates`, without dwelling on a node.

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
        """Return the target after `updates` generator updates."""
        left = self.start * max(1 - updates / self.updates, 0.0) if nodes else 0.0
        return Target(left * nodes, 1 - left if self.amplitude else 1.0)

    def horizon(self, nodes: int) -> int:
        """Return K; 0 without a path, where `nodes` is 0."""
        return self.updates if nodes else 0


@dataclass(frozen=True)
class Auto(Schedule):
    """The default, without a setting: recording measures F and ends as soon as it has, and F is the descent's length.

    F is also the time in which s_phi follows a change of the student at this network, learning rate and batch. That the
    descent takes F updates, from 0.9 N, was found on a few small problems (`benchmarks/EVIDENCE.md`).

    Args:
        fitted: F >= 1; None takes it from the path's recording. Without a path this schedule does nothing.

    Raises:
        OptionError: If fitted < 1.

    Example:
        >>> Auto(20)(10, 1), Auto(20)(20, 1)
        (Target(position=0.45, gradient=1.0), Target(position=0.0, gradient=1.0))
    """

    fitted: int | None = None
    until_fitted = True
    # Measured in ten regimes (`benchmarks/EVIDENCE.md`).
    effective_step = (
        "under Adam the generator's steps were about 1.1 times as long as without DisBack in the first %d updates "
        "(0.9 to 1.4 times, by problem), as at another learning rate, and shorter later from a student far from the "
        "data: the log's effective_step shows yours, in units of the learning rate"
    )

    def __post_init__(self) -> None:
        if self.fitted is not None and self.fitted < 1:
            raise OptionError(repr(self), expected="updates >= 1", cure="leave it to the recording: Auto()")

    def __call__(self, updates: int, nodes: int) -> Target:
        """Return the target after `updates` generator updates."""
        if not nodes or self.fitted is None:
            return Target(0.0)
        return Target(0.9 * nodes * max(1 - updates / self.fitted, 0.0))

    def horizon(self, nodes: int) -> int:
        """Return F; 0 without a path, where `nodes` is 0."""
        return self.fitted if nodes and self.fitted is not None else 0

    def settle(self, fitted: int) -> Auto:
        """Return the schedule with F = `fitted`, unless F was given."""
        return self if self.fitted is not None else replace(self, fitted=fitted)


@dataclass(frozen=True)
class WarmStart(Schedule):
    """No descent: s_phi starts from s'_N, the teacher stays s'_0. The control that every path has to beat.

    Example:
        >>> WarmStart()(0, 4)
        Target(position=0.0, gradient=1.0)
    """

    def __call__(self, updates: int, nodes: int) -> Target:
        """Return the target after `updates` generator updates."""
        return Target(0.0)

    def horizon(self, nodes: int) -> int:
        """Return 0, whatever `nodes` is."""
        return 0


@dataclass(frozen=True)
class GradientRamp(Schedule):
    """No path: the generator's gradient is multiplied by 1 - depth (1 - u / K)+. The other control.

    Args:
        updates: Length K of the ramp in generator updates, >= 1.
        depth: Part of the gradient that is taken away at first, in [0, 1].

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
        """Return the target after `updates` generator updates."""
        return Target(0.0, 1 - self.depth * max(1 - updates / self.updates, 0.0))

    def horizon(self, nodes: int) -> int:
        """Return K, whatever `nodes` is."""
        return self.updates


@dataclass(frozen=True)
class Recipe:
    """One setting of the paper, from recipes.toml.

    The file also holds the paper's words that the counts come from, and the rest of the setting.

    Attributes:
        name: Name of the recipe and of its schedule: `schedule="edm-64"`.
        record: Recording iterations, in updates of s'.
        every: Recording iterations from one node to the next.
        budgets: Generator updates on nodes N - 1, ..., 1.
        source: Section of the paper.

    Example:
        >>> edm = recipe("edm-64")
        >>> edm.budgets, edm.options
        ((1000, 10000, 10000), {'record': 200, 'every': 50, 'schedule': 'edm-64'})
    """

    name: str
    record: int
    every: int
    budgets: tuple[int, ...]
    source: str

    @property
    def options(self) -> dict[str, Any]:
        """Arguments of `attach`: `attach(..., **recipe("edm-64").options)`."""
        return {"record": self.record, "every": self.every, "schedule": self.name}


@cache
def recipes() -> dict[str, Recipe]:
    """Return all recipes by name.

    Example:
        >>> list(recipes())
        ['edm-64', 'lsun-256', 'sdxl', 'lcm-lora']
    """
    table = tomllib.loads(files("disback_plugin").joinpath("recipes.toml").read_text(encoding="utf-8"))
    return {
        name: Recipe(name, row["record"], row["every"], tuple(row["budgets"]), row["source"])
        for name, row in table.items()
    }


def recipe(name: str) -> Recipe:
    """Return a recipe by its name; raises OptionError if no recipe has this name.

    Example:
        >>> recipe("sdxl").record, recipe("sdxl").source
        (1000, 'B.2, third paragraph')
    """
    if name not in recipes():
        raise OptionError(f"recipe {name!r}", expected=f"one of {', '.join(recipes())}", cure="correct the name")
    return recipes()[name]


def recording_options(options: Any) -> dict[str, Any]:
    """Return those of `record`, `every` and `schedule` that a command's options give, or its `recipe`'s, not both."""
    values = {name: getattr(options, name) for name in ("record", "every", "schedule")}
    given = {name: value for name, value in values.items() if value is not None}
    if options.recipe is None:
        return given
    if given:
        both = f"--recipe {options.recipe} and {', '.join(f'--{name}' for name in given)}"
        raise OptionError(both, expected="a recipe, which sets all three, or these", cure="omit one of them")
    return recipe(options.recipe).options


# Names of schedules for `parse`: the class, and the largest number of arguments.
NAMES: dict[str, tuple[Callable[..., Schedule], float]] = {
    "auto": (Auto, 0),
    "warm": (WarmStart, 0),
    "ramp": (Ramp, 1),
    "plain-ramp": (partial(Ramp, amplitude=False), 1),
    "grad-ramp": (GradientRamp, 1),
    "fixed": (Fixed, float("inf")),
}


def parse(schedule: Schedule | str) -> Schedule:
    """Return the schedule that a short text names, as on a command line.

    Args:
        schedule: "auto", "warm", "ramp[:K]", "plain-ramp[:K]" (without amplitude), "grad-ramp[:K]", "fixed:b,c,...", or
            the name of a recipe, which fits the path of its own recording only. A `Schedule` is returned as it is.

    Raises:
        OptionError: If it is neither.

    Example:
        >>> parse("ramp:50"), parse("fixed:1000,10000"), parse(WarmStart())
        (Ramp(updates=50, start=0.9, amplitude=True), Fixed(1000, 10000), WarmStart())
    """
    if isinstance(schedule, Schedule):
        return schedule
    text = str(schedule)
    if text in recipes():
        return Fixed(*recipe(text).budgets, of=text)
    name, _, arguments = text.partition(":")
    numbers = arguments.split(",") if arguments else []
    make, most = NAMES.get(name, (None, 0))
    if make is not None and len(numbers) <= most and all(number.strip().isdecimal() for number in numbers):
        return make(*map(int, numbers))
    raise OptionError(
        f"schedule {schedule!r}",
        expected=f"auto, warm, ramp[:K], plain-ramp[:K], grad-ramp[:K], fixed:b,c,... or {', '.join(recipes())}",
        cure="pass one of these, or an object of a class that inherits from disback_plugin.schedules.Schedule",
    )
