"""`disback run`: both stages on a script that nobody edits (`injection`). Imports no torch before it runs.

disback run --adapter sid --path runs/path sid_train.py --outdir runs ...
torchrun --nproc_per_node=8 -m disback_plugin.launch --adapter sid --path runs/path sid_train.py --outdir runs ...
accelerate launch -m disback_plugin.launch --adapter dmd2 --path runs/path main/edm/train_edm.py ...
disback run --adapter accelerate_loop --role teacher=real_unet --role fake_score=fake_unet train.py ...
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

from disback_plugin.errors import DisbackError, OptionError, RoleError

__all__ = ["add_arguments", "exit_code", "launch", "main"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `disback run` to a parser."""
    parser.add_argument("--adapter", required=True, metavar="NAME", help="of the trainer: see `disback plugins`")
    parser.add_argument("--path", default="disback-path", metavar="DIR", help="folder of the path (%(default)s)")
    parser.add_argument("--record", type=int, metavar="K", help="recording iterations (200)")
    parser.add_argument("--every", type=int, metavar="K", help="updates between two nodes (50)")
    parser.add_argument("--schedule", help="auto, warm, ramp[:K], fixed:b,c,... (auto)")
    parser.add_argument(
        "--recipe", metavar="NAME", help="instead of these three: a setting of the paper, as edm-64, lsun-256 or sdxl"
    )
    parser.add_argument("--codec", default="int8", help="how nodes are stored (%(default)s)")
    parser.add_argument(
        "--role",
        dest="roles",
        type=_role,
        action="append",
        default=[],
        metavar="ROLE=VARIABLE",
        help="with accelerate_loop: the script's variable, as teacher=unet_teacher, fake_score=self.critic, or one of "
        "the optimizers, generator_optimizer=opt; of its own name unless given",
    )
    parser.set_defaults(
        code_of_users=True,
        interrupted="what was recorded is in {path}: the same command goes on from its last node, or, with the "
        "trainer's own flag for that, from the trainer's last checkpoint",
    )
    parser.add_argument("script", metavar="SCRIPT", help="Python file; it runs as __main__")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="the script's own arguments")


def launch(options: argparse.Namespace) -> None:
    """Run what `add_arguments` has read, and say on stderr what happens: all of it on the first rank."""
    from disback_plugin.launch.run import run

    plan = _plan(options)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("disback: %(message)s"))
    ours = logging.getLogger("disback_plugin")
    level = ours.level
    ours.addHandler(handler)
    ours.setLevel(logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING)
    try:
        run(
            options.script,
            options.arguments,
            adapter=options.adapter,
            path=options.path,
            codec=options.codec,
            plugins=options.plugins,
            **plan,
            roles=dict(options.roles),
        )
    finally:
        ours.removeHandler(handler)
        ours.setLevel(level)


def _plan(options: argparse.Namespace) -> dict[str, Any]:
    """Return what was said about recording and schedule; the rest is `injection.run`'s to know."""
    from disback_plugin.recipes import recipe

    given = {name: getattr(options, name) for name in ("record", "every", "schedule")}
    given = {name: value for name, value in given.items() if value is not None}
    if options.recipe is None:
        return given
    if given:
        raise OptionError(
            f"--recipe {options.recipe} and {', '.join(f'--{name}' for name in given)}",
            expected="a recipe, which says all three, or these",
            cure="leave one out",
        )
    return recipe(options.recipe).options


def _role(text: str) -> tuple[str, str]:
    role, _, variable = text.partition("=")
    return role, variable


def exit_code(command: Callable[[argparse.Namespace], int | None], options: argparse.Namespace) -> int:
    """Run a command and return its exit code: its own, or 0 fine, 1 the path or the run is broken, 2 wrong use, 130
    interrupted; and say why.

    Args:
        command: Does the work.
        options: With `debug`; and perhaps `interrupted`, what to say after Ctrl-C of what is left behind, a format of
            the other options, and `code_of_users`, whose own errors shall show where they come from.
    """
    try:
        code = command(options)
        sys.stdout.flush()  # now, where a reader that has left, as `head` does, is no error yet
    except DisbackError as error:
        if options.debug:
            raise
        print(f"disback: {error}", file=sys.stderr)
        return 2 if isinstance(error, (OptionError, RoleError)) else 1
    except OSError as error:
        if options.debug or getattr(options, "code_of_users", False):
            raise
        if isinstance(error, BrokenPipeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what is left to be written
            return 141  # what a shell says of a process that SIGPIPE ended
        print(f"disback: {error}; --debug shows where", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        left = getattr(options, "interrupted", "").format(**vars(options))
        print(f"disback: interrupted{left and '; '}{left}", file=sys.stderr)
        return 130
    return code or 0


def main(arguments: Sequence[str] | None = None) -> int:
    """`disback run` for launchers that start modules, as `torchrun ... -m disback_plugin.launch`."""
    parser = argparse.ArgumentParser(prog="python -m disback_plugin.launch", allow_abbrev=False)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.add_argument("-p", dest="plugins", action="append", default=[], metavar="NAME", help="see `disback --help`")
    add_arguments(parser)
    return exit_code(launch, parser.parse_args(arguments))


if __name__ == "__main__":
    raise SystemExit(main())
