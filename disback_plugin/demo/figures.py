"""Draw the two figures of the demonstration, and its grids of samples."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from disback_plugin.demo.study import Run

__all__ = ["convergence", "grid", "samples"]

# These colours are distinguishable without colour vision (Okabe and Ito).
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


def samples(images: dict[str, Tensor], file: Path) -> None:
    """Draw 36 samples of each source side by side.

    Args:
        images: Title and images in [-1, 1], shape (n, 64), n >= 36.
        file: PNG file to write.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3 * len(images), 3.3), layout="constrained")
    for axes, (title, batch) in zip(figure.subplots(1, len(images)), images.items(), strict=True):
        axes.imshow(_tiled(batch), cmap="gray", vmin=-1, vmax=1)
        axes.set_title(title, fontsize=10)
        axes.set_axis_off()
    figure.savefig(file, dpi=150)


def grid(batch: Tensor, file: Path) -> None:
    """Write 36 images in [-1, 1], shape (n, 64), n >= 36, as one PNG of 60 x 60 pixels."""
    from matplotlib.image import imsave

    file.parent.mkdir(parents=True, exist_ok=True)
    imsave(file, _tiled(batch), cmap="gray", vmin=-1, vmax=1)


def _tiled(batch: Tensor) -> NDArray[Any]:
    framed = F.pad(batch[:36].reshape(6, 6, 8, 8), (1, 1, 1, 1), value=-1.0)
    return framed.permute(0, 2, 1, 3).reshape(60, 60).clamp(-1, 1).numpy()
