"""What a trial or a recording has for itself: networks and optimizers, borrowed and put back bit for bit; a copy of the
teacher; a random stream.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from disback_plugin.errors import OptionError
from disback_plugin.loop import optimizers
from disback_plugin.loop.lr_schedulers import taken
from disback_plugin.weights.network import ScoreNetwork

__all__ = ["TrainingSnapshot", "borrowed", "copy_of", "private_stream"]

# Of one tensor or value in an optimizer: itself, and what it was.
Kept = tuple[Any, Any]


class TrainingSnapshot:
    """What was found of the networks, and of each optimizer before its first step."""

    def __init__(self, networks: Sequence[ScoreNetwork]) -> None:
        self._networks = [
            (network, {k: t.detach().clone() for k, t in network.state_dict().items()}) for network in networks
        ]
        tensors = {id(tensor): tensor for network in networks for _, tensor in network.named_tensors()}
        self._gradients = [(tensor, _gradient(tensor)) for tensor in tensors.values()]
        self._known = set(tensors)
        self._others: list[tuple[Tensor, Tensor]] = []  # weights of further networks, as of a discriminator
        self._optimizers: dict[Optimizer, _Optimizer] = {}

    def before_step(self, optimizer: Optimizer, args: object, kwargs: object) -> None:
        """Keep what an optimizer holds, the first time that it is about to step."""
        if optimizer in self._optimizers:
            return
        self._optimizers[optimizer] = _Optimizer(optimizer)
        for group in optimizer.param_groups:
            for weight in group["params"]:
                if id(weight) not in self._known:
                    self._known.add(id(weight))
                    self._others.append((weight, weight.detach().clone()))
                    self._gradients.append((weight, None))

    def steppers(self, network: ScoreNetwork) -> list[Optimizer]:
        """Return the optimizers that have stepped a network so far."""
        return optimizers.steppers(self._optimizers, (tensor for _, tensor in network.named_tensors()))

    @contextmanager
    def hastened(self, network: ScoreNetwork, haste: Callable[[], int]) -> Iterator[None]:
        """Multiply the learning rates that optimizers have for a network, at each of their steps."""
        rates = optimizers.LearningRateScale(haste, lambda: (tensor for _, tensor in network.named_tensors()))

        def before(optimizer: Optimizer, args: object, kwargs: object) -> None:
            rates.before_step(optimizer)

        def after(optimizer: Optimizer, args: object, kwargs: object) -> None:
            rates.put_back(optimizer)

        hooks = register_optimizer_step_pre_hook(before), register_optimizer_step_post_hook(after)
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def put_back(self) -> None:
        """Put everything back as it was found."""
        for network, state in self._networks:
            network.load_state_dict(state)
        with torch.no_grad():
            for weight, found in self._others:
                weight.copy_(found)
        for kept_optimizer in self._optimizers.values():
            kept_optimizer.put_back()
        for tensor, kept in self._gradients:
            if kept is not None:
                kept[0].copy_(kept[1])
            tensor.grad = None if kept is None else kept[0]


class _Optimizer:
    """The groups and the state of an optimizer, put back into the very objects: a captured graph, or the trainer, may
    hold them; and its learning-rate schedulers.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        self._groups = [_kept(group) for group in optimizer.param_groups]
        self._state = {
            weight: (state, _kept(state) if isinstance(state, dict) else optimizers.copied(state))
            for weight, state in optimizer.state.items()
        }
        self._rewind = taken(optimizer)

    @torch.no_grad()
    def put_back(self) -> None:
        for group, kept in zip(self._optimizer.param_groups, self._groups, strict=True):
            _put_back(group, kept)
        self._optimizer.state.clear()
        for weight, (state, kept) in self._state.items():
            if isinstance(state, dict):
                _put_back(state, kept)
                self._optimizer.state[weight] = state
            else:  # what an optimizer keeps beside its weights' states
                self._optimizer.state[weight] = optimizers.copied(kept)
        self._rewind.put_back()
        self._rewind = taken(self._optimizer)  # there may be another trial


def _kept(values: dict[str, Any]) -> dict[str, Kept]:
    return {name: (value, optimizers.copied(value)) for name, value in values.items() if name != "params"}


def _put_back(values: dict[str, Any], kept: dict[str, Kept]) -> None:
    for name in values.keys() - kept.keys() - {"params"}:
        del values[name]
    for name, (there, was) in kept.items():
        if isinstance(there, Tensor):
            there.copy_(was)
            values[name] = there
        else:
            values[name] = optimizers.copied(was)


def _gradient(tensor: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return a tensor's gradient and a copy of it."""
    gradient = tensor.grad if isinstance(tensor, nn.Parameter) else None
    return None if gradient is None else (gradient, gradient.detach().clone())


@contextmanager
def borrowed(*networks: ScoreNetwork) -> Iterator[TrainingSnapshot]:
    """Lend networks to whoever trains them inside; at the end all is as it was found, the global random state too.

    Optimizers that step inside are put back with their weights, and their learning-rate schedulers. What else the
    user's functions keep, as the place in a data loader, is theirs.

    Args:
        networks: Whose weights, buffers and gradients are kept, in memory of their size.

    Example:
        >>> net = nn.Linear(1, 1)
        >>> before, optimizer = net.weight.item(), torch.optim.Adam(net.parameters())
        >>> with borrowed(ScoreNetwork(net)):
        ...     net(torch.randn(4, 1)).sum().backward()
        ...     optimizer.step()
        >>> net.weight.item() == before, net.weight.grad, len(optimizer.state)
        (True, None, 0)
    """
    found = TrainingSnapshot(networks)
    hook = register_optimizer_step_pre_hook(found.before_step)
    try:
        with private_stream():
            yield found
    finally:
        hook.remove()
        found.put_back()


@contextmanager
def private_stream(seed: int | None = None) -> Iterator[None]:
    """Let what runs inside draw from random streams of its own, and put the global ones back.

    Args:
        seed: Of these streams; None: they begin where the global ones stand.

    Example:
        >>> before = torch.get_rng_state()
        >>> with private_stream(0):
        ...     x = torch.randn(1)
        >>> torch.equal(torch.get_rng_state(), before)
        True
    """
    started = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if started else []):
        if seed is not None:
            # Not torch.manual_seed: for CUDA before its first use that is remembered, and not undone.
            torch.default_generator.manual_seed(seed)
            if started:
                torch.cuda.manual_seed_all(seed)
        yield


def copy_of(teacher: ScoreNetwork) -> nn.Module:
    """Return a copy of the teacher's module that can be trained.

    Raises:
        OptionError: If it is a LoRA adapter, sharded, or made of several experts.

    Example:
        >>> copy_of(ScoreNetwork(nn.Linear(1, 1).requires_grad_(False))).weight.requires_grad
        True
    """
    module, *others = teacher.modules().values()
    if teacher.lora_adapter is not None:
        raise OptionError(
            "a teacher that is a LoRA adapter, with sample and loss, which train a copy of it",
            expected="fake_score and fake_step",
            cure="pass fake_score=ScoreNetwork(model, lora_adapter=...), and a fake_step that trains that adapter",
        )
    if teacher.sharded:
        raise OptionError(
            "a sharded teacher, with sample and loss, which train a copy of it",
            expected="a module that can be copied",
            cure="record before sharding, or use fake_score and fake_step",
        )
    if others:
        raise OptionError(
            f"a teacher of {1 + len(others)} experts, with sample and loss, which train a copy of it",
            expected="one module",
            cure="take each expert on its own, or use fake_score and fake_step",
        )
    return copy.deepcopy(module).requires_grad_(True)
