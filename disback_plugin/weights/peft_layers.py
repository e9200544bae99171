"""Layers into which peft has put adapters: which tensors are whose, and under which adapter a forward runs.

By names of attributes: peft is not imported here, and a network without it has no such layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from disback_plugin.weights.tensors import named_modules, own_tensors, unwrap

__all__ = [
    "MATRICES",
    "active",
    "activity",
    "adapter_tensors",
    "base_parameters",
    "layers",
    "named_layers",
    "restore",
    "runs_under",
]

# What of an adapter is a matrix of its own; whatever else a layer keeps of it, as DoRA's magnitudes, is refused.
MATRICES = ("lora_A", "lora_B")


def layers(root: nn.Module) -> Iterator[Any]:
    """Yield the layers that have adapters, whose own modules are not looked into."""
    waiting: list[nn.Module | None] = [root]
    while waiting:
        module = waiting.pop()
        if module is None:
            continue
        if hasattr(type(module), "adapter_layer_names") and "base_layer" in module._modules:
            yield module
        else:
            waiting.extend(module._modules.values())


def named_layers(root: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield each with its canonical name, with a dot at its end."""
    adapted = {id(layer) for layer in layers(root)}
    yield from ((name, module) for name, module in named_modules(root, "") if id(module) in adapted)


def adapter_tensors(root: nn.Module, adapter: str, role: str) -> Iterator[tuple[str, Tensor]]:
    """Yield canonical name, which is peft's own without the adapter's, and live tensor of all that an adapter is.

    Args:
        root: The network, unwrapped.
        adapter: Its name.
        role: What to call it in errors.

    Raises:
        RoleError: If one of them cannot be written in place.
    """
    for prefix, layer in named_layers(root):
        for matrix in MATRICES:
            holder = getattr(layer, matrix, None)
            if holder is not None and adapter in holder:
                for name, module in named_modules(holder[adapter], f"{prefix}{matrix}."):
                    yield from own_tensors(module, name, role)


def base_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the parameters of a network that are of no adapter, by the names that they have without adapters."""
    root = unwrap(model)
    of_adapters = {id(p) for layer in layers(root) for p in parameters_of(layer)}
    for name, module in named_modules(root, ""):
        for own, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in of_adapters:
                yield f"{name}{own}".replace("base_layer.", ""), parameter


def parameters_of(layer: Any) -> Iterator[nn.Parameter]:
    """Yield the parameters of all adapters of a layer."""
    for name in layer.adapter_layer_names:
        holder = getattr(layer, name, None)
        yield from holder.parameters() if isinstance(holder, nn.Module) else ()


def runs_under(root: nn.Module, adapter: str) -> bool:
    """Return whether a forward would run under this adapter, and no other, at this moment."""
    return active(root) == [adapter]


def active(root: nn.Module) -> list[str]:
    """Return the names of the adapters that a forward would run under; [] for the bare base."""
    first = next(layers(root), None)
    return [] if first is None or first.disable_adapters else list(first.active_adapters)


def activity(root: nn.Module) -> list[tuple[Any, Any, bool]]:
    """Return each layer with its active adapters, and whether they are switched off."""
    return [(layer, layer._active_adapter, layer._disable_adapters) for layer in layers(root)]


def restore(state: list[tuple[Any, Any, bool]]) -> None:
    """Put back what `activity` returned, or something like it."""
    # Not by the layers' own set_adapter, which changes what requires gradients, and takes thirty times as long.
    for layer, names, disabled in state:
        vars(layer).update(_active_adapter=names, _disable_adapters=disabled)
