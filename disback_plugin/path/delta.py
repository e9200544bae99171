"""Nodes as they are stored and read: the teacher and i differences, decoded piece by piece.

A move of the teacher reads the mapped files, adds in a processor's cache, and writes into the live weights: no decoded
node is ever in memory as a whole.
"""

from __future__ import annotations

import math
import re
from collections.abc import Container, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from disback_plugin.errors import TrainingError
from disback_plugin.path.codecs import Delta, Entry, decode_int8, encode_int8, equal_bits
from disback_plugin.weights.sharding import FullState
from disback_plugin.weights.tensors import Checksum, TensorMeta, host_tensor, pieces


def encode(codec: str, state: Mapping[str, Tensor], previous: NodeSource) -> tuple[Delta, dict[str, Any]]:
    """Encode a network's weights as the node after `previous`, one tensor at a time.

    Under "int8" too some tensors are stored whole: buffers, as running statistics, whose signs matter; those that
    overlap others in memory; and those that would not be finite once decoded.

    Args:
        codec: "int8" or "exact".
        state: All weights of s'_i, under canonical names.
        previous: Node i - 1.

    Returns:
        The content of the node's file, and what the manifest says of it: codec, delta_norm, checksum, recorded and
        weight_error (`manifest.Node`).

    Raises:
        TrainingError: If the weights are not finite, or equal those of `previous`.
    """
    state = FullState.of(state)
    overlapping = state.overlapping()
    recorded, checksum, moved, lost = Checksum(), Checksum(), 0.0, 0.0
    entries: dict[str, Entry] = {}
    parts: dict[str, Tensor] = {}
    for name in state.own():
        value, before = state.flat(name), previous.flat(name)
        moved += _squared_distance(value, before)
        whole = name in state.buffers or name in overlapping
        code, made, decoded, error = _encode_tensor(codec, value, before.to(value.dtype), whole)
        lost += error
        entries[name] = Entry(code, TensorMeta(value.dtype, state.layout[name].shape))
        if code == "plain":
            made = {"": (value.clone() if name in overlapping else value).view(state.layout[name].shape)}
        parts |= {name + part: tensor for part, tensor in made.items()}
        for each in [name, *(alias for alias, first in state.aliases.items() if first == name)]:
            recorded.add(each, value)
            checksum.add(each, decoded)
    if not 0 < moved < math.inf:
        raise TrainingError(
            f"weights that {'did not move' if moved == 0 else 'are not finite'}",
            expected="a fake score that its optimizer moves by finite amounts",
            cure="check the fake score's learning rate and loss, and that its dtype does not swallow the steps",
        )
    sums = {"checksum": checksum.digest(), "recorded": recorded.digest()}
    measured = {"codec": codec, "delta_norm": math.sqrt(moved), "weight_error": math.sqrt(lost) / math.sqrt(moved)}
    return Delta(entries, state.aliases, parts), measured | sums


def _encode_tensor(
    codec: str, value: Tensor, before: Tensor, whole: bool
) -> tuple[str, dict[str, Tensor], Tensor, float]:
    """Return how a flat tensor is stored: its code, its parts, the decoded tensor, and the squared error of that."""
    if codec == "int8" and equal_bits(value, before):
        return "same", {}, value, 0.0
    if codec == "int8" and not whole and value.is_floating_point() and value.element_size() <= 4:
        made = encode_int8(value, before)
        decoded = host_tensor(len(value), value.dtype)
        for start, stop in pieces(len(value)):
            decode_int8(made["q"], made["scale"], before[start:stop], start, decoded[start:stop])
        error = _squared_distance(value, decoded)
        if math.isfinite(error):  # else a difference is not, or the tensor's dtype cannot hold what was decoded
            return "int8", {f"|{part}": tensor for part, tensor in made.items()}, decoded, error
    return "plain", {}, value, 0.0


def _squared_distance(a: Tensor, b: Tensor) -> float:
    """Return |a - b|^2 of two flat tensors; 0 unless they are floating or complex."""
    if a.is_complex():
        a, b = torch.view_as_real(a).reshape(-1), torch.view_as_real(b).reshape(-1)
    total = 0.0
    for start, stop in pieces(len(a)) if a.is_floating_point() else ():
        x, y = a[start:stop], b[start:stop]
        d = x - y
        square = float(d @ d)
        if d.dtype != torch.float32 or not 1e-25 < square < math.inf:
            # Too small, too large or too coarse for its dtype; and equal elements are at distance 0, be they infinite.
            d = torch.where(x == y, 0.0, x.double() - y.double())
            square = float(d @ d)
        total += square
    return total


class NodeSource:
    """Node i of a path, read piece by piece (`weights.tensors.Source`).

    Args:
        teacher: All weights of node 0, on the CPU and contiguous; they may be mapped from a file.
        deltas: The content of the files of nodes 1 ... i.

    Attributes:
        aliases: {name: name under which it is stored} of the other names of tied weights.
    """

    def __init__(self, teacher: Mapping[str, Tensor], deltas: Sequence[Delta] = ()) -> None:
        self.teacher, self.deltas = teacher, tuple(deltas)
        self.aliases: Mapping[str, str] = self.deltas[-1].aliases if self.deltas else {}

    def layout(self) -> dict[str, TensorMeta]:
        """Return dtype and shape of each tensor."""
        if self.deltas:
            return self.deltas[-1].layout
        return {name: TensorMeta(tensor.dtype, tensor.shape) for name, tensor in self.teacher.items()}

    def read(self, name: str, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        """Return elements [start, stop) of a tensor, within one piece of it."""
        *_, value = self.trace(name, start, stop, out)
        return value if out is None or value is out else out.copy_(value)

    def trace(self, name: str, start: int, stop: int, out: Tensor | None = None) -> Iterator[Tensor]:
        """Yield elements [start, stop) of a tensor at nodes 0, 1, ..., i. Each may be overwritten by the next.

        Args:
            name: Canonical name.
            start: First element.
            stop: End.
            out: Memory that decoded differences may be written into.
        """
        stored = self.aliases.get(name, name)
        value = self.teacher[stored].view(-1)[start:stop]
        yield value
        for delta in self.deltas:
            value = delta.decode(stored, value, start, out)
            yield value

    def flat(self, name: str) -> Tensor:
        """Return a copy of a whole tensor, shape (elements,)."""
        layout = self.layout()[name]
        whole = host_tensor(layout.shape.numel(), layout.dtype)
        for start, stop in pieces(len(whole)):
            self.read(name, start, stop, whole[start:stop])
        return whole

    def state_dict(self) -> dict[str, Tensor]:
        """Return all weights, on the CPU; tied ones share memory."""
        layout = self.layout()
        aliases = self.aliases if self.deltas else FullState(self.teacher).aliases
        own = {name: self.flat(name).view(meta.shape) for name, meta in layout.items() if name not in aliases}
        return {name: own[aliases.get(name, name)] for name in layout}


class InterpolatedSource:
    """The weights (1 - fraction) s'_{i-1} + fraction s'_i, interpolated in float32 and cast to the dtype of node i.

    Args:
        node: Node i.
        fraction: Position between nodes i - 1 and i, in (0, 1). Integers, and the singular vectors of a spectral norm,
            come from the nearer node.
    """

    def __init__(self, node: NodeSource, fraction: float) -> None:
        self.node, self.fraction = node, fraction
        self._before = NodeSource(node.teacher, node.deltas[:-1])

    def layout(self) -> dict[str, TensorMeta]:
        """Return dtype and shape of each tensor."""
        return self.node.layout()

    def read(self, name: str, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        """Return elements [start, stop) of a tensor, within one piece of it."""
        delta = self.node.deltas[-1]
        name = delta.aliases.get(name, name)
        low = self._before.read(name, start, stop)
        high = delta.decode(name, low, start, memory="high")
        if delta.entries[name].code == "int8" and out is not None and out.dtype == torch.float32 == low.dtype:
            return torch.lerp(low, high, self.fraction, out=out)
        continuous = high.is_floating_point() or high.is_complex()
        if low is high or not continuous or _is_singular_vector(name, delta.entries):
            mixed = low if self.fraction < 0.5 else high
        else:
            dtype = torch.promote_types(torch.promote_types(low.dtype, high.dtype), torch.float32)
            wide = low.to(dtype)
            # An attention mask's -inf stays: -inf minus -inf would be NaN.
            mixed = torch.where(low == high, wide, torch.lerp(wide, high.to(dtype), self.fraction))
        return mixed.to(high.dtype) if out is None else out.copy_(mixed)


def _is_singular_vector(name: str, entries: Container[str]) -> bool:
    """Return whether a tensor is one of the unit vectors that torch's spectral norm keeps, in either of its forms.

    Example:
        >>> _is_singular_vector("0.weight_u", {"0.weight_orig"}), _is_singular_vector("0.weight_v", {"0.weight_g"})
        (True, False)
    """
    parametrized = re.search(r"(^|\.)parametrizations\.[^.]+\.\d+\._[uv]$", name) is not None
    return parametrized or (name[-2:] in ("_u", "_v") and f"{name[:-2]}_orig" in entries)
