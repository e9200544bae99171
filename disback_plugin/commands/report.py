"""Make one page of a run, or of several side by side.

Write a page of HTML, without network, of the logs that runs leave beside their paths: position and node over updates,
what the loop logged, the recording, samples, swap times, codec errors, settings, versions and fingerprints. Several
runs are drawn together, with their ratios to the first.

Example:
  disback report runs/path --out report.html
  disback report disback-demo                            # every log in a folder, the first run first
  disback report runs/baseline.log.jsonl runs/path --out report.html
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `disback report`."""
    add, out = parser.add_argument, "file of the page, which is replaced (%(default)s)"
    add("runs", nargs="+", type=Path, metavar="RUN", help="a path, a log, or a folder of logs")
    add("--out", type=Path, default=Path("report.html"), metavar="FILE", help=out)
    add("--json", action="store_true", help="print one JSON object instead of the page's name")


def run(options: argparse.Namespace) -> None:
    """Write the page."""
    from disback_plugin.path import files
    from disback_plugin.plugins.log_reader import load_all
    from disback_plugin.report import page
    from disback_plugin.report.figures import compare

    runs = load_all(options.runs)
    text = page(runs)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    files.write_text(options.out, text)
    if options.json:
        found = [{"run": r.name, "log": str(r.file), "updates": r.updates, "recorded": r.recorded} for r in runs]
        print(json.dumps({"out": str(options.out), "runs": found, "comparison": compare(runs)}))
    else:
        print(f"{options.out}: {len(runs)} run{'s' * (len(runs) > 1)}, {len(text) / 1e6:.1f} MB")
