"""`disback report`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from disback_plugin.cli import Commands, command, json_option

__all__ = ["add"]


def add(commands: Commands[argparse.ArgumentParser]) -> None:
    """Add `disback report` to the commands."""
    report = command(
        commands,
        "report",
        help="make one page of a run, or of several side by side",
        description="Write a page of HTML, without network, of the logs that runs leave beside their paths: position "
        "and node over updates, what the loop logged, the recording, samples, swap times, codec errors, settings, "
        "versions and fingerprints. Several runs are drawn together, with their ratios to the first.",
        examples="""
        disback report runs/path --out report.html
        disback report disback-demo                            # every log in a folder, the first run first
        disback report runs/baseline.log.jsonl runs/path --out report.html
        """,
    )
    report.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a path, a log, or a folder of logs")
    report.add_argument(
        "--out", type=Path, default=Path("report.html"), metavar="FILE", help="the page (%(default)s); replaced"
    )
    json_option(report, "where the page is")
    report.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Write the page."""
    from disback_plugin.path import files
    from disback_plugin.plugins.log_reader import load_all
    from disback_plugin.report.figures import compare
    from disback_plugin.report.page import page

    runs = load_all(options.runs)
    text = page(runs)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    files.write_text(options.out, text)
    if options.json:
        found = [{"run": r.name, "log": str(r.file), "updates": r.updates, "recorded": r.recorded} for r in runs]
        print(json.dumps({"out": str(options.out), "runs": found, "comparison": compare(runs)}))
    else:
        print(f"{options.out}: {len(runs)} run{'s' * (len(runs) > 1)}, {len(text) / 1e6:.1f} MB")
