"""`disback record`, on networks that a function of the user's builds.

def build():
    ...
    return {"teacher": teacher, "fake_score": fake_score, "fake_step": fake_step}    # the trainer's own fake score
    return {"teacher": teacher, "sample": sample, "loss": loss}                      # or a copy of the teacher
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from disback_plugin.cli import Commands, command, json_option
from disback_plugin.errors import OptionError, RoleError

__all__ = ["add", "build_networks"]

# The two sets of keyword arguments of `record` that make a recording.
FORMS = ({"teacher", "fake_score", "fake_step"}, {"teacher", "sample", "loss"})


def add(commands: Commands[argparse.ArgumentParser]) -> None:
    """Add `disback record` to the commands."""
    record = command(
        commands,
        "record",
        help="record a degradation path, apart from any training loop",
        description="Algorithm 1 on networks that a function of yours builds: fit a copy of the teacher to samples of "
        "the initial student, and save its weights on the way. A finished path is shown, an unfinished one resumed: "
        "after Ctrl-C, run the same command again. With --dry-run no path is kept, and the sizes and times are printed "
        "that a recording with these options has.",
        examples="""
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
        """,
    )
    record.add_argument("build", metavar="MODULE:FUNCTION", help="returns the networks; as in pkg.module:build")
    target = record.add_mutually_exclusive_group(required=True)
    target.add_argument("--path", type=Path, metavar="DIR", help="folder for the nodes")
    target.add_argument("--dry-run", action="store_true", help="record until s' is fitted, and keep nothing")
    record.add_argument("--iterations", type=int, default=200, metavar="N", help="updates in all (%(default)s)")
    record.add_argument("--every", type=int, default=50, metavar="K", help="updates between two nodes (%(default)s)")
    record.add_argument("--codec", default="int8", metavar="C", help="int8 or exact (%(default)s)")
    record.add_argument(
        "--no-keep-teacher", dest="keep_teacher", action="store_false", help="omit node 0: half the size"
    )
    record.add_argument(
        "--learning-rate", type=float, metavar="R", help="of Adam, in a recording with sample and loss (1e-5)"
    )
    json_option(record, "a table")
    record.set_defaults(
        run=run, runs_user_code=True, interrupted="the same command goes on from the last node that is in {path}"
    )


def run(options: argparse.Namespace) -> None:
    """Record a path and print its nodes, or print what a dry run measured."""
    from disback_plugin.commands.dry_run import print_dry_run
    from disback_plugin.commands.inspect import describe
    from disback_plugin.recording import record

    plan = {name: getattr(options, name) for name in ("iterations", "every", "codec", "keep_teacher")}
    with build_networks(options.build, learning_rate=options.learning_rate) as networks:
        if options.dry_run:
            print_dry_run(networks, **plan, as_json=options.json)
            return
        path = record(**networks, path=options.path, **plan, plugins=tuple(options.plugins))
    describe(path, as_json=options.json)


@contextmanager
def build_networks(target: str, *, learning_rate: float | None = None) -> Iterator[dict[str, Any]]:
    """Call `pkg.module:build`. Inside the `with` block the working folder is on the import path, as for `python -m`.

    Args:
        target: Module and function; the function takes no argument.
        learning_rate: Learning rate of a recording with sample and loss; None for the default of `record`.

    Yields:
        The keyword arguments of `record` that the function returned, and the learning rate if it was given.

    Raises:
        OptionError: If there is no such module or function, or a learning rate is given with a fake_step.
        RoleError: If the function returned something else.

        Errors of the module and of the function are passed on.

    Example:
        >>> with build_networks("json:absent") as networks:  # doctest: +ELLIPSIS
        ...     pass
        Traceback (most recent call last):
        disback_plugin.errors.OptionError: found no function json:absent; expected ...
    """
    import pkgutil
    import sys

    folder = str(Path.cwd())
    sys.path.insert(0, folder)
    try:
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
                expected=f"pkg.module:build, for build() in pkg/module.py, importable from {folder}",
                cure="correct the name, or run the command from the folder that holds the package",
            )
        networks = function()
        found = set(networks) if isinstance(networks, Mapping) else type(networks).__name__
        if found not in FORMS:
            raise RoleError(
                f"{sorted(map(str, found)) if isinstance(found, set) else found} from {target}()",
                expected="a mapping with teacher, fake_score and fake_step, or with teacher, sample and loss",
                cure="return one of the two, with all keys and no more",
            )
        if learning_rate is not None:
            if "loss" not in networks:
                raise OptionError(
                    f"--learning-rate and fake_step of {target}",
                    expected="no rate: fake_step() has an optimizer of its own",
                    cure="omit --learning-rate",
                )
            networks = {**networks, "learning_rate": learning_rate}
        yield dict(networks)
    finally:
        sys.path.remove(folder)
