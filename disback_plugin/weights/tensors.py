"""Types, shapes and parts of tensors, the pieces in which they are read, and the protocol of what is read from."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

# The number of elements that are read, decoded and written at once: large enough that a call's fixed costs vanish,
# small enough for a processor's cache, and a whole number of every codec's blocks.
PIECE = 1 << 20
# A rank that holds a part of a tensor reads from and to multiples of this: a whole number of blocks of the int8 codec,
# and of a checksum's 512 bytes. It divides PIECE.
GRAIN = 512


class TensorMeta(NamedTuple):
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


class Cell(NamedTuple):
    """A range of a tensor that is read at once, and the elements of it that this rank holds.

    Attributes:
        start: First element to read, in the whole tensor's row-major order.
        stop: End of the range.
        at: The place of the elements held in the local tensor, in its row-major order.
        keep: The elements of the range that are held here; None for all of them.
    """

    start: int
    stop: int
    at: slice
    keep: slice | Tensor | None = None


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

    @classmethod
    def chunk(cls, shape: torch.Size, rank: int, ranks: int, dim: int = 0) -> Part:
        """Return the part of one of several ranks, as torch cuts a tensor: equal chunks, the last ones smaller.

        Example:
            >>> [Part.chunk(torch.Size([5]), rank, 4).elements for rank in range(4)]
            [2, 2, 1, 0]
        """
        rows = -(-shape[dim] // ranks)
        return cls(shape, dim, min(rank * rows, shape[dim]), min((rank + 1) * rows, shape[dim]))

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
        total, inner = self.shape.numel(), prod(self.shape[self.dim + 1 :])
        if self.stop is None:
            for start, stop in pieces(total):
                yield Cell(start, stop, slice(start, stop))
        elif prod(self.shape[: self.dim]) == 1:
            first, last = self.start * inner, self.stop * inner
            for piece in range(first - first % PIECE, last if first < last else 0, PIECE):
                low, high = max(piece, first), min(piece + PIECE, last)
                start, stop = low - low % GRAIN, min(-(-high // GRAIN) * GRAIN, total)
                inside = None if (start, stop) == (low, high) else slice(low - start, high - start)
                yield Cell(start, stop, slice(low - first, high - first), inside)
        else:  # the cut goes across the rows: the whole tensor is read
            done = 0
            for start, stop in pieces(total):
                index = torch.arange(start, stop, device="cpu") // inner % self.shape[self.dim]
                keep = (index >= self.start) & (index < self.stop)
                before, done = done, done + int(keep.sum())
                if before < done:
                    yield Cell(start, stop, slice(before, done), keep)


def masked(values: Tensor, cell: Cell) -> Tensor:
    """Return the values of a cell, with zeros where this rank does not hold them."""
    if cell.keep is None:
        return values
    own = torch.zeros_like(values)
    own[cell.keep] = values[cell.keep]
    return own


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
