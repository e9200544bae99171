"""Compare convergence of methods in regimes, with the same seeds and random numbers for each method.

    python benchmarks/bench_convergence.py REGIME... --out DIR     # resumable; all regimes unless some are named: hours
    python benchmarks/bench_convergence.py REGIME... --out DIR --own       # also each method at its own best rate
    python benchmarks/bench_convergence.py REGIME... --out DIR --compare   # the candidates for the default and controls
    python benchmarks/bench_convergence.py --keep DIR              # results in DIR into convergence.jsonl, EVIDENCE.md
    python benchmarks/bench_convergence.py --figures DIR           # figures of the kept results into DIR
    pytest -m slow benchmarks/bench_convergence.py                 # one tiny regime

Methods and regimes: `convergence_methods`. The rate of a regime is Diff-Instruct's best, found on tuning seeds and
teachers, and the same for every method; with --own each method's own best rate is found likewise, and the methods whose
rate differs run at it too. The results are of other seeds and other teachers. A regime's result grows by one part after
the other (`PARTS`), and finished parts are not repeated.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import replace
from pathlib import Path
from statistics import median

import convergence_results as results
import convergence_tables as tables
import pytest
import torch
from convergence_methods import BASELINE, COMPARISON, METHODS, NEW_REGIMES, REGIMES, Regime
from convergence_runs import Distillation
from convergence_worlds import RECIPES, students, world
from tqdm import tqdm

# These rates are tried first; if the best one is at the edge, the next by a factor of two is tried as well.
RATES = (5e-4, 1e-3, 2e-3)
# If Diff-Instruct's rate is within this factor of a method's best score, the method keeps it.
CLOSE = 1.1


def distil(regime, methods, rates, part, folder, title, *, curves=True, steps=False, seeds=None):
    """Run the methods of one regime; return each method's curves and its recordings."""
    place, seeds = world(regime.world), seeds or regime.seeds(part)
    bank = students(place, "teacher", part, seeds, folder)
    student = students(place, regime.student, part, seeds, folder)
    runs = Distillation(place, regime, methods, rates, seeds, bank, student)
    runs.record()
    with tqdm(total=regime.updates, desc=title, unit="update", leave=False) as bar:
        found = runs.train(regime.updates, bar.update, curves=curves, steps=steps)
    result = {}
    for i, method in enumerate(methods):
        mine = slice(i * len(seeds), (i + 1) * len(seeds))
        fitted = [runs.clock(member) for member in range(len(runs.methods))[mine]]
        more = {"steps": found["steps"][mine]} if steps else {}
        result[method.name] = more | {
            "updates": found["updates"],
            "ema": [values[mine] for values in found["ema"]],
            "recorded": [*zip(runs.recorded[mine], fitted, strict=True)],
        }
    return result


def tuned(name, pairs, folder):
    """Return each pair's median final distance over the tuning seeds, by method and rate."""
    candidates = [replace(method, name=f"{method.name} {rate:g}") for method, rate in pairs]
    rates, title = [rate for _, rate in pairs], f"{name}: rates"
    runs = distil(REGIMES[name], candidates, rates, "tuning", folder, title, curves=False)
    scores = {method.name: {} for method, _ in pairs}
    for (method, rate), candidate in zip(pairs, candidates, strict=True):
        finals = [results.final(curve) for curve in results.curves(runs[candidate.name]["ema"])]
        scores[method.name][f"{rate:g}"] = median(x if math.isfinite(x) else math.inf for x in finals)
    return scores


def searched(name, methods, rates, folder):
    """Return the same for some rates, and for the next ones as long as a method's best rate is at the edge."""
    scores = {method.name: {} for method in methods}
    pairs = [(method, rate) for method in methods for rate in rates]
    while pairs:
        for method, found in tuned(name, pairs, folder).items():
            scores[method] |= found
        pairs = [(method, rate) for method in methods if (rate := beyond(scores[method.name]))]
    return scores


def beyond(scores):
    """Return the next rate beyond the best one if that is at the edge, else None."""
    rates, found = sorted(map(float, scores)), best(scores)
    return found / 2 if found == rates[0] else 2 * found if found == rates[-1] else None


def best(scores):
    return float(min(scores, key=scores.get))


def part_rate(name, folder, content):
    """Find Diff-Instruct's best rate, unless the regime has one."""
    if rate := REGIMES[name].rate:
        return {"name": name, "rate": rate, "tuning": {}}
    scores = searched(name, [BASELINE], RATES, folder)[BASELINE.name]
    return {"name": name, "rate": best(scores), "tuning": scores}


def part_runs(name, folder, content):
    """Run all methods at that rate."""
    runs = distil(REGIMES[name], METHODS, [content["rate"]] * len(METHODS), "shown", folder, name)
    recorded = [run.pop("recorded") for run in runs.values()][-1]
    return {"R": {"auto": recorded}, "runs": runs}


def part_own_rates(name, folder, content):
    """Find each other method's best rate: Diff-Instruct's, unless another is better by more than a tenth."""
    rate = content["rate"]
    if REGIMES[name].rate:
        return {"own_tuning": {}, "own_rates": {method.name: rate for method in METHODS[1:]}}
    scores = searched(name, METHODS[1:], (rate / 2, rate, 2 * rate), folder)
    own = {m: rate if found[f"{rate:g}"] <= CLOSE * min(found.values()) else best(found) for m, found in scores.items()}
    return {"own_tuning": scores, "own_rates": own}


def part_own_runs(name, folder, content):
    """Run the methods whose best rate differs at that rate."""
    others = [(m, r) for m in METHODS[1:] if (r := content["own_rates"][m.name]) != content["rate"]]
    if not others:
        return {"own_runs": {}}
    runs = distil(REGIMES[name], [m for m, _ in others], [r for _, r in others], "shown", folder, f"{name}: own rates")
    return {"own_runs": runs}


# Parts of a result, by a key that the result has once the part is done.
PARTS = {"rate": part_rate, "runs": part_runs}
OWN = {"own_rates": part_own_rates, "own_runs": part_own_runs}


def study(name: str, folder: Path, *, own: bool = False) -> None:
    """Run the unfinished parts of a regime; its JSON is written after each."""
    file = folder / results.file_name(name)
    for key, part in (PARTS | (OWN if own else {})).items():
        content = json.loads(file.read_text()) if file.exists() else {}
        if key not in content:
            content |= part(name, folder, content)
            partial = file.with_suffix(".partial")
            partial.write_text(json.dumps(content))
            partial.rename(file)


def compare(name: str, folder: Path, times: float, seeds: list[int]) -> None:
    """Run candidates and controls at Diff-Instruct's rate, or a multiple, and add a line to those that are kept."""
    line = {"regime": name, "times": times, "seeds": seeds}
    if any(line.items() <= known.items() for known in results.compared()):
        return
    regime = (REGIMES | NEW_REGIMES)[name]
    known = [entry["base"] for entry in results.compared() if entry["regime"] == name]
    base = known[0] if known else results.kept()[name]["rate"] if name in REGIMES else quick_rate(name, folder)
    rates = [times * base] * len(COMPARISON)
    found = distil(regime, COMPARISON, rates, "compared", folder, f"{name} x {times:g}", steps=True, seeds=seeds)
    with results.COMPARED.open("a") as lines:
        lines.write(json.dumps(line | {"base": base, "runs": results.rounded(found)}) + "\n")


def quick_rate(name, folder):
    """Return Diff-Instruct's best of `RATES` on two tuning seeds, ten in 2-D: all that is chosen in a new regime."""
    regime = NEW_REGIMES[name]
    seeds = list(range(100, 110 if regime.world.endswith("2d") else 102))
    methods = [replace(BASELINE, name=f"{rate:g}") for rate in RATES]
    runs = distil(regime, methods, RATES, "compared", folder, f"{name}: rate", curves=False, seeds=seeds)
    scores = {rate: median(map(results.final, results.curves(run["ema"]))) for rate, run in runs.items()}
    print(name, scores, flush=True)
    return best(scores)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("regimes", nargs="*", metavar="REGIME", help=f"of: {', '.join(REGIMES)}")
    parser.add_argument("--out", type=Path, help="folder for teachers and results")
    parser.add_argument("--own", action="store_true", help="with --out: each method at its own best rate, too")
    parser.add_argument("--compare", action="store_true", help="with --out: candidates for the default, and controls")
    parser.add_argument("--times", type=float, default=1.0, help="with --compare: multiple of Diff-Instruct's rate")
    parser.add_argument("--seeds", type=int, nargs="+", help="with --compare: other seeds than the regime's")
    parser.add_argument("--keep", type=Path, help="folder of results to copy into convergence.jsonl and EVIDENCE.md")
    parser.add_argument("--figures", type=Path, help="folder for figures")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.regimes if name not in REGIMES | NEW_REGIMES]
    if unknown or sum(folder is not None for folder in (arguments.out, arguments.keep, arguments.figures)) != 1:
        parser.error(f"no regime {unknown[0]!r}" if unknown else "one of --out, --keep and --figures")
    torch.set_num_threads(1)
    if arguments.keep:
        results.keep(arguments.keep, REGIMES)
        tables.write(REGIMES)
        print(f"default: {tables.decided(results.comparisons(REGIMES | NEW_REGIMES))}")
    elif arguments.figures:
        from convergence_figures import draw

        draw(arguments.figures, REGIMES)
    else:
        arguments.out.mkdir(parents=True, exist_ok=True)
        with tqdm(arguments.regimes or REGIMES, unit="regime") as bar:
            for name in bar:
                bar.set_description(name)
                if arguments.compare:
                    seeds = arguments.seeds or (REGIMES | NEW_REGIMES)[name].seeds("compared")
                    compare(name, arguments.out, arguments.times, seeds)
                    continue
                study(name, arguments.out, own=arguments.own)


@pytest.mark.slow
def bench_a_small_regime_runs_to_its_table_and_is_not_run_twice(tmp_path, monkeypatch):
    monkeypatch.setitem(RECIPES, "gauss10-2d", (100, 2e-3, 64))
    monkeypatch.setitem(REGIMES, "gauss teacher", Regime("gauss10-2d", "teacher", 10.0, 60))
    study("gauss teacher", tmp_path)
    (file,) = tmp_path.glob("*.json")
    before = file.stat()
    study("gauss teacher", tmp_path)
    assert file.stat() == before
    study("gauss teacher", tmp_path, own=True)
    content = json.loads(file.read_text())
    assert content["own_runs"].keys() == {m for m, r in content["own_rates"].items() if r != content["rate"]}
    monkeypatch.setattr(results, "KEPT", tmp_path / "kept.jsonl")
    results.keep(tmp_path, REGIMES)
    found = results.read(REGIMES)
    assert [row.split(",")[0] for row in tables.by_regime(found, {})[2:-1]] == ["| gauss teacher"]


if __name__ == "__main__":
    main()
