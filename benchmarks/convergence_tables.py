"""Write the results of `bench_convergence` as the tables of EVIDENCE.md."""

from __future__ import annotations

import re
from pathlib import Path
from statistics import median

from convergence_goals import VERDICTS, goals, verdict
from convergence_methods import LONGEST, Regime
from convergence_results import BASELINE, CONTROLS, OURS, RECORDED, Result, over_all, read

__all__ = ["EVIDENCE", "text", "write"]

EVIDENCE = Path(__file__).parent / "EVIDENCE.md"


def of_regime(name: str, result: Result) -> list[str]:
    """Return the table of one regime."""
    recorded, fitted = ([pair[i] for pair in result.fitted[OURS]] for i in (0, 1))
    how = "--out DIR --own" if result.own else "--out DIR"
    near = ", ".join(f"{threshold:.3g}" for threshold in result.thresholds)
    lines = [
        f"### {name}",
        "",
        f"`python benchmarks/bench_convergence.py '{name}' {how}`. Rate {result.rate:g}, {result.updates[-1]} "
        f"updates, {result.seeds} seeds. Diff-Instruct ends at {median(result.finals):.3g}; thresholds {near}. "
        f"auto recorded {median(recorded):g} [{min(recorded)}, {max(recorded)}], F = {median(fitted):g} "
        f"[{min(fitted)}, {max(fitted)}].",
        "",
        "| method | updates, compute to 2x | to 1.3x | final | at equal compute | better | least | stalled | raw |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    order = {method: i for i, method in enumerate((BASELINE, *RECORDED, OURS))}
    for method in sorted(result.ema, key=lambda label: order[label.partition(",")[0]]):
        speeds = [
            " ".join(number(result.median_speed(method, threshold, compute)) for compute in (False, True))
            for threshold in result.thresholds
        ]
        equal = result.equal_compute(method)
        better = f"{sum(value < 1 for value in equal)}/{result.seeds}"
        cells = (
            [
                method,
                *speeds,
                spread(result.last(method, result.ema)),
                spread(equal),
                better,
                spread(result.least(method)),
            ]
            if method != BASELINE
            else [method, *["1 1"] * 2, "1", "1", "", "1"]
        )
        raw = spread(result.last(method, result.raw)) if method != BASELINE else "1"
        lines.append(f"| {' | '.join([*cells, str(sum(result.stalled(method))), raw])} |")
    return [*lines, ""]


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def spread(values: list[float]) -> str:
    return f"{median(values):.2f} [{min(values):.2f}, {max(values):.2f}]"


def predictors(results: dict[str, Result]) -> list[str]:
    """Return a table of two numbers of a recording beside the measured gain, regime by regime."""
    known = {name: r for name, r in results.items() if r.excess is not None}
    lines = [
        "### The excess loss of a recording, F, and the gain",
        "",
        "Medians over the seeds: the excess loss L_teacher / L_s'N - 1 of the teacher on the student's samples; F, the "
        "updates after which s' was fitted; and auto's final distance over Diff-Instruct's at equal compute and "
        "Diff-Instruct's rate.",
        "",
        "| regime | excess loss | F | measured |",
        "|---|---|---|---|",
    ]
    for name, r in known.items():
        recorded, fitted = (median(column) for column in zip(*r.fitted[OURS], strict=True))
        shown = "not fitted" if recorded == LONGEST else f"{fitted:g}"
        lines.append(f"| {name} | {r.excess:.2f} | {shown} | {median(r.equal_compute(OURS)):.2f} |")
    if len(known) > 4:
        lines += ["", _signs(known)]
    return [*lines, ""]


def _signs(known: dict[str, Result]) -> str:
    """Whether a sign of the recording orders the regimes by their gain."""
    from scipy.stats import spearmanr

    outcome = [median(r.equal_compute(OURS)) for r in known.values()]
    signs = {
        "the excess loss": [r.excess for r in known.values()],
        "F": [median(pair[1] for pair in r.fitted[OURS]) for r in known.values()],
    }
    found = {sign: spearmanr(values, outcome) for sign, values in signs.items()}
    listed = ", ".join(f"{sign} {f.statistic:+.2f} (p = {f.pvalue:.2f})" for sign, f in found.items())
    return f"Rank correlation with the measured ratio over these {len(known)} regimes: {listed}."


def text(results: dict[str, Result], regimes: dict[str, Regime]) -> str:
    """Return all results as Markdown."""
    rows = goals(results, regimes)
    missing = [name for name in regimes if name not in results]
    counts = [sum(row[2] is verdict for row in rows) for verdict in (True, False)]
    means, same = over_all(results), over_all(results, own=False)
    lines = [
        f"Of {len(rows)} goals {counts[0]} are reached and {counts[1]} missed. Not measured: "
        f"{', '.join(missing) or 'nothing'}; the geometric means are of what is.",
        "",
        f"Each method is at its own best rate in {owned(results)}.",
        "",
        "| goal | auto | |",
        "|---|---|---|",
        *(f"| {what} | {shown} | {VERDICTS[verdict]} |" for what, shown, verdict in rows),
        "",
        *_means(f"Geometric mean over {len(results)} regimes (of medians), all at Diff-Instruct's rate", same),
        *_means("The same, each at its own best rate where that was looked for", means),
    ]
    lines += [*predictors(results), *_halves(results)]
    return "\n".join([*lines, *(line for name, result in results.items() for line in of_regime(name, result))])


def _halves(results: dict[str, Result]) -> list[str]:
    """Return a table of the warm start and the path of auto, each alone (the paper's Table 3)."""
    known = {name: r for name, r in results.items() if r.halves}
    if not known:
        return []
    halves = next(iter(known.values())).halves
    lines = [
        "### Auto's halves alone",
        "",
        "Final distance over Diff-Instruct's, at its rate (`--out DIR --halves`).",
        "",
        f"| regime | {' | '.join(halves)} | both: auto |",
        f"|---|{'---|' * len(halves)}---|",
    ]
    for name, r in known.items():
        found = [spread(r.last(half, r.halves | {BASELINE: r.ema[BASELINE]})) for half in halves]
        lines.append(f"| {name} | {' | '.join(found)} | {spread(r.last(OURS, r.ema))} |")
    return [*lines, ""]


def _means(title: str, means: dict[str, list[float]]) -> list[str]:
    return [
        f"### {title}",
        "",
        "| method | updates to 2x | to 1.3x | compute to 2x | to 1.3x | final | at equal compute | raw final |",
        "|---|---|---|---|---|---|---|---|",
        *(f"| {method} | {' | '.join(f'{value:.3f}' for value in row)} |" for method, row in means.items()),
        "",
    ]


def owned(results: dict[str, Result]) -> str:
    own = [name for name, r in results.items() if r.own]
    if len(own) == len(results):
        return "every regime"
    return f"{', '.join(own) or 'no regime'}; in the others all are at Diff-Instruct's"


def _how_many(results: dict[str, Result]) -> str:
    own = sum(r.own for r in results.values())
    return "everywhere" if own == len(results) else f"in {own} of them"


def hurry(results: dict[str, Result], regimes: dict[str, Regime]) -> str:
    """Return the same results in three sentences."""
    rows, means, own = goals(results, regimes), over_all(results, own=False), over_all(results)
    controls, owns = (", ".join(f"{method} {m[method][5]:.2f}" for method in CONTROLS) for m in (means, own))
    reached, missed, unknown = (
        f"{len(found)} ({'; '.join(dict.fromkeys(what.split(':')[0] for what in found)) or 'none'})"
        for found in ([what for what, _, known in rows if known is wanted] for wanted in (True, False, None))
    )
    names = {1: [], -1: [], 0: []}
    for name, result in results.items():
        equal = result.equal_compute(result.best[OURS])
        better = sum(value < 1 for value in equal)
        names[verdict(better, len(equal))].append(f"{name} ({median(equal):.2f}, {better} of {len(equal)} better)")
    better, worse, alike = (", ".join(names[way]) or "no regime" for way in (1, -1, 0))
    unknown = "" if unknown.startswith("0") else f", {unknown} not measured yet"
    every = "all" if len(results) == len(regimes) else f"{len(results)} of"
    return (
        f"1. Over {every} {len(regimes)} regimes, all methods at Diff-Instruct's best rate, `auto` ends, at "
        f"equal compute, at {means[OURS][5]:.2f} of Diff-Instruct's distance in the geometric mean ({controls}), and "
        f"is {means[OURS][0]:.2f} times as fast in updates, {means[OURS][2]:.2f} in compute, to twice Diff-Instruct's "
        f"final distance; with each method at its own best rate {_how_many(results)} it "
        f"is {own[OURS][5]:.2f} ({owns}).\n"
        f"2. Of {len(rows)} goals that were set beforehand {missed} are missed, {reached} reached{unknown}; the first "
        "table has each.\n"
        f"3. At equal compute more seeds than chance gives (sign test, 5 %) were better in {better}, worse in {worse}; "
        f"it could not be told from Diff-Instruct in {alike}."
    )


def write(regimes: dict[str, Regime]) -> None:
    """Write the sentences and the tables between their markers in EVIDENCE.md."""
    results, page = read(regimes), EVIDENCE.read_text()
    for marker, found in (("tables", text(results, regimes)), ("hurry", hurry(results, regimes))):
        begin, end = f"<!-- {marker} -->", f"<!-- end of {marker} -->"
        new = f"{begin}\n{found}\n{end}"
        page = re.sub(f"{begin}.*{end}", lambda _, new=new: new, page, flags=re.DOTALL)
    EVIDENCE.write_text(page)
