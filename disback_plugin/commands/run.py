"""`disback run`."""

from __future__ import annotations

import argparse
from typing import Any

from disback_plugin.cli import Commands, command

__all__ = ["add"]


def add(commands: Commands[argparse.ArgumentParser]) -> None:
    """Add `disback run` to the commands."""
    run = command(
        commands,
        "run",
        help="run a trainer's script with DisBack, without editing it",
        description="Run a Python script, and attach DisBack to the trainer in it, whose files are not edited. Under "
        "torchrun and accelerate launch use `-m disback_plugin.launch` with the same arguments.",
        examples="""
        disback run --adapter sid --path runs/path sid_train.py --outdir runs ...
        disback run --adapter accelerate_loop --role teacher=real_unet --role fake_score=fake_unet train.py ...
        torchrun --nproc_per_node=8 -m disback_plugin.launch --adapter dmd2 --path runs/path main/edm/train_edm.py ...
        """,
    )
    run.add_argument("--adapter", required=True, metavar="NAME", help="of the trainer: see `disback plugins`")
    run.add_argument("--path", default="disback-path", metavar="DIR", help="folder of the path (%(default)s)")
    run.add_argument("--record", type=int, metavar="K", help="recording iterations (200)")
    run.add_argument("--every", type=int, metavar="K", help="recording iterations between two nodes (50)")
    run.add_argument("--schedule", help="auto, warm, ramp[:K], fixed:b,c,... (auto)")
    run.add_argument(
        "--recipe", metavar="NAME", help="instead of these three: a setting of the paper, as edm-64, lsun-256 or sdxl"
    )
    run.add_argument("--codec", default="int8", help="how nodes are stored (%(default)s)")
    run.add_argument(
        "--role",
        dest="roles",
        type=_role,
        action="append",
        default=[],
        metavar="ROLE=VARIABLE",
        help="with accelerate_loop: the script's variable, as teacher=unet_teacher, fake_score=self.critic, or one of "
        "the optimizers, generator_optimizer=opt; by default the variable of the role's name",
    )
    run.add_argument("script", metavar="SCRIPT", help="Python file; it runs as __main__")
    run.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="the script's own arguments")
    run.set_defaults(
        run=launch,
        runs_user_code=True,
        interrupted="what was recorded is in {path}: the same command goes on from its last node, or, with the "
        "trainer's own flag for that, from the trainer's last checkpoint",
    )


def launch(options: argparse.Namespace) -> None:
    """Run the script, and log on stderr: everything on rank 0, warnings on the others."""
    import logging
    import sys

    from disback_plugin import distributed
    from disback_plugin.launch.run import ScriptRunner

    runner_options = _recording_and_schedule(options)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("disback: %(message)s"))
    logger = logging.getLogger("disback_plugin")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO if distributed.is_main_process() else logging.WARNING)
    try:
        runner = ScriptRunner(
            options.adapter,
            options.path,
            plugins=options.plugins,
            roles=dict(options.roles),
            codec=options.codec,
            **runner_options,
        )
        runner.run(options.script, options.arguments)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def _recording_and_schedule(options: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of `attach` that the options or the recipe give; the others have `attach`'s defaults."""
    from disback_plugin.errors import OptionError
    from disback_plugin.schedules import recipe

    given = {name: getattr(options, name) for name in ("record", "every", "schedule")}
    given = {name: value for name, value in given.items() if value is not None}
    if options.recipe is None:
        return given
    if given:
        raise OptionError(
            f"--recipe {options.recipe} and {', '.join(f'--{name}' for name in given)}",
            expected="a recipe, which sets all three, or these",
            cure="omit one of them",
        )
    return recipe(options.recipe).options


def _role(text: str) -> tuple[str, str]:
    role, _, variable = text.partition("=")
    return role, variable
