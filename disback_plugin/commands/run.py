r"""Run a trainer's script with DisBack, without editing it.

Run a Python script, and attach DisBack to the trainer in it, whose files are not edited. Under torchrun and accelerate
launch use `-m disback_plugin.launch` with the same arguments.

Example:
  disback run --adapter sid --path runs/path sid_train.py --outdir runs ...
  disback run --adapter accelerate_loop --role teacher=real_unet --role fake_score=fake_unet train.py ...
  disback run --role teacher=self.real --role fake_score=self.fake --role generator_optimizer=self.opt_g \
              --role fake_score_optimizer=self.opt_f --saves trainer.loop:Trainer.save train.py ...
  torchrun --nproc_per_node=8 -m disback_plugin.launch --adapter dmd2 --path runs/path main/edm/train_edm.py ...
"""

from __future__ import annotations

import argparse
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `disback run`."""
    add = parser.add_argument
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--adapter",
        default="",
        metavar="NAME",
        help="adapter of the trainer: see `disback plugins`; without one, --role names the roles in any script",
    )
    where.add_argument(
        "--watch",
        default="",
        metavar="MODULE:NAME",
        help="without adapter: attach at the first call of this function, as trainer.loop:Trainer.train; by default at "
        "the first forward with gradients",
    )
    add("--path", default="disback-path", metavar="DIR", help="folder of the path (%(default)s)")
    add("--record", type=int, metavar="K", help="recording iterations (200)")
    add("--every", type=int, metavar="K", help="recording iterations between two nodes (50)")
    add("--schedule", help="auto, warm, ramp[:K], fixed:b,c,... (auto)")
    add("--recipe", metavar="NAME", help="instead of these three: a setting of the paper, as edm-64, lsun-256 or sdxl")
    add("--codec", default="int8", help="how nodes are stored: int8 or exact (%(default)s)")
    add(
        "--role",
        dest="roles",
        action="append",
        default=[],
        metavar="ROLE=VARIABLE",
        help="without adapter, or with accelerate_loop: the script's variable, as teacher=unet_teacher, "
        "fake_score=self.critic, generator_optimizer=opts.0; by default the variable of the role's name",
    )
    add(
        "--saves",
        action="append",
        default=[],
        metavar="MODULE:NAME",
        help="function that saves the trainer's checkpoint, as trainer.loop:Trainer.save or __main__:save",
    )
    add(
        "--restore",
        action="append",
        default=[],
        metavar="VARIABLE",
        help="object, beside the learning-rate schedulers, that goes back to its beginning after the recording",
    )
    add(
        "--evaluate",
        default="",
        metavar="MODULE:FUNCTION",
        help="function that measures the student and returns numbers by name; each of its arguments is the script's "
        "variable of that name",
    )
    add("--evaluate-every", type=int, metavar="N", help="generator updates between two evaluations (1000)")
    add("script", metavar="SCRIPT", help="Python file; it runs as __main__")
    add("arguments", nargs=argparse.REMAINDER, metavar="...", help="the script's own arguments")
    parser.set_defaults(runs_user_code=True)


def run(options: argparse.Namespace) -> None:
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
        roles: dict[str, str] = {}
        for role, _, variable in (each.partition("=") for each in options.roles):
            roles[role] = f"{roles[role]},{variable}" if role in roles else variable
        shared = {
            name: getattr(options, name) for name in ("plugins", "codec", "watch", "saves", "restore", "evaluate")
        }
        shared["roles"] = roles
        if options.evaluate_every is not None:
            shared["evaluate_every"] = options.evaluate_every
        ScriptRunner(options.adapter, options.path, **shared, **runner_options).run(options.script, options.arguments)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def _recording_and_schedule(options: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of `attach` that the options or the recipe give; the others have `attach`'s defaults."""
    from disback_plugin.errors import OptionError
    from disback_plugin.schedules import recipe

    names = [name for name in ("record", "every", "schedule") if getattr(options, name) is not None]
    if options.recipe is None:
        return {name: getattr(options, name) for name in names}
    if names:
        raise OptionError(
            f"--recipe {options.recipe} and {', '.join(f'--{name}' for name in names)}",
            expected="a recipe, which sets all three, or these",
            cure="omit one of them",
        )
    return recipe(options.recipe).options
