"""What tells the weights of one moment from those of another: checksums of all values, and samples of some.

Every k-th element of the weights or gradients is enough to compare them with those of another update.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence, Set
from itertools import accumulate
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from disback_plugin import distributed
from disback_plugin.weights.sharding import Weight, local_tensor
from disback_plugin.weights.tensors import Checksum, Part

if TYPE_CHECKING:
    from disback_plugin.weights.network import ScoreNetwork

# Elements of a sample. The cosine of two samples is then that of the whole gradients to about 0.02.
SAMPLE = 4096


class WeightSample:
    """The places of a sample. Of sharded weights each rank samples its own shards.

    Args:
        weights: The weights.

    Attributes:
        parts: Each weight that has an element in the sample, the first of these, and how many there are.

    Example:
        >>> net = nn.Linear(2, 1)
        >>> WeightSample(net.parameters()).weights().tolist() == [*net.weight[0].tolist(), net.bias.item()]
        True
    """

    def __init__(self, weights: Iterable[Tensor]) -> None:
        weights = [*weights]
        elements = [_flat(weight).numel() for weight in weights]
        self._stride = max(-(-sum(elements) // SAMPLE), 1)
        first = [-offset % self._stride for offset in accumulate(elements, initial=0)]
        self.parts = [
            (weight, start, -(-(count - start) // self._stride))
            for weight, start, count in zip(weights, first, elements, strict=False)
            if start < count
        ]

    def weights(self) -> Tensor:
        """Return the sampled weights, shape (elements,), float32 on the first weight's device."""
        return self._draw([weight for weight, _, _ in self.parts])

    def gradients(self, idle: Set[int]) -> tuple[Tensor, Tensor | None]:
        """Return the sampled gradients, and which of them are of weights that took part.

        Args:
            idle: Ids of weights that took no part in the update, whatever gradients they have.

        Returns:
            The sample, in which a missing or sparse gradient is zero; and a sample of ones and zeros, 1 where there is
            a gradient, or None if that is everywhere.
        """
        held = [None if id(weight) in idle else weight.grad for weight, _, _ in self.parts]
        gradients = [None if grad is None or grad.layout is not torch.strided else grad for grad in held]
        sample, counts = self._draw(gradients), [count for _, _, count in self.parts]
        if all(grad is not None for grad in gradients):
            return sample, None
        pairs = zip(gradients, counts, strict=True)
        return sample, torch.cat([sample.new_full((count,), float(grad is not None)) for grad, count in pairs])

    @classmethod
    def of(cls, network: ScoreNetwork) -> WeightSample:
        """Return a sample of a network's parameters."""
        return cls(tensor for _, tensor in network.named_tensors() if isinstance(tensor, nn.Parameter))

    @torch.no_grad()
    def _draw(self, values: Sequence[Tensor | None]) -> Tensor:
        drawn = [
            torch.zeros(count, device=weight.device) if value is None else _flat(value)[first :: self._stride].float()
            for value, (weight, first, count) in zip(values, self.parts, strict=True)
        ]
        return torch.cat([part.to(drawn[0].device) for part in drawn]) if drawn else torch.zeros(0)


def _flat(tensor: Tensor) -> Tensor:
    """Return what this rank holds of a tensor as real numbers, shape (elements,)."""
    local = local_tensor(tensor).detach()
    return (torch.view_as_real(local.resolve_conj()) if local.is_complex() else local).reshape(-1)


def _count(total: Checksum, weight: Weight, chunk: tuple[int, int] | None, rounded: torch.dtype | None = None) -> None:
    """Add what this rank holds of a weight to a checksum; with `chunk`, only what lies in that chunk of a parameter."""
    part, local, shape = weight.part, weight.local(), weight.meta.shape
    if rounded is not None and local.is_floating_point() and local.element_size() > rounded.itemsize:
        local = local.to(rounded).to(local)
    rows = Part.chunk(shape, *chunk) if chunk is not None and weight.is_parameter and shape else None
    if part.stop is None and rows is None:
        total.add(weight.name, local)
        return
    flat, inner = local.detach().reshape(-1), prod(shape[1:])
    first, last = (0, shape.numel()) if rows is None else (rows.start * inner, (rows.stop or 0) * inner)
    total.add(weight.name, flat.new_zeros(0))
    for cell in part.cells():
        values = flat.new_zeros(cell.stop - cell.start)
        values[slice(None) if cell.keep is None else cell.keep] = flat[cell.at]
        values[: max(first - cell.start, 0)] = 0
        values[max(last - cell.start, 0) :] = 0
        total.add(weight.name, values)


def weights_checksum(
    weights: Iterable[Weight],
    chunk: tuple[int, int] | None = None,
    *,
    alone: bool = False,
    rounded: torch.dtype | None = None,
) -> str:
    """Return the checksum of weights; the ranks that share them add up their sums, 512 bytes a tensor.

    Args:
        weights: The weights. All ranks that share them have to call, unless `alone`.
        chunk: An index and a number of chunks, into which dimension 0 of each parameter is cut: only those rows count.
        alone: Whether only what this rank holds counts.
        rounded: A dtype to which the weights are rounded, in their own; None for the weights as they are.
    """
    total, groups = Checksum(), dict[Any, list[Weight]]()
    for weight in weights:
        _count(total, weight, chunk, rounded)
        if weight.group is not None and not alone:
            groups.setdefault(weight.group, []).append(weight)
    for group, members in groups.items():
        sums = torch.stack([total.sums[weight.name] for weight in members]).to(members[0].device)
        torch.distributed.all_reduce(sums, group=group)
        total.sums |= dict(zip((weight.name for weight in members), sums.cpu(), strict=True))
    return total.digest()


def mark(weights: Iterable[Weight]) -> str:
    """Return a text that identifies weights, computed without communication.

    It is their checksum, or that of this rank's part, followed by those after rounding to bfloat16 and to float16, as a
    checkpoint may hold them. It is empty if other ranks could not find the same part.
    """
    weights = list(weights)
    chunks = {weight.chunk for weight in weights if weight.group is not None}
    flat = chunks == {None}  # FSDP1: this number of ranks can find the same part
    if not flat and (len(chunks) > 1 or any(chunk is None or chunk[2] for chunk in chunks)):
        return ""
    chunk = next(iter(chunks), None)
    # No weight of a half-precision network changes when it is rounded.
    rounds = any(weight.meta.dtype.is_floating_point and weight.meta.dtype.itemsize > 2 for weight in weights)
    kinds = (None, torch.bfloat16, torch.float16) if rounds else (None,)
    sums = [weights_checksum(weights, chunk and chunk[:2], alone=True, rounded=kind) for kind in kinds]
    part = f" of shard {chunk[0]} of {chunk[1]}" if chunk is not None else ""
    part = f" of rank {torch.distributed.get_rank()} of {torch.distributed.get_world_size()}" if flat else part
    return " or ".join(dict.fromkeys(sums)) + part


def checksums_in(text: str) -> list[str]:
    """Return the checksums in a `mark`, the exact one first."""
    return text.partition(" of ")[0].split(" or ")


def checksum_like(weights: Iterable[Weight], text: str) -> str:
    """Return the checksum of what the `mark` was computed from, on any number of ranks; "" if it cannot be told."""
    weights, (_, _, part) = list(weights), text.partition(" of ")
    place = re.fullmatch(r"(shard|rank) (\d+) of ([1-9]\d*)", part)
    if place is None:
        return weights_checksum(weights) if text else ""
    index, number = int(place[2]), int(place[3])
    if place[1] == "shard":
        return weights_checksum(weights, (index, number))
    flat = any(weight.flattened and weight.sharded for weight in weights)
    own = distributed.gather(weights_checksum(weights, alone=True) if flat else "")
    return own[index] if len(own) == number else ""
