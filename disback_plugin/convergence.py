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
import binascii
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

__all__ = ["AGREEMENT", "EVERY", "DivergenceMonitor", "FitDetector", "GradientSample", "fitted_after", "means"]

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


class GradientSample:
    """Every k-th element of a network's gradient, and its comparison with that of the update before.

    Args:
        network: The network. Of a sharded network each rank samples its own shards.

    Attributes:
        last: The last sample, shape (elements,); None before the first.

    Example:
        >>> net = nn.Linear(2, 1)
        >>> net.weight.grad = torch.tensor([[1.0, 2.0]])
        >>> sample = GradientSample(ScoreNetwork(net))
        >>> sample.draw()
        tensor([1., 2., 0.])
    """

    def __init__(self, network: ScoreNetwork) -> None:
        weights = [tensor for _, tensor in network.named_tensors() if isinstance(tensor, nn.Parameter)]
        elements = [local_tensor(weight).numel() for weight in weights]
        self._stride = max(-(-sum(elements) // SAMPLE), 1)
        # Parameter, first element that is sampled, and number of elements that are.
        self._parts: list[tuple[nn.Parameter, int, int]] = []
        for weight, count, offset in zip(weights, elements, accumulate(elements, initial=0), strict=False):
            first = -offset % self._stride
            if first < count:
                self._parts.append((weight, first, -(-(count - first) // self._stride)))
        self.last: Tensor | None = None

    def draw(self) -> Tensor | None:
        """Return the sample of the present gradients, parameter after parameter; None if there is no gradient.

        A parameter without a gradient, or with a sparse one, counts as zero.
        """
        parts, empty = [], True
        for weight, first, count in self._parts:
            gradient = weight.grad
            if gradient is None or gradient.layout is not torch.strided:
                parts.append(torch.zeros(count, device=weight.device))
                continue
            local = gradient.to_local() if hasattr(gradient, "to_local") else gradient
            parts.append(local.reshape(-1)[first :: self._stride].float())
            empty = False
        return None if empty else torch.cat([part.to(parts[0].device) for part in parts])

    @torch.no_grad()
    def compare(self) -> tuple[Tensor, Tensor | None] | None:
        """Draw a sample and return it with its cosine to the last one; None if there is no gradient.

        The cosine is None without a comparable sample before (another number of ranks has other shards), and NaN where
        one of the two is zero, as after `zero_grad(set_to_none=False)`. Nothing is read from the device.
        """
        sample, last = self.draw(), self.last
        if sample is None:
            return None
        self.last = sample
        if last is None or len(last) != len(sample):
            return sample, None
        last = last.to(sample)
        return sample, torch.where(sample.any() & last.any(), cosine_similarity(sample, last, dim=0), math.nan)


class FitDetector:
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
        self._gradient = GradientSample(network)
        self._known: list[float] = []
        self._pending: list[Tensor] = []

    def observe(self) -> None:
        """Compare the gradients of an update with those of the update before; reads nothing from the device."""
        compared = self._gradient.compare()
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

    def to_tensor(self) -> Tensor:
        """Return the state as one row of float32 on the CPU: number of cosines, cosines, last sample."""
        return _row([float(len(self.cosines())), *self.cosines()], self._gradient.last)

    def load_tensor(self, state: Tensor) -> None:
        """Continue from the state that `to_tensor` returned.

        Raises:
            StateError: If the state is damaged. Then nothing changes.
        """
        self._validate(state)
        end = 1 + int(state[0])
        self._pending.clear()
        self._known = state[1:end].tolist()
        self._gradient.last = state[end:].clone() if len(state) > end else None

    def to_text(self) -> str:
        """Return the state as text."""
        return _encoded(self.to_tensor())

    def load_text(self, text: str) -> None:
        """Continue from the state that `to_text` returned; raises StateError if it is damaged."""
        self.load_tensor(_decoded(text))

    @classmethod
    def validate_text(cls, text: str) -> None:
        """Raise StateError unless `load_text` can read a text."""
        cls._validate(_decoded(text))

    @staticmethod
    def _validate(state: Tensor) -> None:
        count = float(state[0]) if state.ndim == 1 and len(state) else math.nan
        if not (count >= 0 and count == int(count) and count < len(state)):
            raise _damaged(f"of {count:g} cosines in {state.numel()} numbers")
        if (state[1 : 1 + int(count)].abs() > 1.001).any():
            raise _damaged("with cosines above 1")


class DivergenceMonitor:
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

    def __init__(self, network: ScoreNetwork, horizon: int) -> None:
        self._gradient = GradientSample(network)
        self._later = min(max(horizon // WINDOWS, EVERY), LONGEST)
        self._count = self._agreed = 0  # updates in this window, windows in a row that agreed
        self.window_ended = self.stalled = self.diverged = False
        self._first = 0.0  # norm in the first window
        self._sums: Tensor | None = None  # sum of the cosines, their number, sum of the squared norms

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
            self._gradient.last = None  # not the sample of the update before
        compared = self._gradient.compare()
        if compared is None:
            return
        sample, cosine = compared
        norm = sample.square().sum()
        known = (
            norm.new_zeros(2) if cosine is None else torch.stack([cosine.nan_to_num(), cosine.isfinite().to(cosine)])
        )
        new = torch.cat([known, norm[None]])
        self._sums = new if self._sums is None else self._sums.to(new) + new

    def new_signs(self) -> list[str]:
        """Return "stalled" and "diverged" where the window that has just ended shows them for the first time.

        All ranks must call, after the same update: rank 0 decides for all. Between two windows nothing is read.
        """
        if not self.window_ended:
            return []
        cosines, number, squares = distributed.on_main_process(self._read)
        known = self.stalled, self.diverged
        self._agreed = self._agreed + 1 if number and cosines / number > STALLED else 0
        self.stalled = self.stalled or self._agreed > 1
        norm = math.sqrt(squares) if math.isfinite(squares) else math.inf
        self.diverged = self.diverged or not math.isfinite(norm) or 0 < GROWTH * self._first < norm
        self._first = self._first or norm
        self._count, self._sums, self.window_ended = 0, None, False
        signs = {"stalled": self.stalled and not known[0], "diverged": self.diverged and not known[1]}
        return [name for name, new in signs.items() if new]

    def _read(self) -> list[float]:
        return [0.0] * 3 if self._sums is None else [float(number) for number in self._sums.tolist()]

    def to_text(self) -> str:
        """Return the state as text, empty before the first update."""
        if not self._count and not self._first:
            return ""
        signs = 2 * self.stalled + 4 * self.diverged  # version 1 also had a bit 1
        return _encoded(_row([self._count, self._agreed, signs, self._first, *self._read()], self._gradient.last))

    def load_text(self, text: str) -> None:
        """Continue from the state that `to_text` returned.

        Raises:
            StateError: If the text is damaged. Then nothing changes.
        """
        self.validate_text(text)
        state = _decoded(text) if text else torch.zeros(COUNTS)
        self._count, self._agreed, signs = (int(number) for number in state[:3].tolist())
        self.stalled, self.diverged = bool(signs & 2), bool(signs & 4)
        self._first = float(state[3])
        self.window_ended = self._count >= self._window
        self._sums = state[4:COUNTS].clone() if state[4:COUNTS].any() else None
        self._gradient.last = state[COUNTS:].clone() if len(state) > COUNTS else None

    @staticmethod
    def validate_text(text: str) -> None:
        """Raise StateError unless `load_text` can read a text."""
        state = _decoded(text) if text else torch.zeros(COUNTS)
        whole = state[:3].tolist()
        if len(state) < COUNTS or any(number < 0 or number % 1 for number in whole) or whole[2] > 7:
            raise _damaged(f"that begins with {state[:COUNTS].tolist()}")


def _row(numbers: Sequence[float], sample: Tensor | None) -> Tensor:
    row = torch.tensor(numbers, dtype=torch.float32)
    return row if sample is None else torch.cat([row, sample.cpu()])


def _encoded(row: Tensor) -> str:
    return base64.b64encode(row.numpy().tobytes()).decode()


def _decoded(text: str) -> Tensor:
    try:
        row = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise _damaged("that does not read") from error
    if not row or len(row) % 4:
        raise _damaged(f"of {len(row)} bytes")
    return torch.frombuffer(bytearray(row), dtype=torch.float32)


def _damaged(how: str) -> StateError:
    return StateError(
        f"a saved fit {how}", expected="the text that a state was saved with", cure="pass an unedited state"
    )
