"""Verify a degradation path, and show its nodes.

Read, decode and verify every file of a degradation path, and print a table of its nodes. Exits with 1 if the path is
broken.

Example:
  disback inspect runs/path
  disback inspect runs/path --json | jq .nodes[].weight_error
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from disback_plugin._text_table import aligned

if TYPE_CHECKING:
    from disback_plugin.path.degradation_path import DegradationPath


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `disback inspect`."""
    parser.add_argument("path", metavar="PATH", help="folder, or id of a repository on the Hugging Face hub")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")


def run(options: argparse.Namespace) -> None:
    """Verify a path, and print its nodes."""
    from disback_plugin.path.degradation_path import DegradationPath

    describe(DegradationPath.from_pretrained(options.path), as_json=options.json)


def describe(path: DegradationPath, *, as_json: bool) -> None:
    """Verify a path, and print its nodes as a table or as one JSON object."""
    rows = node_rows(path)
    manifest = path.manifest
    about = {
        "path": str(path.folder),
        "complete": path.complete,
        "codec": manifest.recording.codec,
        "iterations": manifest.iterations,
        "fitted": manifest.fitted,
        "learning_rate_factor": manifest.learning_rate_factor,
        "teacher": manifest.teacher.fingerprint,
        "generator": manifest.generator,
        "bytes": sum(row["bytes"] for row in rows),
    }
    if as_json:
        print(json.dumps(about | {"nodes": rows}))
        return
    state = "complete" if path.complete else "unfinished"
    print(f"{about['path']}: {state}, codec {about['codec']}, {about['bytes']:,} bytes")
    saved, factor = rows[-1]["iteration"], manifest.learning_rate_factor
    faster = f" at {factor} times the learning rate" if factor > 1 else ""
    fitted = "not seen to be fitted" if manifest.fitted is None else f"s_phi fitted after {manifest.fitted}{faster}"
    done = f"{saved}" if path.complete else f"{saved} of at most {about['iterations']}"
    print(f"{done} iterations, {fitted}; teacher {about['teacher']}\n")
    cells = [[form(row[key]) for key, (_, form) in COLUMNS.items()] for row in rows]
    print(aligned([[name for name, _ in COLUMNS.values()], *cells], right=[1, 2, 4, 5], indent=""))


# Name of each column, and how a value of it is written.
COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "node": ("node", str),
    "iteration": ("iteration", str),
    "bytes": ("bytes", "{:,}".format),
    "codec": ("codec", str),
    "weight_error": ("error in weights", "{:.2%}".format),
    "delta_norm": ("|theta_i - theta_i-1|", "{:.4g}".format),
    "sha256": ("sha256", lambda digest: digest[:12] or "-"),
}


def node_rows(path: DegradationPath) -> list[dict[str, Any]]:
    """Verify a path, finished or not, and return for each node what the manifest says about the names in `COLUMNS`.

    Raises:
        PathError: If the path is broken.

    Example:
        >>> import tempfile, torch
        >>> from disback_plugin.path.degradation_path import DegradationPath
        >>> from disback_plugin.path.manifest import Recording
        >>> folder, plan = tempfile.mkdtemp(), Recording(iterations=1, every=1)
        >>> path = DegradationPath.create(folder, {"w": torch.zeros(2)}, plan)
        >>> path.append({"w": torch.tensor([3.0, 4.0])}, iteration=1)
        >>> [row["delta_norm"] for row in node_rows(path)]
        [0.0, 5.0]
    """
    path.verify()
    teacher = {"iteration": 0, "codec": "teacher", "weight_error": 0.0, "delta_norm": 0.0}
    known = [teacher | vars(entry) | {"node": index} for index, entry in enumerate(path.manifest.entries)]
    return [{key: row[key] for key in COLUMNS} for row in known]
