"""Digests of weights by their content: a SHA-256 of everything, and a checksum at the speed of memory.

The checksum adds up the bits of each tensor as 64-bit integers, in 64 columns, so that neither the order of summation
nor the size of the pieces matters. It detects accidents (a flipped bit, a foreign node, a half-written network), but
not every permutation inside a tensor; the SHA-256 protects against intent.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

COLUMNS = 64


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
