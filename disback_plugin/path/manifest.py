"""The manifest of a degradation path: the content of `config.json` as values."""

from __future__ import annotations

import json
import math
import numbers
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

from disback_plugin.errors import OptionError, PathError
from disback_plugin.path import files
from disback_plugin.path.codecs import CODECS, unreadable

T = TypeVar("T")

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
        OptionError: If a count is no whole number >= 1, there is no such codec, or `keep_teacher` is no bool.

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
        for name in ("iterations", "every"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < 1:
                raise OptionError(
                    f"record={self.iterations!r}, every={self.every!r}",
                    expected="two whole numbers >= 1",
                    cure="pass record=200, every=50 as the paper does, or record=0 for no path",
                )
            object.__setattr__(self, name, int(value))  # JSON has no integers of numpy
        if not isinstance(self.keep_teacher, bool):
            raise OptionError(f"keep_teacher={self.keep_teacher!r}", expected="True or False", cure="pass one of them")

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
    def identity(self) -> str:
        """The SHA-256 of what is recorded, by which a saved state names the path: 64 hexadecimal digits.

        Teacher, generator and plan identify a recording, not how far it got.

        Example:
            >>> Manifest(Teacher("t", ""), Recording(200, 50)).identity[:12]
            'd498b7066a1b'
        """
        plan = {key: getattr(self.recording, key) for key in ("iterations", "every", "codec", "keep_teacher")}
        names = {"teacher": self.teacher.fingerprint, "generator": self.generator, "recording": plan}
        # The two constants were part of what version 0.1.0 hashed, and states saved by it must be recognized.
        content = names | {"complete": False, "nodes": []}
        return sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

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

    def due_iteration(self, index: int) -> int:
        """Return the iteration after which node `index` in [1, N] is saved.

        Example:
            >>> Manifest(Teacher("", ""), Recording(25, 10), ended=12).due_iteration(2)
            12
        """
        return min(index * self.recording.every, self.iterations)

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
            readable = {"int8"} if version == 1 else {*CODECS}  # format 1 compressed the nodes of exact
            odd = {content["recording"]["codec"]} - {*CODECS} | {node["codec"] for node in content["nodes"]} - readable
            if odd:
                raise unreadable(f"the codec {odd.pop()!r} of format {version} in {file}")
            if version > 1 and not content.keys() >= WRITTEN:
                raise ValueError(f"without {sorted(WRITTEN - content.keys())}")
            if version == 1:
                content["learning_rate_factor"] = content.pop("haste", 1)
            teacher, recording, nodes = (content.pop(key) for key in ("teacher", "recording", "nodes"))
            if not isinstance(nodes, list):
                raise TypeError(f"nodes={nodes!r:.80} is not a list")
            manifest = _from_json(
                cls,
                content | {"generator": content["generator"]["fingerprint"]},
                teacher=_from_json(Teacher, teacher),
                recording=Recording(**recording),
                nodes=tuple(_from_json(Node, node) for node in nodes),
            )
            manifest.validate()
        except PathError:
            raise
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise files.damaged(
                f"a manifest that no recording writes ({error}) in {file}", f"format {version}"
            ) from error
        return manifest

    def validate(self) -> None:
        """Raise ValueError if the manifest says what no recording can have written."""
        teacher, nodes = self.teacher, self.nodes
        # File names are fixed, so that no manifest can point out of its folder.
        listed = [(node.file, node.index, node.iteration) for node in nodes]
        due = [(files.node_file(index), index, self.due_iteration(index)) for index in range(1, len(nodes) + 1)]
        if teacher.file != "teacher.safetensors" or listed != due:
            raise ValueError(f"{teacher.file} and nodes {listed[:3]}, where {due[:3]} were due")
        if not all(0 < node.delta_norm < math.inf for node in nodes):
            raise ValueError("a node at no distance from the one before")
        counts = [count for count in (self.fitted, self.ended) if count is not None]
        if any(not 1 <= count <= self.recording.iterations for count in counts):
            raise ValueError(f"a recording that was fitted after {self.fitted} updates and ended after {self.ended}")
        if self.learning_rate_factor < 1:
            raise ValueError(f"a recording at {self.learning_rate_factor} times the learning rate")
        if len(nodes) > self.last_node or (self.complete and nodes and len(nodes) != self.last_node):
            raise ValueError(f"{len(nodes)} of {self.last_node} nodes, complete: {self.complete}")
        if (nodes or self.complete) and self.teacher_missing:
            raise ValueError("nodes without a teacher")
        if teacher.sha256 and not self.recording.keep_teacher:
            raise ValueError("a teacher that is kept and not kept")

    def write(self, folder: Path) -> None:
        """Write the manifest into a folder, whole or not at all; equal manifests give equal bytes."""
        content = asdict(self, dict_factory=_with_extra) | {"format": FORMAT}
        content["generator"] = {"fingerprint": self.generator}
        text = json.dumps(content, indent=2, sort_keys=True, allow_nan=False)
        files.write_text(folder / CONFIG, f"{text}\n")


def _with_extra(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the fields of a dataclass, with the keys of another version among them."""
    known = dict(pairs)
    extra: dict[str, Any] = known.pop("extra", {})
    return extra | known


def _from_json(kind: Callable[..., T], content: Mapping[str, Any], **parsed: Any) -> T:
    """Return a dataclass made from JSON; keys that it does not know are kept in its field `extra`.

    Args:
        kind: The dataclass, whose other fields are plain values.
        content: The JSON object.
        parsed: Fields that are no plain values.

    Raises:
        TypeError: If a field is missing, or has another type than it declares.
    """
    types = get_type_hints(kind)
    known = {name: value for name, value in content.items() if name in types and name != "extra"}
    for name, value in known.items():
        if type(value) not in (get_args(types[name]) or (types[name],)):
            raise TypeError(f"{name}={value!r:.80} is not of type {types[name]}")
    unknown = {name: value for name, value in content.items() if name not in known}
    return kind(**known, **parsed, extra=unknown)
