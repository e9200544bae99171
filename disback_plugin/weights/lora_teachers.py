"""Teachers whose nodes are LoRA adapters: `attach` finds the adapter of the fake score by itself.

* A whole teacher that equals the base of the fake score's adapter (`MergedTeacher`): a move writes W + s B A into its
  own weights, of the base's W, the scale s and the node's A and B.
* A network with a LoRA beside it (`AddedLora`): forward hooks add s B A x to the outputs of its layers. The network is
  neither written nor changed: its weights, names, state dict and flags stay, and after `remove` no hook is left. While
  the teacher is node 0, nothing is added. It is the fake score's network with its adapters switched off
  (`switched_off`), where peft computes the base alone, as in `with model.disable_adapter():`; or a network of another
  size than the fake score (`beside`), to which a recording fits the LoRA.

A position between two nodes interpolates A and B, as `lora` says, so that a path means the same to every teacher.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from disback_plugin.errors import MismatchError, RoleError, StateError
from disback_plugin.weights import lora
from disback_plugin.weights.lora import CONVOLUTIONS, LoraLayer
from disback_plugin.weights.marks import weights_checksum
from disback_plugin.weights.modules import WeightTable, is_compiled, named_modules, roots_of
from disback_plugin.weights.network import Network, ScoreNetwork
from disback_plugin.weights.sharding import FullState, Weight, increment_versions, local_tensor, part_of
from disback_plugin.weights.tensors import Source, pieces

# Layers whose adapter is W + s B A, or its transpose. FSDP2 makes subclasses; layers of quantised bases are others.
KINDS = {"Linear", "Embedding", "Conv1d", "Conv2d", "Conv3d"}
# Rank of the LoRA of a teacher of another size than the fake score; its scale is 1.
RANK = 32


def pair(teacher: Any, fake_score: Any, lora_adapter: str, *, live: bool) -> tuple[ScoreNetwork, ScoreNetwork]:
    """Return a teacher, and the fake score, which is a LoRA adapter on an equal base, as they share nodes.

    Args:
        teacher: The teacher: a network of its own, or the fake score's network with its adapters switched off.
        fake_score: The fake score.
        lora_adapter: The name of its adapter.
        live: Whether the caller installs hooks, and removes them.

    Raises:
        RoleError: If both are one network and the caller installs no hooks, or the network is compiled.
    """
    if not isinstance(fake_score, ScoreNetwork):
        fake_score = ScoreNetwork(fake_score, lora_adapter=lora_adapter, role="fake score")
    adapter = ScoreNetwork.of(fake_score, role="fake score")
    if adapter.lora_adapter is None:
        adapter.select_adapter(lora_adapter)
    if set(map(id, roots_of(teacher))) == set(map(id, roots_of(fake_score))):
        if not live:
            found = "one network as teacher and fake score, whose forwards have to change"
            cure = "use attach(), or give the teacher an adapter of its own: lora.add_teacher(model, like=...)"
            raise RoleError(found, expected="attach(), which installs and removes hooks", cure=cure)
        check_not_compiled(teacher)
        return switched_off(adapter), adapter
    whole = ScoreNetwork.of(teacher, role="teacher")
    # The base may have further modules, as a discriminator's head, which training changes.
    adapter.select_adapter(lora_adapter, {name for name, _ in whole.named_tensors()})
    return MergedTeacher(whole, adapter), adapter


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


class MergedTeacher(ScoreNetwork):
    """A whole teacher whose nodes are LoRA adapters of another network on an equal base, which no optimizer steps.

    The base is the memory from which node 0 is restored, so it has to stay as it is; the teacher's other weights, and
    its buffers, are never written. A node's A and B are read into memory of the host. Where FSDP cuts the two networks
    at other places, as FSDP1 does, each rank keeps the base's values of its part of the teacher there, too.

    Args:
        teacher: The teacher.
        adapter: The LoRA adapter.

    Raises:
        RoleError: If the adapter has layers of other kinds, or the teacher is cut along another dimension than 0.
        MismatchError: If the base is another architecture.
    """

    def __init__(self, teacher: ScoreNetwork, adapter: ScoreNetwork) -> None:
        vars(self).update(vars(teacher))
        self._adapter, self._lora = adapter, switched_off(adapter, torch.device("cpu"))  # no hooks are installed
        for name, layer in self._lora.layers.items():
            kinds = {
                kind.__name__ for kind in type(layer.module).__mro__ if kind.__module__ == "peft.tuners.lora.layer"
            }
            if not kinds & KINDS:
                found = f"a LoRA on {name} of kind {type(layer.module).__name__}"
                cure = "omit it from target_modules, or load the base unquantised"
                raise RoleError(found, expected=f"layers of kinds {sorted(KINDS)}", cure=cure)
        self._kept: dict[str, Tensor] = {}
        own, base = {weight.name: weight for weight in self._weights()}, self._base_weights()
        for name, like in base.items():
            if name in own and like.meta.shape == own[name].meta.shape and like.part != own[name].part:
                self._kept[name] = part_of(like.whole().detach(), own[name].part).cpu().clone()
        for weight, _, left, right in self._changes():
            shape, part = weight.meta.shape, weight.part
            if shape != base[weight.name].meta.shape or len(left) * right.shape[1] != shape.numel():
                found = f"{weight.name} of shape {tuple(shape)} under a LoRA of another shape"
                raise MismatchError(found, expected="an ungrouped layer of one shape in both networks", cure=_COPY)
            if part.dim and part.stop is not None:
                found = f"{weight.name} of the teacher, cut along dimension {part.dim}"
                cure = "shard it along dimension 0 (fully_shard), or not at all"
                raise RoleError(found, expected="a teacher cut along dimension 0", cure=cure)
        self._targets = {weight.name for weight, *_ in self._changes()}
        self._base = self._base_checksum()

    # -- what a path sees: the adapter ---------------------------------------------------------------------------------

    def full_state(self) -> FullState:
        """Return node 0: an adapter that changes nothing, the same in every run on this base."""
        return FullState(lora.neutral_state(self._adapter._weights()))

    def check_same_layout(self, other: ScoreNetwork) -> None:
        """Raise MismatchError unless `other` is an adapter of the same layers, rank and scale on an equal base."""
        self._adapter.check_same_layout(other)

    def check_original(self) -> None:
        """Raise MismatchError unless the teacher's parameters equal the base's at its precision."""
        base = self._base_weights()
        for weight in self._weights():
            like, own = base.get(weight.name), weight.local()
            values = self._kept.get(weight.name, None if like is None else like.local())
            if weight.is_parameter and (values is None or not torch.equal(values.to(own), own)):
                raise MismatchError(
                    f"{weight.name} of the teacher, which differs from the base of LoRA adapter "
                    f"{self._adapter.lora_adapter!r} of the fake score",
                    expected="one base, because a node is the base with an adapter",
                    cure=_COPY,
                )

    def parts(self) -> None:
        """Return None: each rank decodes all of an adapter."""

    def relative_rounding(self, source: Source, distance: float) -> float:
        """Return what a write of a source rounds away of the weights, over its distance to the base, both Euclidean."""
        self._lora.write(source)
        rounded = moved = 0.0
        for local, base, delta in self._merged():
            if delta is not None:
                exact = base.double() + delta
                rounded += float((exact.to(local.dtype).double() - exact).square().sum())
                moved += float((exact - base.double()).square().sum())
        return math.sqrt(rounded / moved) if moved else 0.0

    # -- write ---------------------------------------------------------------------------------------------------------

    def write(self, source: Source, *, keep_finer: bool = False) -> str:
        """Write base + s B A into the teacher, in place, computed in float64 and rounded once; the base where B A is 0.

        Args:
            source: The adapter.
            keep_finer: Of no effect.

        Returns:
            The checksum of the adapter's values.
        """
        found, unchanged = self._lora.write(source), True
        with torch.no_grad():
            for local, base, delta in self._merged():
                local.copy_(base if delta is None else base.double() + delta)
                unchanged = unchanged and delta is None
        increment_versions(weight for weight in self._weights() if weight.name in self._targets)
        if unchanged and self._base_checksum() != self._base:
            what = f"the base of LoRA adapter {self._adapter.lora_adapter!r} that somebody has written since attach()"
            cure = "freeze the base and do not merge adapters into it; reload the teacher, and start in another folder"
            raise StateError(what, expected="the frozen base, from which the teacher is restored", cure=cure)
        return found

    def _merged(self) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        """Yield flat pieces of the teacher and of the base, and what is added to these; None for nothing."""
        for weight, base, left, right in self._changes():
            local, changes = weight.local().detach(), bool(left.any()) and bool(right.any())
            left, right = left.to(local.device), right.to(local.device)
            inner = right.shape[1]
            offset = weight.part.start * (1 if weight.flattened else inner)
            flat, base = local.contiguous().view(-1), base.detach().contiguous().view(-1)
            for start, stop in pieces(flat.numel()):
                delta = None
                if changes:
                    first, last = (offset + start) // inner, -(-(offset + stop) // inner)
                    at = offset + start - first * inner
                    delta = (left[first:last] @ right).view(-1)[at : at + stop - start]
                yield flat[start:stop], base[start:stop].to(local.device), delta
            if not local.is_contiguous():
                local.copy_(flat.view(local.shape))

    def _changes(self) -> Iterator[tuple[Weight, Tensor, Tensor, Tensor]]:
        """Yield each weight under the LoRA, the base's values of it, and two matrices whose product is added."""
        own, base = {weight.name: weight for weight in self._weights()}, self._base_weights()
        for name, layer in self._lora.layers.items():
            for target, left, right in layer.changes(name):
                if target not in own:
                    found = f"a teacher without {target}, on which the fake score has a LoRA"
                    raise MismatchError(found, expected="the network that is the fake score's base", cure=_COPY)
                yield own[target], self._kept.get(target, base[target].local()), left, right

    def _base_weights(self) -> dict[str, Weight]:
        """Return the entries of the base's parameters, by name."""
        self._adapter._weights()  # FSDP frees what it has gathered
        return {
            f"{prefix}{name}": Weight.of(f"{prefix}{name}", parameter)
            for prefix, root in self._adapter.modules().items()
            for name, parameter in lora.base_parameters(root)
        }

    def _base_checksum(self) -> str:
        """Return the checksum of what this rank holds of the base's weights under the adapter."""
        base = self._base_weights()
        return weights_checksum([base[name] for name in self._targets], alone=True)


_COPY = (
    "make the teacher a copy of the fake score's network before the LoRA is added, in the same precision or a lower one"
)
