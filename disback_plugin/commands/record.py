"""`disback record`."""

from __future__ import annotations

import argparse
from pathlib import Path

from disback_plugin.cli import Commands, command, json_option

__all__ = ["add"]


def add(commands: Commands[argparse.ArgumentParser]) -> None:
    """Add `disback record` to the commands."""
    record = command(
        commands,
        "record",
        help="record a degradation path, apart from any training loop",
        description="Algorithm 1 on networks that a function of yours builds: fit a copy of the teacher to samples of "
        "the initial student, and save its weights on the way. A finished path is shown, an unfinished one resumed: "
        "after Ctrl-C, run the same command again.",
        examples="""
        disback record networks:build --path runs/path --iterations 200 --every 50

        with networks.py:
          def build():
              teacher, student = load_teacher(), load_student()
              sample = lambda: student(torch.randn(64, 2)).detach()
              loss = lambda net, x_0: denoising_loss(net, x_0)          # returns a scalar
              return {"teacher": teacher, "sample": sample, "loss": loss}
        or, with the fake score of a trainer, where fake_step() does one update of it:
              return {"teacher": teacher, "fake_score": fake_score, "fake_step": fake_step}
        """,
    )
    record.add_argument("build", metavar="MODULE:FUNCTION", help="returns the networks; as in pkg.module:build")
    record.add_argument("--path", type=Path, required=True, metavar="DIR", help="folder for the nodes")
    record.add_argument("--iterations", type=int, default=200, metavar="N", help="updates in all (%(default)s)")
    record.add_argument("--every", type=int, default=50, metavar="K", help="updates between two nodes (%(default)s)")
    record.add_argument("--codec", default="int8", metavar="C", help="int8 or exact (%(default)s)")
    record.add_argument(
        "--no-keep-teacher", dest="keep_teacher", action="store_false", help="leave node 0 out: half the size"
    )
    record.add_argument(
        "--learning-rate", type=float, metavar="R", help="of Adam, in a recording with sample and loss (1e-5)"
    )
    json_option(record, "a table of the nodes")
    record.set_defaults(
        run=run, runs_user_code=True, interrupted="the same command goes on from the last node that is in {path}"
    )


def run(options: argparse.Namespace) -> None:
    """Record a path, and print its nodes."""
    from disback_plugin.commands.inspect import describe
    from disback_plugin.entry_function import built
    from disback_plugin.recording import record

    with built(options.build, learning_rate=options.learning_rate) as networks:
        path = record(
            **networks,
            path=options.path,
            iterations=options.iterations,
            every=options.every,
            codec=options.codec,
            keep_teacher=options.keep_teacher,
            plugins=tuple(options.plugins),
        )
    describe(path, as_json=options.json)
