"""Copies that optimizers keep of the weights, as float32 masters of bf16 weights: found by their values."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from torch.optim import Optimizer

from disback_plugin.loop.optimizers import parameters
from disback_plugin.weights.network import ScoreNetwork


def master_copies(network: ScoreNetwork, optimizers: Iterable[Optimizer]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the copies that optimizers keep of a network's weights, each with its weight.

    A copy is a tensor in the optimizer's state or attributes that equals its weight at the weight's precision. All
    tensors of one place, as one key of the state or one list, have to: a zero moment is no copy of a zero weight.

    Example:
        >>> net = nn.Linear(2, 2)
        >>> adam = torch.optim.Adam(net.parameters())
        >>> adam.masters = [p.detach().double() for p in net.parameters()]
        >>> [weight is own for (_, weight), own in zip(master_copies(ScoreNetwork(net), [adam]), net.parameters())]
        [True, True]
    """
    own = {id(tensor) for _, tensor in network.named_tensors()}
    for optimizer in optimizers:
        weights = [p for p in parameters([optimizer]) if id(p) in own]
        places: list[list[tuple[Tensor, Tensor]]] = []
        kept = [optimizer.state.get(p, {}) for p in weights]
        for key in {key for state in kept for key in state}:
            places.append([(s[key], p) for s, p in zip(kept, weights, strict=True) if torch.is_tensor(s.get(key))])
        everything = parameters([optimizer])
        for tensors in _lists_of_tensors(optimizer):
            if len(tensors) == len(everything):
                places.append([(t, p) for t, p in zip(tensors, everything, strict=True) if id(p) in own])
            elif len(tensors) == len(weights):
                places.append([*zip(tensors, weights, strict=True)])
        for pairs in places:
            if len(pairs) == len(weights) and all(_is_copy(*pair) for pair in pairs) and any(p.any() for _, p in pairs):
                yield from pairs


def _lists_of_tensors(optimizer: Optimizer) -> Iterator[list[Tensor]]:
    """Yield the tensors of each list, dictionary and inner optimizer among an optimizer's attributes."""
    for name, value in vars(optimizer).items():
        if name in ("state", "param_groups", "defaults"):
            continue
        if name == "param_groups_master" or (isinstance(value, list) and value and isinstance(value[0], dict)):
            value = [p for group in value for p in group.get("params", ())]
        items = parameters([value]) if isinstance(value, Optimizer) else value
        items = list(items.values()) if isinstance(items, dict) else items
        if isinstance(items, (list, tuple)) and items and all(map(torch.is_tensor, items)):
            yield [*items]


def _is_copy(copy: Tensor, weight: Tensor) -> bool:
    return copy is not weight and copy.shape == weight.shape and torch.equal(copy.detach().to(weight), weight.detach())
