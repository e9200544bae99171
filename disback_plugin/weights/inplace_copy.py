"""Values into live memory: what is held here of one tensor of a source, decoded, counted and cast once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

import torch
from torch import Tensor

from disback_plugin.weights.checksum import Checksum
from disback_plugin.weights.sharding import Part, held, is_sharded, masked
from disback_plugin.weights.tensor_meta import TensorMeta, room

__all__ = ["Source", "bump", "fill", "part_of", "write_tensor"]


class Source(Protocol):
    """A state that is read piece by piece, so that it need not be in memory as a whole."""

    def layout(self) -> Mapping[str, TensorMeta]:
        """Return what each tensor is, by canonical name; tied ones under each name."""
        ...

    def grain(self, name: str) -> int:
        """Return at what multiples that which is read of a tensor begins and ends: one of GRAIN that divides PIECE."""
        ...

    def read(self, name: str, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        """Return elements [start, stop) of a tensor in row-major order, on the CPU, shape (stop - start,).

        All are in one piece (`layouts.pieces`); `start` is a multiple of `grain(name)`, and so is `stop`, or it is the
        tensor's end. With `out`, of this shape, the tensor's dtype
        and in memory of the CPU, the values are written there and `out` is returned; without it, what is returned may
        be overwritten by the next call.
        """
        ...


def write_tensor(live: Tensor, source: Source, name: str, given: TensorMeta, total: Checksum, names: list[str]) -> None:
    """Write what is held here of one tensor of a source into the live one."""
    local, part = held(live)
    straight = local.device.type == "cpu" and local.is_contiguous()
    pinned = local.device.type == "cuda"
    flat = local.detach().view(-1) if straight else room(local.numel(), given.dtype, pinned=pinned)
    fill(flat, part, source, name, given.dtype, total, names)
    if not straight:
        local.copy_(flat.view(local.shape), non_blocking=pinned)


def fill(
    flat: Tensor, part: Part, source: Source, name: str, dtype: torch.dtype, total: Checksum, names: Iterable[str]
) -> None:
    """Decode a part of a tensor into memory.

    Args:
        flat: Where to, on the CPU, shape (elements of the part,), of any dtype.
        part: What to read.
        source: What from.
        name: Of which tensor.
        dtype: What the source has it in.
        total: A checksum of what was read, before any cast.
        names: Under which names it is counted there.
    """
    for cell in part.cells(source.grain(name)):
        piece = flat[cell.at]
        if cell.complete and piece.dtype == dtype:
            values = source.read(name, cell.start, cell.stop, out=piece)
        else:
            values = source.read(name, cell.start, cell.stop)
            piece.copy_(values[cell.keep])
        counted = masked(values, cell)
        for each in names:
            total.add(each, counted)


def part_of(given: Tensor, part: Part) -> Tensor:
    """Return what is held here of a tensor that is whole, or sharded in the same way."""
    if is_sharded(given):
        return held(given)[0]
    whole = given.reshape(part.shape)  # flat, if that is how it is cut
    return whole if part.stop is None else whole.narrow(part.dim, part.start, part.stop - part.start)


def bump(tensors: Iterable[Tensor]) -> None:
    """Let the version counters of DTensors move as well, which know nothing of a write into their memory."""
    for tensor in tensors:
        if is_sharded(tensor):
            torch.autograd.graph.increment_version(tensor)
