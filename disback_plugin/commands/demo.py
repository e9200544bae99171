"""`disback demo`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from disback_plugin.cli import Commands, command, json_option

__all__ = ["add"]


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
        help="the student's first weights: random, the teacher's, or of a network trained on negatives (%(default)s)",
    )
    demo.add_argument(
        "--loss", choices=("diff-instruct", "dmd", "sid"), default="diff-instruct", help="of the student (%(default)s)"
    )
    demo.add_argument(
        "--network", choices=("mlp", "conv"), default="mlp", help="of teacher, fake score and student (%(default)s)"
    )
    demo.add_argument(
        "--schedule", help="of DisBack: warm, ramp[:K], plain-ramp[:K] or fixed:b,c,... (the regime's own)"
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
        run=run, interrupted="{out} holds the logs so far, for disback report; the same command begins anew"
    )


def run(options: argparse.Namespace) -> None:
    """Run the study, and print its result."""
    import torch

    from disback_plugin.demo.main import CAVEAT, demo
    from disback_plugin.demo.pictures import table

    # The seeds' matrices are small: a second thread gains little, and waits for ages if another process has its core.
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
    print(table(result))
    print(f"\n{CAVEAT}")
    print(f"{result['seconds']:.0f} s; {options.out} holds convergence.png, samples.png, result.json and path/")
    print(f"disback report {options.out}  # makes a page of it")
