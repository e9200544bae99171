"""From the results of `bench_convergence` to the tables of EVIDENCE.md, and to which goals are reached.

A result is a JSON: `runs[method]` has `updates` (n,), `ema` and `raw` (n, seeds), and `R["auto"]` has, of each seed,
how long it was recorded and after how many updates s' was fitted; `own_runs` has the methods whose own best rate is
another one than Diff-Instruct's. All ratios are to Diff-Instruct with the same seed, at its best rate.

A run goes by its label: the method, and its rate where that is its own.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from statistics import geometric_mean, median

from disback_plugin.outlook import MEASURED, NEAR, advice

BASELINE, OURS = "diff-instruct", "auto"
CONTROLS = ("fixed", "plain-ramp", "warm", "grad-ramp")
RECORDED = {"diff-instruct": 0, "warm": 25, "grad-ramp": 0, "plain-ramp": 25, "fixed": 50}
# In forward passes of one network, a backward pass being two: of a recording's update, and of a round of each loss.
COST_OF_RECORDING, COST_OF_ROUND = 4, {"sid": 11}
# Thresholds, as multiples of Diff-Instruct's median final distance.
THRESHOLDS = (2.0, 1.3)
EVIDENCE = Path(__file__).parent / "EVIDENCE.md"

TEACHER_UNETS = ("conv teacher 2.5", "conv teacher 20", "conv teacher 80")
FAR = ("mlp inverted", "conv inverted", "conv rolled", "conv one class", "gauss far")


def file_name(regime: str) -> str:
    return f"ev-{regime.replace(' ', '_')}.json"


def curves(values: list[list[float]]) -> list[list[float]]:
    """From one list an evaluation to one list a seed."""
    return [list(seed) for seed in zip(*values, strict=True)]


def final(curve: list[float]) -> float:
    """The average of the last three evaluations."""
    return sum(curve[-3:]) / len(curve[-3:])


class Result:
    """One regime's runs, seed by seed."""

    def __init__(self, content: dict, loss: str) -> None:
        self.rate, runs = content["rate"], dict(content["runs"])
        self.fitted = {OURS: content["R"][OURS]}
        self.excess = median(content["excess"]) if "excess" in content else None
        # Of each method the label of its run at its own best rate.
        self.own, self.best = "own_runs" in content, {method: method for method in runs}
        for method, run in content.get("own_runs", {}).items():
            self.best[method] = label = f"{method}, {content['own_rates'][method]:g}"
            runs[label] = run
            if method == OURS:
                self.fitted[label] = run["recorded"]
        self.halves = {half: curves(run["ema"]) for half, run in content.get("halves", {}).items()}
        self.updates = runs[BASELINE]["updates"]
        self.ema = {label: curves(run["ema"]) for label, run in runs.items()}
        self.raw = {label: curves(run["raw"]) for label, run in runs.items()}
        self.seeds = len(self.ema[BASELINE])
        self._round = COST_OF_ROUND.get(loss, 9)
        self.finals = [final(curve) for curve in self.ema[BASELINE]]
        self.thresholds = [factor * median(self.finals) for factor in THRESHOLDS]

    def head_start(self, label: str, seed: int) -> float:
        """What the recording costs, in generator updates."""
        recorded = self.fitted[label][seed][0] if label in self.fitted else RECORDED[label.partition(",")[0]]
        return COST_OF_RECORDING * recorded / self._round

    def speed(self, method: str, threshold: float, seed: int, compute: bool = False) -> float | None:
        """How many times sooner a seed is at a threshold; None if it began there.

        Who never is counts as being there at twice the run's length if the other is, Diff-Instruct at its end; if
        neither is, it is 1.
        """
        plain, ours = (crossing(self.updates, self.ema[name][seed], threshold) for name in (BASELINE, method))
        if plain == 0 or ours == 0:
            return None
        if math.isinf(plain) and math.isinf(ours):
            return 1.0
        end = self.updates[-1]
        sooner = 2.0 * end if math.isinf(ours) else ours
        return min(plain, end) / (sooner + (self.head_start(method, seed) if compute else 0.0))

    def median_speed(self, method: str, threshold: float, compute: bool = False) -> float | None:
        found = [self.speed(method, threshold, seed, compute) for seed in range(self.seeds)]
        known = [value for value in found if value is not None]
        return median(known) if 2 * len(known) > self.seeds else None

    def last(self, method: str, curves: dict[str, list[list[float]]]) -> list[float]:
        """Each seed's final distance over Diff-Instruct's."""
        return [final(a) / final(b) for a, b in zip(curves[method], curves[BASELINE], strict=True)]

    def equal_compute(self, method: str) -> list[float]:
        """The same, where the recording has cost the run so many of its last updates."""
        ratios = []
        for seed, curve in enumerate(self.ema[method]):
            ends = [u - self.head_start(method, seed) for u in self.updates[-3:]]
            ratios.append(sum(at(self.updates, curve, u) for u in ends) / 3 / self.finals[seed])
        return ratios

    def stalled(self, method: str) -> list[bool]:
        """Which seeds end above twice Diff-Instruct's median final distance, or are not finite."""
        return [not final(curve) <= 2 * median(self.finals) for curve in self.ema[method]]

    def diverged(self, method: str) -> int:
        return sum(not math.isfinite(final(curve)) for curve in self.raw[method])


def crossing(updates: list[int], curve: list[float], threshold: float) -> float:
    """Updates after which a curve first is at a threshold, interpolated; 0 if it begins there, inf if it never is."""
    if curve[0] <= threshold:
        return 0.0
    for u, v, a, b in zip(updates, updates[1:], curve, curve[1:], strict=False):
        if b <= threshold:
            return u + (a - threshold) / (a - b) * (v - u) if math.isfinite(a) else float(v)
    return math.inf


def at(updates: list[int], curve: list[float], u: float) -> float:
    """A curve's value between two evaluations."""
    i = next(i for i in range(1, len(updates)) if updates[i] >= u)
    part = (u - updates[i - 1]) / (updates[i] - updates[i - 1])
    return curve[i - 1] + part * (curve[i] - curve[i - 1])


def read(folder: Path, regimes: dict) -> dict[str, Result]:
    files = {name: folder / file_name(name) for name in regimes}
    return {
        name: Result(json.loads(file.read_text()), regimes[name].loss) for name, file in files.items() if file.exists()
    }


def of_regime(name: str, result: Result) -> list[str]:
    """The table of one regime."""
    recorded, fitted = ([pair[i] for pair in result.fitted[OURS]] for i in (0, 1))
    how = "--out DIR --own" if result.own else "--out DIR"
    near = ", ".join(f"{threshold:.3g}" for threshold in result.thresholds)
    lines = [
        f"### {name}",
        "",
        f"`python benchmarks/bench_convergence.py '{name}' {how}`. Rate {result.rate:g}, {result.updates[-1]} "
        f"updates, {result.seeds} seeds. Diff-Instruct ends at {median(result.finals):.3g}; thresholds {near}. "
        f"auto recorded {median(recorded):g} [{min(recorded)}, {max(recorded)}], fitted after {median(fitted):g} "
        f"[{min(fitted)}, {max(fitted)}].",
        "",
        "| method | updates, compute to 2x | to 1.3x | final | final at equal compute | better | stalled | raw final |",
        "|---|---|---|---|---|---|---|---|",
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
            [method, *speeds, spread(result.last(method, result.ema)), spread(equal), better]
            if method != BASELINE
            else [method, *["1 1"] * 2, "1", "1", ""]
        )
        raw = spread(result.last(method, result.raw)) if method != BASELINE else "1"
        lines.append(f"| {' | '.join([*cells, str(sum(result.stalled(method))), raw])} |")
    return [*lines, ""]


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def spread(values: list[float]) -> str:
    return f"{median(values):.2f} [{min(values):.2f}, {max(values):.2f}]"


def over_all(results: dict[str, Result], *, own: bool = True) -> dict[str, list[float]]:
    """Of each method the geometric means over regimes: updates to 2x, to 1.3x, compute to the same, final distances.

    Each at its own best rate where that was looked for, or all at Diff-Instruct's.
    """

    def label(result: Result, method: str) -> str:
        return result.best[method] if own else method

    means = {}
    for method in (BASELINE, *CONTROLS, OURS):
        columns = [
            [r.median_speed(label(r, method), r.thresholds[i], compute) for r in results.values()]
            for compute in (False, True)
            for i in range(len(THRESHOLDS))
        ]
        columns.append([median(r.last(label(r, method), r.ema)) for r in results.values()])
        columns.append([median(r.equal_compute(label(r, method))) for r in results.values()])
        columns.append([median(r.last(label(r, method), r.raw)) for r in results.values()])
        known = [[value for value in column if value is not None] for column in columns]
        means[method] = [geometric_mean(column) if column else math.nan for column in known]
    return means


# Columns of `over_all` in which auto is to be ahead, and whether more is better.
COMPARED = ((0, "updates to 2x", 1), (1, "updates to 1.3x", 1), (4, "final", -1), (5, "final at equal compute", -1))


def goals(results: dict[str, Result], regimes: dict) -> list[tuple[str, str, bool | None]]:
    """What the issue asks for: each goal, what was measured, and whether it is reached (None: not measured)."""
    rows: list[tuple[str, str, bool | None]] = []

    def goal(what: str, regime: str, measure) -> None:
        found = measure(results[regime]) if regime in results else ("not measured yet", None)
        rows.append((f"{regime}: {what}", *found))

    goal("to pfd 2.0 >= 1.38 updates, >= 1.21 compute", "mlp scratch", _prototype)
    goal("final no worse than grad-ramp's", "mlp scratch", _gradient_ramp)
    for name in TEACHER_UNETS:
        goal("final at equal compute <= 0.95, better in 8 of 10", name, _teacher_unet)
    for name in FAR:
        goal("final <= 0.90, no stalled seed where Diff-Instruct stalls", name, _far)
    for name in (n for n in regimes if n not in (*TEACHER_UNETS, *FAR, "mlp scratch")):
        goal("updates >= 0.95, final <= 1.05, no divergence", name, _harmless)
    means = over_all(results)
    for i, what, sign in COMPARED:
        best = max(CONTROLS, key=lambda method: sign * means[method][i])
        shown = f"auto {means[OURS][i]:.3f}, best other: {best} {means[best][i]:.3f}"
        ahead = sign * (means[OURS][i] - means[best][i]) > 0
        rows.append((f"geometric mean, {what}: ahead of all controls", shown, ahead))
    return rows


def _prototype(r: Result) -> tuple[str, bool]:
    updates, compute = (r.median_speed(r.best[OURS], 2.0, c) or 0.0 for c in (False, True))
    return f"{updates:.2f}, {compute:.2f}", updates >= 1.38 and compute >= 1.21


def _gradient_ramp(r: Result) -> tuple[str, bool]:
    ours, ramp = (median(r.last(r.best[method], r.ema)) for method in (OURS, "grad-ramp"))
    return f"{ours:.3f}, grad-ramp {ramp:.3f}", ours <= ramp


def _teacher_unet(r: Result) -> tuple[str, bool]:
    equal = r.equal_compute(r.best[OURS])
    better = sum(value < 1 for value in equal)
    return f"{median(equal):.3f}, {better}/{r.seeds}", median(equal) <= 0.95 and better >= 0.8 * r.seeds


def _far(r: Result) -> tuple[str, bool]:
    last = median(r.last(r.best[OURS], r.ema))
    plain, ours = r.stalled(BASELINE), r.stalled(r.best[OURS])
    both = sum(a and b for a, b in zip(plain, ours, strict=True))
    return f"{last:.3f}, stalled: {sum(plain)}, with auto {sum(ours)}, both {both}", last <= 0.90 and not both


def _harmless(r: Result) -> tuple[str, bool]:
    ours = r.best[OURS]
    speeds = [value for threshold in r.thresholds if (value := r.median_speed(ours, threshold)) is not None]
    last = median(r.last(ours, r.ema))
    shown = f"{', '.join(f'{value:.2f}' for value in speeds)}; {last:.3f}; {r.diverged(ours)} diverged"
    return shown, min(speeds, default=1.0) >= 0.95 and last <= 1.05 and not r.diverged(ours)


def foretold(results: dict[str, Result]) -> list[str]:
    """The preflight's sentence beside what was measured, regime by regime."""
    known = {name: r for name, r in results.items() if r.excess is not None}
    lines = [
        "### What the preflight says, and what was measured",
        "",
        "Its sentence is one of two, by the excess loss of the recording (median over seeds); it is true where the "
        "measured ratio, auto's final distance at equal compute and Diff-Instruct's rate, is in its range.",
        "",
        *(f"* {kind}: {advice(excess)}" for kind, excess in (("near", 0.0), ("far", NEAR))),
        "",
        "| regime | excess loss | F | sentence | its range | measured | |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, r in known.items():
        kind = "near" if r.excess < NEAR else "far"
        _, low, high = MEASURED[kind]
        found = median(r.equal_compute(OURS))
        fitted = median(pair[1] for pair in r.fitted[OURS])
        true = "true" if low <= round(found, 2) <= high else "**false**"
        lines.append(
            f"| {name} | {r.excess:.2f} | {fitted:g} | {kind} | {low:.2f} to {high:.2f} | {found:.2f} | {true} |"
        )
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
    told = ", ".join(f"{sign} {f.statistic:+.2f} (p = {f.pvalue:.2f})" for sign, f in found.items())
    return f"Rank correlation with the measured ratio over these {len(known)} regimes: {told}."


def text(folder: Path, regimes: dict) -> str:
    """All that is measured in a folder, as Markdown."""
    results = read(folder, regimes)
    if not results:
        raise SystemExit(f"found no result in {folder}; run bench_convergence.py REGIME... --out {folder}")
    rows = goals(results, regimes)
    missing = [name for name in regimes if name not in results]
    counts = [sum(row[2] is verdict for row in rows) for verdict in (True, False)]
    means, same = over_all(results), over_all(results, own=False)
    lines = [
        f"Of {len(rows)} goals {counts[0]} are reached and {counts[1]} missed. Not measured: "
        f"{', '.join(missing) or 'nothing'}; the geometric means are of what is.",
        "",
        f"Each method is at its own best rate in {owned(results)}; in the others all are at Diff-Instruct's.",
        "",
        "| goal | auto | |",
        "|---|---|---|",
        *(f"| {what} | {shown} | {VERDICTS[verdict]} |" for what, shown, verdict in rows),
        "",
        *_means(f"Geometric mean over {len(results)} regimes (of medians), all at Diff-Instruct's rate", same),
        *_means("The same, each at its own best rate where that was looked for", means),
    ]
    lines += [*foretold(results), *_halves(results)]
    return "\n".join([*lines, *(line for name, result in results.items() for line in of_regime(name, result))])


def _halves(results: dict[str, Result]) -> list[str]:
    """Warm start and path of auto, each alone (the paper's Table 3)."""
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
    return ", ".join(name for name, r in results.items() if r.own) or "no regime"


def hurry(folder: Path, regimes: dict) -> str:
    """Three sentences for a reader in a hurry, from the same numbers."""
    results = read(folder, regimes)
    rows, means, own = goals(results, regimes), over_all(results, own=False), over_all(results)
    controls, owns = (", ".join(f"{method} {m[method][5]:.2f}" for method in CONTROLS) for m in (means, own))
    reached, missed, unknown = (
        f"{len(found)} ({'; '.join(dict.fromkeys(what.split(':')[0] for what in found)) or 'none'})"
        for found in ([what for what, _, known in rows if known is wanted] for wanted in (True, False, None))
    )
    told = {1: [], -1: [], 0: []}
    for name, result in results.items():
        equal = result.equal_compute(result.best[OURS])
        better = sum(value < 1 for value in equal)
        told[verdict(better, len(equal))].append(f"{name} ({median(equal):.2f}, {better} of {len(equal)} better)")
    better, worse, alike = (", ".join(told[way]) or "no regime" for way in (1, -1, 0))
    unknown = "" if unknown.startswith("0") else f", {unknown} not measured yet"
    return (
        f"1. Over {len(results)} of {len(regimes)} regimes, all methods at Diff-Instruct's best rate, `auto` ends, at "
        f"equal compute, at {means[OURS][5]:.2f} of Diff-Instruct's distance in the geometric mean ({controls}), and "
        f"is {means[OURS][0]:.2f} times as fast in updates, {means[OURS][2]:.2f} in compute, to twice Diff-Instruct's "
        f"final distance; with each method at its own best rate in {sum(r.own for r in results.values())} of them it "
        f"is {own[OURS][5]:.2f} ({owns}).\n"
        f"2. Of {len(rows)} goals that were set beforehand {missed} are missed, {reached} reached{unknown}; the first "
        "table has each.\n"
        f"3. At equal compute more seeds than chance gives (sign test, 5 %) were better in {better}, worse in {worse}; "
        f"it could not be told from Diff-Instruct in {alike}."
    )


def verdict(better: int, seeds: int) -> int:
    """1 if so many seeds are better beyond chance, -1 if so many are worse, by a two-sided sign test at 5 %; else 0."""
    rarer = max(better, seeds - better)
    chance = 2 * sum(math.comb(seeds, k) for k in range(rarer, seeds + 1)) / 2**seeds
    return 0 if chance >= 0.05 else 1 if 2 * better > seeds else -1


VERDICTS = {True: "reached", False: "**missed**", None: "not measured"}


def write(folder: Path, regimes: dict) -> None:
    """Put the sentences and the tables between their markers in EVIDENCE.md."""
    page = EVIDENCE.read_text()
    for marker, found in (("tables", text(folder, regimes)), ("hurry", hurry(folder, regimes))):
        begin, end = f"<!-- {marker} -->", f"<!-- end of {marker} -->"
        new = f"{begin}\n{found}\n{end}"
        page = re.sub(f"{begin}.*{end}", lambda _, new=new: new, page, flags=re.DOTALL)
    EVIDENCE.write_text(page)
