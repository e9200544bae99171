"""Distil one-step generators, of digits or in the plane, with and without DisBack.

Distil one-step generators from a teacher that comes with this package, of scikit-learn's digits or of ten Gaussians in
the plane: Diff-Instruct, the package's default and controls, from the same seeds. Takes a minute or two on a CPU, and
half a minute with --seeds 1. `disback report` makes a page of the logs that it leaves in --out.

Example:
  disback demo --seeds 1
  disback demo --world gaussians --out gaussians
  disback demo --student teacher && disback report disback-demo
  disback demo --seeds 3 --student far --schedule ramp:50 --out results --json > result.json
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from disback_plugin._text_table import aligned
from disback_plugin.errors import OptionError

CAVEAT = (
    "What the controls reach without a path is not the path's merit. Other regimes gain less or lose "
    '(--student teacher): README, "Does it help?".'
)
CHOICES = {
    "world": (("digits", "gaussians"), "the data: images, or points in the plane, whose figures show more"),
    "student": (("scratch", "teacher", "far"), "the student's first weights: random, the teacher's, or of negatives"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `disback demo`."""
    add = parser.add_argument
    add("--seeds", type=int, default=5, metavar="N", help="number of seeds, trained side by side (%(default)s)")
    for name, (choices, help) in CHOICES.items():
        add(f"--{name}", choices=choices, default=choices[0], help=f"{help} (%(default)s)")
    add("--schedule", help="of DisBack: auto, warm, ramp:K, fixed:b,c,... (the package's default)")
    add("--out", type=Path, default="disback-demo", metavar="DIR", help="folder of results (%(default)s)")
    add("--json", action="store_true", help="print one JSON object instead of a table")
    parser.set_defaults(interrupted="{out} holds the logs so far; the same command starts again")


def run(options: argparse.Namespace) -> None:
    """Run the study, and print its result."""
    from disback_plugin.schedules import parse

    if options.seeds < 1:
        raise OptionError(f"--seeds {options.seeds}", expected="a number >= 1", cure="omit it for 5")
    if options.schedule is not None:
        parse(options.schedule)
    print("Loading PyTorch; then come five runs with a progress bar each.", file=sys.stderr, flush=True)
    import torch

    from disback_plugin.demo import demo

    # The seeds' matrices are small: a second thread gains little, and waits if another process has its core.
    torch.set_num_threads(1)
    names = ("seeds", "world", "student", "schedule", "out")
    result = demo(**{name: getattr(options, name) for name in names})
    if options.json:
        print(json.dumps(result))
        return
    first = next(iter(result["runs"]))
    print(f"\n{first} and DisBack, {options.world}, student {options.student}, {options.seeds} seeds")
    print(f"Medians over the seeds. The last two columns are relative to {first}, seed by seed: below 1 is better.\n")
    rows = [["", "recording", "distance at the end", "its ratio [min, max]", "rounds to the same distance"]]
    for name, found in result["runs"].items():
        low, high = found["range"]
        rounds = "never" if found["rounds_ratio"] is None else f"{found['rounds_ratio']:.2f}"
        span = f"{found['ratio']:.2f} [{low:.2f}, {high:.2f}]"
        rows.append([name, str(found["recorded"]), f"{found['final']:.2f}", span, rounds])
    print(aligned(rows, right=range(1, 5), indent=""))
    print(f"\nA recording takes whole rounds of the loop here, as in a trainer that nobody edits. {CAVEAT}")
    figures = ", ".join(sorted(file.name for file in options.out.glob("*.png")))
    print(f"{result['seconds']:.0f} s; {options.out} holds {figures}, result.json and path/")
    print(f"disback report {options.out}  # makes a page of it")
