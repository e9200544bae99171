"""Adapt any script that calls `Accelerator.prepare` (huggingface/accelerate).

    disback run --adapter accelerate_loop --role teacher=real_unet --role fake_score=fake_unet train.py ...

The user names two variables, the teacher and the fake score: local or global ones, or attributes (`self.critic`,
`model.real_unet`) where the networks are used. A role that is not named is the variable of the role's own name. The
optimizers follow from what they step: each prepared optimizer that steps the fake score's parameters is the fake
score's. Of the others, as of a discriminator, the generator's is the only one, or the one that steps a prepared network
of the teacher's class, whole or by LoRA layers. Else `--role generator_optimizer=NAME` selects it. What the others step
is left alone.

`prepare` wraps networks in DDP and optimizers in `AcceleratedOptimizer`; a script may call it several times, and call
`prepare_model` and `prepare_optimizer` directly (`accelerate/accelerator.py`). DisBack attaches at the first forward
with gradients of a prepared network: after the script has loaded its weights, and outside any graph of the fake score.
The teacher need not be prepared; the fake score's optimizer must be. `Accelerator.save_state` saves the checkpoints.

In a script of your own, `attach(trainer, adapter="accelerate_loop")` takes any object with the attributes
`accelerator`, `teacher` and `fake_score`.
"""

from __future__ import annotations

import logging
from typing import Any

from disback_plugin import Adapter, ScoreNetwork, Watch, hookimpl
from disback_plugin.errors import RoleError

logger = logging.getLogger(f"disback_plugin.{__name__}")

ROLES = ("teacher", "fake_score")

WATCH = tuple(
    Watch(
        f"accelerate.accelerator:Accelerator.{name}",
        frame="",
        needs=ROLES,
        prepares=True,
        knows="a script of accelerate (1.0 to 1.15)",
        saves=("accelerate.accelerator:Accelerator.save_state",),
    )
    for name in ("prepare", "prepare_model", "prepare_optimizer")
)


@hookimpl
def disback_adapter(trainer: Any) -> Adapter | None:
    """Return the roles of an object with `teacher`, `fake_score`, and `accelerator` or `prepared`; else None.

    Raises:
        RoleError: If the optimizers cannot be told apart.
    """
    prepared = getattr(trainer, "prepared", None)
    accelerator = getattr(trainer, "accelerator", None)
    if not all(hasattr(trainer, role) for role in ROLES) or (prepared is None and not hasattr(accelerator, "prepare")):
        return None
    if prepared is None:
        prepared = [*accelerator._models, *accelerator._optimizers]  # accelerate has no public names for them
    teacher, fake_score = (ScoreNetwork.of(getattr(trainer, role), role=role.replace("_", " ")) for role in ROLES)
    weights = {id(tensor) for _, tensor in fake_score.named_tensors()}
    optimizers = [each for each in prepared if hasattr(each, "param_groups")]
    of_fake_score = [each for each in optimizers if weights & _parameters(each)]
    others = [each for each in optimizers if each not in of_fake_score]
    fake_score_optimizer = getattr(trainer, "fake_score_optimizer", None) or of_fake_score
    if not fake_score_optimizer:
        raise RoleError(
            "a fake score whose parameters no prepared optimizer steps",
            expected="the network that the script trains on the generator's samples, and its optimizer prepared",
            cure="correct --role fake_score=VARIABLE, pass that optimizer to Accelerator.prepare, or name it with "
            "--role fake_score_optimizer=VARIABLE",
        )
    named = getattr(trainer, "generator_optimizer", None)
    return Adapter(
        teacher=teacher,
        fake_score=fake_score,
        generator_optimizer=named or _of_generator(others, prepared, (teacher, fake_score)),
        fake_score_optimizer=fake_score_optimizer,
    )


def _parameters(optimizer: Any) -> set[int]:
    return {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}


def _of_generator(optimizers: list[Any], prepared: list[Any], others: tuple[ScoreNetwork, ...]) -> Any:
    """Return the only optimizer, or the only one that steps a third network of the teacher's class."""
    students = optimizers
    if len(optimizers) > 1:
        known = [module for network in others for module in network.modules().values()]
        kinds = {type(module) for module in known if type(module).__module__.partition(".")[0] != "torch"}  # containers
        inside = [module for each in prepared if hasattr(each, "modules") for module in each.modules()]
        networks = [module for module in inside if type(module) in kinds and module not in known]
        weights = {id(parameter) for network in networks for parameter in network.parameters()}
        students = [each for each in optimizers if weights & _parameters(each)]
    if len(students) != 1:
        raise RoleError(
            f"{len(optimizers)} prepared optimizers beside the fake score's, {len(students)} of them for a network of "
            "the teacher's class",
            expected="one, the generator's",
            cure="name the generator's with --role generator_optimizer=VARIABLE",
        )
    for other in (each for each in optimizers if each is not students[0]):
        logger.info(
            "%s of %d other tensors is left alone. If it trains a discriminator on the teacher's features, these are "
            "the active node's during backtracking",
            *(type(getattr(other, "optimizer", other)).__name__, len(_parameters(other))),
        )
    return students[0]
