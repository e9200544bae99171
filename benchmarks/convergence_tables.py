"""Write the results of `bench_convergence` as the tables of EVIDENCE.md."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import geometric_mean, mean, median

from convergence_methods import CANDIDATES, COMPARISON, NEW_REGIMES, Regime
from convergence_results import (
    BASELINE,
    CONTROLS,
    DIVERGED,
    OURS,
    Result,
    comparisons,
    final,
    kept,
    over_all,
    read,
    verdict,
)

__all__ = ["EVIDENCE", "decided", "goals", "text", "write"]

EVIDENCE = Path(__file__).parent / "EVIDENCE.md"
# What the pages call them: "path" is `schedule="auto"`, "path + factor" what that was when the kept study was made.
NAMES = {
    "auto": "path + factor",
    "walk": "path",
    "walk, divided": "path, divided",
    "walk, capped": "path, capped",
    "warm, fitted": "warm start",
    "diff-instruct 1.25": "1.25 rate",
}
ORDER = ("walk", "auto", "ramp 3F", "diff-instruct 1.25", "warm, fitted", "walk, divided", "walk, capped")
TIMES = {method.name: method.times for method in COMPARISON}
TEACHER_UNETS = ("conv teacher 2.5", "conv teacher 20", "conv teacher 80", "shapes teacher")
FAR = ("mlp inverted", "conv inverted", "conv rolled", "conv one class", "gauss far")


def table(head: Iterable[str], rows: Iterable[Iterable[object]]) -> list[str]:
    head = list(head)
    lines = (f"| {' | '.join(map(str, row))} |" for row in (head, *rows))
    return [next(lines), f"|{'---|' * len(head)}", *lines, ""]


def named(method: str) -> str:
    return NAMES.get(method, method)


def better(values: list[float]) -> str:
    return f"{sum(value < 1 for value in values)}/{len(values)}"


def harms(values: list[float]) -> bool:
    """Return whether a method harms: a median above 1.10, beyond chance or in every one of a few seeds."""
    worse = sum(value > 1 for value in values)
    return median(values) > 1.10 and (worse == len(values) if len(values) < 10 else verdict(worse, len(values)) == 1)


def candidates(results: dict[str, Result], half: dict[str, Result]) -> list[str]:
    """Return the candidates for the default and the controls: final distance at equal compute."""
    known = [m for m in ORDER if any(m in r.ema for r in results.values())]
    rows: list[list[str]] = []
    for name, r in results.items():
        found = [r.equal_compute(m) if m in r.ema else None for m in known]
        cells = ["-" if e is None else f"{median(e):.2f}{'!' if harms(e) else ''}" for e in found]
        rows.append([f"{name}, {r.seeds}", *cells])
    rows.append(["**geometric mean**", *(f"{_mean(results, m):.3f}" for m in known)])
    rows.append(["the same, recorded apart", *(f"{_mean(results, m, apart=True):.3f}" for m in known)])
    free = (geometric_mean(median(r.last(m)) for r in results.values() if m in r.ema) for m in known)
    rows.append(["the same, nothing charged", *(f"{value:.3f}" for value in free)])
    harm = (sum(harms(r.equal_compute(m)) for r in results.values() if m in r.ema) for m in known)
    rows.append(["regimes harmed", *harm])
    if half:
        rows.append([f"mean at half the rate, {len(half)}", *(f"{_mean(half, m):.3f}" for m in known)])
    return table(("regime, seeds", *map(named, known)), rows)


def _mean(results: dict[str, Result], method: str, apart: bool = False) -> float:
    return geometric_mean(median(r.equal_compute(method, apart)) for r in results.values() if method in r.ema)


def decided(results: dict[str, Result]) -> str:
    """Apply the rule for the default: the name of the candidate."""
    means = {m.name: _mean(results, m.name) for m in CANDIDATES}
    harm = {m: sum(harms(r.equal_compute(m)) for r in results.values()) for m in means}
    left = [m for m in means if harm[m] < min(harm.values()) + 2]
    least = min(means[m] for m in left)
    return next(m for m in left if means[m] <= 1.02 * least)


def steps(results: dict[str, Result], half: dict[str, Result]) -> list[str]:
    """Return the generator's effective step in four windows, and its rank correlation with the final distance.

    A regime's methods are pooled with those at half the rate.
    """
    from scipy.stats import spearmanr

    shown = ("walk", "auto", "ramp 3F", "warm, fitted", "walk, divided")
    rows = []
    for name, r in results.items():
        pooled = [(factor, one) for factor, one in ((1, r), (0.5, half.get(name))) if one]
        late = [factor * TIMES[m] * mean(one.windows(m)[2:]) for factor, one in pooled for m in one.ema]
        ends = [geometric_mean(map(final, one.ema[m])) for _, one in pooled for m in one.ema]
        rho = spearmanr(late, ends).statistic
        cells = [_windows(r.windows(m, relative=True)) for m in shown]
        rows.append([name, _windows(r.windows(BASELINE)), *cells, f"{rho:+.2f} ({len(ends)})"])
    relative = {m: [r.windows(m, relative=True) for r in results.values()] for m in shown}
    means = [_windows([geometric_mean(column) for column in zip(*relative[m], strict=True)]) for m in shown]
    return table(("regime", BASELINE, *map(named, shown), "rank"), [*rows, ["**geometric mean**", "", *means, ""]])


def _windows(values: list[float]) -> str:
    return " ".join(f"{value:.2f}" for value in values)


def by_regime(results: dict[str, Result], news: dict[str, Result]) -> list[str]:
    """Return the kept study of all regimes, each method at Diff-Instruct's rate and at its own."""
    rows = []
    for name, r in results.items():
        own, new = r.best[OURS], news.get(name)
        controls = [f"{median(r.equal_compute(m)):.2f}" for m in ("grad-ramp", "plain-ramp", "warm")]
        more = [f"{median(new.equal_compute(m)):.2f}" if new else "-" for m in ("ramp 3F", "diff-instruct 1.25")]
        rows.append(
            [
                f"{name}, {r.rate:g}",
                _priced(r, OURS),
                better(r.equal_compute(OURS)),
                *more,
                *controls,
                _priced(r, own) if r.searched else "not looked for",
                f"{r.above(BASELINE, 2)}, {r.above(OURS, 2)}, {r.above(own, 2)}",
                f"{r.above(BASELINE, DIVERGED)}, {r.above(OURS, DIVERGED)}, {r.above(own, DIVERGED)}",
            ]
        )
    head = ("regime, rate", named(OURS), "better", "ramp 3F", "1.25 rate", "grad-ramp", "plain-ramp", "warm")
    return table((*head, "at its own rate", "stalled", "diverged"), rows)


def _priced(r: Result, method: str) -> str:
    return " ".join(f"{median(r.equal_compute(method, apart)):.2f}" for apart in (False, True))


def means(results: dict[str, Result]) -> list[str]:
    """Return geometric means: all regimes at Diff-Instruct's rate, and those with own rates at these."""
    searched = {name: r for name, r in results.items() if r.searched}
    rows = []
    for own, some in ((False, results), (True, searched)):
        both = [over_all(some, own=own, apart=apart) for apart in (False, True)]
        for method in (OURS, "grad-ramp", "warm"):
            quick, apart = (one[method] for one in both)
            cells = [f"{a:.3f}" if a == b else f"{a:.3f} ({b:.3f})" for a, b in zip(quick, apart, strict=True)]
            rows.append([f"{named(method)}, {'own' if own else 'the same'} rate, {len(some)}", *cells])
    head = ("method, rate, regimes", "updates to 2x", "to 1.3x", "compute to 2x", "to 1.3x", "final", "equal compute")
    return table(head, rows)


def rates() -> list[str]:
    """Return final distances over Diff-Instruct's at the same rate, from the tuning seeds."""
    found: dict[str, dict[float, list[float]]] = {}
    for content in kept().values():
        plain = content["tuning"].get(BASELINE, content["tuning"])
        for method, scores in content["own_tuning"].items():
            for times in (0.5, 1, 2):
                key = f"{times * content['rate']:g}"
                found.setdefault(method, {}).setdefault(times, []).append(scores[key] / plain[key])
    count = len(found[OURS][1])
    rows = (
        [named(m), *(f"{geometric_mean(found[m][times]):.2f}" for times in (0.5, 1, 2))] for m in (OURS, *CONTROLS[:3])
    )
    return table((f"{count} regimes", "half the rate", "the rate", "twice the rate"), rows)


def goals(results: dict[str, Result], regimes: Iterable[str]) -> list[tuple[str, str, bool]]:
    """Return each goal that was set beforehand for auto, the measured value, and whether it is reached."""
    rows = []
    first = results["mlp scratch"]
    speeds = [first.median_speed(first.best[OURS], 2.0, c) or 0.0 for c in (False, True)]
    fast = speeds[0] >= 1.38 and speeds[1] >= 1.21
    rows.append(("mlp scratch: to 2.0 >= 1.38 updates, >= 1.21 compute", f"{speeds[0]:.2f}, {speeds[1]:.2f}", fast))
    ours, ramp = (median(first.last(first.best[m])) for m in (OURS, "grad-ramp"))
    rows.append(("mlp scratch: final no worse than grad-ramp's", f"{ours:.2f}, {ramp:.2f}", ours <= ramp))
    for name in regimes:
        r = results[name]
        ours, last, equal = r.best[OURS], median(r.last(r.best[OURS])), r.equal_compute(r.best[OURS])
        if name in TEACHER_UNETS:
            reached = median(equal) <= 0.95 and sum(value < 1 for value in equal) >= 0.8 * r.seeds
            shown = f"{median(equal):.2f}, {better(equal)}"
            rows.append((f"{name}: <= 0.95 at equal compute, 8 of 10 better", shown, reached))
        elif name in FAR:
            stalls = [r.above(m, 2) for m in (ours, BASELINE)]
            shown = f"{last:.2f}; {stalls[0]}, {stalls[1]}"
            rows.append((f"{name}: final <= 0.90, stalls no more", shown, last <= 0.90 and stalls[0] <= stalls[1]))
        elif name != "mlp scratch":
            known = [v for t in r.thresholds if (v := r.median_speed(ours, t)) is not None]
            shown = f"{', '.join(f'{v:.2f}' for v in known)}; {last:.2f}; {r.above(ours, DIVERGED)}"
            reached = min(known, default=1.0) >= 0.95 and last <= 1.05 and not r.above(ours, DIVERGED)
            rows.append((f"{name}: updates >= 0.95, final <= 1.05, none diverged", shown, reached))
    over, compare = over_all(results, own=True), ((0, 1), (1, 1), (4, -1), (5, -1))
    ahead = all(sign * (over[OURS][i] - over[m][i]) > 0 for i, sign in compare for m in CONTROLS)
    shown = ", ".join(f"{over[OURS][i]:.2f}" for i, _ in compare)
    return [*rows, ("geometric means: ahead of all controls in updates, final, equal compute", shown, ahead)]


def said(rows: list[tuple[str, str, bool]]) -> list[str]:
    """Return the number of goals that are reached, and the missed ones."""
    missed = [f"{what} ({shown})" for what, shown, reached in rows if not reached]
    return [f"Of {len(rows)} goals {len(rows) - len(missed)} are reached. Missed: {'; '.join(missed)}.", ""]


def text(regimes: dict[str, Regime]) -> dict[str, list[str]]:
    """Return all tables as Markdown, by marker."""
    results = read(regimes)
    news, half = (comparisons(regimes | NEW_REGIMES, times) for times in (1.0, 0.5))
    return {
        "candidates": candidates(news, half),
        "steps": steps(news, half),
        "regimes": by_regime(results, news),
        "means": means(results),
        "rates": rates(),
        "goals": said(goals(results, regimes)),
    }


def write(regimes: dict[str, Regime], found: Callable[[dict[str, Regime]], dict[str, list[str]]] = text) -> None:
    """Write the tables between their markers in EVIDENCE.md."""
    page = EVIDENCE.read_text()
    for marker, lines in found(regimes).items():
        begin, end = f"<!-- {marker} -->", f"<!-- end of {marker} -->"
        new = "\n".join([begin, *lines[:-1], end])
        page = re.sub(f"{begin}.*{end}", lambda _, new=new: new, page, flags=re.DOTALL)
    EVIDENCE.write_text(page)
