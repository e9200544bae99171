"""Teacher and fake score as two LoRA adapters of peft on one base network, which is never written.

s_phi is the base with one adapter, and the teacher is the base with another: a frozen adapter of the same kind, whose B
is 0 at node 0, where its outputs are the base's own. A node is then the tensors A and B of an adapter, tens of
megabytes, and a move writes them into the teacher's adapter in place.

A position between two nodes interpolates A and B. The product B A of interpolated matrices differs from the
interpolated product by t (1 - t) (B' - B)(A' - A), for A, B and A', B' of the two nodes: by nothing at a node, and to
second order between them.

This module needs the extra `lora`. Layers of peft are recognised by their attributes; only `add_teacher` imports peft.
"""

from __future__ import annotations

import copy
import math
import re
import warnings
from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from hashlib import sha256
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding
from torch.nn.utils import skip_init

from disback_plugin.errors import RoleError
from disback_plugin.weights.marks import weights_checksum
from disback_plugin.weights.modules import Modules, named_modules, unwrap
from disback_plugin.weights.sharding import Weight

__all__ = ["add_teacher", "base_checksum", "use_adapter"]

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
# The matrices of an adapter. Whatever else a layer keeps of it, as DoRA's magnitudes, is refused.
MATRICES = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B")


def add_teacher(model: nn.Module, *, like: str, name: str = "teacher") -> None:
    """Add the teacher as a frozen LoRA adapter, which changes no output until a node is written into it.

    The matrix A of the adapter is the same in every process and on every machine (peft draws it from a fixed seed), and
    a recording sets the A of s_phi to it at its start, so that a path fits every run on the same base. The adapter has
    no dropout. The active adapter, the flags `requires_grad` and the global random state stay as they are.

    Args:
        model: A `PeftModel`, or a model of diffusers, transformers or torch with adapters injected; plain or wrapped.
        like: Name of the fake score's LoRA adapter, whose targets, rank and scale are taken over.
        name: Name of the new adapter.

    Raises:
        RoleError: If there is no adapter `like`, if it is not plain LoRA, or if the name is taken.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> net = get_peft_model(nn.Sequential(nn.Linear(2, 2)), LoraConfig(r=1, target_modules=["0"]), "fake")
        >>> add_teacher(net, like="fake")
        >>> x = torch.ones(1, 2)
        >>> with use_adapter(net, "teacher"):
        ...     before = net(x)
        >>> with use_adapter(net, None):
        ...     torch.equal(net(x), before)
        True
    """
    import peft

    root: Any = unwrap(model, keep_peft=True)
    adapter_layers(root, like, "fake score")
    if name in root.peft_config:
        found = f"an adapter {name!r} that is there already"
        raise RoleError(found, expected="a new name", cure="pass another name=, or use it")
    config = copy.deepcopy(root.peft_config[like])
    config.lora_dropout, config.inference_mode = 0.0, True
    config.init_lora_weights = config.init_lora_weights or True
    before = _activity(root)
    flags = [(parameter, parameter.requires_grad) for parameter in root.parameters()]
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        torch.default_generator.manual_seed(0)
        if isinstance(root, peft.PeftModel):
            root.add_adapter(name, config)
        else:
            peft.inject_adapter_in_model(config, root, adapter_name=name)
    for _, module in adapter_modules(named_modules(root), name):
        module.requires_grad_(False)
    _set_activity(before)
    for parameter, flag in flags:
        parameter.requires_grad_(flag)


@contextmanager
def use_adapter(model: nn.Module, lora_adapter: str | None) -> Iterator[None]:
    """Activate one LoRA adapter of a network inside a `with` block, and the adapters that were active before after it.

    The flags `requires_grad` do not change, as they would with peft's own `set_adapter`. A compiled network has a graph
    for each adapter, made at its first use. With activation checkpointing the backward runs the forward again, so call
    `backward()` inside the block.

    Args:
        model: The network, plain or wrapped.
        lora_adapter: The adapter's name; None for the bare base.

    Raises:
        RoleError: If there is no such adapter.

    Example:
        >>> from peft import LoraConfig, get_peft_model
        >>> config = LoraConfig(r=1, target_modules=["0"], init_lora_weights=False)
        >>> net, x = get_peft_model(nn.Sequential(nn.Linear(2, 2)), config, "fake"), torch.ones(1, 2)
        >>> with use_adapter(net, None):
        ...     bare = net(x)
        >>> torch.equal(net(x), bare), net.active_adapter
        (False, 'fake')
    """
    root = unwrap(model)
    before = _activity(root)
    wanted = [] if lora_adapter is None else [lora_adapter]
    if wanted and not any(lora_adapter in getattr(layer, "r", ()) for layer, _, _ in before):
        adapter_layers(root, wanted[0], "network")  # raises the error that lists the adapters
    try:
        _set_activity([(layer, wanted or names, not wanted) for layer, names, _ in before])
        yield
    finally:
        _set_activity(before)


def base_checksum(model: nn.Module, only: Container[str] | None = None) -> str:
    """Return the checksum of the parameters that belong to no adapter, under the names they have without adapters.

    Args:
        model: A network, with or without adapters. If it is sharded, all ranks must call.
        only: The names of the parameters that count; None for all.

    Example:
        >>> base_checksum(nn.Linear(2, 2)) == base_checksum(nn.Linear(2, 2))
        False
    """
    weights = [Weight.of(name, parameter) for name, parameter in base_parameters(model) if only is None or name in only]
    if any(weight.tensor.is_meta for weight in weights):
        found = f"{weights[0].name} of the base, which is on the meta device"
        raise RoleError(found, expected="a base that has values", cure="load the network's weights first")
    return weights_checksum(weights)


def neutral_state(weights: list[Weight]) -> dict[str, Tensor]:
    """Return the tensors of an adapter that changes nothing: B is 0, and A is the same in every process.

    Args:
        weights: The weights of an adapter of the same layers and rank.
    """
    stream, state = torch.Generator().manual_seed(0), dict[str, Tensor]()
    for weight in weights:
        name, shape = weight.name, weight.meta.shape
        state[name] = torch.zeros(shape, dtype=weight.meta.dtype, device="cpu")
        if re.search(r"(^|\.)lora_(A|embedding_B)\.", name):  # peft draws from the same range
            state[name].uniform_(-1, 1, generator=stream).div_(math.sqrt(shape[1:].numel()))
    return state


# -- the layers of peft ------------------------------------------------------------------------------------------------


def named_layers(modules: Modules) -> list[tuple[str, Any]]:
    """Return those of the `named_modules` of a network that hold adapters, without layers inside such layers."""
    adapted = {id(layer) for layer in _layers(modules[0][1])}
    return [(name, module) for name, module in modules if id(module) in adapted]


def adapter_modules(modules: Modules, lora_adapter: str) -> Modules:
    """Return the modules that hold the matrices of an adapter, by names that are peft's own without the adapter's.

    Args:
        modules: The `named_modules` of a network.
        lora_adapter: The adapter's name.
    """
    found: Modules = []
    for name, layer in named_layers(modules):
        for matrix in MATRICES:
            if lora_adapter in getattr(layer, matrix, ()):
                held = getattr(layer, matrix)[lora_adapter]
                if isinstance(held, nn.Parameter):  # of an embedding
                    held = nn.ParameterDict({"weight": held})
                found += named_modules(held, f"{name}{matrix}.")
    return found


def base_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the parameters of a network that belong to no adapter, under the names that they have without adapters."""
    modules = named_modules(model)
    holders = [getattr(layer, name, None) for _, layer in named_layers(modules) for name in layer.adapter_layer_names]
    of_adapters = {id(p) for holder in holders if isinstance(holder, nn.Module) for p in holder.parameters()}
    for name, module in modules:
        for own, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in of_adapters:
                yield f"{name}{own}".replace("base_layer.", ""), parameter


def _layers(root: nn.Module) -> Iterator[Any]:
    """Yield the layers that hold adapters, without their names, fast enough for each forward."""
    waiting: list[nn.Module | None] = [root]
    while waiting:
        module = waiting.pop()
        if module is None:
            continue
        if hasattr(type(module), "adapter_layer_names") and "base_layer" in module._modules:
            yield module
        else:
            waiting.extend(module._modules.values())


def _activity(root: nn.Module) -> list[tuple[Any, Any, bool]]:
    """Return each layer with its active adapters, and whether they are disabled."""
    return [(layer, layer._active_adapter, layer._disable_adapters) for layer in _layers(root)]


def _set_activity(activity: list[tuple[Any, Any, bool]]) -> None:
    """Set the active adapters of layers, as `_activity` returns them."""
    # The layers' own set_adapter changes what requires gradients, and takes thirty times as long.
    for layer, names, disabled in activity:
        vars(layer).update(_active_adapter=names, _disable_adapters=disabled)


class LoraLayer:
    """A LoRA on one layer.

    Args:
        module: The layer, perhaps peft's around another.
        rank: r.
        scale: s.
        dtype: The dtype of A and B.
        device: Their device, until the layer runs on another.
        bias: Whether B has a bias.
    """

    def __init__(
        self, module: Any, rank: int, scale: float, dtype: torch.dtype, device: torch.device, *, bias: bool = False
    ) -> None:
        base = module.get_base_layer() if hasattr(module, "get_base_layer") else module
        make = partial(skip_init, device=device, dtype=dtype)  # draws no random numbers
        self.module, self.scale, self.embeds = module, scale, isinstance(base, nn.Embedding)
        kind = next((each for each in CONVOLUTIONS if isinstance(base, each)), None)
        if kind is not None:
            geometry = base.kernel_size, base.stride, base.padding, base.dilation
            self._down: Any = make(kind, base.in_channels, rank, *geometry, bias=False, padding_mode=base.padding_mode)
            self._up: Any = make(kind, rank, base.out_channels, 1, bias=bias)
        else:
            self._down = make(nn.Linear, module.in_features, rank, bias=False)  # of embeddings peft has these names too
            self._up = make(nn.Linear, rank, module.out_features, bias=bias)

    def matrices(self, name: str) -> Modules:
        """Return the modules of A and B under the names that peft has for those of a layer `name`."""
        infix = "embedding_" if self.embeds else ""
        return [(f"{name}lora_{infix}A.", self._down), (f"{name}lora_{infix}B.", self._up)]

    def changes(self, name: str) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Yield the names of the weights of a layer `name`, and two float64 matrices whose product is added to each."""
        left, right = self._up.weight.detach().flatten(1), self._down.weight.detach().flatten(1)
        if self.embeds or getattr(self.module, "fan_in_fan_out", False):
            left, right = right.T, left.T
        yield f"{name}weight", self.scale * left.double(), right.double()
        if self._up.bias is not None:
            bias = self._up.bias.detach().double().view(-1, 1)
            yield f"{name}bias", self.scale * bias, torch.ones_like(bias[:1])

    def add(self, switch: Mapping[str, bool], module: Any, args: Any, kwargs: Any, output: Tensor) -> Tensor | None:
        """Return the layer's output with s B A x, in the output's dtype, if the switch is on: a forward hook."""
        if not switch["active"] or not getattr(module, "disable_adapters", True):
            return None
        x: Tensor = args[0] if args else next(iter(kwargs.values()))
        for matrix in (self._down, self._up):
            if matrix.weight.device != x.device:  # the network has been moved
                matrix.to(x.device)
        below = embedding(x, self._down.weight.T) if self.embeds else self._down(x.to(self._down.weight.dtype))
        result: Tensor = (output + self._up(below) * self.scale).to(output.dtype)
        return result


# -- which adapters can be a role --------------------------------------------------------------------------------------


def identity(root: nn.Module, lora_adapter: str, role: str, only: Container[str] | None = None) -> str:
    """Return a digest of the base's weights and of the adapter's scale in each of its layers.

    Args:
        root: The network. If it is sharded, all ranks must call.
        lora_adapter: The adapter's name.
        role: The name of the network in errors.
        only: The names of the base's weights that count; None for all.

    Raises:
        RoleError: If there is no such adapter, or if its matrices are not all that changes; the cure says more.
    """
    scales = [(name, layer.scaling[lora_adapter]) for name, layer in adapter_layers(root, lora_adapter, role)]
    return sha256(repr((base_checksum(root, only), scales)).encode()).hexdigest()[:32]


def require_unmerged(roots: Iterable[nn.Module], role: str) -> None:
    """Raise RoleError if adapters are merged into the base: `unmerge_adapter` would subtract what was written since."""
    if any(layer.merged for root in roots for layer in _layers(root)):
        found = f"adapters that were merged into the base of the {role} since attach()"
        raise RoleError(
            found, expected="a base without them", cure="call unmerge_adapter() before the next optimizer step"
        )


def adapter_layers(root: nn.Module, lora_adapter: str, role: str) -> list[tuple[str, Any]]:
    """Return the layers of an adapter; raise RoleError if it is missing or more than its matrices."""
    layers = [(n, layer) for n, layer in named_layers(named_modules(root)) if MATRICES[0] in layer.adapter_layer_names]
    found = [(name, layer) for name, layer in layers if lora_adapter in layer.r]
    if not found:
        names = sorted({name for _, layer in layers for name in layer.r})
        missing = f"no LoRA adapter {lora_adapter!r} in {type(root).__name__}, which has {names}"
        cure = "add it with model.add_adapter(config, name) first; lora.add_teacher(model, like=name) adds a teacher"
        raise RoleError(missing, expected=f"the {role} there", cure=cure)
    if problem := _problem(root, lora_adapter, [layer for _, layer in found]):
        found_there = f"{role}: LoRA adapter {lora_adapter!r} {problem[0]}"
        raise RoleError(found_there, expected="plain LoRA layers", cure=problem[1])
    return found


def _problem(root: nn.Module, lora_adapter: str, found: list[Any]) -> tuple[str, str] | None:
    """Return why an adapter cannot be a role, and the cure; None if it can."""
    extra = {name for layer in found for name in layer.adapter_layer_names if name not in MATRICES}
    odd = sorted(name for name in extra if any(lora_adapter in getattr(layer, name, ()) for layer in found))
    variants = [getattr(layer, "lora_variant", {}) for layer in found]
    odd += sorted({type(variant[lora_adapter]).__name__ for variant in variants if lora_adapter in variant})
    if any(layer.merged for layer in found):
        return "on a base that holds merged adapters", "call unmerge_adapter() on it first"
    if odd:
        return f"with {', '.join(odd)}", "omit use_dora= and other variants of LoRA"
    configs = [vars(module).get("peft_config", {}) for module in root.modules()]
    for name, config in chain.from_iterable(each.items() for each in configs):  # all adapters share the base
        beside = "" if name == lora_adapter else f"beside {name!r}, which is "
        if getattr(config, "bias", "none") != "none":
            return f"{beside}with bias={config.bias!r}, which trains the base", 'use LoraConfig(bias="none")'
        if getattr(config, "modules_to_save", None) or getattr(config, "trainable_token_indices", None):
            return f"{beside}with modules_to_save, copies of whole layers", "target those layers by the LoRA instead"
        init = getattr(config, "init_lora_weights", True)
        if not (isinstance(init, bool) or init == "gaussian"):
            return f"{beside}with init_lora_weights={init!r}, which changes the base", 'use True or "gaussian"'
    return None
