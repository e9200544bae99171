"""Tests on the fake score's gradients: whether s' is fitted, and whether s_phi follows the student while backtracking.

While a network is far from its optimum, the gradients of two updates in a row agree, whatever the batch: their cosine
is near 1. Once the network fits as well as its learning rate allows, noise and the optimizer's own oscillation are
left: the cosine is 0 or below. The cosine has no unit: neither the loss's scale nor clipping nor a GradScaler matters.

| sign     | in the gradients                                            | meaning                             |
|----------|-------------------------------------------------------------|-------------------------------------|
| fitted   | last quarter of the cosines: mean below 0.1                 | recording has done its work         |
| stalled  | mean cosine above 0.6 in two windows in a row               | s_phi does not follow the student   |
| diverged | norm not finite, or above 30 times that of the first window | the student runs away from s_phi    |

The number of updates until s' is fitted is also the time in which s_phi follows a change of the student, at this
network, rate and batch: the natural length of a descent (`schedules.Auto`). In the sound runs of
`benchmarks/EVIDENCE.md` two windows in a row stay below 0.50 and the norm below 3.8 times the first. With gradient
clipping, or a bounded loss, "diverged" detects only NaN.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from disback_plugin import distributed
from disback_plugin.errors import StateError
from disback_plugin.weights.network import ScoreNetwork
from disback_plugin.weights.sharding import local_tensor

__all__ = ["AGREEMENT", "EVERY", "DivergenceMonitor", "FitDetector", "fitted_after", "means"]

# Elements of a gradient that are kept for the next comparison: a cosine is then right to about 0.02.
SAMPLE = 4096
# Updates between two decisions, which alone read numbers from the device.
EVERY = 5
# Gradients with a mean cosine below this do not agree.
AGREEMENT = 0.1
# Mean cosine, and growth of the norm, above which a run is stalled or has diverged.
STALLED, GROWTH = 0.6, 30.0
# A window is this part of backtracking, at most so many updates; the first one has EVERY updates.
WINDOWS, LONGEST = 12, 50
# Numbers of a monitor's state before the gradient's sample.
COUNTS = 7


def fitted_after(cosines: Sequence[float]) -> int | None:
    """Return after how many updates a network was fitted; None if it is not fitted yet.

    That is the first multiple of five at which the last quarter of the cosines, four at least, is below 0.1 on average.

    Args:
        cosines: Between the gradients of updates 1 and 2, 2 and 3, ...; values that are not finite are ignored.

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


class _GradientTest:
    """Samples of a network's gradients, update after update, and the state that all tests on them save.

    Args:
        network: The network. Of a sharded network each rank samples its own shards.
    """

    def __init__(self, network: ScoreNetwork) -> None:
        weights = [tensor for _, tensor in network.named_tensors() if isinstance(tensor, nn.Parameter)]
        elements = [local_tensor(weight).numel() for weight in weights]
        self._stride = max(-(-sum(elements) // SAMPLE), 1)
        first = [-offset % self._stride for offset in accumulate(elements, initial=0)]
        # Parameter, its first element that is sampled, and the number of elements that are.
        self._parts = [
            (weight, start, -(-(count - start) // self._stride))
            for weight, start, count in zip(weights, first, elements, strict=False)
            if start < count
        ]
        self._last: Tensor | None = None

    def _draw(self) -> Tensor | None:
        """Return every k-th element of the present gradients; None if there is no gradient, zeros for a sparse one."""
        parts, empty = [], True
        for weight, first, count in self._parts:
            gradient = weight.grad
            if gradient is None or gradient.layout is not torch.strided:
                parts.append(torch.zeros(count, device=weight.device))
            else:
                local = gradient.to_local() if hasattr(gradient, "to_local") else gradient
                parts.append(local.reshape(-1)[first :: self._stride].float())
                empty = False
        return None if empty else torch.cat([part.to(parts[0].device) for part in parts])

    @torch.no_grad()
    def _compare(self) -> tuple[Tensor, Tensor | None] | None:
        """Draw a sample and return it with its cosine to the last one; None if there is no gradient.

        The cosine is None without a comparable sample before (another number of ranks has other shards), and NaN where
        one of the two is zero, as after `zero_grad(set_to_none=False)`. Nothing is read from the device.
        """
        sample, last = self._draw(), self._last
        if sample is None:
            return None
        self._last = sample
        if last is None or len(last) != len(sample):
            return sample, None
        last = last.to(sample)
        return sample, torch.where(sample.any() & last.any(), cosine_similarity(sample, last, dim=0), math.nan)

    def _numbers(self) -> list[float]:
        raise NotImplementedError

    def _set_numbers(self, numbers: list[float]) -> None:
        raise NotImplementedError

    @staticmethod
    def _length(state: Tensor) -> int:
        """Return how many numbers stand before the sample in a state; raise StateError if it is damaged."""
        raise NotImplementedError

    def to_tensor(self) -> Tensor:
        """Return the state as one row of float32 on the CPU: numbers, and the last sample."""
        numbers = torch.tensor(self._numbers(), dtype=torch.float32)
        return numbers if self._last is None else torch.cat([numbers, self._last.cpu()])

    def load_tensor(self, state: Tensor) -> None:
        """Continue from the state that `to_tensor` returned; raise StateError, and change nothing, if it is damaged."""
        end = self._length(state)
        self._set_numbers(state[:end].tolist())
        self._last = state[end:].clone() if len(state) > end else None

    def to_text(self) -> str:
        """Return the state as text."""
        return base64.b64encode(self.to_tensor().numpy().tobytes()).decode()

    def load_text(self, text: str) -> None:
        """Continue from the state that `to_text` returned; raise StateError, and change nothing, if it is damaged."""
        self.load_tensor(self.validate_text(text))

    @classmethod
    def validate_text(cls, text: str) -> Tensor:
        """Return the state that a text holds; raise StateError if it is damaged."""
        try:
            row = base64.b64decode(text, validate=True)
        except ValueError as error:
            raise _damaged("that does not read") from error
        if not row or len(row) % 4:
            raise _damaged(f"of {len(row)} bytes")
        state = torch.frombuffer(bytearray(row), dtype=torch.float32)
        cls._length(state)
        return state


class FitDetector(_GradientTest):
    """Detects from gradients in a row that a network is fitted.

    Args:
        network: s', the network. Call `observe` after each of its updates, before the gradients are cleared.

    Example:
        >>> net = nn.Linear(2, 1)
        >>> fit = FitDetector(ScoreNetwork(net))
        >>> for _ in range(3):
        ...     net.weight.grad, net.bias.grad = torch.ones(1, 2), torch.zeros(1)
        ...     fit.observe()
        >>> [round(cosine, 3) for cosine in fit.cosines()], fit.fitted_after() is None
        ([1.0, 1.0], True)
    """

    def __init__(self, network: ScoreNetwork) -> None:
        super().__init__(network)
        self._known: list[float] = []
        self._pending: list[Tensor] = []

    def observe(self) -> None:
        """Compare the gradients of an update with those of the update before; reads nothing from the device."""
        compared = self._compare()
        if compared is not None and compared[1] is not None:
            self._pending.append(compared[1])

    def cosines(self) -> list[float]:
        """Return all cosines so far; those of the last updates are read from the device."""
        if self._pending:
            self._known += [float(value) for value in torch.stack(self._pending).tolist()]
            self._pending.clear()
        return self._known

    def fitted_after(self) -> int | None:
        """Return after how many updates the network was fitted on this rank's gradients; None if it is not yet."""
        return fitted_after(self.cosines())

    def _numbers(self) -> list[float]:
        return [float(len(self.cosines())), *self.cosines()]

    def _set_numbers(self, numbers: list[float]) -> None:
        self._known, self._pending = numbers[1:], []

    @staticmethod
    def _length(state: Tensor) -> int:
        count = float(state[0]) if state.ndim == 1 and len(state) else math.nan
        if not (count >= 0 and count == int(count) and count < len(state)):
            raise _damaged(f"of {count:g} cosines in {state.numel()} numbers")
        if (state[1 : 1 + int(count)].abs() > 1.001).any():
            raise _damaged("with cosines above 1")
        return 1 + int(count)


class DivergenceMonitor(_GradientTest):
    """Detects while backtracking that s_phi does not follow the student. Three numbers a window leave the device.

    Args:
        network: s_phi. Call `observe` after each of its updates, before the gradients are cleared.
        horizon: Length of backtracking in generator updates: a longer one has longer windows.

    Attributes:
        window_ended: Whether a window has ended whose signs `new_signs` has not returned; the same on all ranks.
        stalled: Whether gradients agreed in two windows in a row; stays True.
        diverged: Whether the gradients have grown thirtyfold or are not finite; stays True.

    Example:
        >>> net = nn.Linear(2, 1)
        >>> monitor = DivergenceMonitor(ScoreNetwork(net), horizon=60)
        >>> for update in range(15):
        ...     net.weight.grad, net.bias.grad = torch.full((1, 2), 10.0 ** (update // 5)), torch.zeros(1)
        ...     monitor.observe()
        ...     for sign in monitor.new_signs():
        ...         print(update, sign)
        9 stalled
        14 diverged
    """

    window_ended: bool
    stalled: bool
    diverged: bool
    _count: int  # updates in this window
    _agreed: int  # windows in a row that agreed
    _first: float  # norm in the first window
    _sums: Tensor | None  # sum of the cosines, their number, sum of the squared norms

    def __init__(self, network: ScoreNetwork, horizon: int) -> None:
        super().__init__(network)
        self._later = min(max(horizon // WINDOWS, EVERY), LONGEST)
        self._set_numbers([0.0] * COUNTS)

    @property
    def _window(self) -> int:
        return self._later if self._first else EVERY

    def observe(self) -> None:
        """Sample the gradients of an update; of a long window only those of the last updates."""
        if self.window_ended:  # nobody asked for the signs: generator updates may be rare
            self._count, self._sums = 0, None
        self._count += 1
        left = self._window - self._count
        self.window_ended = left <= 0
        if left > EVERY:
            return
        if left == EVERY:
            self._last = None  # not the sample of the update before
        compared = self._compare()
        if compared is None:
            return
        sample, cosine = compared
        norm = sample.square().sum()
        known = norm.new_zeros(()) if cosine is None else cosine
        new = torch.stack([known.nan_to_num(), known.isfinite().to(norm) * (cosine is not None), norm])
        self._sums = new if self._sums is None else self._sums.to(new) + new

    def new_signs(self) -> list[str]:
        """Return "stalled" and "diverged" where the window that has just ended shows them for the first time.

        All ranks must call, after the same update: rank 0 decides for all. Between two windows nothing is read.
        """
        if not self.window_ended:
            return []
        cosines, number, squares = distributed.on_main_process(self._read)
        self._agreed = self._agreed + 1 if number and cosines / number > STALLED else 0
        norm = math.sqrt(squares) if math.isfinite(squares) else math.inf
        found = {"stalled": self._agreed > 1, "diverged": norm == math.inf or 0 < GROWTH * self._first < norm}
        new = [sign for sign, shown in found.items() if shown and not getattr(self, sign)]
        self.stalled, self.diverged = self.stalled or found["stalled"], self.diverged or found["diverged"]
        self._first = self._first or norm
        self._count, self._sums, self.window_ended = 0, None, False
        return new

    def _read(self) -> list[float]:
        return [0.0] * 3 if self._sums is None else [float(number) for number in self._sums.tolist()]

    def to_text(self) -> str:
        """Return the state as text, empty before the first update."""
        return super().to_text() if self._count or self._first else ""

    @classmethod
    def validate_text(cls, text: str) -> Tensor:
        """Return the state that a text holds; raise StateError if it is damaged."""
        return super().validate_text(text) if text else torch.zeros(COUNTS)

    def _numbers(self) -> list[float]:
        return [self._count, self._agreed, 2 * self.stalled + 4 * self.diverged, self._first, *self._read()]

    def _set_numbers(self, numbers: list[float]) -> None:
        self._count, self._agreed, signs = (int(number) for number in numbers[:3])
        self.stalled, self.diverged = bool(signs & 2), bool(signs & 4)  # bit 1 was another sign in version 1
        self._first, self._sums = numbers[3], torch.tensor(numbers[4:]) if any(numbers[4:]) else None
        self.window_ended = self._count >= self._window

    @staticmethod
    def _length(state: Tensor) -> int:
        whole = state[:3].tolist()
        if len(state) < COUNTS or any(number < 0 or number % 1 for number in whole) or whole[2] > 7:
            raise _damaged(f"that begins with {state[:COUNTS].tolist()}")
        return COUNTS


def _damaged(how: str) -> StateError:
    return StateError(f"a saved fit {how}", expected="the text of a saved state", cure="pass an unedited state")
