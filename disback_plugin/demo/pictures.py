"""The two pictures and the table of the demonstration."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from disback_plugin.demo.study import Run

__all__ = ["convergence", "grid", "samples", "table"]

# Distinguishable without colour vision (Okabe and Ito).
COLOURS = {"warm": "#E69F00", "grad-ramp": "#56B4E9", "disback": "#D55E00"}
BASELINE = "#555555"


def convergence(runs: dict[str, Run], thresholds: tuple[float, ...], file: Path) -> None:
    """Draw the distance of each run's averaged generator over updates: median line, band from best to worst seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, run in runs.items():
        colour = COLOURS.get(name, BASELINE)
        axes.plot(run.updates, [median(v) for v in run.ema], color=colour, label=name, linewidth=2)
        axes.fill_between(run.updates, [min(v) for v in run.ema], [max(v) for v in run.ema], color=colour, alpha=0.12)
    for threshold in thresholds:
        axes.axhline(threshold, color="black", linewidth=0.6, linestyle=":")
    axes.set(xlabel="generator updates", ylabel="Fréchet distance (20 principal components)", yscale="log")
    axes.set_title("One-step generators of digits, average of the weights", fontsize=10)
    axes.legend(frameon=False)
    figure.savefig(file, dpi=150)


def grid(batch: Tensor, file: Path, *, rows: int = 6) -> None:
    """Write images as one PNG, pixel by pixel.

    Args:
        batch: Images in [-1, 1], shape (n, 64), n >= rows^2.
        file: Where to.
        rows: Images in a row and a column.
    """
    from matplotlib.image import imsave

    file.parent.mkdir(parents=True, exist_ok=True)
    imsave(file, _framed(batch, rows), cmap="gray", vmin=-1, vmax=1)


def _framed(batch: Tensor, rows: int) -> NDArray[Any]:
    framed = F.pad(batch[: rows**2].reshape(rows, rows, 8, 8), (1, 1, 1, 1), value=-1.0)
    return framed.permute(0, 2, 1, 3).reshape(rows * 10, rows * 10).clamp(-1, 1).numpy()


def samples(images: dict[str, Tensor], file: Path, *, rows: int = 6) -> None:
    """Draw samples of each source side by side.

    Args:
        images: Title and images in [-1, 1], shape (n, 64), n >= rows^2.
        file: Where to.
        rows: Images in a row and a column.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3 * len(images), 3.3), layout="constrained")
    for axes, (title, batch) in zip(figure.subplots(1, len(images)), images.items(), strict=True):
        axes.imshow(_framed(batch, rows), cmap="gray", vmin=-1, vmax=1)
        axes.set_title(title, fontsize=10)
        axes.set_axis_off()
    figure.savefig(file, dpi=150)


def table(result: dict[str, Any]) -> str:
    """Return the result as text: each run's updates and compute to each threshold and its final distances; ratios."""
    names = [f"{threshold:g}" for threshold in result["thresholds"]]
    to = " / ".join(names)
    rows = [["", f"updates to {to}", f"compute to {to}", "final", "raw weights"]]
    for name, run in result["runs"].items():
        reached = [" / ".join(_number(run[kind][n]) for n in names) for kind in ("updates", "compute")]
        rows.append([name, *reached, f"{result['final'][name]:.2f}", f"{result['final_raw'][name]:.2f}"])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    baseline = next(iter(result["runs"]))
    lines += ["", f"{baseline} over disback, median [min, max] over the seeds:"]
    lines += [
        f"  to {n}:  updates {_ratio(result['ratio_updates'][n])}   compute {_ratio(result['ratio_compute'][n])}"
        for n in names
    ]
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "never" if value is None else f"{value:,.0f}"


def _ratio(value: dict[str, float]) -> str:
    return f"{value['median']:.2f} [{value['min']:.2f}, {value['max']:.2f}]"
