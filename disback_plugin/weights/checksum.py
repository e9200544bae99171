"""What names weights by their content: a SHA-256 of everything, and a checksum at the speed of memory.

The checksum adds up the bits of each tensor as 64-bit integers, in 64 columns, so that neither the order of summation
nor the size of the pieces matters. It finds what goes wrong by accident (a flipped bit, a foreign node, a half-written
network, tensors in each other's place), not every permutation inside a tensor; against intent there is the SHA-256.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["Checksum", "checksum", "contiguous_bytes", "fingerprint"]

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
        digest.update(contiguous_bytes(tensor).numpy().data)
    return digest.hexdigest()


class Checksum:
    """The checksum of a state whose tensors arrive piece by piece.

    Example:
        >>> whole, pieces = Checksum(), Checksum()
        >>> whole.add("w", torch.arange(1024.0))
        >>> pieces.add("w", torch.arange(512.0, 1024.0))
        >>> pieces.add("w", torch.arange(0.0, 512.0))
        >>> whole.digest() == pieces.digest()
        True
    """

    def __init__(self) -> None:
        self._sums: dict[tuple[str, torch.dtype], list[Tensor]] = {}

    def add(self, name: str, piece: Tensor) -> None:
        """Add a piece of a tensor: all of it, or a part that starts at a multiple of 512 of its row-major bytes.

        No device sync.
        """
        self._sums.setdefault((name, piece.dtype), []).append(_sums(piece.detach()))

    def sums(self, name: str) -> Tensor:
        """Return what was added up for a tensor so far, shape (COLUMNS,): sums of its parts add up to its own."""
        found = [torch.stack(sums).sum(0) for (known, _), sums in self._sums.items() if known == name]
        return torch.stack(found).sum(0)

    def replace(self, name: str, sums: Tensor) -> None:
        """Put other sums in the place of a tensor's: those of all the processes that share it."""
        for key in [key for key in self._sums if key[0] == name]:
            self._sums[key] = [sums]

    def digest(self) -> str:
        """Return the checksum: 32 hexadecimal digits."""
        totals = [(name, str(dtype), torch.stack(sums).sum(0).tolist()) for (name, dtype), sums in self._sums.items()]
        return hashlib.sha256(repr(sorted(totals)).encode()).hexdigest()[:32]


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


def contiguous_bytes(tensor: Tensor) -> Tensor:
    """Return the bytes of a tensor in row-major order, on the CPU, shape (bytes,)."""
    return tensor.cpu().contiguous().reshape(-1).view(torch.uint8)


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
    if rest:
        sums[-1] += _weigh(flat[-rest:].view(torch.uint8))
    return sums


def _weigh(rest: Tensor) -> Tensor:
    """Return up to seven bytes as one number."""
    return (rest.long() << 8 * torch.arange(rest.numel(), device=rest.device)).sum()
