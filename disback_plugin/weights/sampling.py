"""Every k-th element of a network's weights or gradients: enough to compare them with those of another update."""

from __future__ import annotations

from collections.abc import Callable, Set
from itertools import accumulate

import torch
from torch import Tensor, nn

from disback_plugin.weights.network import ScoreNetwork
from disback_plugin.weights.sharding import local_tensor

# Elements of a sample. The cosine of two samples is then that of the whole gradients to about 0.02.
SAMPLE = 4096


class WeightSample:
    """The places of a sample. Of a sharded network each rank samples its own shards.

    Args:
        network: The network. Only its parameters are sampled.

    Example:
        >>> net = nn.Linear(2, 1)
        >>> WeightSample(ScoreNetwork(net)).weights().tolist() == [*net.weight[0].tolist(), net.bias.item()]
        True
    """

    def __init__(self, network: ScoreNetwork) -> None:
        self.parameters = [tensor for _, tensor in network.named_tensors() if isinstance(tensor, nn.Parameter)]
        elements = [_flat(weight).numel() for weight in self.parameters]
        self._stride = max(-(-sum(elements) // SAMPLE), 1)
        first = [-offset % self._stride for offset in accumulate(elements, initial=0)]
        # Parameter, its first element that is sampled, and the number of elements that are.
        self._parts = [
            (weight, start, -(-(count - start) // self._stride))
            for weight, start, count in zip(self.parameters, first, elements, strict=False)
            if start < count
        ]

    def weights(self) -> Tensor:
        """Return the sampled weights, shape (elements,), float32 on the first weight's device."""
        return self._draw(lambda weight: weight)

    def gradients(self, idle: Set[int]) -> tuple[Tensor, Tensor | None]:
        """Return the sampled gradients, and which of them are of weights that took part.

        Args:
            idle: Ids of weights that took no part in the update, whatever gradients they have.

        Returns:
            The sample, in which a missing or sparse gradient is zero; and a sample of ones and zeros, 1 where there is
            a gradient, or None if that is everywhere.
        """

        def gradient(weight: Tensor) -> Tensor | None:
            found = None if id(weight) in idle else weight.grad
            return found if found is not None and found.layout is torch.strided else None

        sample = self._draw(gradient)
        if all(gradient(weight) is not None for weight, _, _ in self._parts):
            return sample, None
        taking_part = [sample.new_full((n,), float(gradient(weight) is not None)) for weight, _, n in self._parts]
        return sample, torch.cat(taking_part) if taking_part else None

    @torch.no_grad()
    def _draw(self, values_of: Callable[[Tensor], Tensor | None]) -> Tensor:
        drawn = []
        for weight, first, count in self._parts:
            values = values_of(weight)
            if values is None:
                drawn.append(torch.zeros(count, device=weight.device))
            else:
                drawn.append(_flat(values)[first :: self._stride].float())
        return torch.cat([part.to(drawn[0].device) for part in drawn]) if drawn else torch.zeros(0)


def _flat(tensor: Tensor) -> Tensor:
    """Return what this rank holds of a tensor as real numbers, shape (elements,)."""
    local = local_tensor(tensor).detach()
    return (torch.view_as_real(local.resolve_conj()) if local.is_complex() else local).reshape(-1)
