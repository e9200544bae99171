"""The command line: `disback demo`, `run`, `inspect` and `plugins`. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import disback_plugin
from disback_plugin import launch

__all__ = ["main", "parser"]


def parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    top = argparse.ArgumentParser(
        prog="disback",
        description="DisBack (Distribution Backtracking Distillation, arXiv 2408.15991) for existing trainers.",
        allow_abbrev=False,
    )
    top.add_argument("--version", action="version", version=f"disback-plugin {disback_plugin.__version__}")
    top.add_argument("--debug", action="store_true", help="show the traceback of an error")
    top.add_argument(
        "-p",
        dest="plugins",
        action="append",
        default=[],
        metavar="NAME",
        help="use an installed plug-in, which has to work; no:NAME blocks it",
    )
    commands = top.add_subparsers(title="commands", dest="command", required=True)
    _add_demo(commands)
    _add_run(commands)
    _add_inspect(commands)
    _add_plugins(commands)
    return top


def _command(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], name: str, **texts: Any
) -> argparse.ArgumentParser:
    """Add a command, with the options that all have."""
    command = commands.add_parser(name, allow_abbrev=False, **texts)
    command.add_argument(
        "--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error"
    )
    return command


def _add_demo(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    demo = _command(
        commands,
        "demo",
        help="distil one-step generators of digits, with and without DisBack",
        description="Distil one-step generators of scikit-learn's digits from a teacher that comes with this package: "
        "Diff-Instruct, two controls and DisBack, from the same seeds. Takes a few minutes on two CPU cores.",
        epilog="example: disback demo --seeds 3 --network conv --student teacher --out results",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    demo.add_argument("--seeds", type=int, default=5, metavar="N", help="number of seeds, trained side by side")
    demo.add_argument(
        "--student", choices=("scratch", "teacher"), default="scratch", help="the student's first weights"
    )
    demo.add_argument("--network", choices=("mlp", "conv"), default="mlp", help="of teacher, fake score and student")
    demo.add_argument(
        "--schedule", help="of DisBack: warm, ramp[:K], plain-ramp[:K] or fixed:b,c,...; else the regime's"
    )
    demo.add_argument(
        "--out", type=Path, default=Path("disback-demo"), help="folder for pictures, path and result.json"
    )
    demo.add_argument("--json", action="store_true", help="print the result as one JSON object instead of a table")
    demo.set_defaults(run=_demo)


def _demo(options: argparse.Namespace) -> None:
    import torch

    from disback_plugin.demo.main import CAVEAT, demo
    from disback_plugin.demo.pictures import table

    # The seeds' matrices are small: a second thread gains little, and waits for ages if another process has its core.
    torch.set_num_threads(1)
    result = demo(
        seeds=options.seeds,
        student=options.student,
        network=options.network,
        schedule=options.schedule,
        out=options.out,
    )
    if options.json:
        print(json.dumps(result))
        return
    regime = f"{result['network']} network, student from {result['student']}, {result['seeds']} seeds"
    print(f"\n{regime}; DisBack: {result['record']} recording iterations, {result['schedule']}")
    print("distances of the averaged generators to the digits, medians over the seeds\n")
    print(table(result))
    print(f"\n{CAVEAT}")
    print(f"{result['seconds']:.0f} s; {options.out} holds convergence.png, samples.png, result.json and path/")


def _add_run(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    run = _command(
        commands,
        "run",
        help="run a trainer's script with DisBack, its files untouched",
        description="Run a Python script with both stages of DisBack on the trainer in it, whose files are not "
        "touched. Under torchrun and accelerate launch use `-m disback_plugin.launch` with the same arguments.",
        epilog="example: disback run --adapter sid --path runs/path sid_train.py --outdir runs ...",
    )
    launch.add_arguments(run)
    run.set_defaults(run=launch.launch)


def _add_inspect(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    inspect = _command(
        commands,
        "inspect",
        help="verify a degradation path, and show its nodes",
        description="Read, decode and verify every file of a degradation path, and print a table of its nodes. "
        "Exits with 1 if the path is broken.",
        epilog="example: disback inspect runs/path --json",
    )
    inspect.add_argument("path", metavar="PATH", help="folder, or id of a repository on the Hugging Face hub")
    inspect.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    inspect.set_defaults(run=_inspect)


def _inspect(options: argparse.Namespace) -> None:
    from dataclasses import asdict

    from disback_plugin.inspection import inspect, table
    from disback_plugin.trajectory import DegradationPath

    path = DegradationPath.from_pretrained(options.path)
    rows = inspect(path)
    about = {
        "path": str(path.folder),
        "complete": path.complete,
        "codec": path.manifest.recording.codec,
        "iterations": path.manifest.iterations,
        "fitted": path.manifest.fitted,
        "teacher": path.manifest.teacher.fingerprint,
        "generator": path.manifest.generator,
        "bytes": sum(row.bytes for row in rows),
    }
    if options.json:
        print(json.dumps(about | {"nodes": [asdict(row) for row in rows]}))
        return
    state = "complete" if path.complete else "unfinished"
    print(f"{about['path']}: {state}, codec {about['codec']}, {about['bytes']:,} bytes")
    fitted = "not seen to be fitted" if about["fitted"] is None else f"s_phi fitted after {about['fitted']}"
    print(f"{about['iterations']} iterations, {fitted}; teacher {about['teacher']}\n")
    print(table(rows))


def _add_plugins(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    plugins = _command(
        commands,
        "plugins",
        help="list the installed plug-ins and adapters",
        description="List the plug-ins and adapters of all installed distributions, without importing one. With "
        "--check each is imported, and exit code 1 means that one is broken.",
        epilog="example: disback -p no:mine plugins --check",
    )
    plugins.add_argument(
        "--check", action="store_true", help="import each, and say whether it works, and what it hooks"
    )
    plugins.add_argument("--env", action="store_true", help="add the versions of what matters, for a bug report")
    plugins.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    plugins.set_defaults(run=_plugins)


def _plugins(options: argparse.Namespace) -> int:
    import logging
    from dataclasses import asdict

    from disback_plugin.hooks import Plugins
    from disback_plugin.plugins import environment, table

    plugins = Plugins(*options.plugins, autoload=False)
    logger = logging.getLogger("disback_plugin")
    before = logger.level
    logger.setLevel(logging.ERROR)  # the table says what the warnings would
    try:
        found = plugins.check() if options.check else plugins.listed()
    finally:
        logger.setLevel(before)
    around = environment() if options.env else {}
    if options.json:
        listed = {"plugins": [asdict(plugin) for plugin in found]}
        print(json.dumps(listed | ({"environment": around} if options.env else {})))
    else:
        print(table(found))
        for name, version in around.items():
            print(f"{name} {version}")
    return int(options.check and any(plugin.status == "broken" for plugin in found))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0 fine, 1 the path or the run is broken, 2 wrong use, 130 interrupted."""
    options = parser().parse_args(arguments)
    return launch.exit_code(options.run, options)


if __name__ == "__main__":
    raise SystemExit(main())
