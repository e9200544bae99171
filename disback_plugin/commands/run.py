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
    add, where = parser.add_argument, parser.add_mutually_exclusive_group()
    several: dict[str, Any] = {"action": "append", "default": []}
    where.add_argument("--adapter", default="", metavar="NAME", help="adapter of the trainer: see `disback plugins`")
    at = "attach at the first call of this function, not at the first forward with gradients"
    where.add_argument("--watch", default="", metavar="MODULE:NAME", help=f"without adapter: {at}")
    add("--path", default="disback-path", metavar="DIR", help="folder of the path (%(default)s)")
    add("--record", type=int, metavar="K", help="recording iterations (200)")
    add("--every", type=int, metavar="K", help="recording iterations between two nodes (50)")
    add("--schedule", help="auto, warm, ramp[:K], fixed:b,c,... (auto)")
    add("--recipe", metavar="NAME", help="instead of these three: a setting of the paper, as edm-64, lsun-256 or sdxl")
    add("--codec", default="int8", help="how nodes are stored: int8 or exact (%(default)s)")
    add(
        "--role",
        **several,
        dest="roles",
        metavar="ROLE=VARIABLE",
        help="without adapter, or with accelerate_loop: the script's variable, as teacher=unet_teacher, "
        "fake_score=self.critic, generator_optimizer=opts.0; by default the variable of the role's name",
    )
    saves = "function that saves the trainer's checkpoint, as trainer.loop:Trainer.save or __main__:save"
    add("--saves", **several, metavar="MODULE:NAME", help=saves)
    restore = "object, beside the learning-rate schedulers, that goes back to its beginning after the recording"
    add("--restore", **several, metavar="VARIABLE", help=restore)
    evaluate = "function of the script's variables, by their names, that returns numbers of the student by name"
    add("--evaluate", default="", metavar="MODULE:FUNCTION", help=evaluate)
    between = "generator updates between two evaluations (%(default)s)"
    add("--evaluate-every", type=int, default=1_000, metavar="N", help=between)
    add("script", metavar="SCRIPT", help="Python file; it runs as __main__")
    add("arguments", nargs=argparse.REMAINDER, metavar="...", help="the script's own arguments")
    parser.set_defaults(runs_user_code=True)


def run(options: argparse.Namespace) -> None:
    """Run the script, and log on stderr: everything on rank 0, warnings on the others."""
    import logging
    import sys

    from disback_plugin import distributed, schedules
    from disback_plugin.launch.run import ScriptRunner

    recording = schedules.recording_options(options)
    roles: dict[str, str] = {}
    for role, _, variable in (each.partition("=") for each in options.roles):
        roles[role] = f"{roles[role]},{variable}" if role in roles else variable
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("disback: %(message)s"))
    logger = logging.getLogger("disback_plugin")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO if distributed.is_main_process() else logging.WARNING)
    names = ("path", "plugins", "codec", "watch", "saves", "restore", "evaluate", "evaluate_every")
    try:
        runner = ScriptRunner(
            options.adapter, **{name: getattr(options, name) for name in names}, roles=roles, **recording
        )
        runner.run(options.script, options.arguments)
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
