"""A teacher that is a network with a LoRA beside it: forward hooks add s B A x to the outputs of its layers.

The network itself is neither written nor changed: its weights, names, state dict and flags stay, and after `remove` no
hook is left. While the teacher is node 0, nothing is added. There are two such teachers:

* the fake score's network with its adapters switched off (`switched_off`), where peft computes the base alone, as in
  `with model.disable_adapter():`;
* a network of another size than the fake score (`beside`), to which a recording fits the LoRA.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding
from torch.nn.utils import skip_init

from disback_plugin.errors import RoleError
from disback_plugin.weights import lora
from disback_plugin.weights.modules import Modules, WeightTable, is_compiled, named_modules
from disback_plugin.weights.network import Network, ScoreNetwork
from disback_plugin.weights.sharding import local_tensor
from disback_plugin.weights.tensors import Source

# Rank of the LoRA of a teacher of another size than the fake score; its scale is 1.
RANK = 32
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class AddedLora(ScoreNetwork):
    """The LoRA beside a network, as the teacher's weights.

    Args:
        network: The network, of which nothing is written.
        layers: The LoRA on each layer, by the layer's name with a dot.
        identity: Names that identify the network, for a path.
    """

    def __init__(self, network: ScoreNetwork, layers: Mapping[str, LoraLayer], identity: list[str]) -> None:
        vars(self).update(vars(network))
        self.role, self.lora_adapter, self.layers = "teacher", "teacher", layers
        self._matrices = list(chain.from_iterable(layer.matrices(name) for name, layer in layers.items()))
        select = lambda modules: self._matrices  # noqa: E731
        self._enumerate = partial(WeightTable, {"": nn.Module()}, [], select=select, names=identity)
        self._table = self._enumerate(self.role)
        self._set_trainable(False)
        self._switch, self._hooks = {"active": False}, list[Any]()  # shared by the copies that ScoreNetwork.of makes
        self.load_state_dict(lora.neutral_state(self._weights()))
        self._node_0 = self.checksum()

    def write(self, source: Source, *, keep_finer: bool = False) -> str:
        """Write a source into the LoRA, in place; from then on it is added, unless it is node 0's."""
        found = super().write(source, keep_finer=keep_finer)
        self._switch["active"] = found != self._node_0
        return found

    def first_parameter(self) -> Tensor:
        """Return the network's own first parameter: two handles must not add to one network."""
        parameters = (parameter for root in self._roots.values() for parameter in root.parameters())
        return next(parameters, super().first_parameter())

    def install(self) -> None:
        """Install the hooks."""
        for layer in self.layers.values():
            hook = partial(layer.add, self._switch)
            self._hooks.append(layer.module.register_forward_hook(hook, with_kwargs=True))

    def remove(self) -> None:
        """Remove the hooks."""
        while self._hooks:
            self._hooks.pop().remove()

    @contextmanager
    def training(self) -> Iterator[Any]:
        """Yield the network as it was passed; inside, its LoRA is trainable and added.

        Outside, nothing is added until a `write`.
        """
        modes = [(module, module.training) for root in self._roots.values() for module in root.modules()]
        self._switch["active"] = True
        self._set_trainable(True)
        try:
            for module, _ in modes:
                module.training = False  # its running statistics stay
            yield self.running
        finally:
            for module, mode in modes:
                module.training = mode
            self._set_trainable(False)
            self._switch["active"] = False

    def _set_trainable(self, value: bool) -> None:
        for _, module in self._matrices:
            module.requires_grad_(value).zero_grad()


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


def switched_off(adapter: ScoreNetwork, device: torch.device | None = None) -> AddedLora:
    """Return the teacher that is the fake score's network with all adapters switched off.

    Args:
        adapter: The fake score, a LoRA adapter.
        device: The device of the teacher's LoRA, until a layer runs on another; None for the adapter's.
    """
    layers, name = dict[str, LoraLayer](), str(adapter.lora_adapter)
    for prefix, root in adapter.modules().items():
        for at, layer in lora.adapter_layers(root, name, "fake score"):
            embeds = name in layer.lora_embedding_A
            like = local_tensor(layer.lora_embedding_A[name] if embeds else layer.lora_A[name].weight)
            bias, place = not embeds and layer.lora_B[name].bias is not None, device or like.device
            layers[f"{prefix}{at}"] = LoraLayer(layer, layer.r[name], layer.scaling[name], like.dtype, place, bias=bias)
    return AddedLora(adapter, layers, [name for name, tensor in adapter.named_tensors() if "on base " in name])


def beside(teacher: ScoreNetwork) -> AddedLora:
    """Return a whole teacher as one whose nodes are adapters on all its linear and ungrouped convolution layers.

    Args:
        teacher: The teacher.
    """
    layers, identity = dict[str, LoraLayer](), []
    for prefix, root in teacher.modules().items():
        identity.append(f"{prefix}on base {lora.base_checksum(root)}")
        for name, module in named_modules(root, prefix):
            # Attention of torch.nn reads the weights of such a layer, and does not call it.
            read = type(module).__name__ == "NonDynamicallyQuantizableLinear"
            if isinstance(module, (nn.Linear, *CONVOLUTIONS)) and getattr(module, "groups", 1) == 1 and not read:
                layers[name] = LoraLayer(
                    module, RANK, 1.0, torch.get_default_dtype(), local_tensor(module.weight).device
                )
    if not layers:
        found = "a teacher of another architecture than the fake score, without linear or convolution layers"
        cure = "record with a copy of the teacher: disback.record(teacher, sample=..., loss=...)"
        raise RoleError(found, expected="layers that a LoRA can be added to", cure=cure)
    return AddedLora(teacher, layers, identity)


def check_not_compiled(network: Network) -> None:
    """Raise RoleError if a network is compiled: its graph would not see the hooks.

    Args:
        network: The network, as it was passed.
    """
    parts = network.modules() if isinstance(network, ScoreNetwork) else network
    if any(map(is_compiled, parts.values() if isinstance(parts, Mapping) else [parts])):
        raise RoleError(
            "a compiled teacher to whose layers a LoRA is added",
            expected="a teacher whose forwards call hooks",
            cure="compile it after attach(), or not at all",
        )
