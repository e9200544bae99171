"""`disback plot`."""

from __future__ import annotations

import argparse
from pathlib import Path

from disback_plugin.commands import Commands, command

__all__ = ["add"]


def add(commands: Commands[argparse.ArgumentParser]) -> None:
    """Add `disback plot` to the commands."""
    plot = command(
        commands,
        "plot",
        help="draw a run as a single picture",
        description="Draw every curve of a run's log into one picture. `disback report` makes a page of it.",
        examples="""
        disback plot runs/path --out run.png
        disback plot disback-demo/disback.log.jsonl --out run.svg
        """,
    )
    plot.add_argument("source", type=Path, metavar="PATH|LOG", help="a path with its log beside it, a log, or a folder")
    plot.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="png, svg or pdf, by its suffix; replaced"
    )
    plot.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Draw the picture."""
    from disback_plugin.errors import PathError
    from disback_plugin.plugins.log_reader import load_all
    from disback_plugin.report.panels import panels
    from disback_plugin.report.plots import save

    runs = load_all([options.source])
    drawn = panels(runs)
    if not drawn:
        raise PathError(
            f"no number in {runs[0].file}", expected="the log of a run that began", cure="let it run a while"
        )
    save(drawn, options.out, ", ".join(run.name for run in runs))
    print(f"{options.out}: {len(drawn)} panels")
