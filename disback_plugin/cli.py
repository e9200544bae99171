"""The command line `disback`: its parser and exit codes.

Each module of `commands` is one command. Its docstring is the command's help: a summary, a description and an example,
with a blank line between them. `add_arguments(parser)` adds the options, and `run(options)` does the work and may
return an exit code. It imports heavy libraries itself, so that `disback --help` imports none.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import textwrap
from collections.abc import Sequence
from importlib import import_module

import disback_plugin
from disback_plugin.errors import DisbackError, OptionError, RoleError

# In the order of `disback --help`.
COMMANDS = ("demo", "run", "record", "inspect", "report", "plugins")

DEBUG = "show the traceback of an error"
PLUGIN = "use an installed plug-in, and fail if it is broken; no:NAME blocks it"


def parser() -> argparse.ArgumentParser:
    """Return the parser of all commands."""
    top = argparse.ArgumentParser(
        prog="disback",
        description="DisBack (Distribution Backtracking Distillation, arXiv 2408.15991) for existing trainers.",
        epilog="Exit codes: 0 fine, 1 the path or the run is broken, 2 wrong use, 130 interrupted. "
        "`disback COMMAND --help` explains each command with an example; begin with `disback demo`.",
        allow_abbrev=False,
    )
    top.add_argument("--version", action="version", version=f"disback-plugin {disback_plugin.__version__}")
    top.add_argument("--debug", action="store_true", help=DEBUG)
    top.add_argument("-p", dest="plugins", action="append", default=[], metavar="NAME", help=PLUGIN)
    commands = top.add_subparsers(title="commands", metavar="COMMAND", dest="command", required=True)
    width = max(min(shutil.get_terminal_size().columns - 2, 100), 20)
    for name in COMMANDS:
        module = import_module(f"disback_plugin.commands.{name}")
        # `python -OO` has no docstrings.
        summary, description, example = (module.__doc__ or "\n\n\n\n").split("\n\n", 2)
        command = commands.add_parser(
            name,
            allow_abbrev=False,
            help=summary,
            description=textwrap.fill(description, width),
            epilog=example,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        # The values of a command's own options replace those given before its name: hence no default, and another list.
        command.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=DEBUG)
        command.add_argument("-p", dest="more_plugins", action="append", default=[], metavar="NAME", help=PLUGIN)
        command.set_defaults(run=module.run)
        module.add_arguments(command)
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code: its own, or 0 fine, 1 the path or the run is broken, 2 wrong use, 130
    interrupted. An error is one line on stderr.

    A command may set defaults in its parser: `interrupted`, a format of the other options that says after Ctrl-C how to
    go on, and `runs_user_code`, whose own errors keep their traceback.
    """
    options = parser().parse_args(arguments)
    options.plugins += options.more_plugins
    try:
        code = options.run(options)
        sys.stdout.flush()  # a reader that has left, as `head` does, is noticed here
    except DisbackError as error:
        if options.debug:
            raise
        print(f"disback: {error}", file=sys.stderr)
        return 2 if isinstance(error, (OptionError, RoleError)) else 1
    except OSError as error:
        if options.debug or getattr(options, "runs_user_code", False):
            raise
        if isinstance(error, BrokenPipeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the output that is still buffered
            return 141  # the exit code that a shell gives a process that SIGPIPE ended
        print(f"disback: {error}; --debug shows where", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        advice = getattr(options, "interrupted", "").format(**vars(options))
        print(f"disback: interrupted{advice and '; '}{advice}", file=sys.stderr)
        return 130
    return code or 0


if __name__ == "__main__":
    raise SystemExit(main())
