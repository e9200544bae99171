"""The manifest of a degradation path: the content of `config.json` as values."""

from __future__ import annotations

import json
import math
import numbers
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

from disback_plugin.errors import OptionError, PathError
from disback_plugin.path import files
from disback_plugin.path.codecs import CODECS, retired_codec

__all__ = [
    "CONFIG", "FORMAT", "Identity", "Manifest", "Node", "Recording", "Teacher"
]  # fmt: skip

# Format 1, of version 0.1.0, compressed the nodes of `exact` and those of codecs that are gone.
FORMAT = 2
CONFIG = "config.json"
# Keys that format 2 always has, those that are optional in format 1 among them: a changed letter must not pass.
WRITTEN = {
    *("teacher", "recording", "generator", "nodes", "complete"),
    *("fitted", "ended", "learning_rate", "learning_rate_factor"),
}


@dataclass(frozen=True)
class Recording:
    """The plan of a recording: so many updates of s', a node after each `every` of them and one at the end.

    Args:
        iterations: Updates of s' in all, >= 1.
        every: Updates between two nodes, >= 1.
        codec: How nodes are stored: "int8" or "exact".
        keep_teacher: Whether the path holds node 0. Without it, the path needs the teacher itself, bit for bit.

    Raises:
        OptionError: If a count is no whole number >= 1, or there is no such codec.

    Example:
        >>> Recording(iterations=25, every=10).nodes
        3
    """

    iterations: int = 200
    every: int = 50
    codec: str = "int8"
    keep_teacher: bool = True

    def __post_init__(self) -> None:
        if self.codec not in CODECS:
            raise OptionError(f"codec={self.codec!r}", expected="'int8' or 'exact'", cure="omit codec= for 'int8'")
        whole = all(isinstance(n, numbers.Integral) and not isinstance(n, bool) for n in (self.iterations, self.every))
        if not whole or self.iterations < 1 or self.every < 1:
            raise OptionError(
                f"record={self.iterations!r}, every={self.every!r}",
                expected="two whole numbers >= 1",
                cure="pass record=200, every=50 as the paper does, or record=0 for no path",
            )
        # JSON has no integers of numpy.
        object.__setattr__(self, "iterations", int(self.iterations))
        object.__setattr__(self, "every", int(self.every))

    @property
    def nodes(self) -> int:
        """N, the index of the last node."""
        return -(-self.iterations // self.every)


@dataclass(frozen=True)
class Teacher:
    """Node 0.

    Attributes:
        fingerprint: `ScoreNetwork.fingerprint` of the live teacher.
        checksum: `ScoreNetwork.checksum` of the live teacher.
        id: Hub id that the teacher came from, for people only.
        sha256: SHA-256 of its file; empty until the file is written.
        bytes: Size of its file.
        file: Name of its file.
        extra: Keys of a later version, which are kept.
    """

    fingerprint: str
    checksum: str
    id: str | None = None
    sha256: str = ""
    bytes: int = 0
    file: str = "teacher.safetensors"
    extra: dict[str, Any] = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class Node:
    """One recorded node s'_i, i >= 1.

    Attributes:
        index: i.
        iteration: Updates of s' before it was saved.
        file: Name of its file.
        sha256: SHA-256 of the file.
        bytes: Size of the file.
        delta_norm: |theta_i - theta_{i-1}|, Euclidean, over all floating tensors.
        codec: The codec that stored it.
        checksum: `ScoreNetwork.checksum` of the decoded node.
        recorded: Checksum of the network that the node was made from; under "exact" it equals `checksum`.
        weight_error: |decoded theta_i - theta_i| / delta_norm.
        extra: Keys of another version, which are kept.
    """

    index: int
    iteration: int
    file: str
    sha256: str
    bytes: int
    delta_norm: float
    codec: str
    checksum: str
    recorded: str
    weight_error: float
    extra: dict[str, Any] = field(default_factory=dict, hash=False)


class Identity(NamedTuple):
    """The fields that identify a recording: its teacher, its generator and its plan, not how far it got.

    Attributes:
        teacher: Fingerprint of the teacher.
        generator: Fingerprint of the initial generator; None if unknown.
        iterations: Updates of s' in the plan.
        every: Updates between two nodes.
        codec: The codec of the plan.
        keep_teacher: Whether the path holds node 0.
    """

    teacher: str
    generator: str | None
    iterations: int
    every: int
    codec: str
    keep_teacher: bool

    def digest(self) -> str:
        """Return the SHA-256 that a saved state names the path by: 64 hexadecimal digits.

        Example:
            >>> Identity("t", None, 200, 50, "int8", True).digest()[:12]
            'd498b7066a1b'
        """
        plan = {key: getattr(self, key) for key in ("iterations", "every", "codec", "keep_teacher")}
        # The two constants were part of what version 0.1.0 hashed, and states saved by it must be recognized.
        content = {"teacher": self.teacher, "generator": self.generator, "recording": plan} | {
            "complete": False,
            "nodes": [],
        }
        return sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Manifest:
    """The content of a path. Every earlier format is read; `write` writes the newest.

    Attributes:
        teacher: Node 0.
        recording: The plan.
        generator: Fingerprint of the initial generator; None if unknown.
        nodes: Nodes 1 ... N, as far as they are recorded.
        complete: Whether node N is among them.
        fitted: Updates after which s' was found to be fitted; None if it was not.
        ended: Updates after which the recording was ended because of that; None if it went on as planned.
        learning_rate_factor: Factor on the learning rate until s' was fitted.
        learning_rate: Learning rate of s', where that was a copy of the teacher that `record` trained; else None.
        format: Format that the manifest was read from.
        extra: Keys of another version, which are kept.
    """

    teacher: Teacher
    recording: Recording
    generator: str | None = None
    nodes: tuple[Node, ...] = ()
    complete: bool = False
    fitted: int | None = None
    ended: int | None = None
    learning_rate_factor: int = 1
    learning_rate: float | None = None
    format: int = FORMAT
    extra: dict[str, Any] = field(default_factory=dict, hash=False)

    @property
    def identity(self) -> Identity:
        """The fields that identify the recording."""
        plan = self.recording
        return Identity(
            self.teacher.fingerprint, self.generator, plan.iterations, plan.every, plan.codec, plan.keep_teacher
        )

    @property
    def updates_to_fit(self) -> int:
        """F: updates at the learning rate itself in which s' was fitted, or all updates if it was not.

        Example:
            >>> Manifest(Teacher("", ""), Recording(200, 50), fitted=5, learning_rate_factor=4).updates_to_fit
            20
        """
        return self.learning_rate_factor * (self.iterations if self.fitted is None else self.fitted)

    @property
    def iterations(self) -> int:
        """Updates of s' in all."""
        return self.ended or self.recording.iterations

    @property
    def last_node(self) -> int:
        """N, the index of the last node."""
        return -(-self.iterations // self.recording.every)

    def due(self, iteration: int) -> bool:
        """Return whether a node is saved after this iteration.

        Example:
            >>> Manifest(Teacher("", ""), Recording(25, 10), ended=12).due(12)
            True
        """
        return iteration == self.iterations or (iteration < self.iterations and iteration % self.recording.every == 0)

    def due_iteration(self, index: int) -> int:
        """Return the iteration after which node `index` in [1, N] is saved."""
        return min(index * self.recording.every, self.iterations)

    def require_teacher(self, found: str, folder: Path) -> None:
        """Raise PathError unless `found` is the fingerprint of the teacher that the path in `folder` was made from."""
        expected = self.teacher.fingerprint
        if found != expected:
            raise PathError(
                f"another teacher (fingerprint {found[:12]}...)",
                expected=f"the one that {folder} was recorded from ({expected[:12]}...)",
                cure="load the teacher's own weights before attaching (a trainer's checkpoint may hold another node), "
                "or pass another path=",
            )

    def require_due(self, iteration: int) -> None:
        """Raise OptionError unless the next node is due at this iteration."""
        index = len(self.nodes) + 1
        if index > self.last_node or self.teacher_missing or iteration != self.due_iteration(index):
            raise OptionError(
                f"append(iteration={iteration!r}) to {len(self.nodes)} of {self.last_node} nodes",
                expected=f"the next iteration of {self.recording}",
                cure="append nodes when they are due",
            )

    @property
    def entries(self) -> tuple[Teacher | Node, ...]:
        """Nodes 0 ... N, as far as they are recorded."""
        return (self.teacher, *self.nodes)

    @property
    def teacher_missing(self) -> bool:
        """Whether node 0 has yet to be written."""
        return self.recording.keep_teacher and not self.teacher.sha256

    @classmethod
    def read(cls, folder: Path) -> Manifest:
        """Return the manifest in a folder.

        Raises:
            PathError: If it is missing, cannot be read, has a newer format or a codec that is gone, or names files that
                a path does not have.
        """
        file = folder / CONFIG
        content = files.read_json(file)
        version = content.get("format")
        if type(version) is not int or not 1 <= version <= FORMAT:
            raise PathError(
                f"format {version!r} in {file}",
                expected=f"a format from 1 to {FORMAT}",
                cure="upgrade disback-plugin if the path is newer, or pass the folder of a degradation path",
            )
        try:
            _refuse_retired(content, file)
            if version > 1 and not content.keys() >= WRITTEN:
                raise ValueError(f"without {sorted(WRITTEN - content.keys())}")
            if version == 1:
                content["learning_rate_factor"] = content.pop("haste", 1)
            generator = content.pop("generator")["fingerprint"]
            manifest = files.from_json(cls, content | {"generator": generator})
        except PathError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise files.damaged(f"a manifest that cannot be read ({error}) in {file}", f"format {version}") from error
        fault = manifest.fault()
        if fault:
            raise files.damaged(f"{fault} in {file}", "the manifest of a recording")
        return manifest

    def fault(self) -> str | None:
        """Return the first statement that no recording can have written, or None."""
        teacher, nodes = self.teacher, self.nodes
        # File names are fixed, so that no manifest can point out of its folder.
        named = [teacher.file, *(node.file for node in nodes)]
        if named != ["teacher.safetensors", *(files.node_file(i + 1) for i in range(len(nodes)))]:
            return f"files {named[:3]}"
        unknown = {node.codec for node in nodes} - set(CODECS)
        if unknown:
            return f"codecs {sorted(unknown)}, which this version cannot read,"
        if not all(0 < node.delta_norm < math.inf for node in nodes):
            return "a node at no distance from the one before"
        counts = [count for count in (self.fitted, self.ended) if count is not None]
        if any(not 1 <= count <= self.recording.iterations for count in counts):
            return f"a recording that was fitted after {self.fitted} updates and ended after {self.ended}"
        if self.learning_rate_factor < 1:
            return f"a recording at {self.learning_rate_factor} times the learning rate"
        iterations, due = [n.iteration for n in nodes], [self.due_iteration(i + 1) for i in range(len(nodes))]
        if [node.index for node in nodes] != list(range(1, len(nodes) + 1)) or iterations != due:
            return f"nodes of iterations {iterations[:5]}, where {due[:5]} were due,"
        if len(nodes) > self.last_node or (self.complete and nodes and len(nodes) != self.last_node):
            return f"{len(nodes)} of {self.last_node} nodes, complete: {self.complete},"
        if (nodes or self.complete) and self.teacher_missing:
            return "nodes without a teacher"
        if teacher.sha256 and not self.recording.keep_teacher:
            return "a teacher that is kept and not kept"
        return None

    def write(self, folder: Path) -> None:
        """Write the manifest into a folder, whole or not at all."""
        content = files.to_json(self) | {"format": FORMAT, "generator": {"fingerprint": self.generator}}
        files.write_json(folder / CONFIG, content)


def _refuse_retired(content: Mapping[str, Any], file: Path) -> None:
    """Raise PathError if a manifest names a codec that only version 0.1.0 reads."""
    codecs = [content["recording"]["codec"], *(node["codec"] for node in content["nodes"])]
    for codec in codecs:
        if re.fullmatch(r"auto(:.*)?|bf16|int[456]", codec):
            raise retired_codec(f"the codec {codec!r} in {file}")
    if content["format"] == 1 and "exact" in codecs[1:]:
        raise retired_codec(f"nodes that are compressed under the codec 'exact' of format 1 in {file}")
