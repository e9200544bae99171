"""Compare the results with the goals that were set beforehand for `auto`."""

from __future__ import annotations

import math
from statistics import median

from convergence_results import BASELINE, COMPARED, CONTROLS, OURS, Result, over_all

__all__ = ["VERDICTS", "goals", "verdict"]

TEACHER_UNETS = ("conv teacher 2.5", "conv teacher 20", "conv teacher 80", "shapes teacher")
FAR = ("mlp inverted", "conv inverted", "conv rolled", "conv one class", "gauss far")
VERDICTS = {True: "reached", False: "**missed**", None: "not measured"}


def goals(results: dict[str, Result], regimes: dict) -> list[tuple[str, str, bool | None]]:
    """Return each goal, the measured value, and whether the goal is reached (None: not measured)."""
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


def verdict(better: int, seeds: int) -> int:
    """Return 1 if the seeds are better beyond chance, -1 if worse, by a two-sided sign test at 5 %; else 0."""
    rarer = max(better, seeds - better)
    chance = 2 * sum(math.comb(seeds, k) for k in range(rarer, seeds + 1)) / 2**seeds
    return 0 if chance >= 0.05 else 1 if 2 * better > seeds else -1
