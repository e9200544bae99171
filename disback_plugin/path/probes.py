"""What a codec does to the scores, measured on the very inputs on which the network was last trained.

While a path is recorded, a hook remembers the arguments of the network's last forward: samples of the student, noised,
with their conditions. When a node is saved, a copy of the network is evaluated on them at theta_i, at theta_i as it
will be decoded, and at theta_{i-1}:

    error = |s(decoded theta_i) - s(theta_i)| / |s(theta_i) - s(theta_{i-1})|
"""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from disback_plugin.errors import TrainingError
from disback_plugin.weights.inplace_copy import Source
from disback_plugin.weights.network import ScoreNetwork

__all__ = ["Probe"]


@dataclass(frozen=True)
class _Call:
    """The arguments of a forward, and the autocast it ran under."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    device: str
    autocast: bool
    dtype: torch.dtype


class Probe:
    """Watches a network's forwards, and evaluates it on the last one's inputs at other weights.

    Args:
        network: s', the network that is recorded.

    Example:
        >>> net = nn.Linear(2, 2)
        >>> probe = Probe(ScoreNetwork(net))
        >>> _ = net(torch.ones(1, 2))
        >>> [output.shape for output in probe.outputs()]
        [torch.Size([1, 2])]
        >>> probe.close()
    """

    def __init__(self, network: ScoreNetwork) -> None:
        self.network = network
        self._calls: dict[str, _Call] = {}
        self._hooks: list[RemovableHandle] = [
            module.register_forward_pre_hook(_Remember(self._calls, name, network), with_kwargs=True)
            for name, module in network.modules().items()
        ]

    @property
    def ready(self) -> bool:
        """Whether a forward was seen."""
        return bool(self._calls)

    def close(self) -> None:
        """Remove the hooks and forget what was seen."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._calls.clear()

    def outputs(self, source: Source | None = None) -> list[Tensor]:
        """Return all floating tensors of the outputs on the remembered inputs.

        The live network is not touched: a copy is run, without the hooks that others have put on it, in evaluation mode
        and with random numbers of its own, and let go.

        Args:
            source: At which weights; the live ones if None.

        Raises:
            TrainingError: If a forward was replaced by a function that a copy would share with the live network.
        """
        own = {id(tensor) for _, tensor in self.network.named_tensors()}
        copies = {name: _copy(module, own).eval() for name, module in self.network.modules().items()}
        copied = self.network.on(copies)
        if source is not None:
            copied.write(source)
        devices = {t.device for m in copies.values() for t in m.parameters() if t.device.type == "cuda"}
        with torch.no_grad(), torch.random.fork_rng(devices=list(devices)), copied.running():
            return [t for name, call in sorted(self._calls.items()) for t in _run(copies[name], call)]


class _Remember:
    """The forward pre-hook of a probe.

    A trainer may copy the network, or save it whole, while it is watched. What is copied or saved in this hook's place
    is a function of the standard library that does nothing: nobody watches the copy, and it can be loaded anywhere.
    """

    def __init__(self, calls: dict[str, _Call], name: str, network: ScoreNetwork) -> None:
        self._calls, self._name, self._network = calls, name, network

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self._network.is_running:  # the forward of another adapter on the same base
            return
        device = next((tensor.device.type for tensor in module.parameters()), "cpu")
        autocast, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
        self._calls[self._name] = _Call(_detached(args), _detached(kwargs), device, autocast, dtype)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (nullcontext(), "__exit__")


def relative_change(changed: list[Tensor], outputs: list[Tensor], before: list[Tensor]) -> float | None:
    """Return |changed - outputs| / |outputs - before|; None if the step itself changed nothing.

    Example:
        >>> relative_change([torch.tensor([1.0])], [torch.tensor([2.0])], [torch.tensor([6.0])])
        0.25
    """
    step = _distance(outputs, before)
    return _distance(changed, outputs) / step if 0 < step < math.inf else None


def _distance(a: list[Tensor], b: list[Tensor]) -> float:
    return math.sqrt(sum(float((x.double() - y.double()).square().sum()) for x, y in zip(a, b, strict=True)))


def _copy(network: nn.Module, own: Collection[int]) -> nn.Module:
    """Return a copy without hooks, which may belong to a trainer, and would be copied with all that it holds.

    Parameters whose id is not in `own`, as those of an adapter's base, are shared.
    """
    memo: dict[int, Any] = {id(p): p for p in network.parameters() if id(p) not in own}
    for module in network.modules():
        replaced = vars(module).get("forward")
        if replaced is not None and getattr(replaced, "__self__", None) is not module:
            raise TrainingError(
                f"a {type(module).__name__} whose forward was replaced by {replaced!r:.60}",
                expected="a forward that a copy has as its own",
                cure="replace it by a method of the module (types.MethodType) to have the error measured",
            )
        memo |= {id(value): type(value)() for name, value in vars(module).items() if "_hooks" in name}
    return copy.deepcopy(network, memo)


def _run(module: nn.Module, call: _Call) -> list[Tensor]:
    with torch.autocast(call.device, dtype=call.dtype, enabled=call.autocast):
        return list(_tensors(module(*call.args, **call.kwargs)))


def _detached(value: Any) -> Any:
    """Return the same arguments without their graphs."""
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
        return type(value)(_detached(entry) for entry in value)
    return {key: _detached(entry) for key, entry in value.items()} if type(value) is dict else value


def _tensors(value: Any) -> Iterator[Tensor]:
    """Yield the floating tensors of an output, whatever holds them."""
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, Mapping):
        for entry in value.values():
            yield from _tensors(entry)
    elif isinstance(value, (list, tuple)):
        for entry in value:
            yield from _tensors(entry)
    elif is_dataclass(value):
        yield from _tensors(vars(value))
