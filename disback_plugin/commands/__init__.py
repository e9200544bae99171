"""The commands, a module each: its `add(commands)` adds the parser, whose `run` does the work.

A module imports what is heavy inside its run function: `disback --help` asks all of them for their parsers.
"""

from __future__ import annotations

import argparse
import shutil
import textwrap

__all__ = ["COMMANDS", "Commands", "command", "json_option"]

# In the order of `disback --help`; each is a module of this package.
COMMANDS = ("demo", "run", "record", "inspect", "report", "plugins")

Commands = argparse._SubParsersAction  # what `add_subparsers` returns has no public name


def command(
    commands: Commands[argparse.ArgumentParser],
    name: str,
    *,
    help: str,
    description: str,
    examples: str,
) -> argparse.ArgumentParser:
    """Add a command with the options that all have, and return its parser.

    Args:
        commands: What `add_subparsers` of the top parser returned.
        name: Of the command.
        help: One line for the list of commands.
        description: What it does, what it leaves behind, and its exit codes where they say something.
        examples: Whole command lines, or code, shown as they are.

    Example:
        >>> top = argparse.ArgumentParser(prog="disback").add_subparsers()
        >>> greet = command(top, "greet", help="say it", description="Greets.", examples="disback greet")
        >>> print(greet.format_help().splitlines()[-1])
          disback greet
    """
    width = max(min(shutil.get_terminal_size().columns - 2, 100), 20)
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        allow_abbrev=False,
        help=help,
        description=textwrap.fill(description, width),
        epilog="example:\n" + textwrap.indent(textwrap.dedent(examples).strip("\n"), "  "),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error"
    )
    return parser


def json_option(parser: argparse.ArgumentParser, instead: str = "a table") -> None:
    """Add --json to a parser."""
    parser.add_argument("--json", action="store_true", help=f"print one JSON object instead of {instead}")
