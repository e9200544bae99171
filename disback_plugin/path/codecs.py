"""The two codecs of a path, and the int8 difference of one tensor.

| codec   | a node's file holds                                                                  | bits a weight |
|---------|--------------------------------------------------------------------------------------|---------------|
| `exact` | its weights: a plain safetensors state dict under canonical names                    | 32 in float32 |
| `int8`  | differences to the node before, in 255 steps of the largest of each block of weights | 8.125         |

The difference is taken to the previous node *as it is decoded*, so errors do not add up along the path. Under `int8`, a
tensor that equals the previous node's takes no space; a tensor that is not floating, has more than 32 bits a number, is
a buffer or is not finite (an attention mask) is stored whole.

A decoded node is the same bit for bit on every machine that keeps denormals: a step q and its scale have 7 and 8
significant bits, so their product is exact in float32, and a fused multiply-add rounds as a product and a sum do.
"""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from disback_plugin.errors import PathError
from disback_plugin.path.files import damaged
from disback_plugin.weights.tensors import PIECE, TensorMeta, host_tensor, pieces

CODECS = ("int8", "exact")
# Neighbouring weights that share a scale: 0.125 bits a weight.
BLOCK = 128
# Steps on each side of 0.
LEVELS = 127

_MEMORY = threading.local()


def unreadable(found: str) -> PathError:
    """Return the error for nodes that this version cannot decode.

    Args:
        found: The nodes in question, with their file.
    """
    return PathError(
        found,
        expected="nodes stored by codec 'int8' or 'exact' without compression",
        cure="read the path with disback-plugin 0.1.0 if that recorded it, or else copy the path again, or record it "
        "again in an empty folder",
    )


def encode_int8(value: Tensor, previous: Tensor) -> dict[str, Tensor]:
    """Return the difference of two tensors as integers and the scale of each block.

    Args:
        value: Weights of the node, flat, on the CPU, shape (n,); floating, of at most 32 bits. Where a
            difference is not finite, the decoded tensor is not finite either.
        previous: Weights of the node before as they are decoded, of the same dtype, shape (n,).

    Returns:
        "q": steps in [-127, 127] as int8, shape (n,); "scale": bfloat16, shape (ceil(n / BLOCK),).
    """
    q = host_tensor(len(value), torch.int8)
    scale = host_tensor(blocks_of(len(value)), torch.bfloat16)
    for start, stop in pieces(len(value)):
        blocks = slice(start // BLOCK, blocks_of(stop))
        delta = host_tensor(blocks_of(stop - start) * BLOCK, torch.float32).zero_().view(-1, BLOCK)
        torch.sub(value[start:stop].float(), previous[start:stop].float(), out=delta.view(-1)[: stop - start])
        scale[blocks] = delta.abs().amax(dim=1) / LEVELS
        # A scale of 0 stands for differences that bfloat16 cannot hold.
        divisor = torch.where(scale[blocks] > 0, scale[blocks].float(), math.inf)
        q[start:stop] = delta.div_(divisor[:, None]).round_().view(-1)[: stop - start]
    return {"q": q, "scale": scale}


def decode_int8(q: Tensor, scale: Tensor, previous: Tensor, start: int, out: Tensor) -> None:
    """Add a piece of a difference to the previous node's weights: in float32, cast once.

    Args:
        q: All steps of the tensor.
        scale: All scales of the tensor.
        previous: The piece of the node before, shape (m,).
        start: First element of the piece, a multiple of BLOCK.
        out: Memory for the decoded piece, shape (m,); it may be `previous`.
    """
    n, first = len(previous), start // BLOCK
    whole = n // BLOCK * BLOCK
    before, factor = previous.float(), scale[first : first + -(-n // BLOCK)].float()
    steps = scratch("steps", n, torch.float32).copy_(q[start : start + n])
    total = out if out.dtype == torch.float32 else steps
    a, b, c = before[:whole].view(-1, BLOCK), steps[:whole].view(-1, BLOCK), total[:whole].view(-1, BLOCK)
    torch.addcmul(a, b, factor[: len(a), None], out=c)
    if n > whole:  # the tensor's last block may be shorter
        torch.addcmul(before[whole:], steps[whole:], factor[-1], out=total[whole:])
    if total is not out:
        out.copy_(total)


def equal_bits(value: Tensor, previous: Tensor) -> bool:
    """Return whether two flat tensors of one dtype are equal bit for bit: 0.0 and -0.0 differ, equal NaNs do not.

    Example:
        >>> equal_bits(torch.zeros(2), -torch.zeros(2))
        False
    """
    return torch.equal(value.view(torch.uint8), previous.view(torch.uint8))


def blocks_of(elements: int) -> int:
    """Return the number of blocks of a tensor.

    Example:
        >>> blocks_of(BLOCK + 1)
        2
    """
    return -(-elements // BLOCK)


# What a node's file can hold of a tensor: a difference, all of it, or nothing because the node before has the same.
CODES = ("int8", "plain", "same")


@dataclass(frozen=True)
class Entry:
    """How one tensor of a node is stored.

    Attributes:
        code: One of `CODES`.
        layout: Dtype and shape of the decoded tensor.
    """

    code: str
    layout: TensorMeta

    def stored(self, name: str) -> dict[str, TensorMeta]:
        """Return the tensors of the file that hold tensor `name`."""
        if self.code == "plain":
            return {name: self.layout}
        if self.code == "same":
            return {}
        elements = self.layout.shape.numel()
        scales = TensorMeta(torch.bfloat16, torch.Size([blocks_of(elements)]))
        return {f"{name}|q": TensorMeta(torch.int8, torch.Size([elements])), f"{name}|scale": scales}

    def to_json(self) -> list[Any]:
        """Return the entry as a JSON value."""
        return [self.code, str(self.layout.dtype).removeprefix("torch."), list(self.layout.shape)]

    @classmethod
    def from_json(cls, value: Any) -> Entry:
        """Return the entry that `to_json` wrote.

        Raises:
            TypeError, ValueError, AttributeError: If it is none.
        """
        code, name, shape = value
        dtype = getattr(torch, name)
        fits = isinstance(dtype, torch.dtype) and (dtype.is_floating_point or code != "int8")
        if code not in CODES or not fits or not all(type(size) is int and 0 <= size < 1 << 48 for size in shape):
            raise ValueError(f"{value!r:.80}")
        return cls(code, TensorMeta(dtype, torch.Size(shape)))


class Delta:
    """The content of a node's file: for each tensor its difference to the node before, or its values.

    Args:
        entries: How each tensor is stored, by canonical name; of tied weights the first name only.
        aliases: {name: first name} of the other names of tied weights.
        parts: The tensors of the file, by name.

    Attributes:
        layout: Dtype and shape of each decoded tensor; tied ones under each name.
    """

    def __init__(self, entries: Mapping[str, Entry], aliases: Mapping[str, str], parts: Mapping[str, Tensor]) -> None:
        self.entries, self.aliases, self.parts = dict(entries), dict(aliases), parts
        own = {name: entry.layout for name, entry in self.entries.items()}
        self.layout: dict[str, TensorMeta] = own | {alias: own[name] for alias, name in self.aliases.items()}

    def decode(
        self, name: str, previous: Tensor, start: int, out: Tensor | None = None, memory: str = "node"
    ) -> Tensor:
        """Return a piece of a tensor, given that of the node before in any dtype.

        Args:
            name: The name under which the tensor is stored.
            previous: The piece at the node before, shape (m,).
            start: First element of the piece.
            out: A tensor of shape (m,), into which a difference is decoded if it has the right dtype.
            memory: Name of the `scratch` memory into which it is decoded else.
        """
        entry = self.entries[name]
        if entry.code == "plain":
            return self.parts[name].view(-1)[start : start + len(previous)]
        dtype = entry.layout.dtype
        previous = previous.to(dtype)
        if entry.code == "same":
            return previous
        if out is None or out.dtype != dtype:
            out = scratch(memory, len(previous), dtype)
        decode_int8(self.parts[f"{name}|q"], self.parts[f"{name}|scale"], previous, start, out)
        return out

    # -- in a file ----------------------------------------------------------------------------------------------------

    def metadata(self) -> str:
        """Return entries and aliases as JSON, to be stored beside the parts."""
        entries = {name: entry.to_json() for name, entry in self.entries.items()}
        return json.dumps({"entries": entries, "aliases": self.aliases}, sort_keys=True)

    @classmethod
    def from_parts(cls, metadata: str, parts: Mapping[str, Tensor], *, source: str) -> Delta:
        """Return the Delta that `metadata` and `parts` were made from, after a check that they fit each other.

        Args:
            metadata: Text that `metadata()` returned.
            parts: Tensors that may be mapped from a file: their values are not read.
            source: Where they come from, for errors.

        Raises:
            PathError: If they do not fit, or are stored as only an earlier version could.
        """
        try:
            content = json.loads(metadata)
            entries = {str(name): Entry.from_json(value) for name, value in content["entries"].items()}
            aliases = {str(alias): str(name) for alias, name in content["aliases"].items()}
            delta = cls(entries, aliases, parts)
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise unreadable(f"{source} whose layout cannot be read ({error})") from error
        wanted = {part: meta for name, entry in entries.items() for part, meta in entry.stored(name).items()}
        found = {name: TensorMeta(part.dtype, part.shape) for name, part in parts.items()}
        odd = sorted({name for name, _ in wanted.items() ^ found.items()} | (aliases.keys() & entries.keys()))
        if odd:
            raise damaged(f"parts {odd[:3]} that do not fit the layout in {source}", "a node")
        return delta


def scratch(name: str, elements: int, dtype: torch.dtype) -> Tensor:
    """Return memory of this thread, shape (elements,), which the next call with this name and dtype returns again.

    New pages cost more than the sums that are written there.
    """
    memory: dict[str, Tensor] = vars(_MEMORY)
    key = f"{name} of {dtype}"
    if key not in memory:
        memory[key] = host_tensor(PIECE, dtype)
    return memory[key][:elements]
