"""Checks on the four roles before anything is written: teacher, fake score and the optimizers of both networks.

A role that cannot work is refused; one that would fail silently is a warning.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import torch
from torch import nn
from torch.optim import Optimizer

from disback_plugin import distributed
from disback_plugin.errors import MismatchError, RoleError
from disback_plugin.loop import optimizers
from disback_plugin.path.degradation_path import DegradationPath
from disback_plugin.weights.network import ScoreNetwork
from disback_plugin.weights.sharding import local_tensor, whole_shape

__all__ = [
    "check_networks",
    "check_roles",
    "describe_roles",
    "warn_of_other_rate",
    "warn_of_other_weights",
]

logger = logging.getLogger(__name__)


def check_networks(teacher: ScoreNetwork, fake_score: ScoreNetwork) -> None:
    """Raise unless teacher and fake score have the same layout and share no memory.

    Raises:
        MismatchError: If they differ in keys, shapes or dtype classes, or in what they tie.
        RoleError: If training one would write the other.
    """
    shared = teacher.storages() & fake_score.storages()
    if shared:
        raise RoleError(
            f"teacher and fake score that share weights ({len(shared)} tensors in the same memory)",
            expected="two networks",
            cure="make the fake score a copy.deepcopy of the teacher",
        )
    try:
        teacher.check_same_layout(fake_score)
    except MismatchError as error:
        raise MismatchError(
            error.found,
            expected=f"{error.expected}, because s_phi starts as the teacher and becomes its nodes",
            cure=f"{error.cure}; with another architecture, record with a copy of the teacher, "
            "disback.record(teacher, sample=..., loss=...), and use TrajectoryScheduler(path, teacher)",
        ) from None


def check_roles(
    teacher: ScoreNetwork,
    fake_score: ScoreNetwork,
    generator_optimizers: list[Optimizer],
    fake_score_optimizers: list[Optimizer],
) -> None:
    """Raise unless teacher and fake score are two networks of one layout and each optimizer steps its own network only.

    Raises:
        MismatchError: If the networks differ in keys, shapes or dtype classes.
        RoleError: If they share weights, or an optimizer steps the wrong network or two of them.
    """
    check_networks(teacher, fake_score)
    if any(isinstance(optimizer, torch.optim.LBFGS) for optimizer in generator_optimizers):
        raise RoleError(
            "LBFGS as generator_optimizer, which evaluates its closure many times a step",
            expected="an optimizer that takes one gradient a step",
            cure="use Adam, AdamW or SGD for the generator",
        )
    teachers = {id(tensor): name for name, tensor in teacher.named_tensors()}
    fakes = {id(tensor): name for name, tensor in fake_score.named_tensors()}
    generators = {id(tensor) for tensor in optimizers.parameters(generator_optimizers)}
    trained = {id(tensor) for tensor in optimizers.parameters(fake_score_optimizers)}
    base = {
        id(weight) for weight in (*teacher.base_parameters(), *fake_score.base_parameters()) if weight.requires_grad
    }
    still = "a teacher that no optimizer steps"
    wrong = [
        (base & (generators | trained), "an optimizer that steps the adapters' base model", "a base that stands still"),
        (generators & teachers.keys(), "a generator_optimizer that steps the teacher", still),
        (trained & teachers.keys(), "a fake_score_optimizer that steps the teacher", still),
        (generators & fakes.keys(), "a generator_optimizer that steps the fake score", "the generator only"),
        (generators & trained, "one optimizer's parameters in the other optimizer too", "parameters of one network"),
    ]
    for shared, found, expected in wrong:
        if shared:
            names = teachers | fakes
            raise RoleError(
                f"{found} ({len(shared)} tensors, as {names.get(next(iter(shared)), 'one of the generator')})",
                expected=expected,
                cure="pass each role its own network and optimizer",
            )
    if not trained & fakes.keys():
        raise RoleError(
            "a fake_score_optimizer that steps nothing of the fake score",
            expected="the optimizer that trains it",
            cure="pass the very module that the optimizer was built from, or swap the two optimizers back",
        )


def warn_of_other_weights(teacher: ScoreNetwork, fake_score: ScoreNetwork, path: DegradationPath) -> None:
    """Warn if s_phi matches neither the teacher nor a node: the run may be a resume without its state. Collective."""
    if fake_score.lora_adapter is not None:  # a LoRA adapter begins at random, without effect
        return
    known = {checksum for node in path.nodes for checksum in (node.checksum, node.recorded)}
    if known and fake_score.checksum() in known:
        return
    if not _same_weights(teacher, fake_score) and distributed.is_main_process():
        logger.warning(
            "the fake score holds other weights than the teacher, and begins at node %d of the path. If this goes on "
            "with an earlier run, pass that run's handle.state_dict(): attach(..., state=state)",
            len(path) - 1,
        )


def _same_weights(teacher: ScoreNetwork, fake_score: ScoreNetwork) -> bool:
    """Return whether all parameters are equal at the fake score's precision; each rank compares its shards."""
    originals = dict(teacher.named_tensors())
    for name, tensor in fake_score.named_tensors():
        if isinstance(tensor, nn.Parameter):  # a forward changes running statistics
            own, original = local_tensor(tensor), local_tensor(originals[name])
            if own.shape == original.shape and not torch.equal(own, original.to(own)):
                return False
    return True


def warn_of_other_rate(path: DegradationPath, fake_score: ScoreNetwork, steppers: Sequence[Optimizer]) -> None:
    """Warn if the path was recorded at a learning rate that s_phi's optimizers do not have.

    Only Adam and its variants are compared: the path was recorded with Adam, and the rate of another kind of optimizer
    means something else.
    """
    recorded = path.manifest.learning_rate
    own = [tensor for _, tensor in fake_score.named_tensors()]
    given = [
        float(group.get("max_lr") or group.get("initial_lr") or group.get("lr") or 0.0)  # without warm-up
        for optimizer in steppers
        if "adam" in type(optimizer).__name__.lower()
        for group in optimizers.groups_of(optimizer, own)
    ]
    rates = [rate for rate in given if rate]
    if recorded is not None and rates and not min(rates) / 2 <= recorded <= 2 * max(rates):
        logger.warning(
            "%s was recorded at a learning rate of %g, and the fake score has %g: backtracking as long as the "
            "recording says will be too %s. Record at its own rate, or give the schedule its length: Auto(F)",
            path.folder,
            recorded,
            max(rates),
            "long" if recorded < max(rates) else "short",
        )


def describe_roles(
    networks: Sequence[ScoreNetwork], steppers: Mapping[str, Sequence[Optimizer]]
) -> dict[str, dict[str, str]]:
    """Return plain descriptions of the networks and their optimizers, for a log.

    Args:
        networks: Teacher and fake score.
        steppers: Optimizers under "generator" and "fake score".
    """
    weights = sum(whole_shape(parameter).numel() for parameter in optimizers.parameters(steppers["generator"]))
    return {
        "networks": {network.role: _describe(network) for network in networks} | {"generator": f"{weights:,} weights"},
        "optimizers": {role: "; ".join(map(_with_rates, own)) for role, own in steppers.items()},
    }


def _describe(network: ScoreNetwork) -> str:
    """Return the class, size, dtype and device of a network."""
    tensors = [tensor for _, tensor in network.named_tensors()]
    kinds = sorted({type(module).__name__ for module in network.modules().values()})
    places = sorted({f"{str(t.dtype).removeprefix('torch.')}, {t.device}" for t in tensors if t.is_floating_point()})
    name = ("" if network.lora_adapter is None else f"LoRA {network.lora_adapter!r} on ") + " + ".join(kinds)
    return f"{name}, {sum(whole_shape(tensor).numel() for tensor in tensors):,} weights, {' and '.join(places)}"


def _with_rates(optimizer: Optimizer) -> str:
    known = [group["lr"] for group in optimizer.param_groups if group.get("lr") is not None]  # Adafactor may have None
    rates = dict.fromkeys(f"{float(rate):g}" for rate in known)
    return f"{type(optimizer).__name__}, learning rate {' and '.join(rates) or 'of its own'}"
