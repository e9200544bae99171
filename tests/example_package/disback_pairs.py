"""DisBack for the trainers of `pairs`, and a log of what it does."""

import json

from disback_plugin import Adapter, Watch, hookimpl
from disback_plugin.errors import RoleError

ROLES = ("true_score", "fake_score", "g_optimizer", "fake_score_optimizer")

WATCH = Watch(
    "pairs.loss:Loss.__call__",  # its first call is the moment to attach
    frame="training_loop",  # whose local variables are the trainer; take="self" for a method's object
    needs=ROLES,  # what is missing is named
    knows="pairs 1.2 (March 2026)",
    saves=("pairs.loop:save_checkpoint",),  # meanwhile the teacher is s'_0, and the state is kept
)


@hookimpl
def disback_adapter(trainer):
    if not all(hasattr(trainer, name) for name in ROLES):
        return None  # not our trainer
    if trainer.fake_score is trainer.true_score:
        raise RoleError(
            "pairs with --shared, where teacher and fake score are one network",
            expected="two",
            cure="train without --shared",
        )
    return Adapter(
        teacher=trainer.true_score,
        fake_score=trainer.fake_score,
        generator_optimizer=trainer.g_optimizer,
        fake_score_optimizer=trainer.fake_score_optimizer,
    )


class Log:
    @hookimpl
    def disback_log(self, values, step):  # fewer arguments are fine; one with a default is never passed
        with open("disback-log.jsonl", "a") as file:
            print(json.dumps({"step": step, **values}), file=file)


log = Log()
