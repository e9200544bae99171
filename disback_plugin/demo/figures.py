"""Draw the demonstration: convergence and mismatch (Fig. 1 and 4), samples (Fig. 8) and directions (Fig. 9)."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from disback_plugin.report.figures import load_matplotlib

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from disback_plugin.demo import Run, Study

# Samples, shape (n, d), and in the plane the direction of s_phi at each point of GRID.
Frame = tuple[Tensor, Tensor]
# 20 x 20 points of [-6, 6]^2, as in the paper's E.2.
GRID = torch.cartesian_prod(torch.linspace(-6, 6, 20), torch.linspace(-6, 6, 20))
# These colours are distinguishable without colour vision (Okabe and Ito).
COLOURS = ("#555555", "#D55E00", "#E69F00", "#56B4E9", "#009E73")
RED, BLUE = "#D55E00", "#0072B2"


def draw(study: Study, runs: dict[str, Run]) -> None:
    """Write convergence.png and samples.png, and directions.png for points in the plane, into the study's folder."""
    first, second, *_ = runs
    figures = {"convergence": _convergence(study, runs), "samples": _samples(study, (first, second))}
    if study.regime.size == 2:
        figures["directions"] = _directions(study, second)
    for name, figure in figures.items():
        figure.savefig(study.folder / f"{name}.png", dpi=130)


def _convergence(study: Study, runs: dict[str, Run]) -> Figure:
    """Draw distances and mismatch degrees over rounds: the median, and a band from the best to the worst seed."""
    figure = _figure(11, 4)
    left, right = figure.subplots(1, 2)
    for i, (name, run) in enumerate(runs.items()):
        for axes, curve in ((left, run.distance), (right, run.mismatch)):
            line = {"color": COLOURS[i], "linestyle": "-" if i < 2 else "--", "label": name}
            axes.plot(run.rounds, [*map(median, curve)], linewidth=2, **line)
            axes.fill_between(run.rounds, [*map(min, curve)], [*map(max, curve)], color=COLOURS[i], alpha=0.1, lw=0)
    right.axhline(study.floor(), color="black", linewidth=1, linestyle=":", label="the same on the data")
    distance = "sliced Wasserstein distance" if study.regime.size == 2 else "Fréchet distance, 20 components"
    left.set(title="Distance of the generator from the data", ylabel=distance)
    right.set(title="Mismatch of the pre-trained teacher on the samples", ylabel="mismatch degree (Eq. 9)")
    for axes in (left, right):
        axes.set(xlabel="rounds of the loop, recording included", yscale="log")
        axes.spines[["top", "right"]].set_visible(False)
    right.legend(frameon=False, fontsize=9, loc="upper right")
    return figure


def _samples(study: Study, names: Sequence[str]) -> Figure:
    """Draw samples of two runs, side by side with the data, after some rounds."""
    rounds = sorted(study.frames[names[0]])
    figure = _figure(2.2 * (len(rounds) + 1), 2.4 * len(names) + 0.4)
    figure.suptitle("Samples of the generator" + " (blue) over the data (red)" * (study.regime.size == 2))
    rows = figure.subplots(len(names), len(rounds) + 1, sharex=True, sharey=True)
    for name, row in zip(names, rows, strict=True):
        for axes, done in zip(row, rounds, strict=False):
            _show(axes, study.frames[name][done][0], study.data, f"round {done}")
        _show(row[-1], study.data[:0], study.data, "the data")
        row[0].set_ylabel(name)
    return figure


def _directions(study: Study, name: str) -> Figure:
    """Draw the directions of both scores: the teacher's towards the data, and s_phi's towards the samples, in time."""
    frames = sorted(study.frames[name].items())
    panels = {"the teacher's s_theta": (study.data[:0], study.directions(study.teacher))}
    panels |= {f"s_phi after round {done}, {name}": frame for done, frame in (*frames[1:3], frames[-1])}
    figure = _figure(3.6 * len(panels), 4.2)
    figure.suptitle("Gradient directions: s_theta points to the data (red), s_phi to the generator's samples (blue)")
    for axes, (title, (samples, arrows)) in zip(figure.subplots(1, len(panels)), panels.items(), strict=True):
        _show(axes, samples, study.data[: 0 if len(samples) else None], title)
        axes.quiver(*GRID.T, *arrows.T, angles="xy", width=0.004, color="0.25")
        axes.set(xlim=(-6.7, 6.7), ylim=(-6.7, 6.7))
    return figure


def _show(axes: Axes, samples: Tensor, data: Tensor, title: str) -> None:
    """Show samples: points over those of the data; or images, those of the data where there are no samples."""
    if data.shape[1] == 2:
        axes.scatter(data[:1_000, 0], data[:1_000, 1], s=2, color=RED, alpha=0.5, lw=0)
        axes.scatter(samples[:, 0], samples[:, 1], s=2, color=BLUE, lw=0)
        axes.set(xlim=(-8, 8), ylim=(-8, 8), aspect="equal")
    else:
        framed = F.pad((samples if len(samples) else data)[:36].reshape(6, 6, 8, 8), (1, 1, 1, 1), value=-1.0)
        axes.imshow(framed.permute(0, 2, 1, 3).reshape(60, 60).numpy(), cmap="gray", vmin=-1, vmax=1)
    axes.set(xticks=[], yticks=[])
    axes.set_title(title, fontsize=10)


def _figure(width: float, height: float) -> Figure:
    figure: Figure = load_matplotlib().figure.Figure(figsize=(width, height), layout="constrained")
    return figure
