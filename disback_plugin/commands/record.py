"""Record a degradation path, apart from any training loop.

Algorithm 1 on networks that a function of yours builds: fit a copy of the teacher to samples of the initial student,
and save its weights on the way. A finished path is shown, an unfinished one resumed: after Ctrl-C, run the same command
again. With --dry-run no path is kept, and the sizes and times are printed that a recording with these options has.

Example:
  disback record networks:build --path runs/path --iterations 200 --every 50
  disback record networks:build --dry-run --json | jq .path_bytes

  with networks.py:
    def build():
        teacher, student = load_teacher(), load_student()
        sample = lambda: student(torch.randn(64, 2)).detach()
        loss = lambda net, x_0: denoising_loss(net, x_0)          # returns a scalar
        return {"teacher": teacher, "sample": sample, "loss": loss}
  or, with the fake score of a trainer, where fake_step() does one update of it:
        return {"teacher": teacher, "fake_score": fake_score, "fake_step": fake_step}
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from disback_plugin._text_table import aligned
from disback_plugin.errors import OptionError, RoleError

# The two sets of keyword arguments of `record` that make a recording.
FORMS = ({"teacher", "fake_score", "fake_step"}, {"teacher", "sample", "loss"})


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `disback record`."""
    add = parser.add_argument
    add("build", metavar="MODULE:FUNCTION", help="returns the networks; as in pkg.module:build")
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--path", type=Path, metavar="DIR", help="folder for the nodes")
    target.add_argument("--dry-run", action="store_true", help="record until s' is fitted, and keep nothing")
    add("--iterations", type=int, default=200, metavar="N", help="updates in all (%(default)s)")
    add("--every", type=int, default=50, metavar="K", help="updates between two nodes (%(default)s)")
    add("--codec", default="int8", metavar="C", help="int8 or exact (%(default)s)")
    add("--no-keep-teacher", dest="keep_teacher", action="store_false", help="omit node 0: half the size")
    add("--learning-rate", type=float, metavar="R", help="of Adam, in a recording with sample and loss (1e-5)")
    add("--json", action="store_true", help="print one JSON object instead of a table")
    parser.set_defaults(
        runs_user_code=True, interrupted="the same command goes on from the last node that is in {path}"
    )


def run(options: argparse.Namespace) -> None:
    """Record a path and print its nodes, or print what a dry run measured."""
    import sys
    from unittest.mock import patch

    from disback_plugin.commands.inspect import describe
    from disback_plugin.recording import record

    plan = {name: getattr(options, name) for name in ("iterations", "every", "codec", "keep_teacher")}
    # The working folder is on the import path, as for `python -m`.
    with patch.object(sys, "path", [str(Path.cwd()), *sys.path]):
        networks = build_networks(options.build, learning_rate=options.learning_rate)
        if not options.dry_run:
            path = record(**networks, path=options.path, **plan, plugins=tuple(options.plugins))
            describe(path, as_json=options.json)
            return
        found = dry_run(networks, **plan)
    known = {name: "-" if value is None else value for name, value in found.items()}
    rows = [(name, f"{value:.3g}" if isinstance(value, float) else f"{value}") for name, value in known.items()]
    print(json.dumps(found) if options.json else aligned(rows, right=[1], indent=""))


def build_networks(target: str, *, learning_rate: float | None = None) -> dict[str, Any]:
    """Call `pkg.module:build`, and return the keyword arguments of `record` that it returns, with the learning rate.

    Args:
        target: Module and function; the function takes no argument.
        learning_rate: Learning rate of a recording with sample and loss; None for the default of `record`.

    Raises:
        OptionError: If there is no such module or function, or a learning rate is given with a fake_step.
        RoleError: If the function returned something else.

        Errors of the module and of the function are passed on.

    Example:
        >>> build_networks("json:absent")  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        disback_plugin.errors.OptionError: found no function json:absent; expected ...
    """
    import pkgutil

    module, _, name = target.partition(":")
    try:
        function = pkgutil.resolve_name(target) if name else None
    except (ValueError, AttributeError, ModuleNotFoundError) as error:
        if isinstance(error, ModuleNotFoundError) and not f"{module}.".startswith(f"{error.name}."):
            raise  # of an import inside the module
        function = None
    if not callable(function):
        raise OptionError(
            f"no function {target}",
            expected=f"pkg.module:build, for build() in pkg/module.py, importable from {Path.cwd()}",
            cure="correct the name, or run the command from the folder that holds the package",
        )
    networks = function()
    found = sorted(map(str, networks)) if isinstance(networks, Mapping) else type(networks).__name__
    if set(found) not in FORMS:
        raise RoleError(
            f"{found} from {target}()",
            expected="a mapping with teacher, fake_score and fake_step, or with teacher, sample and loss",
            cure="return one of the two, with all keys and no more",
        )
    if learning_rate is None:
        return dict(networks)
    if "loss" not in networks:
        raise OptionError(
            f"--learning-rate and fake_step of {target}",
            expected="no rate: fake_step() has an optimizer of its own",
            cure="omit --learning-rate",
        )
    return {**networks, "learning_rate": learning_rate}


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
    import tempfile
    import time
    from itertools import pairwise
    from statistics import median

    import torch

    from disback_plugin.convergence import EVERY  # a node as often as `record` tests whether s' is fitted
    from disback_plugin.path.degradation_path import DegradationPath
    from disback_plugin.plugins.manager import PluginManager
    from disback_plugin.recording import record
    from disback_plugin.weights.network import ScoreNetwork

    if iterations < 2 * EVERY:
        raise OptionError(f"--iterations {iterations}", expected=f"at least {2 * EVERY} with --dry-run", cure="omit it")
    seconds: list[float] = []  # at the beginning of each iteration

    def now() -> float:
        """Return the time after all work of the GPU."""
        if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
            torch.cuda.synchronize()
        return time.perf_counter()

    with tempfile.TemporaryDirectory(prefix="disback-dry-run-") as folder:
        path = Path(folder) / "path"
        first = "fake_step" if "fake_step" in networks else "sample"  # what an iteration calls first

        def timed() -> object:
            seconds.append(now())
            saved, remainder = divmod(len(seconds) - 1, EVERY)
            if saved and not remainder and DegradationPath(path).manifest.fitted is not None:
                raise _FittedError
            return networks[first]()

        with suppress(_FittedError):
            arguments = {**networks, first: timed, "plugins": PluginManager(autoload=False)}
            record(**arguments, path=path, iterations=iterations, every=EVERY, codec=codec)
        recorded, teacher = DegradationPath(path), ScoreNetwork.of(networks["teacher"], role="teacher")
        begin = now()
        teacher.load_state_dict(recorded[len(recorded) - 1])
        move_seconds = now() - begin
        teacher.load_state_dict(recorded[0])
    lengths = [end - begin for begin, end in pairwise(seconds)]
    iteration_seconds = median(lengths)  # four of five iterations save no node
    nodes, node_bytes = -(-iterations // every), max(node.bytes for node in recorded.nodes)
    teacher_bytes = sum(tensor.nbytes for tensor in teacher.state_dict().values())
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
