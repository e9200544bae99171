"""Checks on the four roles before anything is written: teacher, fake score and the optimizers of both networks."""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from disback_plugin.errors import MismatchError, RoleError
from disback_plugin.loop.optimizers import groups_of, parameters
from disback_plugin.path.manifest import CONFIG, Manifest
from disback_plugin.weights.modules import NO_DEEPSPEED, roots_of
from disback_plugin.weights.network import Network, ScoreNetwork
from disback_plugin.weights.sharding import local_tensor, whole_shape
from disback_plugin.weights.tensors import memory_span, overlap

logger = logging.getLogger(__name__)


def networks_of(
    teacher: Network, fake_score: Network, trained: Iterable[Tensor] | None = None
) -> tuple[ScoreNetwork, ScoreNetwork]:
    """Return teacher and fake score as they share nodes: a LoRA adapter of the fake score is found by itself.

    Args:
        teacher: The teacher.
        fake_score: The fake score.
        trained: The parameters that the fake score's optimizers step; None for those that require gradients.
    """
    known = isinstance(teacher, ScoreNetwork) and (
        teacher.lora_adapter is not None or type(teacher) is not ScoreNetwork
    )
    name = None if known else trained_adapter(fake_score, None if trained is None else set(map(id, trained)))
    if name is not None:
        from disback_plugin.weights import lora_teachers

        return lora_teachers.pair(teacher, fake_score, name, live=trained is not None)
    target = ScoreNetwork.of(teacher, role="teacher")
    return target, ScoreNetwork.of(fake_score, role="fake score", like=target)


def trained_adapter(network: Network, trained: set[int] | None) -> str | None:
    """Return the name of the LoRA adapter of a fake score that is trained; None if there is none.

    Args:
        network: The fake score; a `ScoreNetwork` of an adapter is that adapter.
        trained: The ids of the parameters that its optimizers step; None for those that require gradients.

    Raises:
        RoleError: If there are several.
    """
    if isinstance(network, ScoreNetwork) and network.lora_adapter is not None:
        return network.lora_adapter
    names = {
        match[1]
        for root in roots_of(network)
        for name, parameter in root.named_parameters()
        if (match := re.search(r"(?:^|\.)lora_(?:embedding_)?[AB]\.([^.]+)", name))
        and parameter.requires_grad
        and (trained is None or id(parameter) in trained)
    }
    if len(names) > 1:
        raise RoleError(
            f"a fake score with several trained LoRA adapters, {sorted(names)}",
            expected="one",
            cure="name it: fake_score=disback.ScoreNetwork(network, lora_adapter=NAME)",
        )
    return next(iter(names), None)


def find_networks(
    teacher: Network,
    fake_score: Network,
    trained: Iterable[Tensor],
    folder: str | os.PathLike[str] | None,
    *,
    sampled: object,
) -> tuple[ScoreNetwork, ScoreNetwork, bool]:
    """Return teacher and fake score, and whether nodes are the teacher's alone, because the two differ in architecture.

    Args:
        teacher: The teacher.
        fake_score: The fake score.
        trained: The parameters that the fake score's optimizers step.
        folder: Folder of the path; None for none.
        sampled: Whether the teacher can be fitted to samples.
    """
    try:
        pair = networks_of(teacher, fake_score, trained)
        check_networks(*pair)
        return (*pair, False)
    except MismatchError as error:
        recorded = Manifest.read(Path(folder)) if folder is not None and (Path(folder) / CONFIG).is_file() else None
        if folder is None or not (sampled or (recorded and recorded.complete)):
            raise
        if not sampled:
            logger.warning("nodes are of the teacher alone, and the fake score is only warmed up: %s", error)
    from disback_plugin.weights import lora_teachers

    whole, fake = ScoreNetwork.of(teacher, role="teacher"), ScoreNetwork.of(fake_score, role="fake score")
    if whole.lora_adapter is not None:
        return whole, fake, True
    lora_teachers.check_not_compiled(teacher)
    added = lora_teachers.beside(whole)
    # A finished path may hold whole nodes, of a copy of the teacher.
    is_whole = recorded is not None and recorded.teacher.fingerprint != added.fingerprint()
    return whole if is_whole else added, fake, True


def check_networks(teacher: ScoreNetwork, fake_score: ScoreNetwork) -> None:
    """Raise MismatchError unless teacher and fake score have the same keys, shapes, dtype classes and ties."""
    try:
        teacher.check_same_layout(fake_score)
    except MismatchError as error:
        check_memory(teacher, fake_score)  # two networks in one memory may differ in what they tie
        raise MismatchError(
            error.found,
            expected=f"{error.expected}, because s_phi starts as the teacher and becomes its nodes",
            cure=f"{error.cure}; if the architectures differ, pass sample= and loss= too, as disback.record has them, "
            "or a path that disback.record(teacher, sample=..., loss=...) has finished",
        ) from None


def check_memory(teacher: ScoreNetwork, fake_score: ScoreNetwork, student: Iterable[Tensor] = ()) -> None:
    """Raise RoleError if tensors of two roles overlap in memory, as after `load_state_dict(..., assign=True)`.

    Networks may lie side by side in one buffer, and two adapters may have one base. No value is read.

    Args:
        teacher: The teacher.
        fake_score: The fake score.
        student: The parameters of the generator.
    """
    base = dict.fromkeys([*fake_score.base_parameters(), *teacher.base_parameters()])
    known = set(map(id, base))  # an optimizer of the whole model holds the frozen base, too
    roles: dict[str, list[tuple[str, Tensor]]] = {
        "teacher": teacher.named_tensors(),
        "fake score": fake_score.named_tensors(),
        "base of LoRA adapters": [(f"parameter {index}", tensor) for index, tensor in enumerate(base)],
        "generator": [
            (f"parameter {index}", tensor) for index, tensor in enumerate(student) if id(tensor) not in known
        ],
    }
    local = [(role, name, local_tensor(tensor)) for role, tensors in roles.items() for name, tensor in tensors]
    spans = [(str(t.device), *memory_span(t), role, name, t) for role, name, t in local if t.numel()]
    spans.sort(key=lambda span: span[:2])
    for index, (device, _, end, role, name, tensor) in enumerate(spans, start=1):
        for where, start, _, other, another, held in islice(spans, index, None):
            if where != device or start >= end:
                break
            if role != other and overlap(tensor, held):
                raise RoleError(
                    f"{role} and {other} that share weights: {name} and {another} are in the same memory",
                    expected="networks with memory of their own",
                    cure="copy them: copy.deepcopy, or load_state_dict without assign=True, before the optimizers are "
                    "built",
                )


def check_roles(
    teacher: ScoreNetwork,
    fake_score: ScoreNetwork,
    generator_optimizers: list[Optimizer],
    fake_score_optimizers: list[Optimizer],
) -> None:
    """Raise unless each optimizer steps its own network only.

    Raises:
        RoleError: If an optimizer steps the wrong network or two of them, or if the student shares weights with one.
    """
    if any(isinstance(optimizer, torch.optim.LBFGS) for optimizer in generator_optimizers):
        raise RoleError(
            "LBFGS as generator_optimizer, which evaluates its closure many times a step",
            expected="an optimizer that takes one gradient a step",
            cure="use Adam, AdamW or SGD for the generator",
        )
    teachers, fakes = ({id(tensor): name for name, tensor in net.named_tensors()} for net in (teacher, fake_score))
    known = fakes.keys() | teachers.keys()
    student = [p for p in parameters(generator_optimizers) if id(p) not in known]
    check_memory(teacher, fake_score, student)
    # One optimizer may step both networks: what it steps beside the fake score is the generator's.
    joint = [each for each in generator_optimizers if each in fake_score_optimizers]
    everything, trained = (set(map(id, parameters(own))) for own in (generator_optimizers, fake_score_optimizers))
    generators, critics = (
        set(map(id, parameters(each for each in own if each not in joint)))
        for own in (generator_optimizers, fake_score_optimizers)
    )
    base = {id(p) for net in (teacher, fake_score) for p in net.base_parameters() if p.requires_grad}
    # A frozen teacher in an optimizer that was built from the whole model never has a gradient.
    trainable = {id(tensor) for _, tensor in teacher.named_tensors() if tensor.requires_grad}
    wrong = [
        (base & (everything | trained), "an optimizer that steps the adapters' base model"),
        (trainable & everything, "a generator_optimizer that steps the teacher"),
        (trainable & trained, "a fake_score_optimizer that steps the teacher"),
        (generators & fakes.keys(), "a generator_optimizer that steps the fake score"),
        (generators & trained | critics & everything, "one optimizer's parameters in the other optimizer too"),
    ]
    for shared, found in wrong:
        if shared:
            name = (teachers | fakes).get(next(iter(shared)), "one of the generator")
            raise RoleError(
                f"{found} ({len(shared)} tensors, as {name})",
                expected="each optimizer to step its own network only, and none the teacher",
                cure="pass each role its own network and optimizer",
            )
    for missing, found in (
        (not trained & fakes.keys(), "a fake_score_optimizer that steps nothing of the fake score"),
        (not student, "a generator_optimizer that steps no generator"),
    ):
        if missing:
            cure = "pass the very module that the optimizer was built from, or swap the two optimizers back"
            if "deepspeed" in sys.modules:
                cure += f". DeepSpeed in half precision steps float32 copies instead: {NO_DEEPSPEED}"
            raise RoleError(found, expected="the optimizer that trains it", cure=cure)


def same_weights(teacher: ScoreNetwork, fake_score: ScoreNetwork) -> bool:
    """Return whether all parameters are equal at the coarser of their precisions; each rank compares its shards."""
    originals = dict(teacher.named_tensors())
    for name, tensor in fake_score.named_tensors():
        if not isinstance(tensor, nn.Parameter):  # a forward changes running statistics
            continue
        own, other = local_tensor(tensor), local_tensor(originals[name]).to(tensor.device)
        coarser = other.dtype if torch.promote_types(own.dtype, other.dtype) == own.dtype else own.dtype
        if own.shape == other.shape and not torch.equal(own.to(coarser), other.to(coarser)):
            return False
    return True


def warn_of_other_rate(manifest: Manifest, fake_score: ScoreNetwork, optimizers: Sequence[Optimizer]) -> None:
    """Warn if the path was recorded at a learning rate that s_phi's optimizers do not have.

    Only Adam and its variants are compared: `record` uses Adam, and the rate of another kind means something else.
    """
    recorded, own = manifest.learning_rate, [tensor for _, tensor in fake_score.named_tensors()]
    adams = [optimizer for optimizer in optimizers if "adam" in type(optimizer).__name__.lower()]
    groups = [group for optimizer in adams for group in groups_of(optimizer, own)]
    # Without a warm-up.
    given = [float(group.get("max_lr") or group.get("initial_lr") or group.get("lr") or 0.0) for group in groups]
    rates = [rate for rate in given if rate]
    if recorded is not None and rates and not min(rates) / 2 <= recorded <= 2 * max(rates):
        logger.warning(
            "the path was recorded at a learning rate of %g, and the fake score has %g: the length of backtracking "
            "will not fit. Record at its own rate, or give the schedule its length: Auto(F)",
            recorded,
            max(rates),
        )


def describe_roles(
    teacher: ScoreNetwork,
    fake_score: ScoreNetwork,
    generator_optimizers: Sequence[Optimizer],
    fake_score_optimizers: Sequence[Optimizer],
) -> dict[str, str]:
    """Return the size of each network and its optimizers, by role, for people."""
    own, fake = ([tensor for _, tensor in network.named_tensors()] for network in (teacher, fake_score))
    others = fake_score.others if fake_score.lora_adapter is None else []
    beside = f"; {len(others)} tensors are left alone, as {others[0]}" if others else ""
    return {
        "teacher": f"{_class_of(teacher)}, {_describe(own, ())}",
        "fake score": f"{_class_of(fake_score)}, {_describe(fake, fake_score_optimizers)}{beside}",
        "generator": _describe(parameters(generator_optimizers), generator_optimizers),
    }


def _class_of(network: ScoreNetwork) -> str:
    kinds = " + ".join(sorted({type(module).__name__ for module in network.modules().values()}))
    return kinds if network.lora_adapter is None else f"LoRA {network.lora_adapter!r} on {kinds}"


def _describe(tensors: Sequence[Tensor], optimizers: Sequence[Optimizer]) -> str:
    weights = sum(whole_shape(tensor).numel() for tensor in tensors)
    places = sorted({f"{tensor.dtype}, {tensor.device}" for tensor in tensors if tensor.is_floating_point()})
    text = f"{weights:,} weights, {' and '.join(places)}"
    for optimizer in optimizers:
        rates = dict.fromkeys(str(group.get("lr")) for group in optimizer.param_groups)
        text += f"; {type(optimizer).__name__}, learning rate {' and '.join(rates)}"
    return text
