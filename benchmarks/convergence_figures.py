"""Draw the results of `bench_convergence` in figures like some of the paper's (arXiv 2408.15991).

| file          | like the paper's | from                                                                            |
|---------------|------------------|---------------------------------------------------------------------------------|
| default.png   | Figure 1         | the kept results of four regimes, for the README: the default and its control   |
| distances.png | Figure 1         | the results: medians over seeds, and the range of auto's and Diff-Instruct's    |
| ablation.png  | Table 3          | the results of `--halves`: auto, and its warm start and its path alone          |

Figures 4, 8 and 9 are drawn by `disback demo --world gaussians`.
"""

from __future__ import annotations

from statistics import median

from convergence_results import BASELINE, OURS, read
from matplotlib.figure import Figure

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


def draw(folder, regimes) -> None:
    """Write all figures into a folder."""
    results = read(regimes)
    save(folder, "default", default(results))
    save(folder, "distances", distances(results))
    if halves := {name: result for name, result in results.items() if result.halves}:
        save(folder, "ablation", ablation(halves))


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


if __name__ == "__main__":
    from pathlib import Path

    from convergence_methods import REGIMES

    save(Path(__file__).parent, "default", default(read(REGIMES)))
