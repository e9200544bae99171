"""How one tensor of a node is stored: as its difference to the node before, coded.

| codec                  | the difference is stored as                             | bits a weight | exact |
|------------------------|---------------------------------------------------------|---------------|-------|
| `exact`                | that of the bit patterns as integers, byte planes, zstd | about 20      | yes   |
| `bf16`                 | bfloat16, byte planes, zstd                             | about 11      | no    |
| `int8`                 | 255 steps of each block's largest, as they are          | 8.125         | no    |
| `int6`, `int5`, `int4` | 63, 31, 15 steps of each block's largest, zstd          | 6, 5, 4       | no    |

The loop is closed: the difference is that to the previous node *as it is decoded*, so errors do not add up along the
path. Whatever the codec, a tensor that did not change is stored as nothing, and one that is no float of at most 32
bits, or is not finite (an attention mask), exactly.

A decoded node is the same bit for bit on every machine that keeps denormals: a step q and its scale have 7 and 8
significant bits, so the product is exact in float32, and a fused multiply-add rounds as a product and a sum do.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from disback_plugin.errors import OptionError
from disback_plugin.path.packing import pack, packed_sizes, unpack
from disback_plugin.weights.tensor_meta import GRAIN, PIECE, pieces, room

__all__ = ["BLOCK", "CODES", "SMALLEST_FIRST", "Code", "Parts", "check_codec", "code_for", "fault"]

# Neighbours that share a scale: 0.125 bits a weight.
BLOCK = 128

Parts = Mapping[str, Tensor]


class Code(Protocol):
    """A way to store one tensor's difference to its predecessor. Tensors are flat and on the CPU.

    Attributes:
        grain: What is decoded at once begins at a multiple of it, and ends at one or at the tensor's end.
    """

    @property
    def grain(self) -> int:
        """See above."""
        ...

    def encode(self, value: Tensor, previous: Tensor) -> dict[str, Tensor]:
        """Return the parts to store, for a value and its decoded predecessor of the same dtype, shape (n,)."""
        ...

    def sizes(self, elements: int, dtype: torch.dtype) -> dict[str, tuple[torch.dtype, int | None]]:
        """Return the dtype and the length of each part of n elements; None where the length depends on the values."""
        ...

    def decode(self, parts: Parts, previous: Tensor, start: int, out: Tensor) -> None:
        """Write the elements from `start` on into `out`, of which `previous` is the predecessor; they may be one."""
        ...


@dataclass(frozen=True)
class Same:
    """A tensor that did not change."""

    grain = GRAIN

    def encode(self, value: Tensor, previous: Tensor) -> dict[str, Tensor]:
        """Return nothing."""
        return {}

    def sizes(self, elements: int, dtype: torch.dtype) -> dict[str, tuple[torch.dtype, int | None]]:
        """Return nothing."""
        return {}

    def decode(self, parts: Parts, previous: Tensor, start: int, out: Tensor) -> None:
        """Copy the predecessor."""
        if out is not previous:
            out.copy_(previous)


@dataclass(frozen=True)
class Blocks:
    """Steps of a block's largest difference: delta = q scale, q an integer in [-levels, levels].

    Args:
        levels: Largest |q|, 1 to 127.
        packed: Whether the steps are compressed; they are read faster if not.
    """

    levels: int
    packed: bool

    @property
    def grain(self) -> int:
        """Blocks are decoded one by one, unless they are compressed together."""
        return PIECE if self.packed else GRAIN

    def encode(self, value: Tensor, previous: Tensor) -> dict[str, Tensor]:
        """Return the steps, shape (n,), and the scales in bfloat16, shape (ceil(n / BLOCK),)."""
        q = room(len(value), torch.int8)
        scale = room(_blocks(len(value)), torch.bfloat16)
        for start, stop in pieces(len(value)):
            blocks = slice(start // BLOCK, _blocks(stop))
            delta = room(_blocks(stop - start) * BLOCK, torch.float32).zero_().view(-1, BLOCK)
            torch.sub(value[start:stop].float(), previous[start:stop].float(), out=delta.view(-1)[: stop - start])
            scale[blocks] = delta.abs().amax(dim=1) / self.levels
            # A scale of 0 stands for differences that bfloat16 cannot hold.
            divisor = torch.where(scale[blocks] > 0, scale[blocks].float(), math.inf)
            q[start:stop] = delta.div_(divisor[:, None]).round_().view(-1)[: stop - start]
        return {"scale": scale, **(pack(q) if self.packed else {"q": q})}

    def sizes(self, elements: int, dtype: torch.dtype) -> dict[str, tuple[torch.dtype, int | None]]:
        """Return what `encode` makes."""
        steps = packed_sizes(elements) if self.packed else {"q": (torch.int8, elements)}
        return {"scale": (torch.bfloat16, _blocks(elements)), **steps}

    def decode(self, parts: Parts, previous: Tensor, start: int, out: Tensor) -> None:
        """Add the difference in float32 and cast once."""
        n, first = len(previous), start // BLOCK
        q = unpack(parts, start, n, torch.int8) if self.packed else parts["q"][start : start + n]
        scale = parts["scale"][first : first + _blocks(n)].float()
        steps = _scratch(n).copy_(q)
        if out.dtype == torch.float32:
            _add(previous.float(), steps, scale, out)
        else:
            out.copy_(_add(previous.float(), steps, scale, steps))


@dataclass(frozen=True)
class Rounded:
    """The difference in bfloat16."""

    grain = PIECE

    def encode(self, value: Tensor, previous: Tensor) -> dict[str, Tensor]:
        """Return the compressed difference."""
        return pack((value.float() - previous.float()).bfloat16().view(torch.int16))

    def sizes(self, elements: int, dtype: torch.dtype) -> dict[str, tuple[torch.dtype, int | None]]:
        """Return what `encode` makes."""
        return packed_sizes(elements)

    def decode(self, parts: Parts, previous: Tensor, start: int, out: Tensor) -> None:
        """Add the difference in float32 and cast once."""
        delta = unpack(parts, start, len(previous), torch.int16).view(torch.bfloat16)
        out.copy_(previous.float() + delta)


@dataclass(frozen=True)
class Exact:
    """The difference of the bit patterns as integers that are ordered as the numbers are: it is small if that is.

    Numbers of one exponent stand together, for their differences are of one size and compress 4 % better for it.
    """

    grain = PIECE

    def encode(self, value: Tensor, previous: Tensor) -> dict[str, Tensor]:
        """Return the compressed difference, its sign in the lowest bit."""
        d = _ordered(_bits(value)) - _ordered(_bits(previous))
        z = (d << 1) ^ (d >> _sign(d))
        for start, stop in pieces(len(z)):
            z[start:stop] = z[start:stop][_by_exponent(previous[start:stop])]
        return pack(z)

    def sizes(self, elements: int, dtype: torch.dtype) -> dict[str, tuple[torch.dtype, int | None]]:
        """Return what `encode` makes."""
        return packed_sizes(elements)

    def decode(self, parts: Parts, previous: Tensor, start: int, out: Tensor) -> None:
        """Add the integer difference."""
        grouped = unpack(parts, start, len(previous), _WORDS[previous.element_size()])
        z = torch.empty_like(grouped)
        z[_by_exponent(previous)] = grouped
        d = (z >> 1) & ~(-1 << _sign(z)) ^ -(z & 1)
        _bits(out).copy_(_ordered(_ordered(_bits(previous)) + d))


CODES: dict[str, Code] = {
    "same": Same(),
    "exact": Exact(),
    "bf16": Rounded(),
    "int8": Blocks(127, packed=False),
    "int6": Blocks(31, packed=True),
    "int5": Blocks(15, packed=True),
    "int4": Blocks(7, packed=True),
}

# What `codec="auto"` tries, in this order.
SMALLEST_FIRST = ("int4", "int5", "int6", "int8", "bf16", "exact")


def check_codec(codec: str) -> None:
    """Raise OptionError unless `codec` names a codec, or is "auto", or "auto:" and a bound on the error.

    Example:
        >>> check_codec("int8"), check_codec("auto:0.005")
        (None, None)
    """
    name, _, bound = str(codec).partition(":")
    try:
        fits = codec in SMALLEST_FIRST or (name == "auto" and (codec == "auto" or 0 < float(bound) < 1))
    except ValueError:
        fits = False
    if not fits:
        raise OptionError(
            f"codec={codec!r}",
            expected=f"'auto', 'auto:BOUND' with a bound in (0, 1), or one of {', '.join(SMALLEST_FIRST)}",
            cure="leave it away for 'int8'",
        )


def code_for(codec: str, value: Tensor, previous: Tensor) -> str:
    """Return the name in `CODES` of what stores this tensor under a codec, given its decoded predecessor.

    Example:
        >>> (
        ...     code_for("int8", torch.ones(2), torch.zeros(2)),
        ...     code_for("int8", torch.ones(2).long(), torch.zeros(2).long()),
        ... )
        ('int8', 'exact')
    """
    if torch.equal(_bits(value), _bits(previous)):
        return "same"
    short = value.is_floating_point() and value.element_size() <= 4
    finite = short and all(
        (value[a:b].float() - previous[a:b].float()).abs().amax().isfinite() for a, b in pieces(len(value))
    )
    return codec if finite else "exact"


def fault(parts: Parts) -> str | None:
    """Return what is wrong with the values of a tensor's parts, if anything, before they are decoded."""
    if "frames" in parts:
        frames = parts["frames"]
        if bool((frames < 0).any()) or int(frames.sum()) != len(parts["bytes"]):
            return "frames that do not add up to its bytes"
    if "scale" in parts and not parts["scale"].isfinite().all():
        return "a scale that is not finite"
    return None


_MEMORY = threading.local()
_WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def _blocks(elements: int) -> int:
    return -(-elements // BLOCK)


def _scratch(elements: int) -> Tensor:
    """Return memory of this thread, in float32, that the next call hands out again: fresh pages cost more than sums."""
    if not hasattr(_MEMORY, "piece"):
        _MEMORY.piece = room(PIECE, torch.float32)
    piece: Tensor = _MEMORY.piece
    return piece[:elements]


def _add(previous: Tensor, q: Tensor, scale: Tensor, out: Tensor) -> Tensor:
    """Write previous + q scale into `out`: whole blocks at once, and then what is left."""
    blocks, rest = divmod(len(q), BLOCK)
    whole = blocks * BLOCK
    a, b, sum_ = (tensor[:whole].view(blocks, BLOCK) for tensor in (previous, q, out))
    torch.addcmul(a, b, scale[:blocks, None], out=sum_)
    if rest:
        torch.addcmul(previous[whole:], q[whole:], scale[-1], out=out[whole:])
    return out


def _bits(tensor: Tensor) -> Tensor:
    return tensor.view(_WORDS[tensor.element_size()])


def _sign(words: Tensor) -> int:
    """Return the place of the sign bit."""
    return 8 * words.element_size() - 1


def _ordered(words: Tensor) -> Tensor:
    """Turn the bits of floats, sign and magnitude, into integers of the same order, and back."""
    return words ^ ((words >> _sign(words)) & ~(-1 << _sign(words)))


def _by_exponent(tensor: Tensor) -> Tensor:
    """Return the order in which floats of one exponent stand together, small ones first; other numbers stay."""
    if not tensor.is_floating_point():
        return torch.arange(len(tensor), device="cpu")
    mantissa = round(-math.log2(torch.finfo(tensor.dtype).eps))
    exponents = (_bits(tensor) >> mantissa) & ~(-1 << (_sign(_bits(tensor)) - mantissa))
    return torch.from_numpy(np.argsort(exponents.to(torch.int16).numpy(), kind="stable"))
