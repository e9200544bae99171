"""What one process holds of a tensor that several share: FSDP's shards, read and written without communication.

`torch.distributed.fsdp.fully_shard` makes each parameter a DTensor: it is cut along one dimension into as many chunks
as there are processes, the last ones smaller or empty, and perhaps repeated over a second dimension of the mesh (HSDP).
FSDP1 cuts a flattened unit wherever its equal stretches end (`flattening`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from disback_plugin.weights.checksum import Checksum
from disback_plugin.weights.fsdp1 import FlatSlice, flattened, shape_of, stretch_of
from disback_plugin.weights.tensor_meta import GRAIN, PIECE, pieces

__all__ = ["Cell", "Part", "add_up", "chunk_of", "count", "cut_of", "gather", "held", "is_sharded", "masked", "trouble"]


class Cell(NamedTuple):
    """A stretch of a tensor that is read at once, and what of it is held here.

    Attributes:
        start: First element to read, in the whole tensor's row-major order.
        stop: End of what is read.
        keep: Which of the elements read are held here.
        at: Where those stand in the local tensor, in its row-major order.
    """

    start: int
    stop: int
    keep: slice | Tensor
    at: slice

    @property
    def complete(self) -> bool:
        """Whether all that is read is held here."""
        return bool(self.at.stop - self.at.start == self.stop - self.start)


@dataclass(frozen=True)
class Part:
    """Rows [start, stop) along one dimension of a tensor: what one process holds.

    Args:
        shape: Of the whole tensor.
        dim: The dimension that is cut.
        start: First index along it.
        stop: End; None for all of it, which makes the part the whole tensor.

    Example:
        >>> Part(torch.Size([4, 3]), dim=0, start=1, stop=3).elements
        6
    """

    shape: torch.Size
    dim: int = 0
    start: int = 0
    stop: int | None = None

    @property
    def elements(self) -> int:
        """Number of elements held."""
        return self.local_shape.numel()

    @property
    def local_shape(self) -> torch.Size:
        """Shape of what is held."""
        if self.stop is None:
            return self.shape
        return torch.Size((*self.shape[: self.dim], self.stop - self.start, *self.shape[self.dim + 1 :]))

    def cells(self, grain: int = GRAIN) -> Iterator[Cell]:
        """Yield what is to be read to have the part: within pieces, from a multiple of `grain` to one or to the end.

        Args:
            grain: Divides `PIECE` and is a multiple of `GRAIN`.
        """
        total = self.shape.numel()
        if self.stop is None:
            for start, stop in pieces(total):
                yield Cell(start, stop, slice(0, stop - start), slice(start, stop))
            return
        inner = prod(self.shape[self.dim + 1 :])
        if prod(self.shape[: self.dim]) == 1:
            yield from _stretch(self.start * inner, self.stop * inner, total, grain)
            return
        # Cut across the rows: the file is read as a whole, piece by piece.
        done = 0
        for start, stop in pieces(total):
            index = torch.arange(start, stop, device="cpu") // inner % self.shape[self.dim]
            keep = (index >= self.start) & (index < self.stop)
            count = int(keep.sum())
            if count:
                yield Cell(start, stop, keep, slice(done, done + count))
            done += count


def _stretch(first: int, last: int, total: int, grain: int) -> Iterator[Cell]:
    """Yield the cells of elements [first, last)."""
    for piece in range(first - first % PIECE, last if first < last else 0, PIECE):
        lo, hi = max(piece, first), min(piece + PIECE, last)
        cuts = [lo, hi]
        if hi - lo > 64 * grain:  # what is complete is decoded in place: the ends apart, so that most of it is
            cuts = sorted({lo, -(-lo // grain) * grain, hi if hi == total else hi - hi % grain, hi})
        for a, b in pairwise(cuts):
            start, stop = a - a % grain, min(-(-b // grain) * grain, total)
            yield Cell(start, stop, slice(a - start, b - start), slice(a - first, b - first))


def chunk_of(shape: torch.Size, rank: int, ranks: int, dim: int = 0) -> Part:
    """Return what one of several processes holds of a tensor, as torch cuts it: equal chunks, the last ones smaller.

    Example:
        >>> [chunk_of(torch.Size([5]), rank, 4).elements for rank in range(4)]
        [2, 2, 1, 0]
    """
    size = shape[dim]
    rows = -(-size // ranks)
    return Part(shape, dim, min(rank * rows, size), min((rank + 1) * rows, size))


def is_sharded(tensor: Tensor) -> bool:
    """Return whether a tensor is a DTensor, cut or repeated over processes, or what FSDP1 has left of one."""
    return hasattr(tensor, "to_local") or _stretch_held(tensor) is not None


def _stretch_held(tensor: Tensor) -> FlatSlice | None:
    """Return where FSDP1 keeps a tensor of which no process holds all."""
    stretch = stretch_of(tensor)
    return None if stretch is None or stretch.ranks == 1 else stretch


def trouble(tensor: Tensor) -> tuple[str, str] | None:
    """Return why what is sharded cannot be written shard by shard, and the cure; None if it can."""
    stretch = _stretch_held(tensor)
    if stretch is not None:
        start, stop = stretch.held_by(stretch.rank)
        if stretch.trouble is None and tensor.numel() != stop - start:
            return "is not in shards now", "use it outside forwards and outside FSDP.summon_full_params"
        return stretch.trouble
    if not hasattr(tensor, "to_local"):
        unknown = flattened(tensor) and stretch_of(tensor) is None
        return ("is in an FSDP1 unit that cannot be found", "keep the wrapped module alive") if unknown else None
    from torch.distributed.tensor import Replicate, Shard

    placements = [p for p in tensor.placements if type(p) is not Replicate]  # type: ignore[attr-defined]
    if any(type(placement) is not Shard for placement in placements) or len(placements) > 1:
        return f"is laid out as {placements}", "shard it along one dimension of the mesh (fully_shard), without TP"
    if tensor.device_mesh.get_coordinate() is None:  # type: ignore[attr-defined]
        return "is on a device mesh that this rank is no part of", "attach on the ranks of that mesh only"
    return None


def held(tensor: Tensor) -> tuple[Tensor, Part]:
    """Return the memory of this process and what it holds of the tensor. A plain tensor is held as a whole.

    Of what FSDP1 has flattened that is a part of the flat tensor.
    """
    if not hasattr(tensor, "to_local"):
        stretch = _stretch_held(tensor)
        return tensor, Part(tensor.shape) if stretch is None else _part(stretch, stretch.rank)
    with torch.no_grad():
        local: Tensor = tensor.to_local()
    cut = cut_of(tensor)
    return local, Part(tensor.shape) if cut is None else chunk_of(tensor.shape, *cut)


def _part(stretch: FlatSlice, rank: int) -> Part:
    return Part(torch.Size([stretch.shape.numel()]), 0, *stretch.held_by(rank))


def cut_of(tensor: Tensor) -> tuple[int, int, int] | None:
    """Return this process's rank among those that share a DTensor, how many they are, and the dimension that is cut;
    None if each of them holds all of it, or FSDP1 has cut it anywhere.
    """
    axis = _axis(tensor)
    if axis is None:
        return None
    mesh, placement = tensor.device_mesh, tensor.placements[axis]  # type: ignore[attr-defined]
    # A group knows its rank too, but to look it up takes longer than to decode a small tensor.
    return mesh.get_coordinate()[axis], mesh.size(axis), placement.dim % tensor.ndim


def _axis(tensor: Tensor) -> int | None:
    """Return the dimension of the mesh over which a tensor is cut."""
    placements = getattr(tensor, "placements", ())
    return next((axis for axis, placement in enumerate(placements) if placement.is_shard()), None)


def masked(values: Tensor, cell: Cell) -> Tensor:
    """Return what was read of a cell, with zeros where it is not held here."""
    if cell.complete:
        return values
    own = torch.zeros_like(values)
    own[cell.keep] = values[cell.keep]
    return own


def _sharers(tensor: Tensor) -> tuple[Any, torch.device, list[Part]] | None:
    """Return the group that shares a tensor, where it sends from, and what each of it holds; None if each holds all."""
    stretch, axis = _stretch_held(tensor), _axis(tensor)
    if stretch is not None:
        return stretch.group, torch.device(stretch.device), [_part(stretch, rank) for rank in range(stretch.ranks)]
    if axis is None:
        return None
    mesh, (_, ranks, dim) = tensor.device_mesh, cut_of(tensor) or (0, 1, 0)  # type: ignore[attr-defined]
    parts = [chunk_of(tensor.shape, rank, ranks, dim) for rank in range(ranks)]
    return mesh.get_group(axis), torch.device(mesh.device_type), parts


def gather(tensor: Tensor) -> Tensor | None:
    """Return a whole tensor on rank 0, and None on the others that share it, which call too and send what they hold."""
    sharers = _sharers(tensor)
    local, _ = held(tensor)
    if sharers is None:
        return local if dist.get_rank() == 0 else None
    group, device, parts = sharers
    members = dist.get_process_group_ranks(group)
    if 0 not in members:
        return None  # another replica: that of rank 0 sends
    # Offloaded shards are on the host, where the group may have no way to send them.
    own = local.detach().to(device)
    sent = own.new_zeros(max(part.elements for part in parts))
    sent[: own.numel()] = own.reshape(-1)
    receiver = dist.get_rank() == 0
    chunks = [torch.empty_like(sent) for _ in parts] if receiver else None
    into = None if chunks is None else [chunk.view(torch.uint8) for chunk in chunks]
    dist.gather(sent.view(torch.uint8), into, dst=0, group=group)
    if chunks is None:
        return None
    pairs = zip(chunks, parts, strict=True)
    return torch.cat([c[: p.elements].view(p.local_shape) for c, p in pairs], parts[0].dim).view(shape_of(tensor))


def count(total: Checksum, name: str, tensor: Tensor, wanted: Part | None = None) -> None:
    """Add what is held here of a tensor to a checksum, or what of that is in a part cut along the first dimension."""
    local, part = held(tensor)
    if part.stop is None and wanted is None:
        total.add(name, local)
        return
    flat = local.detach().reshape(-1)
    total.add(name, flat.new_zeros(0))
    first, last = 0, part.shape.numel()
    if wanted is not None:
        inner = prod(wanted.shape[1:])
        first, last = wanted.start * inner, (wanted.stop or 0) * inner
    for cell in part.cells():
        values = flat.new_zeros(cell.stop - cell.start)
        values[cell.keep] = flat[cell.at]
        values[: max(first - cell.start, 0)] = 0
        values[max(last - cell.start, 0) :] = 0
        total.add(name, values)


def add_up(total: Checksum, tensors: Mapping[str, Tensor]) -> None:
    """Make one checksum of those of the processes that share the tensors; all call, and send 512 bytes a tensor."""
    groups: dict[int, tuple[Any, torch.device, list[str]]] = {}
    for name in sorted(tensors):
        sharers = _sharers(tensors[name])
        if sharers is not None:
            group, device, _ = sharers
            groups.setdefault(id(group), (group, device, []))[2].append(name)
    for group, device, names in groups.values():
        sums = torch.stack([total.sums(name) for name in names]).to(device)
        dist.all_reduce(sums, group=group)
        for name, column in zip(names, sums.cpu(), strict=True):
            total.replace(name, column)
