"""The part of a tensor that one rank holds, read and written without communication.

`torch.distributed.fsdp.fully_shard` (FSDP2) makes each parameter a DTensor. It is cut along one dimension into as many
chunks as there are ranks, the last ones smaller or empty, and perhaps repeated over a second dimension of the mesh
(HSDP). FSDP1 cuts a flattened unit at arbitrary places (`fsdp1`, imported only where FSDP1 is in use).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from disback_plugin import distributed
from disback_plugin.weights.checksum import Checksum
from disback_plugin.weights.tensors import Part, Sharding, Source, TensorMeta, masked

__all__ = [
    "FullState",
    "Weight",
    "add_up",
    "count",
    "has_gradient",
    "is_flattened",
    "local_tensor",
    "problem",
    "read_part",
    "whole_shape",
]


class Weight:
    """One entry of the table of a network: a live parameter or persistent buffer under its canonical name.

    Args:
        name: The canonical name.
        tensor: The live tensor.

    Attributes:
        meta: Its dtype and its whole shape.
        sharding: How ranks share it; None if each of them holds all of it.
        part: The part that this rank holds.
        is_parameter: Whether it is a parameter, not a buffer.
        is_dtensor: Whether it is a DTensor, sharded or repeated.
        flattened: Whether FSDP1 has flattened it.
        tied_to: The first name of the same tensor, if it is tied and this is another of its names.
    """

    __slots__ = ("flattened", "is_dtensor", "is_parameter", "meta", "name", "part", "sharding", "tensor", "tied_to")

    def __init__(self, name: str, tensor: Tensor) -> None:
        self.name, self.tensor = name, tensor
        self.is_parameter = isinstance(tensor, nn.Parameter)
        self.is_dtensor = hasattr(tensor, "to_local")
        self.flattened = getattr(tensor, "_fsdp_flattened", False) is True
        self.tied_to: str | None = None
        self.sharding: Sharding | None = None
        shape = tensor.shape
        if self.is_dtensor:
            self.sharding = _sharding_of(tensor)
        elif self.flattened:
            from disback_plugin.weights import fsdp1

            self.sharding = fsdp1.sharding_of(tensor)
            shape = tensor.shape if self.sharding is None else self.sharding.shape
        self.meta = TensorMeta(tensor.dtype, shape)
        self.part = Part(shape) if self.sharding is None else self.sharding.part_of(self.sharding.rank)

    @property
    def sharded(self) -> bool:
        """Whether the tensor is distributed over ranks: sharded, or a DTensor that is repeated on each."""
        return self.is_dtensor or self.sharding is not None

    def local(self) -> Tensor:
        """Return the memory of this rank."""
        return local_tensor(self.tensor) if self.is_dtensor else self.tensor

    def gathered(self) -> Tensor | None:
        """Return the whole tensor on rank 0 and None on the others; all ranks that share it have to call."""
        import torch.distributed as dist

        sharding, local = self.sharding, self.local()
        if sharding is None:
            return local if distributed.is_main_process() else None
        if 0 not in dist.get_process_group_ranks(sharding.group):
            return None  # another replica: the ranks of rank 0's own send
        # Offloaded shards are on the host, from where the group may have no way to send them.
        own = local.detach().to(sharding.device)
        parts = [sharding.part_of(rank) for rank in range(sharding.ranks)]
        sent = own.new_zeros(max(part.elements for part in parts))
        sent[: own.numel()] = own.reshape(-1)
        chunks = [torch.empty_like(sent) for _ in parts] if distributed.is_main_process() else None
        received = None if chunks is None else [chunk.view(torch.uint8) for chunk in chunks]
        dist.gather(sent.view(torch.uint8), received, dst=0, group=sharding.group)
        if chunks is None:
            return None
        pairs = zip(chunks, parts, strict=True)
        return torch.cat([c[: p.elements].view(p.local_shape) for c, p in pairs], parts[0].dim).view(self.meta.shape)


def local_tensor(tensor: Tensor) -> Tensor:
    """Return the memory that this rank holds of a tensor: a DTensor's local one, any other tensor itself."""
    if not hasattr(tensor, "to_local"):
        return tensor
    with torch.no_grad():
        local: Tensor = tensor.to_local()
    return local


def problem(tensor: Tensor) -> tuple[str, str] | None:
    """Return why a distributed tensor cannot be written part by part, and the cure; None if it can."""
    if is_flattened(tensor):
        from disback_plugin.weights import fsdp1

        return fsdp1.problem(tensor)
    from torch.distributed.tensor import Replicate, Shard

    placements = [p for p in tensor.placements if type(p) is not Replicate]  # type: ignore[attr-defined]
    if any(type(placement) is not Shard for placement in placements) or len(placements) > 1:
        return f"is laid out as {placements}", "shard it along one dimension of the mesh (fully_shard), without TP"
    if tensor.device_mesh.get_coordinate() is None:  # type: ignore[attr-defined]
        return "is on a device mesh that this rank is no part of", "attach on the ranks of that mesh only"
    return None


def _sharding_of(tensor: Any) -> Sharding | None:
    """Return how ranks share a DTensor; None if each of them holds all of it."""
    for axis, placement in enumerate(tensor.placements):
        if placement.is_shard():
            mesh = tensor.device_mesh
            device = torch.device(mesh.device_type)
            # A group knows its rank too, but to look it up takes longer than to decode a small tensor.
            rank, dim = mesh.get_coordinate()[axis], placement.dim % tensor.ndim
            return Sharding(tensor.shape, rank, mesh.size(axis), mesh.get_group(axis), device, dim)
    return None


# -- FSDP1, by its mark ------------------------------------------------------------------------------------------------


def is_flattened(tensor: Tensor) -> bool:
    """Return whether FSDP1 has marked a parameter as flattened."""
    return getattr(tensor, "_fsdp_flattened", False) is True


def whole_shape(tensor: Tensor) -> torch.Size:
    """Return the shape of a tensor, and the whole shape of a parameter that FSDP1 has flattened.

    Example:
        >>> whole_shape(torch.zeros(2, 3))
        torch.Size([2, 3])
    """
    return Weight("", tensor).meta.shape if is_flattened(tensor) else tensor.shape


def has_gradient(parameter: Tensor) -> bool:
    """Return whether a parameter has a gradient, perhaps on other ranks while this rank holds nothing of it."""
    if parameter.grad is not None:
        return True
    if parameter.numel() or not is_flattened(parameter):
        return False
    from disback_plugin.weights import fsdp1

    return fsdp1.unit_has_gradient(parameter)


# -- read, count and gather --------------------------------------------------------------------------------------------


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
        if cell.complete and piece.dtype == dtype:
            values = source.read(name, cell.start, cell.stop, out=piece)
        else:
            values = source.read(name, cell.start, cell.stop)
            piece.copy_(values[cell.keep])
        counted = values if part.stop is None else masked(values, cell)
        for each in names:
            total.add(each, counted)


def count(total: Checksum, weight: Weight, wanted: Part | None = None) -> None:
    """Add what this rank holds of a weight to a checksum; with `wanted`, only rows of that part of dimension 0."""
    part, local = weight.part, weight.local()
    if part.stop is None and wanted is None:
        total.add(weight.name, local)
        return
    flat = local.detach().reshape(-1)
    total.add(weight.name, flat.new_zeros(0))
    first, last = 0, part.shape.numel()
    if wanted is not None:
        inner = prod(wanted.shape[1:])
        first, last = wanted.start * inner, (wanted.stop or 0) * inner
    for cell in part.cells():
        values = flat.new_zeros(cell.stop - cell.start)
        values[cell.keep] = flat[cell.at]
        values[: max(first - cell.start, 0)] = 0
        values[max(last - cell.start, 0) :] = 0
        total.add(weight.name, values)


def add_up(total: Checksum, weights: Iterable[Weight]) -> None:
    """Replace the sums of sharded weights by the sums over all ranks; all ranks call, and send 512 bytes a tensor."""
    groups: dict[int, tuple[Sharding, list[str]]] = {}
    for weight in sorted((w for w in weights if w.sharding is not None), key=lambda w: w.name):
        assert weight.sharding is not None
        groups.setdefault(id(weight.sharding.group), (weight.sharding, []))[1].append(weight.name)
    for sharding, names in groups.values():
        sums = torch.stack([total.sums(name) for name in names]).to(sharding.device)
        torch.distributed.all_reduce(sums, group=sharding.group)
        for name, column in zip(names, sums.cpu(), strict=True):
            total.replace(name, column)


class FullState(Mapping[str, Tensor]):
    """A lazy full state dict. Reading a sharded tensor on rank 0 gathers its shards from the other ranks.

    Args:
        state: Live tensors by name, tied ones under each name; or the weights of a network.

    Attributes:
        layout: Dtype and shape of each tensor.
        aliases: {name: first name} of tensors that are tied to another.
        sharded: Whether only rank 0 can read, while the other ranks `serve` (`distributed.on_main_process`).

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
        self.sharded = any(weight.sharded for weight in self._weights.values())
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
        if not weight.sharded:
            return weight.tensor.detach()
        distributed.broadcast(name)
        whole = weight.gathered()
        assert whole is not None, "only rank 0 reads sharded weights"
        return whole.detach()

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)

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

    def serve(self) -> None:
        """Send the parts that rank 0 asks for, until it calls `stop_serving`; the other ranks call this."""
        nothing: str | None = None
        while (name := distributed.broadcast(nothing)) is not None:
            self._weights[name].gathered()

    def stop_serving(self) -> None:
        """Let `serve` return on the other ranks."""
        distributed.broadcast(None)
