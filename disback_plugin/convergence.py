"""Whether s_phi still follows the student while the teacher walks, from its gradients alone (as in `fitting`).

| sign     | in s_phi's gradients, a window of updates                    | what it means                          |
|----------|--------------------------------------------------------------|----------------------------------------|
| behind   | two in a row agree: their cosines' mean is above 0.1         | the student moves faster than s_phi    |
| stalled  | above 0.6, in two windows in a row                           | s_phi does not follow at all           |
| diverged | their norm is 30 times the first window's, or not finite     | the student runs away from s_phi       |

Over all regimes of `benchmarks/EVIDENCE.md` the greatest of these numbers in a sound run are 0.50, the lesser of two
windows in a row, and 3.8 times. Of the third only NaN is seen where the trainer clips these gradients, or where the
loss is bounded however far the student is, as that of a noise prediction by a saturating network.
"""

from __future__ import annotations

import base64
import math

import torch
from torch import Tensor

from disback_plugin.errors import StateError
from disback_plugin.fitting import AGREEMENT, EVERY, sampled, unpack
from disback_plugin.weights.network import ScoreNetwork

__all__ = ["Monitor"]

STALLED = 0.6
GROWTH = 30.0
# A window is one of so many of the walk, but not longer than fifty updates; the first is of five.
WINDOWS, LONGEST = 12, 50
# Numbers of a state before the gradient's sample.
COUNTS = 7


class Monitor:
    """The signs above. Nothing is read from the device but three numbers at the end of a window.

    Args:
        network: s_phi; `look` is called after each of its updates, while the gradients are still there.
        horizon: Length of the walk in generator updates: what is longer has longer windows.

    Attributes:
        behind: The first sign, at the last window's end.
        stalled: The second; it stays.
        diverged: The third; it stays.

    Example:
        >>> from torch import nn
        >>> net = nn.Linear(2, 1)
        >>> monitor = Monitor(ScoreNetwork(net), horizon=60)
        >>> for update in range(15):
        ...     net.weight.grad, net.bias.grad = torch.full((1, 2), 10.0 ** (update // 5)), torch.zeros(1)
        ...     monitor.look()
        ...     if monitor.due:
        ...         monitor.judge(monitor.read())
        ...         print(monitor.behind, monitor.stalled, monitor.diverged)
        True False False
        True True False
        True True True
    """

    def __init__(self, network: ScoreNetwork, horizon: int) -> None:
        self._network = network
        self._later = min(max(horizon // WINDOWS, EVERY), LONGEST)
        self._count = self._agreed = 0  # updates of the window, windows in a row
        self.behind = self.stalled = self.diverged = False
        self._first = 0.0  # norm in the first window
        self._sample: Tensor | None = None
        self._sums: Tensor | None = None  # of the cosines, their number, and of the squared norms

    @property
    def window(self) -> int:
        """Updates of the present window."""
        return self._later if self._first else EVERY

    @property
    def due(self) -> bool:
        """Whether a window is at its end, and not read yet; on all ranks alike, whatever each has of the gradients."""
        return self._count >= self.window

    @torch.no_grad()
    def look(self) -> None:
        """Take in the gradients of one update; of a long window only the last, which are enough for a cosine."""
        if self._count >= self.window:  # nobody asked: generator updates may be rare
            self._begin()
        self._count += 1
        left = self.window - self._count
        if left > EVERY:
            return
        last = None if left == EVERY else self._sample
        sample = sampled(self._network)
        if sample is None:
            return
        self._sample = sample
        norm = sample.square().sum()
        cosine = norm.new_zeros(2)
        if last is not None and len(last) == len(sample):
            found = torch.nn.functional.cosine_similarity(sample, last.to(sample), dim=0)
            cosine = torch.stack([found.nan_to_num(), found.isfinite().to(found)])
        new = torch.cat([cosine, norm[None]])
        self._sums = new if self._sums is None else self._sums.to(new) + new

    def read(self) -> list[float]:
        """Return the window's numbers from the device: sum of the cosines, their number, sum of the squared norms."""
        return [0.0] * 3 if self._sums is None else [float(number) for number in self._sums.tolist()]

    def judge(self, window: list[float]) -> None:
        """Draw the signs from what `read` returned, here or on rank 0, and begin a new window."""
        cosines, number, squares = window
        agreement = cosines / number if number else 0.0
        self.behind = agreement > AGREEMENT
        self._agreed = self._agreed + 1 if agreement > STALLED else 0
        self.stalled = self.stalled or self._agreed > 1
        norm = math.sqrt(squares) if math.isfinite(squares) else math.inf
        self.diverged = self.diverged or not math.isfinite(norm) or 0 < GROWTH * self._first < norm
        self._first = self._first or norm
        self._begin()

    def _begin(self) -> None:
        self._count, self._sums = 0, None

    def text(self) -> str:
        """Return the state as text, empty if there is none yet."""
        if not self._count and not self._first:
            return ""
        signs = self.behind + 2 * self.stalled + 4 * self.diverged
        counts = torch.tensor([self._count, self._agreed, signs, self._first, *self.read()], dtype=torch.float32)
        sample = counts[:0] if self._sample is None else self._sample.cpu()
        return base64.b64encode(torch.cat([counts, sample]).numpy().tobytes()).decode()

    @staticmethod
    def check(text: str) -> None:
        """Raise StateError unless a `text` can be gone on from; the empty one can."""
        if text:
            state = unpack(text)
            whole = state[:3].tolist()
            if len(state) < COUNTS or any(number < 0 or number % 1 for number in whole) or whole[2] > 7:
                raise StateError(
                    f"what was seen of s_phi: {state[:COUNTS].tolist()}",
                    expected="the text that a state was saved with",
                    cure="pass an unedited state",
                )

    def load_text(self, text: str) -> None:
        """Go on from a `text`.

        Raises:
            StateError: If it is damaged. Then nothing changes.
        """
        self.check(text)
        state = unpack(text) if text else torch.zeros(COUNTS)
        self._count, self._agreed, signs = (int(number) for number in state[:3].tolist())
        self.behind, self.stalled, self.diverged = (bool(signs & bit) for bit in (1, 2, 4))
        self._first = float(state[3])
        self._sums = state[4:COUNTS].clone() if state[4:COUNTS].any() else None
        self._sample = state[COUNTS:].clone() if len(state) > COUNTS else None
