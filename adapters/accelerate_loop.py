"""Any script that calls `Accelerator.prepare` (huggingface/accelerate), whose author never heard of DisBack.

    disback run --adapter accelerate_loop --role teacher=real_unet --role fake_score=fake_unet train.py ...

Two roles have names that only the script's author knows: teacher and fake score. A role that is not named is a variable
of its own name, a local or global one, or an attribute (`self.critic`, `model.real_unet`), where the networks are used.
The optimizers follow: whatever prepared optimizer steps the fake score's parameters is the fake score's, and if one
other is left, it is the generator's. With more than that, `--role generator_optimizer=NAME` says which.

`prepare` wraps networks in DDP and optimizers in `AcceleratedOptimizer`; there may be several calls of it, and direct
ones of `prepare_model` and `prepare_optimizer` (`accelerate/accelerator.py`). The moment is the first forward with
gradients of a prepared network: after whatever the script loads into them, and outside any graph of the fake score. The
teacher need not be prepared; the fake score's optimizer has to be. Checkpoints are followed through
`Accelerator.save_state`.

In a script of your own, `attach(trainer, adapter="accelerate_loop")` takes any object with the attributes
`accelerator`, `teacher` and `fake_score`.
"""

from __future__ import annotations

from typing import Any

from disback_plugin import Adapter, ScoreNetwork, Watch, hookimpl
from disback_plugin.errors import RoleError

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
    """Return the roles of an object with `teacher`, `fake_score`, and `accelerator` or what it `prepared`; else None.

    Raises:
        RoleError: If teacher and fake score are one network, or the optimizers cannot be told apart.
    """
    prepared = getattr(trainer, "prepared", None)
    accelerator = getattr(trainer, "accelerator", None)
    if not all(hasattr(trainer, role) for role in ROLES) or (prepared is None and not hasattr(accelerator, "prepare")):
        return None
    if prepared is None:
        prepared = accelerator._optimizers  # accelerate has no public name for what was prepared
    if trainer.teacher is trainer.fake_score:
        raise RoleError(
            f"one {type(trainer.teacher).__name__} as teacher and as fake score, as where adapters are switched in it",
            expected="two networks: s_phi is trained, and nodes are written into the teacher, which would change both",
            cure="give the fake score a copy.deepcopy of the teacher, and train that",
        )
    steps = {id(tensor) for _, tensor in ScoreNetwork.of(trainer.fake_score, role="fake score").named_tensors()}
    optimizers = [each for each in prepared if hasattr(each, "param_groups")]
    of_fake_score = [each for each in optimizers if steps & _parameters(each)]
    others = [each for each in optimizers if each not in of_fake_score]
    fake_score_optimizer = getattr(trainer, "fake_score_optimizer", None) or _some(of_fake_score)
    return Adapter(
        teacher=trainer.teacher,
        fake_score=trainer.fake_score,
        generator_optimizer=getattr(trainer, "generator_optimizer", None) or _only(others),
        fake_score_optimizer=fake_score_optimizer,
    )


def _parameters(optimizer: Any) -> set[int]:
    return {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}


def _some(optimizers: list[Any]) -> list[Any]:
    if not optimizers:
        raise RoleError(
            "a fake score that no prepared optimizer steps",
            expected="the network that the script trains on the generator's samples, and its optimizer prepared",
            cure="correct --role fake_score=VARIABLE, pass that optimizer to Accelerator.prepare, or name it with "
            "--role fake_score_optimizer=VARIABLE",
        )
    return optimizers


def _only(optimizers: list[Any]) -> Any:
    if len(optimizers) != 1:
        raise RoleError(
            f"{len(optimizers)} prepared optimizers beside the fake score's",
            expected="one, the generator's",
            cure="name it with --role generator_optimizer=VARIABLE",
        )
    return optimizers[0]
