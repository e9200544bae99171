"""Print, draw and store what `gpu_study` found."""

from __future__ import annotations

import json
import math
import os
from statistics import mean

from convergence_results import crossing
from matplotlib.figure import Figure

from disback_plugin._text_table import aligned

BASELINE = "diff-instruct"
# Thresholds as multiples of Diff-Instruct's last distance.
TIMES = (4.0, 2.0, 1.1)
WINDOWS = 4


def write(file, content):
    """Write JSON whole or not at all."""
    part = file.with_suffix(".part")
    part.write_text(json.dumps(content))
    os.replace(part, file)


def common(methods):
    """Return the last update at which every method was evaluated."""
    return min(run["curve"][-1][0] for run in methods.values())


def windows(run, end):
    """Return the generator's effective step, RMS of the step over the base rate, in four quarters of the updates."""
    parts = [[s for at, s in run["steps"] if w * end < WINDOWS * at <= (w + 1) * end] for w in range(WINDOWS)]
    return [mean(part) if part else float("nan") for part in parts]


def table(methods):
    """Return the lines of one rate's table."""
    end = common(methods)
    values = {name: [v for at, v in run["curve"] if at <= end] for name, run in methods.items()}
    last = {name: mean(v[-3:]) for name, v in values.items()}
    goals = [times * last[BASELINE] for times in TIMES]
    head = ["method", "distance", "ratio", *(f"to {times:g}x" for times in TIMES), "recorded", "F", "effective step"]
    rows = [head]
    for name, run in methods.items():
        updates = [at for at, _ in run["curve"] if at <= end]
        reached = [crossing(updates, values[name], goal) for goal in goals]
        shown = ["never" if math.isinf(at) else f"{at:.0f} / {at + run['recorded']:.0f}" for at in reached]
        scale = run["rate"] / methods[BASELINE]["rate"]
        steps = " ".join(f"{scale * step:.2f}" for step in windows(run, end))
        row = [name, f"{last[name]:.4g}", f"{last[name] / last[BASELINE]:.2f}", *shown, str(run["recorded"])]
        rows.append([*row, str(run["fitted"] or "") if name == "disback" else "", steps])
    return aligned(rows, right=range(1, len(head) - 1), indent="")


def text(found):
    """Return the whole page."""
    losses = found["teacher losses"]
    lines = [
        f"{found['device']}, torch {found['torch']}, {found['weights'] / 1e6:.2f} M weights, {found['seconds']:.0f} s",
        f"teacher: loss {losses[0]:.3f} at first, {losses[-1]:.3f} at last; its samples are at {found['teacher']:.3g}, "
        f"other data at {found['other data']:.3g} from the data (Frechet distance, random convolutions)",
    ]
    for rate, methods in found["rates"].items():
        lines += ["", f"rate {rate}, {common(methods)} generator updates", table(methods)]
    times = ", ".join(f"{t:g}" for t in TIMES)
    note = f"""
distance: mean of the last three evaluations of the averaged generator; ratio: over Diff-Instruct's
to 4x ...: generator updates / rounds to {times} times Diff-Instruct's distance; each recorded update is a round
effective step: RMS of the generator's step over the rate of the table, in four quarters of the updates"""
    return "\n".join([*lines, note, ""])


def finish(folder, found):
    """Print the table and write study.json, study.txt and study.png."""
    write(folder / "study.json", found)
    (folder / "study.txt").write_text(text(found))
    print(text(found))
    figure = Figure(figsize=(5 * len(found["rates"]), 4), layout="constrained")
    axes = figure.subplots(1, len(found["rates"]), squeeze=False)[0]
    for ax, (rate, methods) in zip(axes, found["rates"].items(), strict=True):
        for name, run in methods.items():
            ax.plot(*zip(*run["curve"], strict=True), label=name, color="0.35" if name == BASELINE else None)
        ax.axhline(found["teacher"], color="0.7", linestyle=":", label="teacher, 18 steps")
        ax.set(title=f"learning rate {rate}", xlabel="generator updates", yscale="log")
    axes[0].set_ylabel("distance to the data")
    axes[0].legend(fontsize=8)
    figure.savefig(folder / "study.png", dpi=80)
