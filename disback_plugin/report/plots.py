"""Panels drawn by matplotlib: as figures for a file, or as SVG whose colours a page's style decides."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

from disback_plugin.errors import OptionError
from disback_plugin.report.panels import Panel

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["COLOURS", "DASHES", "figure", "save", "svg"]

# Distinguishable without colour vision (after Okabe and Ito), at 3:1 on white; and by their dashes without any colour.
COLOURS = ("#0072B2", "#C25400", "#00805C", "#A8447E", "#8A6A00", "#5B5FC7")
DASHES = ("", "6 2", "2 2", "7 2 2 2", "10 3", "4 1 1 1 1 1")
# Stands in an SVG for the colour of text until the page's takes its place; so do the lower numbers for that of a run.
_INK, _RUN = "#00aa00", "#00bb{:02x}"
_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "disback",
    "font.family": "sans-serif",
    "font.size": 10.5,
    "xtick.labelsize": 9.5,
    "ytick.labelsize": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "lines.linewidth": 1.8,
    "xtick.major.width": 0.8,
    "ytick.major.width": 0.8,
}


def _matplotlib() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise OptionError(
            "no matplotlib", expected="the package that draws", cure="pip install 'disback-plugin[plots]'"
        ) from error
    return matplotlib


def figure(panels: Sequence[Panel], title: str = "") -> Figure:
    """Return a figure of panels side by side, three in a row.

    Args:
        panels: What to draw, one or more.
        title: Of the figure.

    Raises:
        OptionError: If matplotlib is not installed.

    Example:
        >>> from disback_plugin.report.panels import Series
        >>> len(figure([Panel("", "loss", "", "updates", (Series(0, "run", [(0, 2.0), (9, 1.0)]),))]).axes)
        1
    """
    matplotlib = _matplotlib()
    from matplotlib.figure import Figure

    columns = min(len(panels), 3)
    rows = -(-len(panels) // columns)
    with matplotlib.rc_context(_STYLE | {"font.size": 9}):
        made = Figure(figsize=(4.2 * columns, 2.9 * rows), layout="constrained")
        grid = made.subplots(rows, columns, squeeze=False).flatten()
        labels: dict[int, Any] = {}
        for axes, panel in zip(grid[: len(panels)], panels, strict=True):
            draw(axes, panel, COLOURS)
            axes.set_title(panel.title, fontsize=10, loc="left")
            lines = zip(panel.series, axes.lines[: len(panel.series)], strict=True)  # a level and marks come after
            labels |= {series.run: line for series, line in lines if series.look == "line"}
        for axes in grid[len(panels) :]:
            axes.set_axis_off()
        if len(labels) > 1:
            names = {series.run: series.label for panel in panels for series in panel.series if series.look == "line"}
            made.legend(labels.values(), [names[run] for run in labels], loc="outside lower center", frameon=False)
        if title:
            made.suptitle(title, fontsize=11)
    return made


def save(panels: Sequence[Panel], file: Path, title: str = "") -> None:
    """Draw panels into a file, of the kind that its suffix says: png, svg, pdf.

    Raises:
        OptionError: If matplotlib is not installed, or does not know the suffix.
    """
    made = figure(panels, title)
    known = sorted(made.canvas.get_supported_filetypes())
    if file.suffix.removeprefix(".") not in known:
        raise OptionError(f"--out {file}", expected=f"a suffix among {', '.join(known)}", cure="name it plot.png")
    file.parent.mkdir(parents=True, exist_ok=True)
    made.savefig(file, dpi=150)


def svg(panel: Panel, key: str) -> ElementTree.Element:
    """Return a panel as an SVG element: text and axes in `currentColor`, run i in the CSS variable `--run-i`.

    Args:
        panel: What to draw.
        key: Makes the element's ids its own in a page of several.

    Raises:
        OptionError: If matplotlib is not installed.

    Example:
        >>> from disback_plugin.report.panels import Series
        >>> drawn = svg(Panel("", "loss", "", "updates", (Series(0, "run", [(0, 2.0), (9, 1.0)]),)), "a")
        >>> "currentColor" in ElementTree.tostring(drawn, "unicode"), drawn.get("role")
        (True, 'img')
    """
    from io import StringIO

    matplotlib = _matplotlib()
    from matplotlib.figure import Figure

    ink = dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), _INK)
    text = StringIO()
    with matplotlib.rc_context(_STYLE | ink):
        made = Figure(figsize=(3.9, 2.6), layout="constrained")
        draw(made.subplots(), panel, tuple(_RUN.format(i) for i in range(len(COLOURS))), ink=_INK)
        made.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    return _themed(text.getvalue(), panel, key)


def _themed(text: str, panel: Panel, key: str) -> ElementTree.Element:
    text = text[text.index("<svg") :].replace(_INK, "currentColor")
    for i in range(len(COLOURS)):
        text = text.replace(_RUN.format(i), f"var(--run-{i})")
    text = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", text)
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text).replace("xlink:href", "href").replace("xlink:", "")
    used = set(re.findall(r"#([\w-]+)", " ".join(re.findall(r'(?:href|clip-path)="[^"]*"', text))))
    text = re.sub(r' id="([^"]*)"', lambda m: f' id="{key}-{m[1]}"' if m[1] in used else "", text)
    for name in used:
        text = text.replace(f"#{name}", f"#{key}-{name}")
    drawn = ElementTree.fromstring(text)
    for name in ("width", "height", "version"):
        drawn.attrib.pop(name, None)
    drawn.set("role", "img")
    drawn.set("aria-label", f"{panel.title} over {panel.x}")
    return drawn


def draw(axes: Axes, panel: Panel, colours: Sequence[str], ink: str = "black") -> None:
    """Draw a panel on axes.

    Args:
        axes: Where to.
        panel: What.
        colours: Of the runs; they repeat.
        ink: Of a level that matters.
    """
    end = max((x for series in panel.series for x, _ in series.points), default=0)
    for series in panel.series:
        colour, dash = colours[series.run % len(colours)], DASHES[series.run % len(DASHES)]
        x = [at for at, _ in series.points]
        y = [float("nan") if value is None else value for _, value in series.points]
        if series.look == "steps":
            x, y = [*x, max(end, x[-1])], [*y, y[-1]]
        single = sum(value == value for value in y) == 1
        look: dict[str, Any] = {"color": colour, "zorder": 3}
        if series.look in ("points", "faint") or single:
            look |= {"linestyle": "none", "marker": "osD^vP"[series.run % 6], "markersize": 4}
            look |= {"alpha": 0.35, "markersize": 3} if series.look == "faint" else {}
        elif dash:
            lengths = tuple(float(length) / 1.8 for length in dash.split())
            look["linestyle"] = (0, lengths)
        axes.plot(x, y, drawstyle="steps-post" if series.look == "steps" else "default", **look)
    if panel.level is not None:
        axes.axhline(panel.level, color=ink, linewidth=0.8, linestyle=(0, (1, 2)), zorder=2)
    for run, at in panel.marks:
        axes.axvline(at, color=colours[run % len(colours)], linewidth=1, linestyle=(0, (3, 3)), zorder=2)
    if panel.logarithmic:
        from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_locator(NullLocator())
    axes.set_xlabel(panel.x)
    axes.set_ylabel(panel.y)
    axes.grid(visible=True, axis="y", color=ink, alpha=0.15, linewidth=0.6)
    axes.margins(x=0.02)
    if all(series.look == "points" for series in panel.series):  # amounts, which begin at zero
        axes.set_xlim(0, 1.05 * max(end, 1))
        axes.set_ylim(bottom=0)
    axes.locator_params(axis="x", nbins=6, integer=True)
