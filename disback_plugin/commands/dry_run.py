"""`disback record --dry-run`: sizes and times of a recording of which nothing is kept."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch

from disback_plugin.errors import OptionError
from disback_plugin.path.degradation_path import DegradationPath
from disback_plugin.plugins.manager import PluginManager
from disback_plugin.recording import record
from disback_plugin.weights.network import ScoreNetwork

__all__ = ["dry_run", "print_dry_run"]

# Recording iterations between two nodes of a dry run: as often as `record` tests whether s' is fitted.
EVERY = 5


class _FittedError(Exception):
    """End the recording of a dry run."""


def dry_run(
    networks: Mapping[str, Any], *, iterations: int, every: int, codec: str, keep_teacher: bool
) -> dict[str, Any]:
    """Record into a temporary folder until s' is fitted or the iterations are over; return what it measured.

    A given fake score and its optimizer are trained: call this in a process that ends afterwards, as the command line
    does. The teacher is itself again, bit for bit.

    Args:
        networks: Keyword arguments of `record`: teacher with fake_score and fake_step, or with sample and loss.
        iterations: Recording iterations of the recording to come, >= 10, and the most that are made here.
        every: Iterations between two nodes of the recording to come.
        codec: Codec of the nodes.
        keep_teacher: Whether the path to come has node 0.

    Returns:
        iterations made; fitted, those after which s' was fitted, or None; iteration_seconds, write_seconds of a node
        and move_seconds of a move of the teacher onto a node; nodes, node_bytes and path_bytes of the path to come.
    """
    if iterations < 2 * EVERY:
        raise OptionError(f"--iterations {iterations}", expected=f"at least {2 * EVERY} with --dry-run", cure="omit it")
    begins: list[float] = []
    first = "fake_step" if "fake_step" in networks else "sample"  # what an iteration calls first

    with tempfile.TemporaryDirectory(prefix="disback-dry-run-") as folder:
        path = Path(folder) / "path"

        def timed() -> object:
            begins.append(_now())
            saved, remainder = divmod(len(begins) - 1, EVERY)
            if saved and not remainder and DegradationPath(path).manifest.fitted is not None:
                raise _FittedError
            return networks[first]()

        changed: dict[str, Any] = {first: timed, "path": path, "iterations": iterations, "every": EVERY, "codec": codec}
        with suppress(_FittedError):
            record(**{**networks, **changed}, plugins=PluginManager(autoload=False))
        recorded = DegradationPath(path)
        teacher = ScoreNetwork.of(networks["teacher"], role="teacher")
        begin = _now()
        teacher.load_state_dict(recorded[len(recorded) - 1])
        move_seconds = _now() - begin
        teacher.load_state_dict(recorded[0])
        lengths = [end - begin for begin, end in pairwise(begins)]
        iteration_seconds = median(length for i, length in enumerate(lengths, start=1) if i % EVERY)
        nodes, node_bytes = -(-iterations // every), max(node.bytes for node in recorded.nodes)
        teacher_bytes = sum(tensor.numel() * tensor.element_size() for tensor in teacher.state_dict().values())
        return {
            "iterations": recorded.nodes[-1].iteration,
            "fitted": recorded.manifest.fitted,
            "iteration_seconds": iteration_seconds,
            "write_seconds": max(median(lengths[EVERY - 1 :: EVERY]) - iteration_seconds, 0.0),
            "move_seconds": move_seconds,
            "nodes": nodes,
            "node_bytes": node_bytes,
            "path_bytes": nodes * node_bytes + teacher_bytes * keep_teacher,
        }


def _now() -> float:
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
    return time.perf_counter()


def print_dry_run(networks: Mapping[str, Any], *, as_json: bool, **plan: Any) -> None:
    """Print the result of `dry_run` as lines or as one JSON object."""
    found = dry_run(networks, **plan)
    if as_json:
        print(json.dumps(found))
        return
    fitted = "s' was not fitted in them" if found["fitted"] is None else f"s' was fitted after {found['fitted']}"
    print(f"{found['iterations']} iterations of {found['iteration_seconds']:.3g} s; {fitted}")
    print(f"a node: {found['node_bytes']:,} bytes, saved in {found['write_seconds']:.3g} s")
    print(f"a move of the teacher onto a node: {found['move_seconds']:.3g} s")
    print(f"a path of {found['nodes']} nodes and the teacher: {found['path_bytes']:,} bytes")
