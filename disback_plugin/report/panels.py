"""What there is to draw of runs: one panel a curve, with the numbers of the logs and nothing else. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from disback_plugin.plugins.log_reader import OURS, Curve, History

__all__ = ["MEASURED", "MEASURES", "Panel", "Series", "compare", "crossing", "panels"]

# Curves of these beginnings measure how good a run is, the lower the better: by them runs are compared.
MEASURES = ("distance", "mismatch")


@dataclass(frozen=True)
class Series:
    """A curve of one run.

    Attributes:
        run: Index of the run; it decides the colour.
        label: Of the run, or of what this curve is.
        points: (x, y), as logged.
        look: "line"; "steps", where a value holds until the next; "points"; or "faint" points behind a line.
    """

    run: int
    label: str
    points: Curve
    look: str = "line"


@dataclass(frozen=True)
class Panel:
    """Curves with one pair of axes.

    Attributes:
        section: Where it belongs.
        title: What is drawn.
        about: How to read it, in a sentence.
        x: What the x axis counts.
        series: The curves.
        y: Unit of the y axis; empty for a plain number.
        level: A value that matters.
        marks: Runs, and the x at which something happened to them.
    """

    section: str
    title: str
    about: str
    x: str
    series: tuple[Series, ...]
    y: str = ""
    level: float | None = None
    marks: tuple[tuple[int, int], ...] = field(default=())

    @property
    def logarithmic(self) -> bool:
        """Whether the values of a loop span so much that a logarithmic axis shows more."""
        values = [y for series in self.series for _, y in series.points if y is not None]
        spans = bool(values) and min(values) > 0 and max(values) > 10 * min(values)
        return spans and self.section == MEASURED


MEASURED = "What the loop measured"
UPDATES = "generator updates"
RECORDED = "updates of s_phi while recording"


def panels(runs: Sequence[History]) -> list[Panel]:
    """Return all panels of some runs, those of one section next to each other.

    Example:
        >>> from disback_plugin.plugins.log_reader import settle
        >>> run = settle([{"update": 0, "position": 1.0}, {"update": 9, "position": 0.0}, {"update": 9, "loss": 0.5}])
        >>> [(panel.section, panel.title) for panel in panels([run])]
        [('What the loop measured', 'loss'), ('The walk back', 'position')]
    """
    every = [*_measured(runs), *_walk(runs), *_recording(runs), *_nodes(runs)]
    return [panel for panel in every if any(series.points for series in panel.series)]


def _series(runs: Sequence[History], name: str, look: str = "line", *, recording: bool = False) -> tuple[Series, ...]:
    curves = [(i, run, run.curves(recording=recording).get(name, [])) for i, run in enumerate(runs)]
    return tuple(Series(i, run.name, curve, look) for i, run, curve in curves if curve)


def _names(runs: Iterable[History], *, recording: bool = False) -> list[str]:
    """Return what loops logged: measures first, else in the order in which it came."""
    found = dict.fromkeys(name for run in runs for name in run.curves(recording=recording) if name not in OURS)
    return sorted(found, key=lambda name: not name.startswith(MEASURES))


def _measured(runs: Sequence[History]) -> Iterator[Panel]:
    for name in _names(runs):
        about = "The lower the better." if name.startswith(MEASURES) else "As the loop logged it."
        yield Panel(MEASURED, name, about, UPDATES, _series(runs, name))


def _walk(runs: Sequence[History]) -> Iterator[Panel]:
    section = "The walk back"
    yield Panel(
        section,
        "position",
        "Where the teacher stands on the path: N is the network fitted to the first student, 0 the teacher itself.",
        UPDATES,
        _moving(_series(runs, "position", "steps"), 0),
    )
    about = "Factor on the generator's gradient; 1 is the trainer's own."
    yield Panel(section, "gradient factor", about, UPDATES, _moving(_series(runs, "gradient", "steps"), 1))
    about = "Time that the host spent on each move of the teacher."
    yield Panel(section, "swap time", about, UPDATES, _series(runs, "swap_ms", "points"), "ms")
    masked = _moving(_series(runs, "masked_samples", "points"), 0)
    yield Panel(section, "masked samples", "Samples without a gradient, as they were not finite.", UPDATES, masked)


def _moving(every: tuple[Series, ...], still: float) -> tuple[Series, ...]:
    """Return the series that are not `still` all the time."""
    return tuple(series for series in every if any(y != still for _, y in series.points))


def _recording(runs: Sequence[History]) -> Iterator[Panel]:
    from disback_plugin.convergence import AGREEMENT, means

    section, name = "The recording", "agreement"
    series: list[Series] = []
    for each in _series(runs, name, "faint", recording=True):
        cosines = dict(each.points)
        row = [cosines.get(i) for i in range(2, max(cosines) + 1)]
        averaged: Curve = list(means([math.nan if cosine is None else cosine for cosine in row]))
        series += [each, Series(each.run, f"{each.label}, mean of the last quarter", averaged)]
    done = [(i, run.completed()) for i, run in enumerate(runs)]
    marks = tuple((i, how["fitted"]) for i, how in done if how and how.get("fitted"))
    about = (
        "Dots: the cosine of each gradient of s_phi and the one before. While s_phi is far from the student's score "
        f"they agree; it is fitted, at the upright line, when their mean over the last quarter is below {AGREEMENT:g}."
    )
    yield Panel(section, "gradient agreement", about, RECORDED, tuple(series), level=AGREEMENT, marks=marks)
    for name in _names(runs, recording=True):
        series_of = _series(runs, name, recording=True)
        yield Panel(section, f"{name}, while recording", "As it was logged.", RECORDED, series_of, marks=marks)


def _nodes(runs: Sequence[History]) -> Iterator[Panel]:
    section = "The nodes"
    kinds = (
        ("step to a node", "delta_norm", "Distance from the node before, in weight space.", 1.0, ""),
        ("codec error in the weights", "weight_error", "Over the step from the node before.", 100.0, "%"),
    )
    for title, key, about, factor, unit in kinds:
        series = []
        for i, run in enumerate(runs):
            points: Curve = [(n["iteration"], factor * n[key]) for n in run.nodes() if n.get(key) is not None]
            if points:
                series.append(Series(i, run.name, points, "points"))
        yield Panel(section, title, about, RECORDED, tuple(series), unit)


# -- several runs -----------------------------------------------------------------------------------------------------


def crossing(curve: Curve, threshold: float) -> float | None:
    """Return the updates after which a curve first is at or below a threshold, interpolated; None if never.

    Example:
        >>> crossing([(0, 5.0), (10, 3.0)], 4.0), crossing([(0, 5.0)], 4.0)
        (5.0, None)
    """
    known = [(x, y) for x, y in curve if y is not None]
    for i, (x, y) in enumerate(known):
        if y <= threshold:
            if i == 0:
                return float(x)
            before, above = known[i - 1]
            return before + (above - threshold) / (above - y) * (x - before)
    return None


def compare(runs: Sequence[History]) -> list[dict[str, float | str | None]]:
    """Return a row for each measure and run: its last value, and the updates to what every run reached; and the ratios
    to the first run, above 1 where fewer updates were needed, below 1 where the last value is lower.

    Example:
        >>> from disback_plugin.plugins.log_reader import settle
        >>> slow, fast = (
        ...     settle([{"update": u, "distance": d} for u, d in curve])
        ...     for curve in ([(0, 9.0), (40, 1.0)], [(0, 9.0), (20, 0.5)])
        ... )
        >>> [(row["last"], row["last ratio"], row["updates ratio"]) for row in compare([slow, fast])]
        [(1.0, 1.0, 1.0), (0.5, 0.5, 2.125)]
    """
    rows: list[dict[str, float | str | None]] = []
    for name in [name for name in _names(runs) if name.startswith(MEASURES)]:
        curves = {i: [(x, y) for x, y in s.points if y is not None] for i, s in _by_run(runs, name)}
        curves = {i: curve for i, curve in curves.items() if curve}
        if len(curves) < 2:
            continue
        first, threshold = min(curves), max(min(y for _, y in curve) for curve in curves.values())
        last = {i: curve[-1][1] for i, curve in curves.items()}
        reached = {i: crossing(list(curve), threshold) for i, curve in curves.items()}
        for i in curves:
            row: dict[str, float | str | None] = {"measure": name, "run": runs[i].name}
            row |= {"last": last[i], "last ratio": _ratio(last[i], last[first]), "threshold": threshold}
            rows.append(row | {"updates": reached[i], "updates ratio": _ratio(reached[first], reached[i])})
    return rows


def _by_run(runs: Sequence[History], name: str) -> list[tuple[int, Series]]:
    return [(series.run, series) for series in _series(runs, name)]


def _ratio(above: float | None, below: float | None) -> float | None:
    return None if above is None or not below else above / below
