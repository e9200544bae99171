"""Compute speeds and final distances of each seed from the results of `bench_convergence`.

A result is a JSON: `runs[method]` has `updates` (n,), `ema` (n, seeds) and `raw`, the last three of n, and `R["auto"]`
has the recorded updates and F of each seed; `own_runs` has the methods whose own best rate is not Diff-Instruct's. All
ratios are to Diff-Instruct with the same seed, at its best rate.

The label of a run is its method, and its rate if that is the method's own. The last result of each regime is kept
beside this file, to four digits (`KEPT`).
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from statistics import geometric_mean, median

from convergence_methods import COST_OF_FAKE_STEP, LAST, Regime

__all__ = [
    "BASELINE",
    "COMPARED",
    "CONTROLS",
    "OURS",
    "RECORDED",
    "Result",
    "at",
    "crossing",
    "curves",
    "file_name",
    "final",
    "keep",
    "over_all",
    "read",
]

BASELINE, OURS = "diff-instruct", "auto"
CONTROLS = ("fixed", "plain-ramp", "warm", "grad-ramp")
RECORDED = {"diff-instruct": 0, "warm": 25, "grad-ramp": 0, "plain-ramp": 25, "fixed": 50}
# Thresholds, as multiples of Diff-Instruct's median final distance.
THRESHOLDS = (2.0, 1.3)
# Columns of `over_all` in which auto is to be ahead, and whether more is better.
COMPARED = ((0, "updates to 2x", 1), (1, "updates to 1.3x", 1), (4, "final", -1), (5, "final at equal compute", -1))
# One line a regime: its name and its result.
KEPT = Path(__file__).parent / "convergence.jsonl"
# One line a run of the candidates for the default: regime, multiple of the rate, seeds.
COMPARED_LINES = KEPT.with_name("convergence_compared.jsonl")


def file_name(regime: str) -> str:
    return f"ev-{regime.replace(' ', '_')}.json"


def kept() -> dict[str, dict]:
    return dict(json.loads(line) for line in KEPT.read_text().splitlines()) if KEPT.exists() else {}


def compared() -> list[dict]:
    """Return the runs of the candidates for the default."""
    return [json.loads(line) for line in COMPARED_LINES.read_text().splitlines()] if COMPARED_LINES.exists() else []


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
        case list():
            return [rounded(one) for one in value]
    return value


def read(regimes: dict[str, Regime]) -> dict[str, Result]:
    """Return the kept results of the regimes, in their order."""
    found = kept()
    return {name: Result(found[name], regime.cost) for name, regime in regimes.items() if name in found}


def curves(values: list[list[float]]) -> list[list[float]]:
    """Turn one list an evaluation into one list a seed."""
    return [list(seed) for seed in zip(*values, strict=True)]


def final(curve: list[float]) -> float:
    """Return the mean of the last evaluations."""
    return sum(curve[-LAST:]) / len(curve[-LAST:])


class Result:
    """Hold the runs of one regime, seed by seed."""

    def __init__(self, content: dict, cost_of_round: int = 9) -> None:
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
        self._round = cost_of_round
        self.finals = [final(curve) for curve in self.ema[BASELINE]]
        self.thresholds = [factor * median(self.finals) for factor in THRESHOLDS]

    def head_start(self, label: str, seed: int) -> float:
        """Return the cost of the recording in generator updates."""
        recorded = self.fitted[label][seed][0] if label in self.fitted else RECORDED[label.partition(",")[0]]
        return COST_OF_FAKE_STEP * recorded / self._round

    def speed(self, method: str, threshold: float, seed: int, compute: bool = False) -> float | None:
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
        return min(plain, end) / (sooner + (self.head_start(method, seed) if compute else 0.0))

    def median_speed(self, method: str, threshold: float, compute: bool = False) -> float | None:
        found = [self.speed(method, threshold, seed, compute) for seed in range(self.seeds)]
        known = [value for value in found if value is not None]
        return median(known) if 2 * len(known) > self.seeds else None

    def last(self, method: str, curves: dict[str, list[list[float]]]) -> list[float]:
        """Return each seed's final distance over Diff-Instruct's."""
        return [final(a) / final(b) for a, b in zip(curves[method], curves[BASELINE], strict=True)]

    def equal_compute(self, method: str) -> list[float]:
        """Return the same with the cost of the recording taken off the end of the run."""
        ratios = []
        for seed, curve in enumerate(self.ema[method]):
            ends = [u - self.head_start(method, seed) for u in self.updates[-LAST:]]
            ratios.append(sum(at(self.updates, curve, u) for u in ends) / len(ends) / self.finals[seed])
        return ratios

    def least(self, method: str) -> list[float]:
        """Return each seed's least distance over Diff-Instruct's: the result of stopping at the best moment."""
        return [min(a) / min(b) for a, b in zip(self.ema[method], self.ema[BASELINE], strict=True)]

    def stalled(self, method: str) -> list[bool]:
        """Return for each seed whether it ends above twice Diff-Instruct's median final distance, or is not finite."""
        return [not final(curve) <= 2 * median(self.finals) for curve in self.ema[method]]

    def diverged(self, method: str) -> int:
        return sum(not math.isfinite(final(curve)) for curve in self.raw[method])


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


def over_all(results: dict[str, Result], *, own: bool = True) -> dict[str, list[float]]:
    """Return each method's geometric means over regimes: updates to 2x, to 1.3x, compute to both, final distances.

    Each method is at its own best rate where that was searched, or all are at Diff-Instruct's.
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
