"""The entries of a network's table of weights, and the part of each that one rank holds.

`torch.distributed.fsdp.fully_shard` (FSDP2) makes each parameter a DTensor. It is cut along one dimension into as many
chunks as there are ranks, the last ones smaller or empty, and perhaps repeated over a second dimension of the mesh
(HSDP). FSDP1 cuts a flattened unit at arbitrary places (`fsdp1`, imported only where FSDP1 is in use). Parts are read
and written without communication.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from disback_plugin import distributed
from disback_plugin.weights.checksum import Checksum
from disback_plugin.weights.tensors import Part, Source, TensorMeta, masked

if TYPE_CHECKING:
    from disback_plugin.weights.fsdp1 import FlatSharding

__all__ = ["FullState", "Weight", "has_gradient", "local_tensor", "read_part", "whole_shape"]


class Sharding:
    """How ranks share a DTensor. `fsdp1.FlatSharding` has the same attributes and methods.

    Attributes:
        shape: The shape of the whole tensor.
        part: The part that this rank holds.
        group: The process group of the ranks that share the tensor; None if each of them holds all of it.
        device: The device from which the group sends.
        chunk: This rank in the group, the number of ranks and the dimension that is cut into equal chunks; None if the
            tensor is cut at other places, or not at all.
    """

    def __init__(self, tensor: Any) -> None:
        self.tensor, self.shape, self.part, mesh = tensor, tensor.shape, Part(tensor.shape), tensor.device_mesh
        self.group, self.device = None, torch.device(mesh.device_type)
        self.chunk: tuple[int, int, int] | None = None
        coordinates = mesh.get_coordinate()
        for axis, placement in enumerate(tensor.placements):
            if placement.is_shard() and coordinates is not None:
                self.chunk = coordinates[axis], mesh.size(axis), placement.dim % tensor.ndim
                self.part, self.group = Part.chunk(tensor.shape, *self.chunk), mesh.get_group(axis)

    def problem(self) -> tuple[str, str] | None:
        """Return why the tensor cannot be written part by part, and the cure; None if it can."""
        from torch.distributed.tensor import Replicate, Shard

        kinds = [type(placement) for placement in self.tensor.placements if type(placement) is not Replicate]
        if kinds not in ([], [Shard]):
            cure = "shard it along one dimension of the mesh (fully_shard), without TP"
            return f"is laid out as {self.tensor.placements}", cure
        if self.tensor.device_mesh.get_coordinate() is None:
            return "is on a device mesh that this rank is no part of", "attach on the ranks of that mesh only"
        return None

    def whole(self) -> Tensor:
        """Return the whole tensor. All ranks that share it have to call."""
        # Offloaded shards are on the host, from where the group may have no way to send them.
        tensor = self.tensor.detach() if self.group is None else self.tensor.detach().to(self.device)
        whole: Tensor = tensor.full_tensor()
        return whole


class Weight:
    """One entry of the table of a network: a live parameter or persistent buffer under its canonical name.

    Args:
        name: The canonical name.
        tensor: The live tensor.

    Attributes:
        meta: Its dtype and its whole shape.
        sharding: How ranks share it; None of a tensor that is no matter of several ranks.
        part: The part that this rank holds.
        is_parameter: Whether it is a parameter, not a buffer.
        flattened: Whether FSDP1 has flattened it.
        tied_to: The first name of the same tensor, if this is another of its names.
    """

    __slots__ = ("flattened", "is_parameter", "meta", "name", "part", "sharding", "tensor", "tied_to")

    def __init__(self, name: str, tensor: Tensor) -> None:
        self.name, self.tensor = name, tensor
        self.is_parameter = isinstance(tensor, nn.Parameter)
        self.tied_to: str | None = None
        self.sharding: Sharding | FlatSharding | None = Sharding(tensor) if hasattr(tensor, "to_local") else None
        self.flattened = getattr(tensor, "_fsdp_flattened", False) is True
        if self.flattened:
            from disback_plugin.weights import fsdp1

            self.sharding = fsdp1.sharding_of(tensor)
        shape = tensor.shape if self.sharding is None else self.sharding.shape
        self.meta = TensorMeta(tensor.dtype, shape)
        self.part = Part(shape) if self.sharding is None else self.sharding.part

    def local(self) -> Tensor:
        """Return the memory of this rank."""
        return self.tensor if self.sharding is None else local_tensor(self.tensor)

    def whole(self) -> Tensor:
        """Return the whole tensor. All ranks that share it have to call."""
        return self.tensor if self.sharding is None else self.sharding.whole()


def local_tensor(tensor: Tensor) -> Tensor:
    """Return the memory that this rank holds of a tensor: a DTensor's local one, any other tensor itself."""
    if not hasattr(tensor, "to_local"):
        return tensor
    with torch.no_grad():
        local: Tensor = tensor.to_local()
    return local


def whole_shape(tensor: Tensor) -> torch.Size:
    """Return the shape of a tensor, or the whole shape of a parameter that FSDP1 has flattened.

    Example:
        >>> whole_shape(torch.zeros(2, 3))
        torch.Size([2, 3])
    """
    return Weight("", tensor).meta.shape


def has_gradient(parameter: Tensor) -> bool:
    """Return whether a parameter has a gradient, perhaps on other ranks while this rank holds nothing of it."""
    if parameter.grad is not None:
        return True
    if parameter.numel() or not getattr(parameter, "_fsdp_flattened", False):
        return False
    from disback_plugin.weights import fsdp1

    return fsdp1.unit_has_gradient(parameter)


def read_part(
    flat: Tensor, part: Part, source: Source, name: str, dtype: torch.dtype, total: Checksum, names: Iterable[str]
) -> None:
    """Read a part of a tensor from a source into memory.

    Args:
        flat: Memory on the CPU, shape (elements of the part,), of any dtype.
        part: The part to read.
        source: The source to read from.
        name: Name of the tensor there.
        dtype: Its dtype there.
        total: A checksum, to which all values are added before any cast.
        names: The names under which they are added.
    """
    for cell in part.cells():
        piece = flat[cell.at]
        if cell.keep is None and piece.dtype == dtype:
            values = source.read(name, cell.start, cell.stop, out=piece)
        else:
            values = source.read(name, cell.start, cell.stop)
            piece.copy_(values if cell.keep is None else values[cell.keep])
        counted = masked(values, cell)
        for each in names:
            total.add(each, counted)


def _count(total: Checksum, weight: Weight, chunk: Part | None = None) -> None:
    """Add what this rank holds of a weight to a checksum; with `chunk`, only what lies in those rows of dimension 0."""
    part, local = weight.part, weight.local()
    if part.stop is None and chunk is None:
        total.add(weight.name, local)
        return
    flat = local.detach().reshape(-1)
    total.add(weight.name, flat.new_zeros(0))
    inner = prod(weight.meta.shape[1:])
    first, last = (0, part.shape.numel()) if chunk is None else (chunk.start * inner, (chunk.stop or 0) * inner)
    for cell in part.cells():
        values = flat.new_zeros(cell.stop - cell.start)
        values[slice(None) if cell.keep is None else cell.keep] = flat[cell.at]
        values[: max(first - cell.start, 0)] = 0
        values[max(last - cell.start, 0) :] = 0
        total.add(weight.name, values)


def add_up(total: Checksum, weights: Iterable[Weight]) -> None:
    """Replace the sums of sharded weights by the sums over all ranks; all ranks call, and send 512 bytes a tensor."""
    groups: dict[int, list[Weight]] = {}
    for weight in weights:
        if weight.sharding is not None and weight.sharding.group is not None:
            groups.setdefault(id(weight.sharding.group), []).append(weight)
    for members in groups.values():
        sharding = members[0].sharding
        assert sharding is not None
        sums = torch.stack([total.sums[weight.name] for weight in members]).to(sharding.device)
        torch.distributed.all_reduce(sums, group=sharding.group)
        total.sums |= dict(zip((weight.name for weight in members), sums.cpu(), strict=True))


def total_checksum(weights: list[Weight]) -> str:
    """Return the checksum of all values; all ranks that share them have to call."""
    total = Checksum()
    for weight in weights:
        _count(total, weight)
    add_up(total, weights)
    return total.digest()


def chunk_checksum(weights: list[Weight], rank: int, ranks: int, dim: int = 0) -> Checksum:
    """Return the checksum of one of several chunks of each parameter, as far as this rank holds it."""
    total = Checksum()
    for weight in weights:
        shape = weight.meta.shape
        _count(total, weight, Part.chunk(shape, rank, ranks, dim) if weight.is_parameter and shape else None)
    return total


class FullState(Mapping[str, Tensor]):
    """A lazy full state dict. Reading a sharded tensor on rank 0 gathers its parts from the other ranks.

    If it is `sharded`, only rank 0 can read, inside `distributed.on_main_process(action, state)`.

    Args:
        state: Live tensors by name, tied ones under each name; or the weights of a network.

    Attributes:
        layout: Dtype and shape of each tensor.
        aliases: {name: first name} of tensors that are tied to another.
        sharded: Whether some tensors are distributed over ranks.

    Example:
        >>> w = torch.zeros(2)
        >>> state = FullState({"left": w, "right": w})
        >>> state.aliases, list(state.own())
        ({'right': 'left'}, ['left'])
    """

    def __init__(self, state: Mapping[str, Tensor] | Iterable[Weight]) -> None:
        weights = [Weight(*item) for item in state.items()] if isinstance(state, Mapping) else state
        self._weights = {weight.name: weight for weight in weights}
        self.layout: dict[str, TensorMeta] = {name: weight.meta for name, weight in self._weights.items()}
        self.sharded = any(weight.sharding is not None for weight in self._weights.values())
        self.aliases: dict[str, str] = {}
        first: dict[object, str] = {}
        for name, weight in self._weights.items():
            local = weight.local()
            key = (local.data_ptr(), local.dtype, local.shape, local.stride()) if local.numel() else id(weight.tensor)
            if first.setdefault(key, name) != name:
                self.aliases[name] = first[key]

    @classmethod
    def of(cls, state: Mapping[str, Tensor]) -> FullState:
        """Return `state` as a FullState."""
        return state if isinstance(state, FullState) else cls(state)

    def __getitem__(self, name: str) -> Tensor:
        """Return a whole tensor, detached; it is live unless it is sharded."""
        weight = self._weights[name]
        if weight.sharding is not None:
            distributed.broadcast(name)
        return weight.whole().detach()

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)

    def serve(self, name: str) -> None:
        """Send this rank's part of a tensor that rank 0 reads."""
        self._weights[name].whole()

    def own(self) -> list[str]:
        """Return the names without those of tied tensors after the first."""
        return [name for name in self._weights if name not in self.aliases]

    def flat(self, name: str) -> Tensor:
        """Return a whole tensor on the CPU in row-major order, shape (elements,)."""
        return self[name].cpu().contiguous().view(-1)

    def overlapping(self) -> set[str]:
        """Return the names of different tensors in one memory, as a slice that is a buffer of its own.

        Parameters that FSDP1 has put side by side do not overlap.
        """
        local = {name: self._weights[name].local() for name in self.own() if not self._weights[name].flattened}
        addresses = {name: t.untyped_storage().data_ptr() for name, t in local.items() if t.numel()}
        used = Counter(addresses.values())
        return {name for name, address in addresses.items() if used[address] > 1}
