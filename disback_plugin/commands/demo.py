"""`disback demo`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from disback_plugin._text_table import aligned
from disback_plugin.cli import Commands, command, json_option

__all__ = ["add"]

CAVEAT = (
    "Compare with the controls before crediting the path: the baseline has its best learning rate of three here, but a "
    "better tuned one narrows the gap, and other regimes gain less or lose (--student teacher, --network conv)."
)


def add(commands: Commands[argparse.ArgumentParser]) -> None:
    """Add `disback demo` to the commands."""
    demo = command(
        commands,
        "demo",
        help="distil one-step generators of digits, with and without DisBack",
        description="Distil one-step generators of scikit-learn's digits from a teacher that comes with this package: "
        "Diff-Instruct, or another loss, two controls and DisBack, from the same seeds. Takes a few minutes on two CPU "
        "cores. `disback report` makes a page of the logs that it leaves in --out.",
        examples="""
        disback demo && disback report disback-demo
        disback demo --seeds 3 --network conv --student far --loss sid --out results --json > result.json
        """,
    )
    demo.add_argument(
        "--seeds", type=int, default=5, metavar="N", help="number of seeds, trained side by side (%(default)s)"
    )
    demo.add_argument(
        "--student",
        choices=("scratch", "teacher", "far"),
        default="scratch",
        help="the student's first weights: random, the teacher's, or a teacher's of negatives (%(default)s)",
    )
    demo.add_argument(
        "--loss",
        choices=("diff-instruct", "dmd", "sid"),
        default="diff-instruct",
        help="the student's loss (%(default)s)",
    )
    demo.add_argument(
        "--network",
        choices=("mlp", "conv"),
        default="mlp",
        help="architecture of all three networks (%(default)s)",
    )
    demo.add_argument(
        "--schedule", help="schedule of DisBack: warm, ramp[:K], plain-ramp[:K] or fixed:b,c,... (the regime's own)"
    )
    demo.add_argument(
        "--out",
        type=Path,
        default=Path("disback-demo"),
        metavar="DIR",
        help="folder for pictures, path, logs and result.json (%(default)s)",
    )
    json_option(demo)
    demo.set_defaults(
        run=run, interrupted="{out} holds the logs so far, for disback report; the same command starts again"
    )


def run(options: argparse.Namespace) -> None:
    """Run the study, and print its result."""
    import torch

    from disback_plugin.demo.study import demo

    # The seeds' matrices are small: a second thread gains little, and waits if another process has its core.
    torch.set_num_threads(1)
    result = demo(
        seeds=options.seeds,
        student=options.student,
        network=options.network,
        loss=options.loss,
        schedule=options.schedule,
        out=options.out,
    )
    if options.json:
        print(json.dumps(result))
        return
    regime = f"{result['loss']}, {result['network']} network, student {result['student']}, {result['seeds']} seeds"
    print(f"\n{regime}; DisBack: {result['record']} recording iterations, {result['schedule']}")
    print("distances of the averaged generators to the digits, medians over the seeds\n")
    print("\n".join(_table(result)))
    print(f"\n{CAVEAT}")
    print(f"{result['seconds']:.0f} s; {options.out} holds convergence.png, samples.png, result.json and path/")
    print(f"disback report {options.out}  # makes a page of it")


def _table(result: dict[str, Any]) -> list[str]:
    """Return the lines of a table: updates and compute to each threshold, final distances, and ratios to DisBack's."""
    names = [f"{threshold:g}" for threshold in result["thresholds"]]
    to = " / ".join(names)
    rows = [["", f"updates to {to}", f"compute to {to}", "final", "raw weights"]]
    for name, run in result["runs"].items():
        reached = [
            " / ".join("never" if run[kind][n] is None else f"{run[kind][n]:,.0f}" for n in names)
            for kind in ("updates", "compute")
        ]
        rows.append([name, *reached, f"{result['final'][name]:.2f}", f"{result['final_raw'][name]:.2f}"])
    lines = [aligned(rows, right=range(5), indent="")]
    lines += ["", f"{result['loss']} over disback, median [min, max] over the seeds:"]
    for n in names:
        updates, compute = (
            "{median:.2f} [{min:.2f}, {max:.2f}]".format(**result[f"ratio_{kind}"][n])
            for kind in ("updates", "compute")
        )
        lines.append(f"  to {n}:  updates {updates}   compute {compute}")
    return lines
