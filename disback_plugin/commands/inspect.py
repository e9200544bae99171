"""`disback inspect`."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from disback_plugin.cli import Commands, command, json_option

if TYPE_CHECKING:
    from disback_plugin.path.degradation_path import DegradationPath

__all__ = ["add", "describe"]


def add(commands: Commands[argparse.ArgumentParser]) -> None:
    """Add `disback inspect` to the commands."""
    inspect = command(
        commands,
        "inspect",
        help="verify a degradation path, and show its nodes",
        description="Read, decode and verify every file of a degradation path, and print a table of its nodes. "
        "Exits with 1 if the path is broken.",
        examples="disback inspect runs/path\ndisback inspect runs/path --json | jq .nodes[].codec_error",
    )
    inspect.add_argument("path", metavar="PATH", help="folder, or id of a repository on the Hugging Face hub")
    json_option(inspect)
    inspect.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Verify a path, and print its nodes."""
    from disback_plugin.path.degradation_path import DegradationPath

    describe(DegradationPath.from_pretrained(options.path), as_json=options.json)


def describe(path: DegradationPath, *, as_json: bool) -> None:
    """Verify a path, and print what it holds as a table or as one JSON object."""
    from dataclasses import asdict

    from disback_plugin.path.inspection import inspect, table

    rows = inspect(path)
    about = {
        "path": str(path.folder),
        "complete": path.complete,
        "codec": path.manifest.recording.codec,
        "iterations": path.manifest.iterations,
        "fitted": path.manifest.fitted,
        "haste": path.manifest.haste,
        "teacher": path.manifest.teacher.fingerprint,
        "generator": path.manifest.generator,
        "bytes": sum(row.bytes for row in rows),
    }
    if as_json:
        print(json.dumps(about | {"nodes": [asdict(row) for row in rows]}))
        return
    state = "complete" if path.complete else "unfinished"
    print(f"{about['path']}: {state}, codec {about['codec']}, {about['bytes']:,} bytes")
    haste = f" at {path.manifest.haste} times the learning rate" if path.manifest.haste > 1 else ""
    fitted = "not seen to be fitted" if about["fitted"] is None else f"s_phi fitted after {about['fitted']}{haste}"
    saved = path.nodes[-1].iteration if path.nodes else 0
    done = f"{saved}" if path.complete else f"{saved} of at most {about['iterations']}"
    print(f"{done} iterations, {fitted}; teacher {about['teacher']}\n")
    print(table(rows))
