"""Types, shapes and parts of tensors, the pieces in which they are read, and the protocol of what is read from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

__all__ = [
    "GRAIN",
    "PIECE",
    "Cell",
    "Part",
    "Sharding",
    "Source",
    "TensorMeta",
    "chunk_of",
    "dtype_class",
    "host_tensor",
    "layout_of",
    "masked",
    "pieces",
]

# The number of elements that are read, decoded and written at once: large enough that a call's fixed costs vanish,
# small enough for a processor's cache, and a whole number of every codec's blocks.
PIECE = 1 << 20
# A rank that holds a part of a tensor reads from and to multiples of this: a whole number of blocks of the
# int8 codec, and of a checksum's 512 bytes. It divides PIECE.
GRAIN = 512


@dataclass(frozen=True)
class TensorMeta:
    """The dtype and the whole shape of a tensor."""

    dtype: torch.dtype
    shape: torch.Size


class Source(Protocol):
    """A state dict that is read piece by piece, so that it need not be in memory as a whole."""

    def layout(self) -> Mapping[str, TensorMeta]:
        """Return dtype and shape of each tensor by canonical name; tied tensors under each of their names."""
        ...

    def read(self, name: str, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        """Return elements [start, stop) of a tensor in row-major order, on the CPU, shape (stop - start,).

        All elements are in one piece (`pieces`). `start` is a multiple of `GRAIN`, and `stop` is one too or the
        tensor's end. With `out`, which has this shape, the tensor's dtype and memory of the CPU, the values are written
        there and `out` is returned. Without it, the next call may overwrite what was returned.
        """
        ...


def layout_of(state: Mapping[str, Tensor]) -> dict[str, TensorMeta]:
    """Return dtype and shape of each tensor of a state dict.

    Example:
        >>> layout_of({"w": torch.zeros(2)})["w"].shape
        torch.Size([2])
    """
    return {name: TensorMeta(tensor.dtype, tensor.shape) for name, tensor in state.items()}


def host_tensor(elements: int, dtype: torch.dtype, *, pinned: bool = False) -> Tensor:
    """Return an uninitialised tensor on the CPU, shape (elements,), under any default device and inference mode.

    Example:
        >>> host_tensor(3, torch.bfloat16).shape
        torch.Size([3])
    """
    with torch.inference_mode(False):
        return torch.empty(elements, dtype=dtype, device="cpu", pin_memory=pinned)


def pieces(elements: int) -> Iterator[tuple[int, int]]:
    """Yield start and stop of the pieces of a tensor; an empty tensor has one empty piece.

    Example:
        >>> list(pieces(PIECE + 1))
        [(0, 1048576), (1048576, 1048577)]
    """
    for start in range(0, max(elements, 1), PIECE):
        yield start, min(start + PIECE, elements)


def dtype_class(dtype: torch.dtype) -> str:
    """Return "floating", "complex", "bool" or "integer": a write casts within a class."""
    if dtype.is_floating_point:
        return "floating"
    return "complex" if dtype.is_complex else "bool" if dtype == torch.bool else "integer"


class Cell(NamedTuple):
    """A range of a tensor that is read at once, and the elements of it that this rank holds.

    Attributes:
        start: First element to read, in the whole tensor's row-major order.
        stop: End of the range.
        keep: The elements of the range that are held here.
        at: Their place in the local tensor, in its row-major order.
    """

    start: int
    stop: int
    keep: slice | Tensor
    at: slice

    @property
    def complete(self) -> bool:
        """Whether the whole range is held here."""
        return bool(self.at.stop - self.at.start == self.stop - self.start)


@dataclass(frozen=True)
class Part:
    """Rows [start, stop) along one dimension of a tensor: the part that one rank holds.

    Args:
        shape: Shape of the whole tensor.
        dim: The dimension that is cut.
        start: First index along it.
        stop: End along it; None makes the part the whole tensor.

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
        """Shape of the part."""
        if self.stop is None:
            return self.shape
        return torch.Size((*self.shape[: self.dim], self.stop - self.start, *self.shape[self.dim + 1 :]))

    def cells(self) -> Iterator[Cell]:
        """Yield the ranges to read for this part; each lies within a piece, and its ends are multiples of `GRAIN`."""
        total = self.shape.numel()
        if self.stop is None:
            for start, stop in pieces(total):
                yield Cell(start, stop, slice(0, stop - start), slice(start, stop))
            return
        inner = prod(self.shape[self.dim + 1 :])
        if prod(self.shape[: self.dim]) == 1:
            yield from _contiguous_cells(self.start * inner, self.stop * inner, total)
            return
        # The cut goes across the rows: the whole tensor is read, piece by piece.
        done = 0
        for start, stop in pieces(total):
            index = torch.arange(start, stop, device="cpu") // inner % self.shape[self.dim]
            keep = (index >= self.start) & (index < self.stop)
            kept = int(keep.sum())
            if kept:
                yield Cell(start, stop, keep, slice(done, done + kept))
            done += kept


def _contiguous_cells(first: int, last: int, total: int) -> Iterator[Cell]:
    """Yield the cells of elements [first, last)."""
    for piece in range(first - first % PIECE, last if first < last else 0, PIECE):
        lo, hi = max(piece, first), min(piece + PIECE, last)
        cuts = [lo, hi]
        if hi - lo > 64 * GRAIN:  # complete cells are decoded in place, so the ragged ends become cells of their own
            cuts = sorted({lo, -(-lo // GRAIN) * GRAIN, hi if hi == total else hi - hi % GRAIN, hi})
        for a, b in pairwise(cuts):
            start, stop = a - a % GRAIN, min(-(-b // GRAIN) * GRAIN, total)
            yield Cell(start, stop, slice(a - start, b - start), slice(a - first, b - first))


def chunk_of(shape: torch.Size, rank: int, ranks: int, dim: int = 0) -> Part:
    """Return the part of one of several ranks, as torch cuts a tensor: equal chunks, the last ones smaller.

    Example:
        >>> [chunk_of(torch.Size([5]), rank, 4).elements for rank in range(4)]
        [2, 2, 1, 0]
    """
    size = shape[dim]
    rows = -(-size // ranks)
    return Part(shape, dim, min(rank * rows, size), min((rank + 1) * rows, size))


@dataclass(frozen=True)
class Sharding:
    """A tensor of which several ranks hold one part each: a DTensor's, which is cut into equal chunks.

    Args:
        shape: Shape of the whole tensor.
        rank: This rank, among those that share the tensor.
        ranks: Number of ranks that share it.
        group: Their process group.
        device: The device from which the group sends.
        dim: The dimension that is cut into equal chunks; None if FSDP1 cuts at arbitrary places.
    """

    shape: torch.Size
    rank: int
    ranks: int
    group: Any
    device: torch.device
    dim: int | None = 0

    def part_of(self, rank: int) -> Part:
        """Return the part of the tensor that a rank holds."""
        assert self.dim is not None
        return chunk_of(self.shape, rank, self.ranks, self.dim)


def masked(values: Tensor, cell: Cell) -> Tensor:
    """Return the values of a cell, with zeros where this rank does not hold them."""
    if cell.complete:
        return values
    own = torch.zeros_like(values)
    own[cell.keep] = values[cell.keep]
    return own
