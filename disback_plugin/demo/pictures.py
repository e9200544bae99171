"""The two pictures and the table of the demonstration."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from disback_plugin.demo.study import Run

__all__ = ["convergence", "samples", "table"]

# Distinguishable without colour vision (Okabe and Ito).
COLOURS = {"diff-instruct": "#555555", "warm": "#E69F00", "grad-ramp": "#56B4E9", "disback": "#D55E00"}


def convergence(runs: dict[str, Run], thresholds: tuple[float, ...], file: Path) -> None:
    """Draw the distance of each run's averaged generator over updates: median line, band from best to worst seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, run in runs.items():
        # Not below the recording: an update of a run that recorded came after it.
        axes.plot(run.updates, [median(v) for v in run.ema], color=COLOURS[name], label=name, linewidth=2)
        axes.fill_between(
            run.updates, [min(v) for v in run.ema], [max(v) for v in run.ema], color=COLOURS[name], alpha=0.12
        )
    for threshold in thresholds:
        axes.axhline(threshold, color="black", linewidth=0.6, linestyle=":")
    axes.set(xlabel="generator updates", ylabel="Fréchet distance (20 principal components)", yscale="log")
    axes.set_title("One-step generators of digits, average of the weights", fontsize=10)
    axes.legend(frameon=False)
    figure.savefig(file, dpi=150)


def samples(images: dict[str, Tensor], file: Path) -> None:
    """Draw 8 x 8 samples of each source side by side.

    Args:
        images: Title and images in [-1, 1], shape (n, 64), n >= 64.
        file: Where to.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3 * len(images), 3.3), layout="constrained")
    for axes, (title, batch) in zip(figure.subplots(1, len(images)), images.items(), strict=True):
        grid = batch[:64].reshape(8, 8, 8, 8).permute(0, 2, 1, 3).reshape(64, 64)
        axes.imshow(grid.clamp(-1, 1).numpy(), cmap="gray", vmin=-1, vmax=1)
        axes.set_title(title, fontsize=10)
        axes.set_axis_off()
    figure.savefig(file, dpi=150)


def table(result: dict[str, Any]) -> str:
    """Return the result as a text table: for each run updates and compute to each threshold and the final distances."""
    names = [f"{threshold:g}" for threshold in result["thresholds"]]
    header = ["", *(f"updates to {n}" for n in names), *(f"compute to {n}" for n in names), "final", "final raw"]
    rows = [header]
    for name, run in result["runs"].items():
        rows.append(
            [
                name,
                *(_number(run["updates"][n]) for n in names),
                *(_number(run["compute"][n]) for n in names),
                f"{result['final'][name]:.2f}",
                f"{result['final_raw'][name]:.2f}",
            ]
        )
    ratios = ["ratio", *(_ratio(result["ratio_updates"][n]) for n in names)]
    rows.append([*ratios, *(_ratio(result["ratio_compute"][n]) for n in names), "", ""])
    widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
    lines = ["  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    lines[1:1] = ["-" * len(lines[0])]
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "never" if value is None else f"{value:,.0f}"


def _ratio(value: dict[str, float]) -> str:
    return f"{value['median']:.2f} [{value['min']:.2f}, {value['max']:.2f}]"
