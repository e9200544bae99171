"""Shapes, parts, pieces and digests of tensors, and the protocol of what tensors are read from.

A digest is a SHA-256 of everything, or a checksum at the speed of memory. The checksum adds up the bits of each tensor
as 64-bit integers, in 64 columns, so that neither the order of summation nor the size of the pieces matters. It detects
accidents (a flipped bit, a foreign node, a half-written network), but not every permutation inside a tensor; the
SHA-256 protects against intent.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from types import SimpleNamespace
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from disback_plugin.errors import MismatchError

# The number of elements that are read, decoded and written at once: large enough that a call's fixed costs vanish,
# small enough for a processor's cache, and a whole number of every codec's blocks.
PIECE = 1 << 20
# A rank that holds a part of a tensor reads from and to multiples of this: a whole number of blocks of the int8 codec,
# and of a checksum's 512 bytes. It divides PIECE.
GRAIN = 512
# The number of sums of a checksum.
COLUMNS = 64


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
        across = self.stop is not None and prod(self.shape[: self.dim]) > 1  # then the whole tensor is read
        first, last = (0, total) if self.stop is None or across else (self.start * inner, self.stop * inner)
        keep: slice | Tensor | None
        done = 0
        for start, stop in pieces(total):
            if across:
                index = torch.arange(start, stop, device="cpu") // inner % self.shape[self.dim]
                keep = (index >= self.start) & (index < (self.stop or 0))
                held = int(keep.sum())
            else:
                low, high = max(start, first), min(stop, last)
                start, stop, held = low - low % GRAIN, min(-(-high // GRAIN) * GRAIN, total), high - low
                keep = None if (start, stop) == (low, high) else slice(low - start, high - start)
            if held > 0 or self.stop is None:
                yield Cell(start, stop, slice(done, done + held), keep)
                done += held


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


def memory_span(tensor: Tensor) -> tuple[int, int]:
    """Return the addresses of the first byte of a tensor that is not empty, and of the end of its last element.

    Example:
        >>> start, end = memory_span(torch.zeros(3, 2)[:, 0])
        >>> end - start
        20
    """
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (reach + 1) * tensor.element_size()


def overlap(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors share an element of memory; no value is read.

    Example:
        >>> both = torch.zeros(2, 4)
        >>> overlap(both[:, :2], both[:, 2:]), overlap(both[:, :2], both[0])
        (False, True)
    """
    return np.shares_memory(_addresses(a), _addresses(b))


def _addresses(tensor: Tensor) -> np.ndarray[Any, Any]:
    """Return an array at the addresses of a tensor on any device; its values must not be read."""
    size = tensor.element_size()
    strides = tuple(stride * size for stride in tensor.stride())
    memory = {"data": (tensor.data_ptr(), True), "shape": tuple(tensor.shape), "strides": strides}
    return np.asarray(SimpleNamespace(__array_interface__=memory | {"typestr": f"|V{size}", "version": 3}))


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


def check_layout(
    given: Mapping[str, TensorMeta], wanted: Mapping[str, TensorMeta], role: str, source: str, hint: str = ""
) -> None:
    """Raise MismatchError unless the given layout has the keys, the shapes and the dtype classes that are wanted."""
    if wanted.keys() != given.keys():
        odd = {"without {} keys {}": wanted.keys() - given.keys(), "with {} unknown {}": given.keys() - wanted.keys()}
        found = " and ".join(text.format(len(keys), sorted(keys)[:3]) for text, keys in odd.items() if keys)
        cure = (
            "use two networks of one architecture (or parts: ScoreNetwork(module, prefix=...)), or two LoRA adapters "
            "of the same targets and scales (lora_alpha, use_rslora) on one base: lora.add_teacher(model, like=...), "
            "and ScoreNetwork(model, lora_adapter=...) for both roles"
        )
        keys = f"the {len(wanted)} keys of the {role}, no more and no less"
        raise MismatchError(f"{source} {found}", expected=keys, cure=hint or cure)
    for name, own in wanted.items():
        other = given[name]
        same_class = other.dtype == own.dtype or dtype_class(other.dtype) == dtype_class(own.dtype)
        if other.shape != own.shape or not same_class:
            raise MismatchError(
                f"{name} of shape {tuple(other.shape)} and {other.dtype} in {source}",
                expected=f"shape {tuple(own.shape)} and a dtype of the class of {own.dtype}, as in the {role}",
                cure="use two networks of one configuration; of LoRA, one rank: lora.add_teacher(model, like=...)",
            )


# -- digests -----------------------------------------------------------------------------------------------------------


def fingerprint(state: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of a state's names, dtypes, shapes and values, independent of order and device.

    Args:
        state: Tensors of any kind, by name.

    Example:
        >>> fingerprint({"w": torch.zeros(2)}) == fingerprint({"w": torch.ones(2)})
        False
    """
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach()
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


class Checksum:
    """The checksum of a state whose tensors arrive piece by piece.

    Attributes:
        sums: The sums of each tensor so far, by name, shape (COLUMNS,); those of a tensor's parts add up to its own.

    Example:
        >>> whole, pieces = Checksum(), Checksum()
        >>> whole.add("w", torch.arange(1024.0))
        >>> pieces.add("w", torch.arange(512.0, 1024.0))
        >>> pieces.add("w", torch.arange(0.0, 512.0))
        >>> whole.digest() == pieces.digest()
        True
    """

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self._dtypes: dict[str, torch.dtype] = {}

    def add(self, name: str, piece: Tensor) -> None:
        """Add a piece of a tensor: all of it, or a part that starts at a multiple of 512 of its row-major bytes.

        No device sync.
        """
        sums = _sums(piece.detach())
        self.sums[name] = self.sums[name] + sums if name in self.sums else sums
        self._dtypes[name] = piece.dtype

    def digest(self) -> str:
        """Return the checksum: 32 hexadecimal digits."""
        totals = sorted([(name, str(self._dtypes[name]), sums.tolist()) for name, sums in self.sums.items()])
        return hashlib.sha256(repr(totals).encode()).hexdigest()[:32]


def checksum(state: Mapping[str, Tensor]) -> str:
    """Return the `Checksum` of a state: 32 hexadecimal digits.

    Args:
        state: Tensors of any kind, by name.

    Example:
        >>> checksum({"w": torch.zeros(2)}) == checksum({"w": torch.tensor([0.0, 1.0])})
        False
    """
    total = Checksum()
    for name, tensor in state.items():
        total.add(name, tensor)
    return total.digest()


def _sums(tensor: Tensor) -> Tensor:
    """Return the sums of every COLUMNS-th word, shape (COLUMNS,)."""
    flat = tensor.contiguous().view(-1)
    size = flat.element_size()
    if flat.storage_offset() * size % 8:  # words are read where they are aligned
        flat = flat.clone()
    rest = flat.numel() * size % 8 // size
    words = (flat[:-rest] if rest else flat).view(torch.int64)
    whole = words.numel() // COLUMNS * COLUMNS
    sums = words[:whole].view(-1, COLUMNS).sum(0)
    sums[: words.numel() - whole] += words[whole:]
    if rest:  # up to seven bytes, as one number
        tail = flat[-rest:].view(torch.uint8).long()
        sums[-1] += (tail << 8 * torch.arange(tail.numel(), device=tail.device)).sum()
    return sums
