"""Compare runs of the paper's settings by the FID that their trainers logged: Fig. 1, its speed-ups and Table 3's row.

    python benchmarks/paper/compare.py runs/cifar10/diff-instruct runs/cifar10/disback ... --png cifar10.png
    python benchmarks/paper/compare.py --ramp runs/cifar10/disback.path     # 3F, the length of the ramp control

The first run is the baseline. In each folder, also below it, is read what there is:

| file                 | written by                                             | FID over                         |
|----------------------|--------------------------------------------------------|----------------------------------|
| `metric-fid*.jsonl`  | Diff-Instruct, SiD, beside `training_options.json`     | images in thousands, over batch  |
| `stats.json`         | DMD2, main/edm/test_folder_edm.py                      | the iteration in a folder's name |
| `fid.log`            | the output of DMD2's main/test_folder_sd.py, or yours  | the same: "checkpoint A_123 fid 4.5" |

A trainer's counter goes on while DisBack records, so that a recording is paid in whole rounds. The log beside the path,
FOLDER.path.log.jsonl, says how many these were; they are subtracted in "updates" alone.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
from itertools import pairwise
from pathlib import Path

from disback_plugin import DegradationPath
from disback_plugin.plugins import log_reader


def lines(file):
    return [json.loads(line) for line in file.read_text().splitlines() if line.strip()]


def curve(folder):
    """Return [(iterations of the trainer, FID)], in their order; an error if the folder has none."""
    found = {}
    for file in sorted(folder.rglob("metric-fid*.jsonl")):
        batch = json.loads((file.parent / "training_options.json").read_text())["batch_size"]
        for line in lines(file):
            (value,) = line["results"].values()
            found[int(re.findall(r"(\d+)\.\w+$", line["snapshot_pkl"])[0]) * 1000 / batch] = value
    for file in folder.rglob("stats.json"):
        for name, stats in json.loads(file.read_text()).items():
            found[float(re.findall(r"_(\d+)/?$", name)[0])] = stats["fid"]
    for file in folder.rglob("fid.log"):
        for at, value in re.findall(r"checkpoint \S*?_(\d+)/? fid ([\d.]+)", file.read_text()):
            found[float(at)] = float(value)
    if not found:
        sys.exit(f"no FID in {folder}: expected metric-fid*.jsonl, stats.json or fid.log")
    return sorted(found.items())


def recorded(folder):
    """Return the recording iterations of the run, by the log beside its path; 0 without one."""
    log = folder.with_name(f"{folder.name}.path.log.jsonl")
    return log_reader.read(log).recorded if log.exists() else 0


def reached(points, level):
    """Return the iterations at which the FID is first at a level, linear between evaluations; inf if never."""
    if points[0][1] <= level:
        return points[0][0]
    for (a, before), (b, after) in pairwise(points):
        if after <= level:
            return a + (b - a) * (before - level) / (before - after)
    return math.inf


def report(runs):
    """Return the page: FID over iterations, the ratios of iterations and updates to equal FID, and the last FIDs."""
    base, points = next(iter(runs)), {name: curve for name, (curve, _) in runs.items()}
    width = max(8, *map(len, runs))
    page = ["FID over the trainer's iterations (recording included)"]
    page += ["iteration  " + "  ".join(name.rjust(width) for name in runs)]
    for at in sorted({at for each in points.values() for at, _ in each}):
        cells = [dict(each).get(at) for each in points.values()]
        page.append(f"{at:9.0f}  " + "  ".join(("" if v is None else f"{v:.3f}").rjust(width) for v in cells))
    page += ["", f"iterations of {base} over those of the run to equal FID (of updates, without the recording)"]
    for name, (each, held) in runs.items():
        level = max(min(value for _, value in points[one]) for one in (base, name))
        for times in (4.0, 2.0, 1.0):
            ours, theirs = reached(each, times * level), reached(points[base], times * level)
            if name != base and ours > held and theirs > 0:
                ratios = f"{theirs / ours:6.2f} ({theirs / (ours - held):.2f})"
                page.append(f"{name.rjust(width)}  FID {times * level:.3f}: {theirs:.0f} / {ours:.0f} = {ratios}")
    page += ["", "Table 3: the last FID, and the best"]
    page += [f"{name.rjust(width)}  {each[-1][1]:.3f}  {min(v for _, v in each):.3f}" for name, each in points.items()]
    return "\n".join(page)


def draw(runs, file):
    """Write Fig. 1: the FID of every run over its iterations."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    ax = figure.subplots()
    for name, (points, _) in runs.items():
        ax.plot(*zip(*points, strict=True), marker=".", label=name)
    ax.set(xlabel="iterations, recording included", ylabel="FID", yscale="log")
    ax.legend()
    figure.savefig(file, dpi=100)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="*", metavar="RUN", help="folder of a run; the first is the baseline")
    parser.add_argument("--png", type=Path, default=Path("compare.png"))
    parser.add_argument("--ramp", type=Path, metavar="PATH", help="print 3F of a recorded path, and nothing else")
    options = parser.parse_args(arguments)
    if options.ramp:
        manifest = DegradationPath(options.ramp).manifest
        if not manifest.complete:
            sys.exit(f"{options.ramp} is not finished: expected a path of the default schedule; wait for its recording")
        print(3 * manifest.updates_to_fit)
        return
    if len(options.runs) < 2:
        parser.error("two runs or more")
    runs = {folder.name: (curve(folder), recorded(folder)) for folder in options.runs}
    print(report(runs))
    draw(runs, options.png)


if __name__ == "__main__":
    main()
