"""Nodes as they are stored and read: s'_i is the teacher plus i differences, decoded piece by piece.

A move of the teacher reads the mapped files, adds in a processor's cache, and writes into the live weights: no decoded
node is ever in memory as a whole.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from disback_plugin.errors import COPY_AGAIN, PathError
from disback_plugin.path.codecs import CODES, code_for, fault
from disback_plugin.weights.full_state import FullState
from disback_plugin.weights.tensor_meta import GRAIN, PIECE, TensorMeta, pieces, room

__all__ = ["Between", "Decoded", "Delta", "Entry"]

_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    )
}


@dataclass(frozen=True)
class Entry:
    """How one tensor of a node is stored: the name of its code, and what it is once decoded."""

    code: str
    layout: TensorMeta

    @property
    def elements(self) -> int:
        """Number of elements."""
        return self.layout.shape.numel()

    def sizes(self) -> dict[str, tuple[torch.dtype, int | None]]:
        """Return the dtype and the length of each of its parts; None where the length depends on the values."""
        return CODES[self.code].sizes(self.elements, self.layout.dtype)

    def to_json(self) -> list[Any]:
        """Return it as a JSON value."""
        return [self.code, str(self.layout.dtype).removeprefix("torch."), list(self.layout.shape)]

    @classmethod
    def from_json(cls, value: Any) -> Entry:
        """Return what `to_json` wrote; raises KeyError, TypeError or ValueError if it cannot be that."""
        code, dtype, shape = value
        if code not in CODES or not all(type(size) is int and 0 <= size < 1 << 48 for size in shape):
            raise ValueError(f"{value!r:.80}")
        return cls(code, TensorMeta(_DTYPES[dtype], torch.Size(shape)))


class Delta:
    """What leads from one node to the next, tensor by tensor.

    Args:
        entries: How each tensor is stored, by canonical name; of tied weights the first name only.
        aliases: {name: first name} of the other names of tied weights.
        parts: The parts of each tensor, under "name|part".
    """

    def __init__(self, entries: Mapping[str, Entry], aliases: Mapping[str, str], parts: Mapping[str, Tensor]) -> None:
        self.entries, self.aliases, self.parts = dict(entries), dict(aliases), parts
        self._codes = {
            name: (CODES[entry.code], {part: parts[f"{name}|{part}"] for part in entry.sizes()}, entry.layout.dtype)
            for name, entry in entries.items()
        }

    @classmethod
    def encode(
        cls,
        codec: str,
        state: FullState,
        previous: Decoded,
        *,
        exactly: Collection[str] = (),
        keep: Callable[[Tensor], Tensor] = lambda part: part,
        compare: Callable[[str, Tensor, Tensor, Tensor], None] | None = None,
    ) -> Delta:
        """Return the difference of a state to the node before it; one tensor of the state at a time is looked at.

        Args:
            codec: A name of `codecs.CODES` for tensors that it can hold.
            state: All weights by canonical name.
            previous: The node before, as it is decoded.
            exactly: Names of tensors that are stored exactly, whatever the codec.
            keep: What is done with a part to keep it.
            compare: Called with each tensor's name and, flat, its values, those of the node before, and the decoded.
        """
        entries: dict[str, Entry] = {}
        parts: dict[str, Tensor] = {}
        for name in state.own():
            flat, before = state.flat(name), previous.flat(name)
            decoded = before.to(flat.dtype, copy=True)
            code = code_for("exact" if name in exactly else codec, flat, decoded)
            entries[name] = Entry(code, TensorMeta(flat.dtype, state.layout[name].shape))
            made = CODES[code].encode(flat, decoded)
            parts |= {f"{name}|{part}": keep(value) for part, value in made.items()}
            if compare is not None:
                for start, stop in pieces(len(flat)):
                    CODES[code].decode(made, decoded[start:stop], start, decoded[start:stop])
                compare(name, flat, before, decoded)
        return cls(entries, state.aliases, parts)

    def layout(self) -> dict[str, TensorMeta]:
        """Return what each tensor is, tied ones under each name."""
        own = {name: entry.layout for name, entry in self.entries.items()}
        return own | {alias: own[name] for alias, name in self.aliases.items()}

    def grain(self, name: str) -> int:
        """Return at what multiples a tensor's pieces begin and end; of the name under which it is stored."""
        return self._codes[name][0].grain

    def resolve(self, name: str) -> str:
        """Return the name under which a tensor is stored."""
        return self.aliases.get(name, name)

    def step(self, name: str, previous: Tensor, start: int, out: Tensor) -> None:
        """Decode a piece of a tensor, given that of the node before in any dtype, into `out`."""
        code, parts, dtype = self._codes[name]
        code.decode(parts, previous.to(dtype), start, out)

    # -- in a file ----------------------------------------------------------------------------------------------------

    def metadata(self) -> str:
        """Return entries and aliases as JSON, to be stored beside the parts."""
        entries = {name: entry.to_json() for name, entry in self.entries.items()}
        return json.dumps({"entries": entries, "aliases": self.aliases}, sort_keys=True)

    @classmethod
    def from_parts(cls, metadata: str, parts: Mapping[str, Tensor], *, source: str) -> Delta:
        """Return what `metadata` and `parts` were made of, after a check that they fit each other.

        Args:
            metadata: As `metadata()` wrote it.
            parts: Tensors that may still be mapped only: their dtypes and sizes are looked at, not their values.
            source: Where they come from, for errors.

        Raises:
            PathError: If they do not fit.
        """
        try:
            content = json.loads(metadata)
            entries = {str(name): Entry.from_json(value) for name, value in content["entries"].items()}
            aliases = {str(alias): str(name) for alias, name in content["aliases"].items()}
            fits = all(name in entries for name in aliases.values()) and not aliases.keys() & entries.keys()
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise PathError(
                f"{source} whose layout does not read ({error})", expected="a node", cure=COPY_AGAIN
            ) from error
        wanted = {f"{name}|{part}": size for name, entry in entries.items() for part, size in entry.sizes().items()}
        if not fits or wanted.keys() != parts.keys():
            odd = sorted(wanted.keys() ^ parts.keys())[:3]
            raise PathError(f"{source} with parts missing or too many {odd}", expected="a node", cure=COPY_AGAIN)
        for name, (dtype, length) in wanted.items():
            part = parts[name]
            if part.dtype != dtype or part.ndim != 1 or length not in (None, len(part)):
                raise PathError(
                    f"{name} of {part.dtype} and shape {tuple(part.shape)} in {source}",
                    expected=f"{dtype} and length {length}",
                    cure=COPY_AGAIN,
                )
        delta = cls(entries, aliases, parts)
        for name in entries:
            wrong = fault(delta._codes[name][1])
            if wrong:
                raise PathError(f"{name} with {wrong} in {source}", expected="a node", cure=COPY_AGAIN)
        return delta


class Decoded:
    """Node i of a path, a `writing.Source`.

    Args:
        teacher: FullState of node 0 on the CPU, contiguous; it may be mapped from a file.
        deltas: Those of nodes 1 ... i.
    """

    def __init__(self, teacher: Mapping[str, Tensor], deltas: Sequence[Delta]) -> None:
        self.teacher, self.deltas = teacher, tuple(deltas)

    def layout(self) -> dict[str, TensorMeta]:
        """Return what each tensor is."""
        if self.deltas:
            return self.deltas[-1].layout()
        return {name: TensorMeta(tensor.dtype, tensor.shape) for name, tensor in self.teacher.items()}

    def grain(self, name: str) -> int:
        """Return at what multiples that which is read of a tensor begins and ends."""
        stored = self.deltas[-1].resolve(name) if self.deltas else name
        return max((delta.grain(stored) for delta in self.deltas), default=GRAIN)

    def read(self, name: str, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        """Return elements [start, stop) of a tensor, a piece of it: the teacher's and all differences up to here."""
        *_, value = self.trace(name, start, stop, out)
        return value if out is None or value is out else out.copy_(value)

    def trace(self, name: str, start: int, stop: int, out: Tensor | None = None) -> Iterator[Tensor]:
        """Yield a piece of a tensor at node 0, 1, ..., i. Each is overwritten by the next; `out` is used if it fits."""
        stored = self.deltas[-1].resolve(name) if self.deltas else name
        value, ours = self.teacher[stored].view(-1)[start:stop], False
        yield value
        for delta in self.deltas:
            entry = delta.entries[stored]
            if entry.code != "same" or entry.layout.dtype != value.dtype:
                room = _room(stop - start, entry.layout.dtype, out, value if ours else None)
                delta.step(stored, value, start, room)
                value, ours = room, True
            yield value

    def flat(self, name: str) -> Tensor:
        """Return a whole tensor, shape (elements,)."""
        layout = self.layout()[name]
        whole = room(layout.shape.numel(), layout.dtype)
        for start, stop in pieces(len(whole)):
            self.read(name, start, stop, whole[start:stop])
        return whole

    def state_dict(self) -> dict[str, Tensor]:
        """Return all weights, on the CPU; tied ones share memory."""
        names = self.layout()
        aliases = self.deltas[-1].aliases if self.deltas else FullState(self.teacher).aliases
        own = {name: self.flat(name).view(layout.shape) for name, layout in names.items() if name not in aliases}
        return {name: own[aliases.get(name, name)] for name in names}


def _room(elements: int, dtype: torch.dtype, *offered: Tensor | None) -> Tensor:
    """Return the first memory offered that has the dtype, or new one."""
    fitting = [room for room in offered if room is not None and room.dtype == dtype]
    return fitting[0] if fitting else room(elements, dtype)


class Between:
    """The mixture (1 - fraction) s'_i + fraction s'_{i+1}, a `writing.Source`: mixed in float32, cast to node i + 1's
    dtype.

    Args:
        node: Node i + 1.
        fraction: Where between node i and node i + 1, in (0, 1). Integers are not mixed: they come from the nearer one.
    """

    def __init__(self, node: Decoded, fraction: float) -> None:
        self.node, self.fraction = node, fraction
        self._before = Decoded(node.teacher, node.deltas[:-1])
        self._dtypes = {name: layout.dtype for name, layout in self._before.layout().items()}
        self._memory: dict[tuple[str, torch.dtype], Tensor] = {}

    def layout(self) -> dict[str, TensorMeta]:
        """Return what each tensor is."""
        return self.node.layout()

    def grain(self, name: str) -> int:
        """Return at what multiples that which is read of a tensor begins and ends."""
        return self.node.grain(name)

    def read(self, name: str, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        """Return a piece of the mixture."""
        delta = self.node.deltas[-1]
        name = delta.resolve(name)
        entry, elements = delta.entries[name], stop - start
        memory = self._room("low", self._dtypes[name], elements) if self._before.deltas else None
        low = self._before.read(name, start, stop, memory).to(entry.layout.dtype)
        if entry.code == "same":
            return low if out is None else out.copy_(low)
        high = self._room("high", entry.layout.dtype, elements)
        delta.step(name, low, start, high)
        if out is not None and out.dtype == torch.float32 == high.dtype and entry.code != "exact":
            return torch.lerp(low, high, self.fraction, out=out)
        mixed = _mix(low, high, self.fraction)
        return mixed.to(high.dtype) if out is None else out.copy_(mixed)

    def _room(self, name: str, dtype: torch.dtype, elements: int) -> Tensor:
        """Return memory that the next piece uses again."""
        if (name, dtype) not in self._memory:
            self._memory[name, dtype] = room(PIECE, dtype)
        return self._memory[name, dtype][:elements]


def _mix(low: Tensor, high: Tensor, fraction: float) -> Tensor:
    if not (high.is_floating_point() or high.is_complex()):
        return low if fraction < 0.5 else high
    dtype = torch.promote_types(high.dtype, torch.float32)
    mixed = torch.lerp(low.to(dtype), high.to(dtype), fraction)
    # An attention mask's -inf stays: -inf minus -inf would be NaN.
    return torch.where(low == high, low.to(dtype), mixed)
