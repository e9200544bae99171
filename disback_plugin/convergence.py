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
from array import array
from collections.abc import Sequence, Set

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from disback_plugin import distributed
from disback_plugin.errors import StateError
from disback_plugin.weights.marks import WeightSample
from disback_plugin.weights.network import ScoreNetwork

# Updates between two decisions, which alone read numbers from the device.
EVERY = 5
# Gradients with a mean cosine below this do not agree.
AGREEMENT = 0.1
# Mean cosine, and growth of the norm, above which a run is stalled or has diverged.
STALLED, GROWTH = 0.6, 30.0
# A window is this part of backtracking, at most so many updates; the first one has EVERY updates.
WINDOWS, LONGEST = 12, 50
NOBODY: frozenset[int] = frozenset()
# Signs of a run that goes wrong, with their bits in a state; bit 1 was another sign in version 1.
BITS = {"stalled": 2, "diverged": 4}


def fitted_after(cosines: Sequence[float]) -> int | None:
    """Return after how many updates a network was fitted; None if it is not fitted yet.

    That is the first multiple of five at which the last quarter of the cosines, four at least, is below 0.1 on average.

    Args:
        cosines: Between the gradients of updates 1 and 2, 2 and 3, ...; values that are not finite are ignored.

    Example:
        >>> fitted_after([0.9] * 10 + [-0.3] * 10), fitted_after([0.9] * 100)
        (15, None)
    """
    for updates in range(EVERY, len(cosines) + 2, EVERY):
        last = [c for c in cosines[: updates - 1][-max(EVERY - 1, updates // 4) :] if math.isfinite(c)]
        if len(last) >= EVERY - 1 and sum(last) / len(last) < AGREEMENT:
            return updates
    return None


class _GradientTest:
    """Samples of a network's gradients, update after update, and the state that all tests on them save.

    A state is a row of float32: the numbers of the test, and the last sample.

    Args:
        network: The network. Of a sharded network each rank samples its own shards.
    """

    def __init__(self, network: ScoreNetwork) -> None:
        self._sample = WeightSample.of(network)
        self._last: Tensor | None = None

    @torch.no_grad()
    def _compare(self, idle: Set[int]) -> tuple[Tensor, Tensor]:
        """Draw a sample and return it with its cosine to the last one; nothing is read from the device.

        Weights that took no part in the update, as those of an idle expert, keep their last gradient and do not count.
        The cosine is NaN where one of the two is zero, as after `zero_grad`, or there is no comparable sample before:
        on another number of ranks a rank has other shards.
        """
        last, (sample, taking_part) = self._last, self._sample.gradients(idle)
        if last is None or len(last) != len(sample):
            last = torch.zeros_like(sample)
        last = last.to(sample)
        self._last = sample
        if taking_part is not None:
            self._last = torch.where(taking_part > 0, sample, last)
            last = last * taking_part
        return sample, torch.where(sample.any() & last.any(), cosine_similarity(sample, last, dim=0), math.nan)

    def _numbers(self) -> list[float]:
        raise NotImplementedError

    def _set_numbers(self, numbers: list[float]) -> None:
        raise NotImplementedError

    @staticmethod
    def _numbers_in(row: list[float]) -> list[float]:
        """Return the numbers with which a state begins, those of a new test if it is empty; [] if it is damaged."""
        raise NotImplementedError

    def to_tensor(self) -> Tensor:
        """Return the state as one row of float32 on the CPU."""
        sample = [] if self._last is None else self._last.tolist()
        return torch.tensor([*self._numbers(), *sample], dtype=torch.float32, device="cpu")

    def to_text(self) -> str:
        """Return the state as text."""
        return base64.b64encode(self.to_tensor().numpy().tobytes()).decode()

    def load(self, state: Tensor | str) -> None:
        """Continue from a state, as a tensor or text; raise StateError, and change nothing, if it is damaged."""
        numbers, sample = self.validate(state)
        self._set_numbers(numbers)
        self._last = torch.tensor(sample, device="cpu") if sample else None

    @classmethod
    def validate(cls, state: Tensor | str) -> tuple[list[float], list[float]]:
        """Return the numbers and the sample in a state; raise StateError if it is damaged."""
        try:
            row = (array("f", base64.b64decode(state, validate=True)) if isinstance(state, str) else state).tolist()
            numbers = cls._numbers_in(row)
        except (ValueError, OverflowError):
            numbers = []
        if not numbers:
            raise StateError(
                f"a saved fit that does not read ({state!r:.80})",
                expected="the text of a saved state",
                cure="pass an unedited state",
            )
        return numbers, row[len(numbers) :]


class FitDetector(_GradientTest):
    """Detects from gradients in a row that a network is fitted.

    Args:
        network: s', the network. Call `observe` after each of its updates, before the gradients are cleared.

    Example:
        >>> net = torch.nn.Linear(2, 1)
        >>> fit = FitDetector(ScoreNetwork(net))
        >>> for _ in range(3):
        ...     net.weight.grad, net.bias.grad = torch.ones(1, 2), torch.zeros(1)
        ...     fit.observe()
        >>> [round(cosine, 3) for cosine in fit.cosines()], fitted_after(fit.cosines()) is None
        ([1.0, 1.0], True)
    """

    def __init__(self, network: ScoreNetwork) -> None:
        super().__init__(network)
        self._known: list[float] = []
        self._pending: list[Tensor] = []

    def observe(self, idle: Set[int] = NOBODY) -> None:
        """Compare the gradients of an update with those of the update before; reads nothing from the device.

        Args:
            idle: Ids of weights that took no part in it, as those of another expert.
        """
        is_first = self._last is None
        _, cosine = self._compare(idle)
        if not is_first:
            self._pending.append(cosine)

    def cosines(self) -> list[float]:
        """Return all cosines so far; those of the last updates are read from the device."""
        if self._pending:
            self._known += torch.stack(self._pending).tolist()
            self._pending.clear()
        return self._known

    def _numbers(self) -> list[float]:
        return [len(self.cosines()), *self.cosines()]

    def _set_numbers(self, numbers: list[float]) -> None:
        self._known, self._pending = numbers[1:], []

    @staticmethod
    def _numbers_in(row: list[float]) -> list[float]:
        row = row or [0.0]
        numbers = row[: 1 + int(row[0])]
        sound = 0 <= row[0] == len(numbers) - 1 and not any(abs(cosine) > 1.001 for cosine in numbers[1:])
        return numbers if sound else []


class DivergenceMonitor(_GradientTest):
    """Detects while backtracking that s_phi does not follow the student. Three numbers a window leave the device.

    Args:
        network: s_phi. Call `observe` after each of its updates, before the gradients are cleared.
        horizon: Length of backtracking in generator updates: a longer one has longer windows.

    Attributes:
        signs: "stalled" once gradients agreed in two windows in a row, and "diverged" once they have grown thirtyfold
            or are not finite.
        agreement: Mean cosine of the gradients in the last window that was read; None if there was none.
        updates_left: Updates that the present window still needs, the same on all ranks; at 0 `new_signs` reads it.

    Example:
        >>> net = torch.nn.Linear(2, 1)
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
        super().__init__(network)
        self._later = min(max(horizon // WINDOWS, EVERY), LONGEST)
        self.agreement: float | None = None
        self._set_numbers(self._numbers_in([]))

    def _set_numbers(self, numbers: list[float]) -> None:
        # Windows in a row that agreed, and the norm in the first window.
        self._agreed, self._first = int(numbers[1]), numbers[3]
        self.updates_left = self._window - int(numbers[0])
        self.signs = {sign for sign, bit in BITS.items() if int(numbers[2]) & bit}
        # Sum of the cosines, their number, and the sum of the squared norms.
        self._sums = torch.tensor(numbers[4:]) if any(numbers[4:]) else None

    @property
    def _window(self) -> int:
        return self._later if self._first else EVERY

    def observe(self, idle: Set[int] = NOBODY) -> None:
        """Sample the gradients of an update; of a long window only those of the last updates.

        Args:
            idle: Ids of weights that took no part in it, as those of another expert.
        """
        if self.updates_left <= 0:  # nobody asked for the signs: generator updates may be rare
            self.updates_left, self._sums = self._window, None
        self.updates_left -= 1
        if self.updates_left > EVERY:
            return
        if self.updates_left == EVERY:
            self._last = None  # not the sample of the update before
        sample, cosine = self._compare(idle)
        norm = sample.square().sum()
        new = torch.stack([cosine.nan_to_num(), cosine.isfinite().to(norm), norm])
        self._sums = new if self._sums is None else self._sums.to(new) + new

    def new_signs(self) -> list[str]:
        """Return the signs that the window that has just ended shows for the first time.

        All ranks must call, after the same update: rank 0 decides for all. Between two windows nothing is read.
        """
        if self.updates_left > 0:
            return []
        # Gathered, so that a rank that has left is noticed here; the others do not wait for their device.
        cosines, number, squares = distributed.gather(self._read() if distributed.is_main_process() else [])[0]
        norm = math.sqrt(squares) if math.isfinite(squares) else math.inf
        self.agreement = cosines / number if number else None
        self._agreed = self._agreed + 1 if (self.agreement or 0.0) > STALLED else 0
        found = {"stalled": self._agreed > 1, "diverged": norm == math.inf or 0 < GROWTH * self._first < norm}
        new = [sign for sign, shown in found.items() if shown and sign not in self.signs]
        self.signs.update(new)
        self._first = self._first or norm
        self.updates_left, self._sums = self._window, None
        return new

    def _read(self) -> list[float]:
        return [0.0] * 3 if self._sums is None else self._sums.tolist()

    def _numbers(self) -> list[float]:
        signs = sum(BITS[sign] for sign in self.signs)
        return [self._window - self.updates_left, self._agreed, signs, self._first, *self._read()]

    @staticmethod
    def _numbers_in(row: list[float]) -> list[float]:
        numbers = row[:7] or [0.0] * 7
        sound = len(numbers) == 7 and all(number >= 0 and number % 1 == 0 for number in numbers[:3]) and numbers[2] < 8
        return numbers if sound else []
