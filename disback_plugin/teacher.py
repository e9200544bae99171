"""Positions of a path written into the trainer's own teacher, in place and checked, perhaps decoded one update ahead.

A move decodes the position piece by piece into the live weights, or copies what a thread has decoded before; at a node
the result is compared with the node's checksum. One weight is remembered to notice that someone else wrote the teacher.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from math import floor

import torch
from torch import Tensor

from disback_plugin import distributed
from disback_plugin.errors import DisbackError, StateError
from disback_plugin.path.degradation_path import DegradationPath
from disback_plugin.weights.network import ScoreNetwork
from disback_plugin.weights.sharding import local_tensor, read_part
from disback_plugin.weights.tensors import Checksum, Part, Source, host_tensor

__all__ = ["Prefetcher", "TeacherWriter"]

logger = logging.getLogger(__name__)


class TeacherWriter:
    """Writes positions of a path into a teacher.

    Args:
        network: The teacher, which holds node 0.
        path: A complete path, or None: then the position is always 0.0 and nothing is ever written.
        prefetch: Whether to decode the next position in a thread, as in `TrajectoryScheduler`.
        together: Whether the ranks move together, as in `TrajectoryScheduler`.

    Attributes:
        position: The position that the teacher holds, in [0, N].
        failed: Whether the last move failed. Then nobody may train on the teacher.
        swap_ms: Milliseconds of the last write, on the host.

    Example:
        >>> import tempfile
        >>> from torch import nn
        >>> from disback_plugin.recording import record
        >>> net, x = nn.Linear(1, 1, bias=False), torch.ones(4, 1)
        >>> before, folder = net.weight.item(), tempfile.mkdtemp()
        >>> def loss(s, x_0):
        ...     return s(x_0).square().mean()
        >>> path = record(net, sample=lambda: x, loss=loss, path=folder, iterations=1, every=1)
        >>> teacher = TeacherWriter(ScoreNetwork(net), path)
        >>> teacher.move_to(1.0)
        >>> net.weight.item() == before, net.weight.item() == path[1]["weight"].item()
        (False, True)
        >>> teacher.restore_teacher()
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
        self._witness = network.first_parameter()
        wanted = self._witness.device.type != "cpu" if prefetch is None else prefetch
        self._prefetcher = Prefetcher(network) if wanted and self._path is not None else None
        # The process group exists by now: the networks are wrapped, and `attach` has compared the ranks' arguments.
        self._together = (network.sharded if together is None else together) and distributed.is_distributed()
        # Of a sharded node each rank compares its own part with that of the node when the whole path was verified.
        parts = network.parts()
        self._expected = None if parts is None or self._path is None else self._path.part_checksums(parts)
        self._remember()

    def warn_if_rounded_away(self) -> None:
        """Warn if the teacher's dtype is too coarse for the distance between two nodes."""
        if self._path is None:
            return
        last = len(self._path) - 1
        rounding = self.network.rounding(self._path.source(last)) / self._path.nodes[-1].delta_norm
        if rounding > 0.5:
            logger.warning(
                "the teacher's dtype rounds node %d by %.1f times its distance to the node before: keep the teacher "
                "in float32, or record with a larger learning rate or fewer nodes",
                *(last, rounding),
            )

    def move_to(self, position: float, *, updates: int | None = None) -> None:
        """Write the weights of a position: a node's own, or a mixture of its two neighbours.

        Args:
            position: In [0, N].
            updates: Generator updates so far, for ranks that move together. Then all ranks have to move to this
                position at this update; if one does not, all of them write s'_0 and raise. None moves this rank alone.

        Raises:
            PathError: If the path cannot be read, or has changed since it was recorded. Then `failed` is set.
            RankError: If another rank failed, or is at another position or update. Then `failed` is set.
        """
        path = self._path
        if path is None:
            return
        with self._timed():
            if self._together and updates is not None:
                facts = {"path": path.identity, "position": position, "generator_updates": updates}
                try:
                    distributed.on_every_rank(lambda: self._move(path, position), "move the teacher", facts)
                except Exception:
                    self._break_off(path)  # on all ranks, wherever each was
                    raise
            else:
                self._move(path, position)
        self.position = position
        self._remember()

    def on_every_rank(self, action: Callable[[], object], about: str) -> None:
        """Run an action without communication; if the ranks move together, all raise if it fails on one of them."""
        if self._together:
            distributed.on_every_rank(action, about)
        else:
            action()

    def restore_teacher(self) -> None:
        """Write s'_0, bit for bit, whatever the teacher holds now, and end the prefetching."""
        if self._path is not None:
            with self._timed():
                self.network.write(self._path.teacher_source())
        self.position = 0.0
        self._remember()
        if self._prefetcher is not None:
            self._prefetcher.close()

    def distance(self, start: float, end: float) -> float:
        """Return the length of the path between two positions in [0, N], in weight space."""
        low, high = sorted((start, end))
        norms = [] if self._path is None else [node.delta_norm for node in self._path.nodes]
        return sum(norm * max(min(high, i + 1) - max(low, i), 0.0) for i, norm in enumerate(norms))

    def prefetch(self, position: float) -> None:
        """Begin to decode the position of the next update, if it is another one."""
        if self._prefetcher is not None and self._path is not None and position != self.position:
            with suppress(DisbackError):  # the move itself will raise it
                self._prefetcher.begin(position, self._path.source(position))

    def validate_untouched(self, updates: int) -> None:
        """Raise if someone else wrote the teacher.

        Args:
            updates: Generator updates so far, for the error.

        Raises:
            StateError: If the remembered weight has other values.
        """
        # The version costs nothing. The values are compared only if it changed: a DDP broadcast writes equal values.
        if self._path is None or self._witness._version == self._version:
            return
        if not torch.equal(local_tensor(self._witness).detach(), self._value):
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
        """Decode a position into the network; at a node, compare the decoded weights with the recorded ones."""
        self.failed = True  # until the move is complete
        source = path.source(position)  # raises before anything is written if a file is missing or changed
        ready = None if self._prefetcher is None else self._prefetcher.wait_for(position)
        if ready is not None:
            self._compare(path, position, ready[1])
        try:
            if ready is not None and self._prefetcher is not None:
                self._prefetcher.write(ready[0])
            else:
                self._compare(path, position, self.network.write(source))
        except BaseException:
            # The file changed during the read, or the move was interrupted: only s'_0 can be trusted.
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
        self._version, self._value = self._witness._version, local_tensor(self._witness).detach().clone()


# -- one update ahead -------------------------------------------------------------------------------------------------


# A decoded position: the weights that this process holds, on the host, and their checksum.
Decoded = tuple[dict[str, Tensor], str]


class Prefetcher:
    """Decodes the next position in a thread while the trainer works; the move is then a copy at memory speed.

    It takes the memory of one node on the host, pinned where the teacher is on a GPU. The copy runs on the trainer's
    own stream, whose order keeps it apart from the forwards that read the weights.

    Args:
        network: The network that will be written.

    Example:
        >>> from torch import nn
        >>> from disback_plugin.path.delta import NodeSource
        >>> net = nn.Linear(1, 1, bias=False)
        >>> prefetcher = Prefetcher(ScoreNetwork(net))
        >>> prefetcher.begin(2.0, NodeSource({"weight": torch.ones(1, 1)}, ()))
        >>> state, checksum = prefetcher.wait_for(2.0)
        >>> prefetcher.write(state)
        >>> net.weight.item()
        1.0
    """

    def __init__(self, network: ScoreNetwork) -> None:
        self._network = network
        self._parts = network.parts() or {}
        self._device = network.first_parameter().device
        self._on_gpu = self._device.type == "cuda"
        self._memory: dict[tuple[str, torch.dtype], Tensor] = {}
        self._position: float | None = None
        self._decoding: Future[Decoded] | None = None
        self._copied: torch.cuda.Event | None = None

    def begin(self, position: float, source: Source) -> None:
        """Start to decode a position, unless it was started already; drop the position started before."""
        if position == self._position:
            return
        self._drop()
        # The interpreter joins an executor's thread at exit, where a running daemon would abort the process.
        executor = ThreadPoolExecutor(1, thread_name_prefix="disback-prefetch")
        self._position, self._decoding = position, executor.submit(self._decode, source)
        executor.shutdown(wait=False)

    def wait_for(self, position: float) -> Decoded | None:
        """Return a position once it is decoded, or raise the thread's error; None if the position was not started."""
        decoding = self._decoding
        if decoding is None or position != self._position:
            return None
        self._drop()
        return decoding.result()

    def write(self, state: dict[str, Tensor]) -> None:
        """Copy the weights of a decoded position into the network."""
        self._network.load_parts(state, non_blocking=self._on_gpu)
        if self._on_gpu:
            self._copied = torch.cuda.current_stream(self._device).record_event()

    def close(self) -> None:
        """Wait for the thread, if one is running, and free the memory."""
        self._drop()
        self._memory.clear()

    def _drop(self) -> None:
        if self._decoding is not None:
            wait([self._decoding])
        self._position = self._decoding = None

    @torch.no_grad()
    def _decode(self, source: Source) -> Decoded:
        if self._copied is not None:
            self._copied.synchronize()  # the last copy still reads this memory
        total, state = Checksum(), {}
        for name, layout in source.layout().items():
            part = self._parts.get(name, Part(layout.shape))
            if (name, layout.dtype) not in self._memory:  # reused by the next position
                self._memory[name, layout.dtype] = host_tensor(part.elements, layout.dtype, pinned=self._on_gpu)
            flat = self._memory[name, layout.dtype]
            read_part(flat, part, source, name, layout.dtype, total, (name,))
            state[name] = flat.view(part.local_shape)
        return state, total.digest()
