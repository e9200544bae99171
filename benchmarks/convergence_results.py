"""Compute speeds and final distances of each seed from the results of `bench_convergence`.

A result is a JSON: `runs[method]` has `updates` (n,), `ema` (n, seeds) and `raw`, the last three of n, and `R["auto"]`
has the recorded updates and F of each seed; `own_runs` has the methods whose own best rate is not Diff-Instruct's. All
ratios are to Diff-Instruct with the same seed, at its best rate.

A recording has two prices. In the quick start an unedited loop goes on computing the generator's gradients, so that a
recording iteration costs a round, or 1/k of one that has k updates of s_phi. Apart from a loop (`disback.record`) it is
an update of s_phi, of `COST_OF_FAKE_STEP` forward passes. The quick start's is meant unless `apart` is said.

The label of a run is its method, and its rate if that is the method's own. The last result of each regime is kept
beside this file, to four digits (`KEPT`), and so are the runs of the candidates for the default (`COMPARED`).
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from statistics import geometric_mean, median

from convergence_methods import BASELINE as DIFF_INSTRUCT
from convergence_methods import COST_OF_FAKE_STEP, LAST, Regime

__all__ = [
    "BASELINE",
    "COMPARED",
    "CONTROLS",
    "OURS",
    "Result",
    "at",
    "compared",
    "comparisons",
    "crossing",
    "curves",
    "file_name",
    "final",
    "keep",
    "kept",
    "over_all",
    "read",
    "rounded",
    "verdict",
]

BASELINE, OURS = DIFF_INSTRUCT.name, "auto"
CONTROLS = ("grad-ramp", "plain-ramp", "warm", "fixed")
RECORDED = {"diff-instruct": 0, "warm": 25, "grad-ramp": 0, "plain-ramp": 25, "fixed": 50}
# Thresholds, as multiples of Diff-Instruct's median final distance, and that above which a seed has diverged.
THRESHOLDS, DIVERGED = (2.0, 1.3), 20
# One line a regime: its name and its result; and one line a run: regime, multiple of the rate, seeds, methods.
KEPT = Path(__file__).parent / "convergence.jsonl"
COMPARED = KEPT.with_name("convergence_compared.jsonl")


def file_name(regime: str) -> str:
    return f"ev-{regime.replace(' ', '_')}.json"


def kept() -> dict[str, dict]:
    return dict(json.loads(line) for line in KEPT.read_text().splitlines()) if KEPT.exists() else {}


def compared() -> list[dict]:
    """Return the runs of the candidates for the default."""
    return [json.loads(line) for line in COMPARED.read_text().splitlines()] if COMPARED.exists() else []


def keep(folder: Path, regimes: dict[str, Regime]) -> None:
    """Copy the results in a folder into the kept ones, and replace earlier results of these regimes."""
    files = {name: folder / file_name(name) for name in regimes}
    new = {name: json.loads(file.read_text()) for name, file in files.items() if file.exists()}
    found = kept() | {name: rounded(content) for name, content in new.items() if "runs" in content}
    KEPT.write_text("".join(f"{json.dumps([name, found[name]])}\n" for name in regimes if name in found))


def rounded(value):
    match value:
        case float():
            return float(f"{value:.4g}")
        case dict():
            return {key: rounded(one) for key, one in value.items()}
        case list() | tuple():
            return [rounded(one) for one in value]
    return value


def read(regimes: dict[str, Regime]) -> dict[str, Result]:
    """Return the kept results of the regimes, in their order."""
    found = kept()
    return {name: Result(found[name], regime.ratio, regime.cost) for name, regime in regimes.items() if name in found}


def comparisons(regimes: dict[str, Regime], times: float = 1.0) -> dict[str, Result]:
    """Return the runs of the candidates at a multiple of the rate, the seeds of a regime's lines side by side."""
    found: dict[str, dict] = {}
    for line in compared():
        if line["times"] != times:
            continue
        known = found.setdefault(line["regime"], {"rate": times * line["base"], "runs": {}, "seeds": []})
        known["seeds"] += line["seeds"]
        for method, run in line["runs"].items():
            mine = known["runs"].setdefault(
                method, {"updates": run["updates"], "ema": [[] for _ in run["ema"]], "recorded": [], "steps": []}
            )
            mine["ema"] = [[*a, *b] for a, b in zip(mine["ema"], run["ema"], strict=True)]
            for key in ("recorded", "steps"):
                mine[key] += run[key]
    ratios = {name: regime.ratio for name, regime in regimes.items()}
    order = [*regimes, *(name for name in found if name not in regimes)]
    return {name: Result(found[name], ratios.get(name, 1)) for name in order if name in found}


def curves(values: list[list[float]]) -> list[list[float]]:
    """Turn one list an evaluation into one list a seed."""
    return [list(seed) for seed in zip(*values, strict=True)]


def final(curve: list[float]) -> float:
    """Return the mean of the last evaluations."""
    return sum(curve[-LAST:]) / len(curve[-LAST:])


class Result:
    """Hold the runs of one regime, seed by seed."""

    def __init__(self, content: dict, ratio: int = 1, cost: int = 9) -> None:
        self.rate, runs = content["rate"], dict(content["runs"])
        # Of each method the label of its run at its own best rate, if that was looked for.
        self.searched, self.best = bool(content.get("own_tuning")), {method: method for method in runs}
        recorded = {OURS: content["R"][OURS]} if "R" in content else {}
        for method, run in content.get("own_runs", {}).items():
            self.best[method] = label = f"{method}, {content['own_rates'][method]:g}"
            runs[label] = run
        # In "ramp 3F" s_phi and its optimizer start from the teacher: nothing is charged.
        free = ("ramp 3F", BASELINE)
        self.recorded = {
            label: recorded.get(label)
            or ([(0, 0)] * len(run["ema"][0]) if label in free else run.get("recorded"))
            or [(RECORDED[label.partition(",")[0]], 0)] * len(run["ema"][0])
            for label, run in runs.items()
        }
        self.updates = runs[BASELINE]["updates"]
        self.ema = {label: curves(run["ema"]) for label, run in runs.items()}
        self.steps = {label: run["steps"] for label, run in runs.items() if "steps" in run}
        self.seeds = len(self.ema[BASELINE])
        self._ratio, self._cost = ratio, cost
        self.finals = [final(curve) for curve in self.ema[BASELINE]]
        self.thresholds = [factor * median(self.finals) for factor in THRESHOLDS]

    def head_start(self, label: str, seed: int, apart: bool = False) -> float:
        """Return the cost of the recording in generator updates."""
        recorded = self.recorded[label][seed][0]
        return recorded * COST_OF_FAKE_STEP / self._cost if apart else recorded / self._ratio

    def speed(
        self, method: str, threshold: float, seed: int, compute: bool = False, apart: bool = False
    ) -> float | None:
        """Return how many times sooner than Diff-Instruct a seed reaches a threshold; None if it starts below.

        A method that never reaches it counts as reaching it at twice the run's length, and Diff-Instruct at its end; if
        both never do, the result is 1.
        """
        plain, ours = (crossing(self.updates, self.ema[name][seed], threshold) for name in (BASELINE, method))
        if plain == 0 or ours == 0:
            return None
        if math.isinf(plain) and math.isinf(ours):
            return 1.0
        end = self.updates[-1]
        sooner = 2.0 * end if math.isinf(ours) else ours
        return min(plain, end) / (sooner + (self.head_start(method, seed, apart) if compute else 0.0))

    def median_speed(self, method: str, threshold: float, compute: bool = False, apart: bool = False) -> float | None:
        found = [self.speed(method, threshold, seed, compute, apart) for seed in range(self.seeds)]
        known = [value for value in found if value is not None]
        return median(known) if 2 * len(known) > self.seeds else None

    def last(self, method: str) -> list[float]:
        """Return each seed's final distance over Diff-Instruct's."""
        return [final(a) / final(b) for a, b in zip(self.ema[method], self.ema[BASELINE], strict=True)]

    def equal_compute(self, method: str, apart: bool = False) -> list[float]:
        """Return the same with the cost of the recording taken off the end of the run."""
        ratios = []
        for seed, curve in enumerate(self.ema[method]):
            ends = [max(u - self.head_start(method, seed, apart), 0.0) for u in self.updates[-LAST:]]
            ratios.append(sum(at(self.updates, curve, u) for u in ends) / len(ends) / self.finals[seed])
        return ratios

    def above(self, method: str, factor: float) -> int:
        """Return how many seeds end above a multiple of Diff-Instruct's median final distance, or are not finite."""
        return sum(not final(curve) <= factor * median(self.finals) for curve in self.ema[method])

    def windows(self, method: str, relative: bool = False) -> list[float]:
        """Return the median effective step in each window, or its ratio to Diff-Instruct's of the same seed."""
        rows = self.steps[method]
        if relative:
            pairs = zip(rows, self.steps[BASELINE], strict=True)
            rows = [[a / b for a, b in zip(mine, plain, strict=True)] for mine, plain in pairs]
        return [median(column) for column in zip(*rows, strict=True)]


def crossing(updates: list[int], curve: list[float], threshold: float) -> float:
    """Return the updates until a curve first is at a threshold, interpolated; 0 if it starts below, inf if never."""
    if curve[0] <= threshold:
        return 0.0
    for u, v, a, b in zip(updates, updates[1:], curve, curve[1:], strict=False):
        if b <= threshold:
            return u + (a - threshold) / (a - b) * (v - u) if math.isfinite(a) else float(v)
    return math.inf


def at(updates: list[int], curve: list[float], u: float) -> float:
    """Return a curve's value between two evaluations."""
    i = next(i for i in range(1, len(updates)) if updates[i] >= u)
    part = (u - updates[i - 1]) / (updates[i] - updates[i - 1])
    return curve[i - 1] + part * (curve[i] - curve[i - 1])


def verdict(better: int, seeds: int) -> int:
    """Return 1 if the seeds are better beyond chance, -1 if worse, by a two-sided sign test at 5 %; else 0."""
    rarer = max(better, seeds - better)
    chance = 2 * sum(math.comb(seeds, k) for k in range(rarer, seeds + 1)) / 2**seeds
    return 0 if chance >= 0.05 else 1 if 2 * better > seeds else -1


def over_all(results: dict[str, Result], *, own: bool = False, apart: bool = False) -> dict[str, list[float]]:
    """Return each method's geometric means: updates to 2x, to 1.3x, compute to both, final, final at equal compute.

    Each method is at its own best rate where that was searched, or all are at Diff-Instruct's.
    """

    def label(result: Result, method: str) -> str:
        return result.best[method] if own else method

    means = {}
    for method in (BASELINE, *CONTROLS, OURS):
        columns = [
            [r.median_speed(label(r, method), r.thresholds[i], compute, apart) for r in results.values()]
            for compute in (False, True)
            for i in range(len(THRESHOLDS))
        ]
        columns.append([median(r.last(label(r, method))) for r in results.values()])
        columns.append([median(r.equal_compute(label(r, method), apart)) for r in results.values()])
        known = [[value for value in column if value is not None] for column in columns]
        means[method] = [geometric_mean(column) if column else math.nan for column in known]
    return means
