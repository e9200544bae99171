"""A node from a network's weights: which codec it gets, and what that costs in the scores and in the weights."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from disback_plugin.errors import TrainingError
from disback_plugin.path.codecs import SMALLEST_FIRST
from disback_plugin.path.delta import Decoded, Delta
from disback_plugin.path.probes import Probe, relative_change
from disback_plugin.weights.checksum import Checksum
from disback_plugin.weights.full_state import FullState
from disback_plugin.weights.tensor_meta import pieces

__all__ = ["BOUND", "Encoded", "encode"]

logger = logging.getLogger(__name__)

# Largest error in the scores, relative to the step between two nodes, that codec="auto" allows.
BOUND = 0.01


@dataclass(frozen=True)
class Encoded:
    """A node, ready to be stored. The attributes but `delta` are those of `manifest.Node`."""

    delta: Delta
    codec: str
    checksum: str
    recorded: str
    delta_norm: float
    weight_error: float
    codec_error: float | None

    def measured(self) -> dict[str, Any]:
        """Return all but the weights."""
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "delta"}


def encode(
    codec: str,
    state: Mapping[str, Tensor],
    previous: Decoded,
    probe: Probe | None = None,
    *,
    exactly: Collection[str] = (),
    keep: Callable[[Tensor], Tensor] = lambda part: part,
) -> Encoded:
    """Encode a network's weights as the node after `previous`.

    Args:
        codec: A codec's name, "auto" or "auto:BOUND": the smallest whose error is at most the bound, in the scores, or
            in the weights where no forward was seen (which is the larger one).
        state: All weights of s'_i, under canonical names.
        previous: Node i - 1.
        probe: What evaluates the network that holds `state`. Without a forward seen, weights are compared.
        exactly: Names of tensors that are stored exactly, whatever the codec: running statistics, whose signs matter.
            So are tensors that overlap others in memory, and a whole node that would not be finite once decoded.
        keep: What is done with a tensor's coded parts to keep them.

    Raises:
        TrainingError: If the weights are not finite, or equal those of `previous`.
    """
    state, score = FullState.of(state), _Score(probe, previous)
    exactly = {*exactly, *state.overlapping()}
    name, _, bound = codec.partition(":")
    allowed = (float(bound) if bound else BOUND) if name == "auto" else math.inf
    for candidate in SMALLEST_FIRST if name == "auto" else (name, "exact"):
        seen = _Comparison(state)
        delta = Delta.encode(candidate, state, previous, exactly=exactly, keep=keep, compare=seen)
        if not 0 < seen.moved < math.inf:
            raise TrainingError(
                f"weights that {'did not move' if seen.moved == 0 else 'are not finite'}",
                expected="a fake score that its optimizer moves by finite amounts",
                cure="check the fake score's learning rate and loss, and that its dtype does not swallow the steps",
            )
        total, recorded, delta_norm = seen.decoded.digest(), seen.recorded.digest(), math.sqrt(seen.moved)
        decoded = Decoded(previous.teacher, (*previous.deltas, delta))
        codec_error = 0.0 if total == recorded else score.change(decoded)
        weight_error = math.sqrt(seen.lost) / delta_norm
        result = Encoded(delta, candidate, total, recorded, delta_norm, weight_error, codec_error)
        error = result.weight_error if codec_error is None else codec_error
        if error <= allowed and math.isfinite(error + result.weight_error):
            return result
    return result  # exact: its errors are 0


class _Comparison:
    """What is seen of a state while it is encoded.

    Attributes:
        recorded: Checksum of the state.
        decoded: Checksum of what will be decoded.
        moved: Squared distance to the node before, over all floating and complex tensors.
        lost: Squared distance of what will be decoded to the state.
    """

    def __init__(self, state: FullState) -> None:
        self._twins: dict[str, list[str]] = {}
        for alias, first in state.aliases.items():
            self._twins.setdefault(first, []).append(alias)
        self.recorded, self.decoded = Checksum(), Checksum()
        self.moved = self.lost = 0.0

    def __call__(self, name: str, values: Tensor, before: Tensor, decoded: Tensor) -> None:
        for each in (name, *self._twins.get(name, ())):
            self.recorded.add(each, values)
            self.decoded.add(each, decoded)
        if values.is_floating_point() or values.is_complex():
            for start, stop in pieces(len(values)):
                self.moved += _square(values[start:stop], before[start:stop])
                self.lost += _square(values[start:stop], decoded[start:stop])


class _Score:
    """The score's change under a codec, over its change from the previous node; evaluates those two once."""

    def __init__(self, probe: Probe | None, previous: Decoded) -> None:
        self._probe = probe if probe is not None and probe.ready else None
        if probe is not None and not probe.ready:
            logger.info("the codec's error in the scores is not measured: no forward of the network was seen")
        self._previous = previous
        self._reference: tuple[list[Tensor], list[Tensor]] | None = None

    def change(self, decoded: Decoded) -> float | None:
        if self._probe is None:
            return None
        try:
            if self._reference is None:
                self._reference = self._probe.outputs(), self._probe.outputs(self._previous)
            return relative_change(self._probe.outputs(decoded), *self._reference)
        except Exception as error:  # a network may not like to be copied, or to be run out of turn
            logger.warning("the codec's error in the scores was not measured: %s: %s", type(error).__name__, error)
            self._probe = None
            return None


def _square(a: Tensor, b: Tensor) -> float:
    """Return |a - b|^2 of two pieces."""
    if a.is_complex():
        a, b = torch.view_as_real(a).reshape(-1), torch.view_as_real(b).reshape(-1)
    d = a - b
    square = float(d @ d)
    if d.dtype == torch.float32 and 1e-25 < square < math.inf:
        return square
    # Too small, too large or too coarse for its dtype; and equal elements are at distance 0, be they infinite.
    d = torch.where(a == b, 0.0, a.double() - b.double())
    return float(d @ d)
