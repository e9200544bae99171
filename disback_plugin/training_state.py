"""What a recording needs to go on after a crash as if nothing had happened: weights, moments, random streams."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor
from torch.optim import Optimizer

from disback_plugin.weights.network import ScoreNetwork

__all__ = ["capture", "restore"]


def capture(network: ScoreNetwork, optimizer: Optimizer) -> dict[str, Tensor]:
    """Return copies of all tensors of that state, on the CPU.

    Args:
        network: What is trained.
        optimizer: What trains it; its state must consist of tensors, as Adam's does.

    Example:
        >>> net = torch.nn.Linear(1, 1)
        >>> sorted(capture(ScoreNetwork(net), torch.optim.Adam(net.parameters())))
        ['random|cpu', 'weights|bias', 'weights|weight']
    """
    weights = {f"weights|{name}": tensor for name, tensor in network.state_dict().items()}
    buffers = {f"buffers|{name}": tensor for name, tensor in _buffers(network)}  # those that are not persistent too
    moments = {
        f"optimizer|{index}|{key}": tensor
        for index, entries in optimizer.state_dict()["state"].items()
        for key, tensor in entries.items()
    }
    streams = {"random|cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        streams |= {f"random|cuda|{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    return {name: tensor.detach().cpu().clone() for name, tensor in (weights | buffers | moments | streams).items()}


def _buffers(network: ScoreNetwork) -> Iterator[tuple[str, Tensor]]:
    for prefix, module in network.modules().items():
        for name, buffer in module.named_buffers():
            yield prefix + name, buffer


def restore(saved: Mapping[str, Tensor], network: ScoreNetwork, optimizer: Optimizer) -> None:
    """Put back what `capture` returned, into a network and an optimizer of the same kind.

    Raises:
        MismatchError: If the weights do not fit the network. Then nothing was written.
    """
    network.load_state_dict({name.partition("|")[2]: t for name, t in saved.items() if name.startswith("weights|")})
    with torch.no_grad():
        for name, buffer in _buffers(network):
            buffer.copy_(saved[f"buffers|{name}"])
    moments: dict[int, dict[str, Tensor]] = {}
    for name, tensor in saved.items():
        if name.startswith("optimizer|"):
            _, index, key = name.split("|")
            moments.setdefault(int(index), {})[key] = tensor.clone()
    optimizer.load_state_dict(optimizer.state_dict() | {"state": moments})
    torch.set_rng_state(saved["random|cpu"])
    devices = [saved[name] for name in saved if name.startswith("random|cuda|")]
    for device, state in enumerate(devices):
        torch.cuda.set_rng_state(state, device)
