"""Choose the panels of a report, and draw each as SVG. Importing this module loads no torch.

matplotlib draws with placeholder colours, for which the page's CSS variables are put in.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import TYPE_CHECKING, Any

from disback_plugin.errors import OptionError
from disback_plugin.plugins.log_reader import Curve, History

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Curves whose names begin like this measure how good a run is, the lower the better: by them runs are compared.
MEASURES = ("distance", "mismatch")
MEASURED, BACKTRACKING, RECORDING, NODES = "Measured by the loop", "Backtracking", "Recording", "Nodes"
UPDATES, ITERATIONS = "generator updates", "recording iterations"

# Panels of the numbers that DisBack logs while backtracking: title, explanation, look, and the value by which nothing
# has happened.
POSITION = "Position of the teacher on the path: N is the network fitted to the initial student, 0 the teacher itself."
FOLLOWS = (
    "Mean cosine between gradients of the fake score in a row, in each window: near 0 it follows the student; above "
    "0.6, twice in a row, it does not."
)
EFFECTIVE_STEP = (
    "Root mean square of the generator's steps in units of its learning rate, on a sample of its weights: a settled "
    "Adam's is near 1, and a larger one acts as a higher learning rate."
)
OWN_PANELS: dict[str, tuple[str, str, str, float | None]] = {
    "position": ("position", POSITION, "steps", 0),
    "gradient": ("gradient factor", "Factor on the generator's gradient; 1 is the trainer's own.", "steps", 1),
    "swap_ms": ("swap time, ms", "Time of the host for each move of the teacher.", "points", None),
    "masked_samples": ("masked samples", "Samples without a gradient, because they were not finite.", "points", 0),
    "agreement": ("agreement of s_phi's gradients", FOLLOWS, "points", None),
    "effective_step": ("effective step", EFFECTIVE_STEP, "line", None),
    "stalled": ("stalled", "A point: the fake score no longer followed the student.", "points", 0),
    "diverged": ("diverged", "A point: the student ran away from the fake score.", "points", 0),
}
NODE_PANELS = (
    ("step to a node", "delta_norm", "Distance from the node before, in weight space.", 1.0),
    ("codec error in the weights, %", "weight_error", "Over the step from the node before.", 100.0),
)
# All names of DisBack's own numbers (see the hook `disback_log`). Other numbers are the loop's.
OWN_NUMBERS = {*OWN_PANELS, "node", "delta_norm", "path_bytes", "node_seconds", "detached"}
COSINES = (
    "The cosine between each gradient of s_phi and the one before. While s_phi is far from the student's score they "
    "agree; s_phi is fitted, at the vertical line, when the mean of the last quarter is below the horizontal one."
)


@dataclass(frozen=True)
class Panel:
    """Curves with one pair of axes.

    Attributes:
        section: Heading in the report.
        title: Name of the number, with its unit.
        about: How to read the panel, in a sentence.
        x: Label of the x axis, which counts updates.
        curves: (x, y) as logged, by the index of the run, which decides the colour.
        look: "line"; "steps", where a value holds until the next; or "points".
        level: A horizontal line.
        marks: Vertical lines: x by the index of the run.
    """

    section: str
    title: str
    about: str
    x: str
    curves: dict[int, Curve]
    look: str = "line"
    level: float | None = None
    marks: dict[int, int] = field(default_factory=dict)

    @property
    def has_course(self) -> bool:
        """Whether a curve has more than one point; else a line of a table shows as much."""
        return any(len(_known(curve)) > 1 for curve in self.curves.values())

    def single(self, run: int) -> float | None:
        """Return the only value of a run; of a sign, the updates at which it was seen."""
        curve = self.curves.get(run)
        return curve[-1][0 if self.title in ("stalled", "diverged") else 1] if curve else None

    def rows(self) -> list[tuple[int, list[float | None]]]:
        """Return the points as a table: each x with the value of every curve."""
        columns = [dict(curve) for curve in self.curves.values()]
        return [(x, [column.get(x) for column in columns]) for x in sorted({x for column in columns for x in column})]


def panels(runs: Sequence[History]) -> list[Panel]:
    """Return all panels of some runs, those of one section next to each other. One without a course is no figure.

    Example:
        >>> from disback_plugin.plugins.log_reader import last_run
        >>> run = last_run([{"update": 0, "position": 1.0}, {"update": 9, "position": 0.0}, {"update": 9, "loss": 0.5}])
        >>> [(panel.section, panel.title) for panel in panels([run])]
        [('Measured by the loop', 'loss'), ('Backtracking', 'position')]
    """
    from disback_plugin.convergence import AGREEMENT

    found = []
    for name in _names(runs):
        about = "The lower the better." if name.startswith(MEASURES) else "As the loop logged it."
        found.append(Panel(MEASURED, name, about, UPDATES, _curves(runs, name)))
    for name, (title, about, look, still) in OWN_PANELS.items():
        curves = _curves(runs, name)
        moved = {run: curve for run, curve in curves.items() if any(y != still for _, y in curve)}
        found.append(Panel(BACKTRACKING, title, about, UPDATES, moved, look))
    marks = {i: at for i, run in enumerate(runs) if (at := (run.completed() or {}).get("fitted"))}
    cosines = _curves(runs, "agreement", recording=True)
    found.append(Panel(RECORDING, "gradient agreement", COSINES, ITERATIONS, cosines, "points", AGREEMENT, marks))
    for name in _names(runs, recording=True):
        title, curves = f"{name}, while recording", _curves(runs, name, recording=True)
        found.append(Panel(RECORDING, title, "As it was logged.", ITERATIONS, curves, marks=marks))
    for title, key, about, factor in NODE_PANELS:
        nodes = ([node for node in run.nodes() if node.get(key) is not None] for run in runs)
        curves = _present([(node["iteration"], factor * node[key]) for node in known] for known in nodes)
        found.append(Panel(NODES, title, about, ITERATIONS, curves, "points"))
    return [panel for panel in found if panel.curves]


def _curves(runs: Sequence[History], name: str, *, recording: bool = False) -> dict[int, Curve]:
    return _present(run.curves(recording=recording).get(name, []) for run in runs)


def _present(curves: Iterable[Curve]) -> dict[int, Curve]:
    return {i: curve for i, curve in enumerate(curves) if curve}


def _names(runs: Sequence[History], *, recording: bool = False) -> list[str]:
    """Return the names of the loop's own numbers: measures first, else in the order in which they came."""
    found = dict.fromkeys(name for run in runs for name in run.curves(recording=recording) if name not in OWN_NUMBERS)
    return sorted(found, key=lambda name: not name.startswith(MEASURES))


def _known(curve: Sequence[tuple[int, float | None]]) -> list[tuple[int, float]]:
    """Return the points whose value was finite."""
    return [(x, y) for x, y in curve if y is not None]


def crossing(curve: Sequence[tuple[int, float | None]], threshold: float) -> float | None:
    """Return the updates after which a curve is first at or below a threshold, interpolated; None if never.

    Example:
        >>> crossing([(0, 5.0), (10, 3.0)], 4.0), crossing([(0, 5.0)], 4.0)
        (5.0, None)
    """
    known = _known(curve)
    at = next((i for i, (_, y) in enumerate(known) if y <= threshold), None)
    if not at:
        return None if at is None else float(known[0][0])
    (before, above), (x, y) = known[at - 1 : at + 1]
    return before + (above - threshold) / (above - y) * (x - before)


def compare(runs: Sequence[History]) -> list[dict[str, Any]]:
    """Return a row for each measure and run: its last value, the updates to the lowest value that every run reached,
    and their ratios to the first run: below 1 where the last value is lower, above 1 where fewer updates were needed.

    Example:
        >>> from disback_plugin.plugins.log_reader import last_run
        >>> slow, fast = (
        ...     last_run([{"update": u, "distance": d} for u, d in curve])
        ...     for curve in ([(0, 9.0), (40, 1.0)], [(0, 9.0), (20, 0.5)])
        ... )
        >>> [(row["last"], row["last ratio"], row["updates ratio"]) for row in compare([slow, fast])]
        [(1.0, 1.0, 1.0), (0.5, 0.5, 2.125)]
    """
    rows: list[dict[str, Any]] = []
    for name in [name for name in _names(runs) if name.startswith(MEASURES)]:
        curves = {run: known for run, curve in _curves(runs, name).items() if (known := _known(curve))}
        if len(curves) < 2:
            continue
        threshold = max(min(y for _, y in curve) for curve in curves.values())
        reached = {run: crossing(curve, threshold) for run, curve in curves.items()}
        first = min(curves)
        rows += [
            {
                "measure": name,
                "run": runs[run].name,
                "last": curve[-1][1],
                "last ratio": _ratio(curve[-1][1], curves[first][-1][1]),
                "threshold": threshold,
                "updates": reached[run],
                "updates ratio": _ratio(reached[first], reached[run]),
            }
            for run, curve in curves.items()
        ]
    return rows


def _ratio(above: float | None, below: float | None) -> float | None:
    return None if above is None or not below else above / below


# -- drawing ----------------------------------------------------------------------------------------------------------

# The lines of the runs, in turn: lengths of dashes and gaps in points. They differ without colour too.
DASHES = ((), (6, 2), (2, 2), (7, 2, 2, 2), (10, 3), (4, 1, 1, 1, 1, 1))
MARKERS = "osD^vP"
# Placeholders in an SVG for the colours of text and of each run.
INK, RUNS = "#00aa00", tuple(f"#00bb{i:02x}" for i in range(len(DASHES)))
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.size": 10.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "lines.linewidth": 1.8,
    "lines.scale_dashes": False,
    "lines.markersize": 4,
} | dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK)


def load_matplotlib() -> Any:
    """Return the module matplotlib, with `matplotlib.figure`.

    Raises:
        OptionError: If matplotlib is not installed.
    """
    try:
        import matplotlib.figure
    except ImportError as error:
        cure = "pip install 'disback-plugin[plots]'"
        raise OptionError("no matplotlib", expected="the package that draws", cure=cure) from error
    return matplotlib


def svg(panel: Panel, key: str) -> str:
    """Return a panel as SVG: text and axes in `currentColor`, run i in the CSS variable `--run-i`.

    Args:
        panel: The panel.
        key: A text that no other panel of the page has, from which the ids in the SVG are made.

    Raises:
        OptionError: If matplotlib is not installed.

    Example:
        >>> drawn = svg(Panel("", "loss", "", "updates", {0: [(0, 2.0), (9, 1.0)]}), "a")
        >>> "currentColor" in drawn, "var(--run-0)" in drawn, drawn.count("<svg")
        (True, True, 1)
    """
    matplotlib, file = load_matplotlib(), io.StringIO()
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": key}):
        figure = matplotlib.figure.Figure(figsize=(3.9, 2.6), layout="constrained")
        _draw(figure.subplots(), panel)
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    text = file.getvalue().replace(INK, "currentColor")
    for i, colour in enumerate(RUNS):
        text = text.replace(colour, f"var(--run-{i})")
    text = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", text)
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*"', "<g", text)  # nothing refers to a group, and each figure has the same names
    _, box, drawing = re.split(r'<svg[^>]*(viewBox="[^"]*")[^>]*>', text, maxsplit=1)
    return f'<svg {box} role="img" aria-label="{escape(f"{panel.title} over {panel.x}")}">{drawing}'


def _draw(axes: Axes, panel: Panel) -> None:
    end = max(x for curve in panel.curves.values() for x, _ in curve)
    for i, curve in panel.curves.items():
        x = [at for at, _ in curve]
        y = [math.nan if value is None else value for _, value in curve]
        run = i % len(DASHES)
        look: dict[str, Any] = {"dashes": DASHES[run]}
        if panel.look == "steps":
            x, y, look["drawstyle"] = [*x, max(end, x[-1])], [*y, y[-1]], "steps-post"
        elif panel.look == "points" or len(_known(curve)) == 1:
            look = {"linestyle": "none", "marker": MARKERS[run]}
        axes.plot(x, y, color=RUNS[run], **look)
    if panel.level is not None:
        axes.axhline(panel.level, color=INK, linewidth=0.8, linestyle=":")
    for run, at in panel.marks.items():
        axes.axvline(at, color=RUNS[run % len(RUNS)], linewidth=1, linestyle="--")
    axes.set_xlabel(panel.x)
    axes.grid(visible=True, axis="y", color=INK, alpha=0.15, linewidth=0.6)
    axes.margins(x=0.02)
    if panel.look == "points" and panel.level is None:  # amounts begin at zero
        axes.set_xlim(0, 1.05 * max(end, 1))
        axes.set_ylim(bottom=0)
    axes.locator_params(axis="x", nbins=6, integer=True)
