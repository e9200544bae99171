"""The command line `disback`: its parser; `commands` has the commands. Nothing heavy is imported before one runs."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib import import_module

import disback_plugin
from disback_plugin.commands import COMMANDS
from disback_plugin.launch import command_line

__all__ = ["main", "parser"]


def parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    top = argparse.ArgumentParser(
        prog="disback",
        description="DisBack (Distribution Backtracking Distillation, arXiv 2408.15991) for existing trainers.",
        epilog="Exit codes: 0 fine, 1 the path or the run is broken, 2 wrong use, 130 interrupted. "
        "`disback COMMAND --help` explains each with an example; `disback demo` is a good first one.",
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
    commands = top.add_subparsers(title="commands", metavar="COMMAND", dest="command", required=True)
    for name in COMMANDS:
        import_module(f"disback_plugin.commands.{name}").add(commands)
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: 0 fine, 1 the path or the run is broken, 2 wrong use, 130 interrupted."""
    options = parser().parse_args(arguments)
    return command_line.exit_code(options.run, options)


if __name__ == "__main__":
    raise SystemExit(main())
