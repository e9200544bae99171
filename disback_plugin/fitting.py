"""When a recording has done its work: s' is fitted once its gradients in a row no longer point the same way.

While s' is far from the student's score, the gradients of two updates in a row agree, whatever the batch: their cosine
is near 1. Once s' fits as well as its learning rate allows, what is left is noise and the optimizer's own oscillation:
0 or below. The cosine knows no unit: not that of the loss, nor clipping, nor a GradScaler's scale. And the updates that
it takes are the time that s_phi needs to follow a change of the student, at this network, rate and batch: the natural
clock of a descent (`schedules.Auto`).
"""

from __future__ import annotations

import base64
import binascii
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from disback_plugin.errors import StateError
from disback_plugin.weights.network import ScoreNetwork
from disback_plugin.weights.sharding import held

__all__ = ["AGREEMENT", "EVERY", "Fit", "fitted_after", "means", "sampled", "unpack"]

# Numbers of a gradient that are kept for the next: a cosine is then right to about 0.02.
SAMPLE = 4096
# The verdict is asked for every so many updates: the only time that a number is read from the device.
EVERY = 5
# A mean cosine below this is no agreement.
AGREEMENT = 0.1


def fitted_after(cosines: Sequence[float]) -> int | None:
    """Return after how many updates a network was fitted; None if it is not yet.

    That is the first multiple of five at which the last quarter of the cosines, four at least, is below 0.1 on average.

    Args:
        cosines: Between the gradients of updates 1 and 2, 2 and 3, ...; what is not finite counts for nothing.

    Example:
        >>> fitted_after([0.9] * 10 + [-0.3] * 10), fitted_after([0.9] * 100)
        (15, None)
    """
    return next((updates for updates, mean in means(cosines) if mean < AGREEMENT), None)


def means(cosines: Sequence[float]) -> list[tuple[int, float]]:
    """Return, at each multiple of five updates, the mean of the last quarter of the cosines, four at least.

    Example:
        >>> means([1.0, 1.0, 0.5, 0.5, 0.5, 0.0, 0.0, 0.0, 0.0])
        [(5, 0.75), (10, 0.0)]
    """
    found = []
    for updates in range(EVERY, len(cosines) + 2, EVERY):
        last = [c for c in cosines[: updates - 1][-max(EVERY - 1, updates // 4) :] if math.isfinite(c)]
        if len(last) >= EVERY - 1:
            found.append((updates, sum(last) / len(last)))
    return found


class Fit:
    """The cosines of one network's gradients, from samples of them on the device.

    Args:
        network: The network; `look` is called after each of its updates, while the gradients are still there. Of a
            sharded one each rank sees its own part.

    Example:
        >>> net = nn.Linear(2, 1)
        >>> fit = Fit(ScoreNetwork(net))
        >>> for _ in range(3):
        ...     net.weight.grad, net.bias.grad = torch.ones(1, 2), torch.zeros(1)
        ...     fit.look()
        >>> [round(cosine, 3) for cosine in fit.cosines()]
        [1.0, 1.0]
    """

    def __init__(self, network: ScoreNetwork) -> None:
        self._network = network
        self._sample: Tensor | None = None
        self._seen: list[float] = []
        self._pending: list[Tensor] = []

    @torch.no_grad()
    def look(self) -> None:
        """Compare the gradients with the last ones; reads nothing from the device."""
        sample = sampled(self._network)
        if sample is None:
            return
        # On another number of ranks than the saved run's, each sees another part.
        if self._sample is not None and len(self._sample) == len(sample):
            last = self._sample.to(sample)
            cosine = torch.nn.functional.cosine_similarity(sample, last, dim=0)
            # Gradients that are all zero, as after zero_grad(set_to_none=False), say nothing.
            self._pending.append(torch.where(sample.any() & last.any(), cosine, math.nan))
        self._sample = sample

    def cosines(self) -> list[float]:
        """Return the cosines so far, read from the device."""
        if self._pending:
            self._seen += [float(value) for value in torch.stack(self._pending).tolist()]
            self._pending.clear()
        return self._seen

    def updates(self) -> int | None:
        """Return after how many updates the network was fitted (`fitted_after`); None if it is not yet.

        Example:
            >>> Fit(ScoreNetwork(nn.Linear(2, 1))).updates() is None
            True
        """
        return fitted_after(self.cosines())

    def state(self) -> Tensor:
        """Return all that is needed to go on, as one row of float32 on the CPU."""
        cosines = torch.tensor([float(len(self.cosines())), *self.cosines()], dtype=torch.float32)
        return cosines if self._sample is None else torch.cat([cosines, self._sample.cpu()])

    def load(self, state: Tensor) -> None:
        """Go on from a `state`.

        Raises:
            StateError: If it is none. Then nothing changes.
        """
        _check(state)
        end = 1 + int(state[0])
        self._pending.clear()
        self._seen = state[1:end].tolist()
        self._sample = state[end:].clone() if len(state) > end else None

    def text(self) -> str:
        """Return the state as text."""
        return base64.b64encode(self.state().numpy().tobytes()).decode()

    def load_text(self, text: str) -> None:
        """Go on from a `text`.

        Raises:
            StateError: If it is damaged. Then nothing changes.
        """
        self.load(unpack(text))

    @staticmethod
    def check(text: str) -> None:
        """Raise StateError unless a `text` can be gone on from."""
        _check(unpack(text))


def unpack(text: str) -> Tensor:
    """Return the row of float32 that a text holds.

    Raises:
        StateError: If it holds none.

    Example:
        >>> unpack("AACAPwAAAEA=")
        tensor([1., 2.])
    """
    try:
        row = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise _damaged("that does not read") from error
    if not row or len(row) % 4:
        raise _damaged(f"of {len(row)} bytes")
    return torch.frombuffer(bytearray(row), dtype=torch.float32)


def _check(state: Tensor) -> None:
    count = float(state[0]) if state.ndim == 1 and len(state) else math.nan
    if not (count >= 0 and count == int(count) and count < len(state)):
        raise _damaged(f"of {count:g} cosines in {state.numel()} numbers")
    if (state[1 : 1 + int(count)].abs() > 1.001).any():
        raise _damaged("with cosines above 1")


def _damaged(how: str) -> StateError:
    return StateError(f"a fit {how}", expected="the text that a state was saved with", cure="pass an unedited state")


def sampled(network: ScoreNetwork) -> Tensor | None:
    """Return every k-th number of a network's gradient, parameter after parameter; None if there is no gradient. One
    that is sparse counts as none.

    Example:
        >>> net = nn.Linear(2, 1)
        >>> net.weight.grad = torch.tensor([[1.0, 2.0]])
        >>> sampled(ScoreNetwork(net))
        tensor([1., 2., 0.])
    """
    weights = [tensor for _, tensor in network.named_tensors() if isinstance(tensor, nn.Parameter)]
    gradients = [_dense(weight.grad) for weight in weights]
    if all(gradient is None for gradient in gradients):
        return None
    local = [
        (held(weight)[0], None if gradient is None else held(gradient)[0])
        for weight, gradient in zip(weights, gradients, strict=True)
    ]
    stride = max(-(-sum(weight.numel() for weight, _ in local) // SAMPLE), 1)
    parts, offset = [], 0
    for weight, gradient in local:
        first, offset = -offset % stride, offset + weight.numel()
        if first < weight.numel():
            part = (weight if gradient is None else gradient).reshape(-1)[first::stride].float()
            parts.append(torch.zeros_like(part) if gradient is None else part)
    return torch.cat([part.to(parts[0].device) for part in parts])


def _dense(gradient: Tensor | None) -> Tensor | None:
    return None if gradient is None or gradient.layout is not torch.strided else gradient
