"""Networks and optimizers borrowed for a trial, and put back bit for bit: weights, gradients, moments, random state."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from disback_plugin.loops import optimizers
from disback_plugin.weights import ScoreNetwork

__all__ = ["Borrowed", "borrowed"]


class Borrowed:
    """What was found of the networks, and of each optimizer before its first step."""

    def __init__(self, networks: Sequence[ScoreNetwork]) -> None:
        self._networks = [
            (network, {k: t.detach().clone() for k, t in network.state_dict().items()}) for network in networks
        ]
        tensors = {id(tensor): tensor for network in networks for _, tensor in network.named_tensors()}
        self._gradients = [(tensor, _gradient(tensor)) for tensor in tensors.values()]
        self._known = set(tensors)
        self._others: list[tuple[Tensor, Tensor]] = []  # weights of further networks, as of a discriminator
        self._optimizers: dict[Optimizer, dict[str, Any]] = {}

    def before_step(self, optimizer: Optimizer, args: object, kwargs: object) -> None:
        """Keep what an optimizer holds, the first time that it is about to step."""
        if optimizer in self._optimizers:
            return
        self._optimizers[optimizer] = copy.deepcopy(optimizer.state_dict())
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
    def hastened(self, steppers: Sequence[Optimizer], haste: Callable[[], int]) -> Iterator[None]:
        """Multiply the learning rates of some optimizers at each of their steps."""
        rates = optimizers.Haste(haste)

        def before(optimizer: Optimizer, args: object, kwargs: object) -> None:
            if optimizer in steppers:
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
        for optimizer, state in self._optimizers.items():
            optimizer.load_state_dict(copy.deepcopy(state))
        for tensor, kept in self._gradients:
            if kept is not None:
                kept[0].copy_(kept[1])
            tensor.grad = None if kept is None else kept[0]


def _gradient(tensor: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return a tensor's gradient and a copy of it."""
    gradient = tensor.grad if isinstance(tensor, nn.Parameter) else None
    return None if gradient is None else (gradient, gradient.detach().clone())


@contextmanager
def borrowed(*networks: ScoreNetwork) -> Iterator[Borrowed]:
    """Lend networks to whoever trains them inside; at the end all is as it was found, the global random state too.

    Optimizers that step inside are put back with their weights. What else the user's functions keep, as the place in a
    data loader or a learning-rate schedule, is theirs.

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
    found = Borrowed(networks)
    hook = register_optimizer_step_pre_hook(found.before_step)
    started = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count()) if started else []):
            yield found
    finally:
        hook.remove()
        found.put_back()
