"""Draw the kept results of `bench_convergence` like the paper's Figure 1 (arXiv 2408.15991).

| file          | what                                                                              |
|---------------|-----------------------------------------------------------------------------------|
| default.png   | four regimes, for the README: Diff-Instruct, the default and the gradient ramp    |
| distances.png | all regimes: medians over seeds, ranges of Diff-Instruct's and auto with factor    |
"""

from __future__ import annotations

from statistics import median

from convergence_methods import NEW_REGIMES, REGIMES
from convergence_results import BASELINE, OURS, comparisons, read
from matplotlib.figure import Figure

# The README's figure: regimes and methods with their labels. In the last regime the default loses.
FRONT = {
    "mlp scratch": "MLP, random student",
    "conv teacher 20": "U-Net, student = teacher",
    "mnist teacher": "16 x 16, U-Net, student = teacher",
    "conv rolled": "U-Net, student far from the data",
}
FRONT_METHODS = {
    BASELINE: ("Diff-Instruct", "0.35"),
    "ramp 3F": ("gradient ramp, no path (control)", "tab:cyan"),
    "walk": ('DisBack, "auto" (default)', "tab:orange"),
}


def draw(folder, regimes) -> None:
    """Write both figures into a folder."""
    results = read(regimes)
    save(folder, "default", default(comparisons(regimes | NEW_REGIMES)))
    save(folder, "distances", distances(results))


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
            recorded = median(seed[0] for seed in result.recorded[method])
            seeds = list(zip(*result.ema[method], strict=True))
            rounds = [recorded + updates for updates in result.updates]
            axis.plot(rounds, [median(values) for values in seeds], label=label, color=colour, lw=2)
            axis.fill_between(rounds, [min(v) for v in seeds], [max(v) for v in seeds], color=colour, alpha=0.12, lw=0)
        axis.set(title=title, yscale="log", xlabel="rounds of the loop, recording included")
        axis.title.set_fontsize(10)
    figure.axes[0].set_ylabel("distance to the data")
    figure.axes[0].legend(fontsize=8, frameon=False)
    return figure


if __name__ == "__main__":
    from pathlib import Path

    save(Path(__file__).parent, "default", default(comparisons(REGIMES | NEW_REGIMES)))
