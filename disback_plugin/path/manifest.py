"""The manifest of a degradation path: what `config.json` says, as values."""

from __future__ import annotations

import math
import numbers
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from disback_plugin.errors import COPY_AGAIN, OptionError, PathError
from disback_plugin.path import files
from disback_plugin.path.codecs import SMALLEST_FIRST, check_codec

__all__ = [
    "CONFIG",
    "FORMAT",
    "Manifest",
    "Node",
    "Recording",
    "Teacher",
    "is_ours",
    "node_file",
    "training_file",
]

FORMAT = 1
CONFIG = "config.json"


@dataclass(frozen=True)
class Recording:
    """How a path is recorded: `iterations` updates of s', a node after each `every`, the last one at the end.

    Args:
        iterations: Updates of s' in all, >= 1.
        every: Updates between two nodes, >= 1.
        codec: How nodes are stored: a name of `codecs`, "auto" or "auto:BOUND".
        keep_teacher: Whether the path holds node 0. If not, it needs the teacher itself, bit for bit, to be used.

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
        check_codec(self.codec)
        whole = all(isinstance(n, numbers.Integral) and not isinstance(n, bool) for n in (self.iterations, self.every))
        if not whole or self.iterations < 1 or self.every < 1:
            raise OptionError(
                f"record={self.iterations!r}, every={self.every!r}",
                expected="two whole numbers >= 1",
                cure="pass record=200, every=50 as the paper does, or record=0 for no path",
            )
        # Of numpy's integers json would make an error.
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
        checksum: `ScoreNetwork.checksum` of it.
        id: Where it comes from, as a hub id; for people only.
        sha256: Of its file; empty until that is written.
        bytes: Size of its file.
    """

    fingerprint: str
    checksum: str
    id: str | None = None
    sha256: str = ""
    bytes: int = 0
    file: str = "teacher.safetensors"


@dataclass(frozen=True)
class Node:
    """One recorded node s'_i, i >= 1.

    Attributes:
        index: i.
        iteration: Updates of s' behind it.
        file: Name inside the folder.
        sha256: Of the file.
        bytes: Size of the file.
        delta_norm: |theta_i - theta_{i-1}|, Euclidean, over all floating tensors.
        codec: How its difference to node i - 1 is stored, a name of `codecs`.
        checksum: `ScoreNetwork.checksum` of the node as it is decoded.
        recorded: That of the network it was made from; the same under "exact".
        weight_error: |decoded theta_i - theta_i| / delta_norm.
        codec_error: Change of the score output that the codec made, over that from node i - 1 to node i, on samples of
            the student; None if no forward of the network was seen while recording.
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
    codec_error: float | None


@dataclass(frozen=True)
class Manifest:
    """What a path holds. Later versions of this package read every earlier format.

    Attributes:
        teacher: Node 0.
        recording: The plan.
        generator: Fingerprint of the initial generator, if known.
        nodes: Nodes 1 ... N, as far as they are recorded.
        complete: Whether node N is among them.
        fitted: Updates after which s' was seen to be fitted (`fitting`); None if it was not.
        ended: Updates after which the recording was ended because of that; None if it went on as planned.
        haste: Factor on the learning rate until s' was fitted.
        learning_rate: Of s', where that was a copy of the teacher that `record` trained; None: the trainer's own.
    """

    teacher: Teacher
    recording: Recording
    generator: str | None = None
    nodes: tuple[Node, ...] = field(default=())
    complete: bool = False
    fitted: int | None = None
    ended: int | None = None
    haste: int = 1
    learning_rate: float | None = None

    @property
    def clock(self) -> int:
        """F: updates at the learning rate itself in which s' was fitted; all that there were if it was not.

        Example:
            >>> Manifest(Teacher("", ""), Recording(200, 50), fitted=5, haste=4).clock
            20
        """
        return self.haste * (self.iterations if self.fitted is None else self.fitted)

    @property
    def iterations(self) -> int:
        """Updates of s' in all."""
        return self.ended or self.recording.iterations

    @property
    def last_node(self) -> int:
        """N, the index of the last node."""
        return replace(self.recording, iterations=self.iterations).nodes

    def due(self, iteration: int) -> bool:
        """Return whether a node is saved after this iteration.

        Example:
            >>> Manifest(Teacher("", ""), Recording(25, 10), ended=12).due(12)
            True
        """
        return iteration == self.iterations or (iteration < self.iterations and iteration % self.recording.every == 0)

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
            PathError: If it is missing, does not read, is of a newer format, or names other files than a path has.
        """
        file = folder / CONFIG
        content = files.read_json(file)
        if type(content.get("format")) is not int or content["format"] != FORMAT:
            raise PathError(
                f"format {content.get('format')!r} in {file}",
                expected=f"format {FORMAT}",
                cure="upgrade disback-plugin if the path is newer, or pass the folder of a degradation path",
            )
        try:
            manifest = cls._from_json(content)
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise PathError(
                f"a manifest that does not read ({error}) in {file}", expected=f"format {FORMAT}", cure=COPY_AGAIN
            ) from error
        fault = manifest.fault()
        if fault:
            raise PathError(f"{fault} in {file}", expected="the manifest of a recording", cure=COPY_AGAIN)
        return manifest

    def fault(self) -> str | None:
        """Return what cannot be in the manifest of a recording, if anything."""
        teacher, nodes = self.teacher, self.nodes
        # Names are fixed, so that no manifest can point out of its folder.
        named = [teacher.file, *(node.file for node in nodes)]
        if named != ["teacher.safetensors", *(node_file(i + 1) for i in range(len(nodes)))]:
            return f"files {named[:3]}"
        unknown = {node.codec for node in nodes} - set(SMALLEST_FIRST)
        if unknown:
            return f"codecs {sorted(unknown)}, which this version cannot read,"
        if not all(0 < node.delta_norm < math.inf for node in nodes):
            return "a node at no distance from the one before"
        iterations = [node.iteration for node in nodes]
        if any(
            count is not None and not 1 <= count <= self.recording.iterations for count in (self.fitted, self.ended)
        ):
            return f"a recording that was fitted after {self.fitted} updates and ended after {self.ended}"
        if self.haste < 1:
            return f"a recording at {self.haste} times the learning rate"
        due = [min((i + 1) * self.recording.every, self.iterations) for i in range(len(nodes))]
        if [node.index for node in nodes] != list(range(1, len(nodes) + 1)) or iterations != due:
            return f"nodes of iterations {iterations[:5]}, where {due[:5]} were due,"
        if len(nodes) > self.last_node or (self.complete and nodes and len(nodes) != self.last_node):
            return f"{len(nodes)} of {self.last_node} nodes, complete: {self.complete},"
        if (nodes or self.complete) and self.teacher_missing:
            return "nodes without a teacher"
        if teacher.sha256 and not self.recording.keep_teacher:
            return "a teacher that is kept and not kept"
        return None

    @classmethod
    def _from_json(cls, content: Mapping[str, Any]) -> Manifest:
        return cls(
            teacher=_typed(Teacher, content["teacher"]),
            recording=_typed(Recording, content["recording"]),
            generator=_of_type(content["generator"]["fingerprint"], str | None),
            nodes=tuple(_typed(Node, node) for node in _of_type(content["nodes"], list)),
            complete=_of_type(content["complete"], bool),
            fitted=_of_type(content.get("fitted"), int | None),
            ended=_of_type(content.get("ended"), int | None),
            haste=_of_type(content.get("haste", 1), int),
            learning_rate=_of_type(content.get("learning_rate"), float | None),
        )

    def write(self, folder: Path) -> None:
        """Write it into a folder, whole or not at all."""
        content = asdict(self) | {"format": FORMAT, "generator": {"fingerprint": self.generator}}
        files.write_json(folder / CONFIG, content)


T = TypeVar("T")


def _typed(kind: type[T], content: Mapping[str, Any]) -> T:
    """Return a dataclass whose fields have the types that it declares; JSON itself promises nothing."""
    hints = get_type_hints(kind)
    return kind(**{name: _of_type(value, hints[name]) for name, value in content.items()})


def _of_type(value: Any, kind: Any) -> Any:
    if kind is float and type(value) is int:
        value = float(value)
    odd = (isinstance(value, bool) and kind is not bool) or (isinstance(value, float) and not math.isfinite(value))
    if odd or not isinstance(value, kind):
        raise TypeError(f"{value!r:.80} where {getattr(kind, '__name__', kind)} was expected")
    return value


def node_file(index: int) -> str:
    """Return the file name of node `index` >= 1.

    Example:
        >>> node_file(7)
        'node-007.safetensors'
    """
    return f"node-{index:03d}.safetensors"


def training_file(index: int) -> str:
    """Return the name of the file that an unfinished recording resumes from after node `index`.

    Example:
        >>> training_file(7)
        'training-007.safetensors'
    """
    return f"training-{index:03d}.safetensors"


def is_ours(name: str) -> bool:
    """Return whether a recording writes files of this name.

    Example:
        >>> is_ours("node-007.safetensors"), is_ours("model.safetensors")
        (True, False)
    """
    return re.fullmatch(r"teacher\.safetensors|(node|training)-\d{3,}\.safetensors", name) is not None
