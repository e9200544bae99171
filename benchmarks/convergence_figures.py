"""Draw the results of `bench_convergence` in figures like some of the paper's (arXiv 2408.15991).

| file          | like the paper's | from                                                                            |
|---------------|------------------|---------------------------------------------------------------------------------|
| default.png   | Figure 1         | the kept results of four regimes, for the README: the default and its control   |
| distances.png | Figure 1         | the results: medians over seeds, and the range of auto's and Diff-Instruct's    |
| ablation.png  | Table 3          | the results of `--halves`: auto, and its warm start and its path alone          |
| mismatch.png  | Figure 4         | runs made here: Eq. 9 of the fixed and the moving target on the student's samples |
| planar.png    | Figures 8 and 9  | the same runs: samples of the student over updates                               |
"""

from __future__ import annotations

from statistics import median

import torch
from convergence_results import BASELINE, OURS, read
from convergence_worlds import seeded, students, world
from matplotlib.figure import Figure

from disback_plugin.metrics import mismatch_degree
from disback_plugin.prediction import Prediction

SIGMAS = (0.5, 1.0, 2.0)
# Regimes and seeds of the runs made here, and the updates of the shown samples and of the measured target.
PLANAR, SEEDS = ("gauss far", "gauss scratch"), range(8)
SHOWN, MEASURED = (0, 20, 60, 120, 400), (1, *range(5, 101, 5))

# The README's figure: regimes and methods with their labels. In the last regime the default loses.
FRONT = {
    "mlp scratch": "digits, MLP, random student",
    "conv teacher 80": "digits, U-Net, the teacher as student",
    "shapes teacher": "shapes, U-Net, the teacher as student",
    "conv rolled": "digits, U-Net, student far from the data",
}
FRONT_METHODS = {
    BASELINE: ("Diff-Instruct", "0.35"),
    "grad-ramp": ("gradient ramp, no path (control)", "tab:cyan"),
    OURS: ('DisBack, "auto" (default)', "tab:orange"),
}


def draw(folder, regimes, methods, distillation) -> None:
    """Write all four figures into the folder of the teachers."""
    results = read(regimes)
    save(folder, "default", default(results))
    save(folder, "distances", distances(results))
    if halves := {name: result for name, result in results.items() if result.halves}:
        save(folder, "ablation", ablation(halves))
    both = (methods[0], methods[-1])
    runs = {name: distil(folder, regimes[name], results[name].rate, both, distillation) for name in PLANAR}
    save(folder, "mismatch", mismatch(runs))
    save(folder, "planar", planar(runs))


def save(folder, name, figure) -> None:
    figure.savefig(folder / f"{name}.png", dpi=70)
    print(folder / f"{name}.png")


def distances(results):
    rows = -(-len(results) // 4)
    figure = Figure((14, 2.7 * rows), layout="constrained")
    axes = figure.subplots(rows, 4, squeeze=False)
    for axis, (name, result) in zip(axes.flat, results.items(), strict=False):
        for method in result.best:
            seeds = result.ema[method]
            middle = [median(values) for values in zip(*seeds, strict=True)]
            (line,) = axis.plot(result.updates, middle, label=method, lw=2 if method == OURS else 1)
            if method in (BASELINE, OURS):
                low, high = ([of(values) for values in zip(*seeds, strict=True)] for of in (min, max))
                axis.fill_between(result.updates, low, high, color=line.get_color(), alpha=0.12, lw=0)
        axis.set(title=f"{name}, rate {result.rate:g}", yscale="log")
    for axis in list(axes.flat)[len(results) :]:
        axis.axis("off")
    axes[0, 0].legend(fontsize=7)
    figure.supxlabel("generator updates")
    figure.supylabel("distance of the averaged generator")
    return figure


def default(results):
    """Draw the package's default beside Diff-Instruct and the gradient ramp, by rounds with the recording counted."""
    figure = Figure((13, 3.2), layout="constrained")
    for axis, (name, title) in zip(figure.subplots(1, len(FRONT)), FRONT.items(), strict=True):
        result = results[name]
        for method, (label, colour) in FRONT_METHODS.items():
            recorded = median(seed[0] for seed in result.fitted[method]) if method == OURS else 0
            seeds = list(zip(*result.ema[method], strict=True))
            rounds = [recorded + updates for updates in result.updates]
            axis.plot(rounds, [median(values) for values in seeds], label=label, color=colour, lw=2)
            axis.fill_between(rounds, [min(v) for v in seeds], [max(v) for v in seeds], color=colour, alpha=0.12, lw=0)
        axis.set(title=title, yscale="log", xlabel="rounds of the loop, recording included")
        axis.title.set_fontsize(10)
    figure.axes[0].set_ylabel("distance to the data")
    figure.axes[0].legend(fontsize=8, frameon=False)
    return figure


def ablation(results):
    figure = Figure((2.6 * len(results) + 1, 3.2), layout="constrained")
    for axis, (name, result) in zip(figure.subplots(1, len(results), squeeze=False).flat, results.items(), strict=True):
        all_of = {
            "neither": result.ema[BASELINE],
            **result.halves,
            "both: auto": result.ema[OURS],
        }
        all_of[BASELINE] = result.ema[BASELINE]
        ends = {label: median(result.last(label, all_of)) for label in ("neither", *result.halves, "both: auto")}
        axis.bar(range(len(ends)), ends.values(), color=["0.6", "tab:blue", "tab:orange", "tab:green"])
        axis.set_xticks(range(len(ends)), [label.replace(" ", "\n") for label in ends], fontsize=7)
        axis.set(title=name)
        for i, end in enumerate(ends.values()):
            axis.text(i, end, f"{end:.2f}", ha="center", va="bottom", fontsize=8)
    figure.supylabel("final distance over Diff-Instruct's")
    return figure


def distil(folder, regime, rate, methods, distillation):
    """Train some seeds under each method; return the mismatch, and samples of the first seed, over updates."""
    place, seeds = world(regime.world), list(SEEDS)
    bank, student = (students(place, kind, "shown", seeds, folder) for kind in ("teacher", regime.student))
    runs = distillation(place, regime, methods, [rate] * len(methods), seeds, bank, student)
    runs.record()
    z = torch.randn(1_000, place.size, generator=seeded(9)).expand(len(runs.methods), -1, -1)
    found = {method.name: {"mismatch": [], "samples": {}} for method in methods}
    updates = iter(range(regime.updates + 1))

    @torch.no_grad()
    def measure():
        update = next(updates)
        if update not in {*SHOWN, *MEASURED}:
            return
        x = runs.generator(regime.sigma_init * z, torch.tensor(regime.sigma_init))
        for i, method in enumerate(methods):
            first = i * len(seeds)
            if update in SHOWN:
                found[method.name]["samples"][update] = x[first].clone()
            if update in MEASURED:
                mine = range(first, first + len(seeds))
                found[method.name]["mismatch"].append(
                    median(distance(runs.target, member, x[member]) for member in mine)
                )

    measure()
    runs.train(regime.updates, measure)
    return found


def distance(target, member, samples):
    """Return the mismatch of one member's target with the scores that its samples have themselves."""
    members = len(next(target.parameters()))

    def predict(x_t, sigma):
        return target(x_t.expand(members, *x_t.shape), sigma.flatten().expand(members, len(x_t)))[member]

    return mismatch_degree(
        predict, samples[:300], references=samples[300:], sigmas=list(SIGMAS), prediction=Prediction.X0
    )["total"]


def mismatch(runs):
    figure = Figure((9, 3.2), layout="constrained")
    for axis, (name, methods) in zip(figure.subplots(1, len(runs)), runs.items(), strict=True):
        for method, found in methods.items():
            axis.plot(MEASURED, found["mismatch"], label=method)
        axis.set(title=name, xlabel="generator updates", ylabel="mismatch of the target (Eq. 9)", yscale="log")
    axis.legend()
    return figure


def planar(runs):
    figure = Figure((2.4 * len(SHOWN), 9.6), layout="constrained")
    rows = [(name, method, found) for name, methods in runs.items() for method, found in methods.items()]
    axes = figure.subplots(len(rows), len(SHOWN), sharex=True, sharey=True)
    data = world("gauss10-2d").data[:1_000]
    for line, (name, method, found) in zip(axes, rows, strict=True):
        for axis, update in zip(line, SHOWN, strict=True):
            axis.scatter(*data.T, s=1, color="0.8")
            if update in found["samples"]:
                axis.scatter(*found["samples"][update].T, s=1, color="tab:green" if method == OURS else "tab:blue")
            axis.set(xlim=(-8, 16), ylim=(-8, 8), title=f"{method}, update {update}")
        line[0].set_ylabel(name)
    return figure


if __name__ == "__main__":
    from pathlib import Path

    from convergence_methods import REGIMES

    save(Path(__file__).parent, "default", default(read(REGIMES)))
