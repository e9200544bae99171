"""Positions of a path written into the trainer's own teacher, in place and checked.

A move decodes the position piece by piece into the live weights; at a node the result is compared with the node's
checksum. A few weights are remembered to notice that someone else wrote or replaced the teacher's.
"""

from __future__ import annotations

import logging
import time

import torch
from torch import Tensor

from disback_plugin import distributed
from disback_plugin.errors import StateError
from disback_plugin.path.degradation_path import DegradationPath
from disback_plugin.weights.network import ScoreNetwork
from disback_plugin.weights.sharding import local_tensor

logger = logging.getLogger(__name__)


class TeacherWriter:
    """Writes positions of a path into a teacher; warns at once if its dtype is too coarse for them.

    Args:
        network: The teacher, which holds node 0.
        path: A complete path, or None: then the position is always 0.0 and nothing is ever written.

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

    def __init__(self, network: ScoreNetwork, path: DegradationPath | None) -> None:
        self.network, self.failed = network, False
        self._together = distributed.is_distributed()  # the process group exists by now: the networks are wrapped
        self._path = path if path is not None and len(path) > 1 else None
        self._remember(0.0, time.perf_counter())
        self._expected: list[str] | None = None
        if self._path is not None:
            # Of a sharded node each rank compares its own part with that of the node when the whole path was verified.
            parts = network.parts()
            self._expected = None if parts is None else self._path.part_checksums(parts)
            last, distance = len(self._path) - 1, self._path.nodes[-1].delta_norm
            rounding = network.relative_rounding(self._path.source(last), distance)
            if rounding > 0.5:
                logger.warning(
                    "the teacher's dtype rounds node %d by %.1f times its distance to the node before: keep the "
                    "teacher in float32, or record with a larger learning rate or fewer nodes",
                    *(last, rounding),
                )

    def move_to(self, position: float, *, updates: int | None = None) -> None:
        """Write the weights of a position: a node's own, or a mixture of its two neighbours.

        Args:
            position: In [0, N].
            updates: Generator updates so far: all ranks have to move to this position at this update, or all raise.
                None moves this rank alone.

        Raises:
            PathError: If the path cannot be read, or has changed since it was recorded.
            RankError: If another rank failed, or is at another position or update.

            On error `failed` is set, and the teacher holds s'_0 unless nothing was written.
        """
        path, began = self._path, time.perf_counter()
        if path is None:
            return
        self.failed = True  # until the move is complete
        self._written = self._together  # perhaps by now on other ranks
        try:
            if updates is None or not self._together:
                self._write(path, position)
            else:
                facts = {"path": path.identity, "position": position, "generator_updates": updates}
                distributed.on_every_rank(lambda: self._write(path, position), "move the teacher", facts)
        except BaseException:
            if self._written:  # half a node, or one that changed while it was read: only s'_0 can be trusted
                self.restore_teacher()
            raise
        self.failed = False
        self._remember(position, began)

    def restore_teacher(self) -> None:
        """Write s'_0, bit for bit, whatever the teacher holds now."""
        began = time.perf_counter()
        if self._path is not None:
            self.network.write(self._path.teacher_source())
        self._remember(0.0, began)

    def _write(self, path: DegradationPath, position: float) -> None:
        """Decode a position into the network; at a node, compare the decoded weights with the recorded ones."""
        source = path.source(position)  # raises before anything is written if a file is missing or changed
        self._written = True
        found = self.network.write(source)
        if position % 1 == 0:
            index = int(position)
            path.verify_checksum(index, found, None if self._expected is None else self._expected[index])

    def _remember(self, position: float, began: float) -> None:
        """Remember the position, the time that its write took, and some of the weights."""
        self.position, self.swap_ms = position, 1e3 * (time.perf_counter() - began)
        if self._path is not None:
            self._slots = self.network.witnesses()
            self._versions = [tensor._version for _, _, tensor in self._slots]
            self._values = [_first_values(tensor).clone() for _, _, tensor in self._slots]

    def distance(self, start: float, end: float) -> float:
        """Return the length of the path between two positions in [0, N], in weight space."""
        low, high = sorted((start, end))
        norms = [] if self._path is None else [node.delta_norm for node in self._path.nodes]
        return sum(norm * max(min(high, i + 1) - max(low, i), 0.0) for i, norm in enumerate(norms))

    def validate(self, updates: int) -> None:
        """Raise if the last move failed, or someone else wrote the teacher.

        Args:
            updates: Generator updates so far, for the error.

        Raises:
            StateError: If the last move failed, or the remembered weight has other values.
        """
        if self.failed:
            cure = "correct the cause of that error, and resume from the last saved state: load_state_dict(state)"
            raise StateError("a scheduler whose last move failed", expected="a teacher in place", cure=cure)
        if self._path is None:
            return
        # Versions cost nothing. Values are compared only if one changed: a DDP broadcast writes equal values.
        found = [tensor._version for _, _, tensor in self._slots]
        replaced = [name for holder, name, tensor in self._slots if holder.get(name) is not tensor]
        if found == self._versions and not replaced:
            return
        if replaced:  # by others, or by FSDP, which puts its own back
            self._slots = self.network.witnesses()
        values = [_first_values(tensor) for _, _, tensor in self._slots]
        pairs = [*zip(values, self._values, strict=True)]
        if not all(now.shape == then.shape and torch.equal(now, then.to(now)) for now, then in pairs):
            raise StateError(
                f"a teacher that somebody else has {'replaced' if replaced else 'written'} since update {updates}",
                expected=f"the weights of position {self.position:g}",
                cure="after loading a trainer's checkpoint call load_state_dict with the state saved beside it; if its "
                "own forward writes them, as a normalisation in training mode does, call teacher.eval()",
            )
        self._versions = [tensor._version for _, _, tensor in self._slots]


def _first_values(tensor: Tensor) -> Tensor:
    """Return the first elements of a weight that this rank holds."""
    return local_tensor(tensor).detach().reshape(-1)[:1024]
