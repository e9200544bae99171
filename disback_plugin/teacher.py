"""The teacher on its way: positions of a path written into the trainer's own network, in place, and checked.

A move is decoded piece by piece into the live weights, or copied from what a thread decoded ahead of time; at a node it
is compared with the node's checksum. One weight is kept as a witness, to notice when somebody else writes the teacher.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from math import floor

import torch

from disback_plugin import distributed
from disback_plugin.errors import DisbackError, StateError
from disback_plugin.path.degradation_path import DegradationPath
from disback_plugin.prefetch import Ahead
from disback_plugin.weights.network import ScoreNetwork
from disback_plugin.weights.sharding import held

__all__ = ["MovingTeacher"]

logger = logging.getLogger(__name__)


class MovingTeacher:
    """A network that holds a position of a path.

    Args:
        network: The teacher, which holds node 0.
        path: A complete path, or None: then the position is always 0.0 and nothing is ever written.
        prefetch: As in `TrajectoryScheduler`.
        together: As in `TrajectoryScheduler`.

    Attributes:
        position: Where it stands, in [0, N].
        failed: Whether the last move broke off, so that nobody may train on what is there.
        swap_ms: Milliseconds of the last write, on the host.

    Example:
        >>> import tempfile
        >>> from torch import nn
        >>> from disback_plugin.recording import record
        >>> net, x = nn.Linear(1, 1, bias=False), torch.ones(4, 1)
        >>> before = net.weight.item()
        >>> path = record(
        ...     net,
        ...     sample=lambda: x,
        ...     loss=lambda s, x_0: s(x_0).square().mean(),
        ...     path=tempfile.mkdtemp(),
        ...     iterations=1,
        ...     every=1,
        ... )
        >>> teacher = MovingTeacher(ScoreNetwork(net), path)
        >>> teacher.go_to(1.0)
        >>> net.weight.item() == before, net.weight.item() == path[1]["weight"].item()
        (False, True)
        >>> teacher.put_back()
        >>> net.weight.item() == before
        True
    """

    def __init__(
        self,
        network: ScoreNetwork,
        path: DegradationPath | None,
        *,
        prefetch: bool | None = None,
        together: bool | None = None,
    ) -> None:
        self.network = network
        self.position = 0.0
        self.failed = False
        self.swap_ms = 0.0
        self._path = path if path is not None and len(path) > 1 else None
        wanted = network.witness().device.type != "cpu" if prefetch is None else prefetch
        self._ahead = Ahead(network) if wanted else None
        self._together = network.sharded if together is None else together
        # Of a node that no process holds as a whole, each compares its part with what it was when all was verified.
        parts = network.parts()
        self._expected = None if parts is None or self._path is None else self._path.part_checksums(parts)
        self._remember()

    @property
    def looks_ahead(self) -> bool:
        """Whether `look_ahead` does anything."""
        return self._ahead is not None and self._path is not None

    def warn_if_swallowed(self) -> None:
        """A teacher in half precision may round the steps between nodes away: say so, with the figure."""
        if self._path is None:
            return
        last = len(self._path) - 1
        rounding = self.network.rounding(self._path.source(last)) / self._path.nodes[-1].delta_norm
        if rounding > 0.5:
            logger.warning(
                "the teacher's dtype rounds node %d by %.1f times its distance to node %d: keep the teacher in "
                "float32, or record with a larger learning rate or fewer nodes",
                last,
                rounding,
                last - 1,
            )

    def go_to(self, position: float, *, updates: int | None = None) -> None:
        """Write the weights of a position: a node's own, or a mixture of its two neighbours.

        Args:
            position: In [0, N].
            updates: Generator updates so far, for ranks that move together: then all have to come to this position at
                this update, and all go back to s'_0 and raise if one does not. None moves this rank alone.

        Raises:
            PathError: If the path cannot be read, or is not what was recorded. Then `failed` is set.
            RankError: If that happened to another rank, or it is elsewhere. Then `failed` is set.
        """
        path = self._path
        if path is None:
            return
        with self._timed():
            if self._together and updates is not None and distributed.several():
                facts = {"path": path.identity, "position": position, "generator_updates": updates}
                try:
                    distributed.on_every_rank(lambda: self._move(path, position), "move the teacher", facts)
                except Exception:
                    self._break_off(path)  # all of them, wherever each was
                    raise
            else:
                self._move(path, position)
        self.position = position
        self._remember()

    def all(self, action: Callable[[], object], about: str) -> None:
        """Run an action without communication; if ranks move together all raise if it fails on one."""
        if self._together:
            distributed.on_every_rank(action, about)
        else:
            action()

    def put_back(self) -> None:
        """Write s'_0, bit for bit, whatever is there now, and end looking ahead."""
        if self._path is not None:
            with self._timed():
                self.network.write(self._path.teacher_source())
        self.position = 0.0
        self._remember()
        if self._ahead is not None:
            self._ahead.close()

    def look_ahead(self, position: float) -> None:
        """Begin to decode what the next update will want, if that is another position."""
        if self._ahead is not None and self._path is not None and position != self.position:
            with suppress(DisbackError):  # the move itself will say so
                self._ahead.begin(position, self._path.source(position))

    def check_untouched(self, updates: int) -> None:
        """Raise if somebody else wrote the teacher.

        Args:
            updates: Generator updates so far, for the error.

        Raises:
            StateError: If the witness has other values.
        """
        witness, version, value = self._witness
        # The version costs nothing; the values are compared only if it moved (a DDP broadcast writes equal values).
        if self._path is not None and witness._version != version:
            if not torch.equal(held(witness)[0].detach(), value):
                raise StateError(
                    f"a teacher that somebody else has written since update {updates}",
                    expected=f"the weights of position {self.position:g}",
                    cure="after loading a trainer's checkpoint call load_state_dict with the state saved beside it",
                )
            self._remember()

    @contextmanager
    def _timed(self) -> Iterator[None]:
        before = time.perf_counter()
        yield
        self.swap_ms = 1e3 * (time.perf_counter() - before)

    def _move(self, path: DegradationPath, position: float) -> None:
        """Decode a position into the network; at a node, compare what was decoded with what was recorded."""
        self.failed = True  # until it is done: nobody may train on what a failed move has left
        source = path.source(position)  # raises before anything is written if a file is missing or changed
        ready = None if self._ahead is None else self._ahead.take(position)
        if ready is not None:
            self._compare(path, position, ready.checksum)
        try:
            if ready is not None and self._ahead is not None:
                self._ahead.write(ready)
            else:
                self._compare(path, position, self.network.write(source))
        except BaseException:
            # Changed this very moment, or interrupted. What is mapped cannot be trusted: back to the teacher.
            self._break_off(path)
            raise
        self.failed = False

    def _break_off(self, path: DegradationPath) -> None:
        self.failed, self.position = True, 0.0
        self.network.write(path.teacher_source())

    def _compare(self, path: DegradationPath, position: float, found: str) -> None:
        if position == floor(position):
            index = int(position)
            path.verify_checksum(index, found, None if self._expected is None else self._expected[index])

    def _remember(self) -> None:
        witness = self.network.witness()
        self._witness = witness, witness._version, held(witness)[0].detach().clone()
