"""What a tensor is apart from its values, and the pieces in which it is read, decoded and written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from disback_plugin.weights.fsdp1 import shape_of

__all__ = ["GRAIN", "PIECE", "TensorMeta", "dtype_class", "layout_of", "pieces", "room"]

# Elements that are read, decoded and written at once: large enough that a call's fixed costs vanish, small enough for
# a processor's cache, and a whole number of every codec's blocks.
PIECE = 1 << 20
# What a process that holds a part of a tensor reads begins and ends at multiples of this: a whole number of blocks of
# the codecs that need not decode a piece as a whole, and of a checksum's 512 bytes. It divides PIECE.
GRAIN = 512


@dataclass(frozen=True)
class TensorMeta:
    """What a tensor is, apart from its values."""

    dtype: torch.dtype
    shape: torch.Size


def layout_of(state: Mapping[str, Tensor]) -> dict[str, TensorMeta]:
    """Return what each tensor of a state is, apart from its values.

    Example:
        >>> layout_of({"w": torch.zeros(2)})["w"].shape
        torch.Size([2])
    """
    return {name: TensorMeta(tensor.dtype, shape_of(tensor)) for name, tensor in state.items()}


def room(elements: int, dtype: torch.dtype, *, pinned: bool = False) -> Tensor:
    """Return new memory on the host, shape (elements,), whatever default device or inference mode the caller is in.

    Example:
        >>> room(3, torch.bfloat16).shape
        torch.Size([3])
    """
    with torch.inference_mode(False):
        return torch.empty(elements, dtype=dtype, device="cpu", pin_memory=pinned)


def pieces(elements: int) -> Iterator[tuple[int, int]]:
    """Yield start and stop of the pieces of a tensor; an empty one has one, empty, piece.

    Example:
        >>> list(pieces(PIECE + 1))
        [(0, 1048576), (1048576, 1048577)]
    """
    for start in range(0, max(elements, 1), PIECE):
        yield start, min(start + PIECE, elements)


def dtype_class(dtype: torch.dtype) -> str:
    """Return "floating", "complex", "bool" or "integer": within a class, a write casts."""
    if dtype.is_floating_point:
        return "floating"
    return "complex" if dtype.is_complex else "bool" if dtype == torch.bool else "integer"
