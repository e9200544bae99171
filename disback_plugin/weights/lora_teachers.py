"""Whole teachers of a fake score that is a LoRA adapter on an equal base: `attach` finds the adapter by itself.

A move writes W + s B A into the teacher's own weights, of the base's W, the scale s and the node's A and B
(`MergedTeacher`).

A position between two nodes interpolates A and B, as `lora` says, so that a path means the same to every teacher.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from disback_plugin.errors import MismatchError, RoleError, StateError
from disback_plugin.weights import lora
from disback_plugin.weights.marks import weights_checksum
from disback_plugin.weights.modules import check_layout, named_modules, roots_of
from disback_plugin.weights.network import ScoreNetwork
from disback_plugin.weights.sharding import FullState, Weight, increment_versions, part_of, whole_shape
from disback_plugin.weights.tensors import Checksum, Source, pieces

# Layers whose adapter is W + s B A, or its transpose. FSDP2 makes subclasses; layers of quantised bases are others.
KINDS = {"Linear", "Embedding", "Conv1d", "Conv2d", "Conv3d"}


def trained_adapter(network: Any, trained: set[int] | None) -> str | None:
    """Return the name of the LoRA adapter of a fake score that is trained; None if there is none.

    Args:
        network: The fake score; a `ScoreNetwork` of an adapter is that adapter.
        trained: The ids of the parameters that its optimizers step; None for those that require gradients.

    Raises:
        RoleError: If there are several.
    """
    if isinstance(network, ScoreNetwork) and network.lora_adapter is not None:
        return network.lora_adapter
    modules = [each for root in roots_of(network) for each in named_modules(root)]
    layers = [layer for _, layer in lora.named_layers(modules) if lora.MATRICES[0] in layer.adapter_layer_names]
    found = sorted(
        name
        for name in {name for layer in layers for name in layer.r}
        for weights in [[p for _, module in lora.adapter_modules(modules, name) for p in module.parameters()]]
        if any(p.requires_grad and (trained is None or id(p) in trained) for p in weights)
    )
    if len(found) > 1:
        raise RoleError(
            f"a fake score with several trained LoRA adapters, {found}",
            expected="one",
            cure="name it: fake_score=disback.ScoreNetwork(network, lora_adapter=NAME)",
        )
    return found[0] if found else None


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
    if isinstance(fake_score, ScoreNetwork):
        adapter = ScoreNetwork.of(fake_score, role="fake score")
    else:
        adapter = ScoreNetwork(fake_score, lora_adapter=lora_adapter, role="fake score")
    if adapter.lora_adapter is None:
        adapter.select_adapter(lora_adapter)
    if set(map(id, roots_of(teacher))) == set(map(id, roots_of(fake_score))):
        from disback_plugin.weights import added_lora

        if not live:
            found = "one network as teacher and fake score, whose forwards have to change"
            cure = "use attach(), or give the teacher an adapter of its own: lora.add_teacher(model, like=...)"
            raise RoleError(found, expected="attach(), which installs and removes hooks", cure=cure)
        added_lora.check_not_compiled(teacher)
        return added_lora.switched_off(adapter), adapter
    whole = ScoreNetwork.of(teacher, role="teacher")
    # The base may have further modules, as a discriminator's head, which training changes.
    adapter.select_adapter(lora_adapter, {name for name, _ in whole.named_tensors()})
    return MergedTeacher(whole, adapter), adapter


class Merge(NamedTuple):
    """One weight of the base and the matrices that change it.

    Attributes:
        target: The weight's name.
        base: The weight.
        scale: The factor s.
        up: The name of B.
        down: The name of A; None for 1, where B is a bias.
        transposed: Whether the weight has shape (in, out).
    """

    target: str
    base: nn.Parameter
    scale: float
    up: str
    down: str | None
    transposed: bool


class MergedTeacher(ScoreNetwork):
    """A whole teacher whose nodes are LoRA adapters of another network on an equal base, which no optimizer steps.

    The base is the memory from which node 0 is restored, so it has to stay as it is; the teacher's other weights, and
    its buffers, are never written. Where FSDP cuts the two networks at other places, as FSDP1 does, each rank keeps the
    base's values of its part of the teacher on the host.

    Args:
        teacher: The teacher.
        adapter: The LoRA adapter.

    Raises:
        RoleError: If the adapter has layers of other kinds, or the teacher is cut along another dimension than 0.
        MismatchError: If the base is another architecture.
    """

    def __init__(self, teacher: ScoreNetwork, adapter: ScoreNetwork) -> None:
        vars(self).update(vars(teacher))
        self._adapter = adapter
        self._kept = dict(self._gather_base())
        layout = {weight.name: weight.meta.shape for weight in adapter._weights()}
        for merge, weight, _ in self._targets():
            shape, up, down = weight.meta.shape, layout[merge.up], layout.get(merge.down or "")
            fits = down is None or (up[1] == down[0] and up[0] * down[1:].numel() == shape.numel())
            if shape != whole_shape(merge.base) or not fits:
                found = f"{merge.target} of shape {tuple(shape)} under a LoRA of another shape"
                raise MismatchError(found, expected="an ungrouped layer of one shape in both networks", cure=_COPY)
            if weight.part.dim and weight.part.stop is not None:
                found = f"{merge.target} of the teacher, cut along dimension {weight.part.dim}"
                cure = "shard it along dimension 0 (fully_shard), or not at all"
                raise RoleError(found, expected="a teacher cut along dimension 0", cure=cure)
        self._base = self._base_checksum()

    def _gather_base(self) -> Iterator[tuple[str, Tensor]]:
        """Yield this rank's part of the teacher's parameters as the base has them, where the base is cut elsewhere.

        All ranks must call.
        """
        own = {weight.name: weight for weight in self._weights()}
        for name, parameter in self._base_parameters():
            like, weight = Weight.of(name, parameter), own.get(name)
            if weight is not None and like.meta.shape == weight.meta.shape and like.part != weight.part:
                yield name, part_of(like.whole().detach(), weight.part).cpu().clone()

    # -- what a path sees: the adapter ---------------------------------------------------------------------------------

    def full_state(self) -> FullState:
        """Return node 0: an adapter that changes nothing, the same in every run on this base."""
        return FullState(lora.neutral_state(self._adapter._weights()))

    def check_same_layout(self, other: ScoreNetwork) -> None:
        """Raise MismatchError unless `other` is an adapter of the same layers, rank and scale on an equal base."""
        self._adapter.check_same_layout(other)

    def check_original(self) -> None:
        """Raise MismatchError unless the teacher's parameters equal the base's at its precision."""
        base = {name: Weight.of(name, parameter) for name, parameter in self._base_parameters()}
        for weight in self._weights():
            if not weight.is_parameter:
                continue
            like, own = base.get(weight.name), weight.local()
            base_values = self._kept.get(weight.name, None if like is None else like.local())
            if base_values is None or not torch.equal(base_values.to(own), own):
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
        rounded = moved = 0.0
        for _, local, base, delta in self._merged(source, Checksum()):
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
        check_layout(source.layout(), self._adapter._weights(), "teacher", "the state")
        total, unchanged = Checksum(), True
        with torch.no_grad():
            for _, local, base, delta in self._merged(source, total):
                local.copy_(base if delta is None else base.double() + delta)
                unchanged = unchanged and delta is None
        increment_versions([weight for _, weight, _ in self._targets()])
        if unchanged and self._base_checksum() != self._base:
            found = f"the base of LoRA adapter {self._adapter.lora_adapter!r} that somebody has written since attach()"
            cure = "freeze the base and do not merge adapters into it; reload the teacher, and start in another folder"
            raise StateError(found, expected="the frozen base, from which the teacher is restored", cure=cure)
        return total.digest()

    def _base_checksum(self) -> str:
        """Return the checksum of what this rank holds of the base's weights under the adapter."""
        return weights_checksum([Weight.of(merge.target, merge.base) for merge in self._merges()], alone=True)

    def _merged(self, source: Source, total: Checksum) -> Iterator[tuple[Weight, Tensor, Tensor, Tensor | None]]:
        """Yield pieces of the teacher's weights, flat: the entry, the teacher's, the base's, and what is added or None.

        Args:
            source: The adapter.
            total: A checksum, to which all values of the adapter are added.
        """
        values = dict[str, Tensor]()
        for name, meta in source.layout().items():
            read = [source.read(name, *piece).clone() for piece in pieces(meta.shape.numel())]
            values[name] = torch.cat(read).view(meta.shape)
            total.add(name, values[name])
        for merge, weight, like in self._targets():
            local, base = weight.local().detach(), like.local().detach().contiguous().view(-1)
            up = values[merge.up].flatten(1) if merge.down else values[merge.up].view(-1, 1)
            down = values[merge.down].flatten(1) if merge.down else torch.ones(1, 1)
            left, right = (down.T, up.T) if merge.transposed else (up, down)
            changes = bool(left.any()) and bool(right.any())
            left, right = (matrix.to(local.device, torch.float64) for matrix in (merge.scale * left.double(), right))
            inner, offset = right.shape[1], weight.part.start * (1 if weight.flattened else right.shape[1])
            flat = local.view(-1) if local.is_contiguous() else torch.empty_like(base, dtype=local.dtype)
            for start, stop in pieces(flat.numel()):
                first, last = (offset + start) // inner, -(-(offset + stop) // inner)
                delta = None
                if changes:
                    at = offset + start - first * inner
                    delta = (left[first:last] @ right).view(-1)[at : at + stop - start]
                yield weight, flat[start:stop], base[start:stop].to(local.device), delta
            if not local.is_contiguous():
                local.copy_(flat.view(local.shape))

    def _base_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        self._adapter._weights()  # FSDP frees what it has gathered
        for prefix, root in self._adapter.modules().items():
            for name, parameter in lora.base_parameters(root):
                yield f"{prefix}{name}", parameter

    def _merges(self) -> Iterator[Merge]:
        names = {weight.name for weight in self._adapter._weights()}
        for prefix, root in self._adapter.modules().items():
            yield from _merges(root, prefix, str(self._adapter.lora_adapter), names)

    def _targets(self) -> Iterator[tuple[Merge, Weight, Weight]]:
        """Yield each change of a weight, with the teacher's and the base's entry of that weight."""
        own = {weight.name: weight for weight in self._weights()}
        for merge in self._merges():
            if merge.target not in own:
                found = f"a teacher without {merge.target}, on which the fake score has a LoRA"
                raise MismatchError(found, expected="the network that is the fake score's base", cure=_COPY)
            kept = self._kept.get(merge.target)
            yield merge, own[merge.target], Weight.of(merge.target, merge.base if kept is None else kept)


_COPY = (
    "make the teacher a copy of the fake score's network before the LoRA is added, in the same precision or a lower one"
)


def _merges(root: nn.Module, prefix: str, lora_adapter: str, names: set[str]) -> Iterator[Merge]:
    """Yield the changes that an adapter makes; raise RoleError if a layer of it is of another kind.

    Args:
        root: The network that has the adapter.
        prefix: A prefix of all names.
        lora_adapter: The adapter's name.
        names: Names of all tensors of the adapter.
    """
    for name, layer in lora.adapter_layers(root, lora_adapter, "fake score"):
        base, at = layer.get_base_layer(), f"{prefix}{name}"
        kinds = {kind.__name__ for kind in type(layer).__mro__ if kind.__module__ == "peft.tuners.lora.layer"}
        if not kinds & KINDS:
            found = f"a LoRA on {name} of kind {type(layer).__name__}"
            raise RoleError(
                found,
                expected=f"layers of kinds {sorted(KINDS)}",
                cure="omit it from target_modules, or load the base unquantised",
            )
        scale, embedding = layer.scaling[lora_adapter], "Embedding" in kinds
        infix = "embedding_" if embedding else ""
        up, down = (f"{at}lora_{infix}{matrix}.weight" for matrix in "BA")
        transposed = embedding or bool(getattr(layer, "fan_in_fan_out", False))
        yield Merge(f"{at}weight", base.weight, scale, up, down, transposed)
        if f"{at}lora_B.bias" in names:
            yield Merge(f"{at}bias", base.bias, scale, f"{at}lora_B.bias", None, transposed=False)
