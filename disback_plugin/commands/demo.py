"""Distil one-step generators of digits, with and without DisBack.

Distil one-step generators of scikit-learn's digits from a teacher that comes with this package: Diff-Instruct, or
another loss, two controls and DisBack, from the same seeds. Takes a few minutes on two CPU cores. `disback report`
makes a page of the logs that it leaves in --out.

Example:
  disback demo && disback report disback-demo
  disback demo --seeds 3 --network conv --student far --loss sid --out results --json > result.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from disback_plugin._text_table import aligned

CAVEAT = (
    "Compare with the controls before crediting the path: the baseline has its best learning rate of three here, but a "
    "better tuned one narrows the gap, and other regimes gain less or lose (--student teacher, --network conv)."
)
CHOICES = {
    "student": (("scratch", "teacher", "far"), "the student's first weights: random, the teacher's, or of negatives"),
    "loss": (("diff-instruct", "dmd", "sid"), "the student's loss"),
    "network": (("mlp", "conv"), "architecture of all three networks"),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `disback demo`."""
    add = parser.add_argument
    add("--seeds", type=int, default=5, metavar="N", help="number of seeds, trained side by side (%(default)s)")
    for name, (choices, help) in CHOICES.items():
        add(f"--{name}", choices=choices, default=choices[0], help=f"{help} (%(default)s)")
    add("--schedule", default="auto", help="of DisBack: auto, ramp:K, fixed:b,c,... (%(default)s)")
    add("--out", type=Path, default="disback-demo", metavar="DIR", help="folder of results (%(default)s)")
    add("--json", action="store_true", help="print one JSON object instead of a table")
    parser.set_defaults(interrupted="{out} holds the logs so far; the same command starts again")


def run(options: argparse.Namespace) -> None:
    """Run the study, and print its result."""
    import torch

    from disback_plugin.demo import demo

    # The seeds' matrices are small: a second thread gains little, and waits if another process has its core.
    torch.set_num_threads(1)
    names = ("seeds", "student", "network", "schedule", "loss", "out")
    result = demo(**{name: getattr(options, name) for name in names})
    if options.json:
        print(json.dumps(result))
        return
    print(f"\n{options.loss}, {options.network} network, student {options.student}, {options.seeds} seeds; ", end="")
    print(f"DisBack by the schedule {options.schedule!r}")
    print("Distances of the averaged generators to the digits at equal compute: medians [min, max] over the seeds.\n")
    rows = [["", "recording", f"rounds to {options.loss}'s end", "final distance"]]
    for name, found in result["runs"].items():
        rounds, last, final = found["rounds_to_baseline"], found["distance"][-1], f"{found['final']:.2f}"
        span = f"{final} [{min(last):.2f}, {max(last):.2f}]"
        reached = "never" if rounds is None else f"{rounds:.0f}"
        rows.append([name, str(found["recorded"]), reached, span])
    print(aligned(rows, right=range(4), indent=""))
    print(f"\nRounds include the recording, at its share of a round's compute. {CAVEAT}")
    print(f"{result['seconds']:.0f} s; {options.out} holds convergence.png, samples.png, result.json and path/")
    print(f"disback report {options.out}  # makes a page of it")
