"""The nodes of a path as they are read: files are mapped when they are needed, and verified before they are used."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from disback_plugin.errors import OptionError, PathError
from disback_plugin.path import files
from disback_plugin.path.codecs import Delta, equal_bits
from disback_plugin.path.delta import InterpolatedSource, NodeSource
from disback_plugin.path.lock import FolderLock
from disback_plugin.path.manifest import CONFIG, FORMAT, Manifest, Node, Teacher
from disback_plugin.weights.sharding import FullState
from disback_plugin.weights.tensors import Checksum, Part, Source, checksum, dtype_class, fingerprint, masked

# What tells a file from its later versions: inode, size, time of its last change, and the SHA-256 in the manifest.
Stamp = tuple[tuple[int, int, int] | None, str]


class PathReader:
    """The reading half of `DegradationPath`.

    Args:
        folder: The path's folder.
        manifest: Its manifest, if another rank has read that already; None reads it.

    Attributes:
        folder: The folder, absolute.
        manifest: The content of `config.json`.
        lock: Keeps other runs from recording into the folder.
    """

    def __init__(self, folder: str | os.PathLike[str], manifest: Manifest | None = None) -> None:
        self.folder = Path(folder).absolute()  # a run may change its directory
        self.manifest = Manifest.read(self.folder) if manifest is None else manifest
        self.lock = FolderLock(self.folder)
        self._teacher: dict[str, Tensor] | None = None  # of a path that does not hold node 0
        self._opened: dict[str, tuple[Stamp, Any]] = {}
        self._verified: dict[str, Stamp] = {}
        if manifest is None and self.manifest.format < FORMAT:
            for node in self.manifest.nodes:
                self._read_delta(node)  # raises if only an earlier version reads it

    def __reduce__(self) -> tuple[type, tuple[Path, Manifest]]:  # another rank opens what this one has read
        return type(self), (self.folder, self.manifest)

    def __len__(self) -> int:
        """Return the number of nodes recorded so far, the teacher among them: N + 1 at the end."""
        return 1 + len(self.manifest.nodes)

    def __fspath__(self) -> str:
        """Return the folder, so that a path can be passed wherever its folder can."""
        return str(self.folder)

    @property
    def nodes(self) -> tuple[Node, ...]:
        """The manifest's entries of nodes 1 ... N, as far as recorded."""
        return self.manifest.nodes

    @property
    def complete(self) -> bool:
        """Whether the recording is finished."""
        return self.manifest.complete

    @property
    def identity(self) -> str:
        """Digest of what was, or is being, recorded: teacher, generator and plan, but not how far it got."""
        return self.manifest.identity

    def log_fields(self) -> dict[str, Any]:
        """Return what tells this path from others in a log: folder, identity, fingerprints of teacher and generator."""
        names = {"folder": str(self.folder), "path": self.identity}
        return names | {"teacher": self.manifest.teacher.fingerprint, "generator": self.manifest.generator}

    def nodes_digest(self, iteration: int | None = None) -> str:
        """Return a digest of the files of the nodes recorded up to an iteration; None: of all."""
        nodes = [n.sha256 for n in self.nodes if iteration is None or n.iteration <= iteration]
        return sha256(json.dumps(nodes).encode()).hexdigest()

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return all weights of node `index` on the CPU, under canonical names; negative indices count from the end.

        Raises:
            IndexError: If there is no such node.
            PathError: If a file is missing, cannot be read, or decodes to other weights than were recorded.
        """
        if not -len(self) <= index < len(self):
            raise IndexError(f"node {index} of a path with nodes 0 to {len(self) - 1}")
        index %= len(self)
        state = self._node(index).state_dict()
        self.verify_checksum(index, checksum(state))
        return state

    def source(self, position: float) -> Source:
        """Return the weights of a position, to be decoded piece by piece into a network (`ScoreNetwork.write`).

        Args:
            position: In [0, N]; between two nodes their weights are interpolated.

        Raises:
            PathError: If a file is missing or changed. All are verified before the first use and after each change.
        """
        index = math.ceil(position)
        if not self._stamps(index).items() <= self._verified.items():
            self.verify()
        node = self._node(index)
        return node if position == index else InterpolatedSource(node, position - (index - 1))

    def teacher_source(self) -> Source:
        """Return node 0 as it was first read, to restore the teacher at the end, though its file may be gone by now.

        Raises:
            PathError: If its values are not those that were recorded any more.
        """
        entry = self.manifest.teacher
        (was, _), teacher = self._opened.get(entry.file, ((None, ""), None))
        now = files.stamp(file := self.folder / entry.file)
        if was and now and was[0] == now[0] and was[1] != now[1]:
            # This is the very file that is mapped: to read beyond its end would kill the process.
            raise files.damaged(f"{file} cut to {now[1]} bytes", f"{was[1]} bytes")
        node = NodeSource(teacher) if teacher is not None else self._node(0)
        self.verify_checksum(0, checksum(node.teacher))
        return node

    def part_checksums(self, parts: Mapping[str, Part]) -> list[str]:
        """Return, for each node, the checksum of the parts that one process holds (`ScoreNetwork.parts`).

        Only those parts are read and decoded, after `verify`.
        """
        self.source(len(self) - 1)
        return self._checksums(parts)

    # -- verify -------------------------------------------------------------------------------------------------------

    def difference(self, state: FullState) -> str:
        """Return in words how weights differ from node 0; "" if the path does not hold it."""
        if not self.manifest.teacher.sha256:
            return ""
        known, own = self._node(0), state.layout
        layout = known.layout()
        if names := sorted(layout.keys() ^ own.keys()):
            return f", {len(names)} names that only one of them has, as {names[0]}"
        if odd := sorted(name for name in layout if layout[name] != own[name]):
            return f", {odd[0]} of {own[odd[0]].dtype} and {tuple(own[odd[0]].shape)} instead of {layout[odd[0]].dtype}"
        odd = sorted(name for name in state.own() if not equal_bits(state.flat(name), known.teacher[name].view(-1)))
        return f", other {'buffers' if state.buffers.issuperset(odd) else 'weights'} {odd[:3]}"

    def verify_checksum(self, index: int, found: str, expected: str | None = None) -> None:
        """Raise PathError unless decoded weights have the checksum of node `index`, or that of a part of it."""
        expected = expected or self.manifest.entries[index].checksum
        if found != expected:
            what = f"node {index} of {self.folder} that decodes to checksum {found[:12]}..."
            raise files.damaged(what, f"{expected[:12]}...")

    def verify(self) -> None:
        """Read every file, decode every node, and compare both with what was recorded.

        Raises:
            PathError: If a file is missing or changed, or holds no node. Files that the manifest does not list are not
                read.
        """
        manifest, stamps = self.manifest, self._stamps(len(self) - 1)
        for entry in manifest.entries:
            if entry.sha256:
                files.require_size(file := self.folder / entry.file, entry.bytes)
                if files.digest(file) != entry.sha256:
                    raise files.damaged(f"{file} with another SHA-256", f"{entry.sha256[:12]}... as {CONFIG} lists it")
        # Without the teacher no node can be decoded: then the files are verified again once it is there.
        decodable = self._teacher is not None or manifest.teacher.sha256 != ""
        if decodable:
            last, expected = self._node(len(self) - 1), manifest.teacher.fingerprint
            if fingerprint(last.teacher) != expected:
                found = f"a teacher in {self.folder} that is not the one it was recorded from"
                raise files.damaged(found, f"fingerprint {expected[:12]}...")
            whole = {name: Part(meta.shape) for name, meta in last.layout().items()}
            for index, found in enumerate(self._checksums(whole)):
                self.verify_checksum(index, found)
        self._verified = stamps if decodable else {}

    def _checksums(self, parts: Mapping[str, Part]) -> list[str]:
        """Return the checksum of some parts of each node; raise PathError if a node holds a NaN there."""
        last, totals = self._node(len(self) - 1), [Checksum() for _ in range(len(self))]
        for name, part in parts.items():
            for cell in part.cells():
                for index, value in enumerate(last.trace(name, cell.start, cell.stop)):
                    if value.isnan().any():
                        raise files.damaged(f"NaN in {name} of node {index} of {self.folder}", "numbers")
                    totals[index].add(name, masked(value, cell))
        return [total.digest() for total in totals]

    def __repr__(self) -> str:
        state = "complete" if self.complete else "unfinished"
        return f"DegradationPath({str(self.folder)!r}, nodes 0 to {len(self) - 1}, {state})"

    # -- files --------------------------------------------------------------------------------------------------------

    def _stamp(self, entry: Teacher | Node) -> Stamp:
        return files.stamp(self.folder / entry.file), entry.sha256

    def _stamps(self, index: int) -> dict[str, Stamp]:
        """Return the stamps of the files of nodes 0 to `index`."""
        return {entry.file: self._stamp(entry) for entry in self.manifest.entries[: index + 1] if entry.sha256}

    def _node(self, index: int) -> NodeSource:
        """Return node `index` without verifying it; only files that are new or have changed are opened."""
        entry = self.manifest.teacher
        if self._teacher is None and not entry.sha256:  # it is not kept, or was not written before a crash
            raise PathError(
                f"a path without its teacher in {self.folder}",
                expected=f"node 0, of fingerprint {entry.fingerprint[:12]}..., in the folder or at hand",
                cure="pass it to path.verify_teacher, as attach and TrajectoryScheduler do, or resume the recording",
            )
        teacher = self._open(entry, self._read_teacher) if self._teacher is None else self._teacher
        deltas: list[Delta] = []
        for node in self.manifest.nodes[:index]:
            deltas.append(self._open(node, lambda node: self._read_fitting(node, teacher, deltas)))
        return NodeSource(teacher, deltas)

    def _open(self, entry: Any, read: Callable[[Any], object]) -> Any:
        """Return what a file holds, from memory unless the file has changed."""
        stamp = self._stamp(entry)
        if entry.file not in self._opened or self._opened[entry.file][0] != stamp:
            self._opened[entry.file] = stamp, read(entry)
        return self._opened[entry.file][1]

    def _read_teacher(self, entry: Teacher) -> dict[str, Tensor]:
        self._opened.clear()  # the nodes were compared with another file
        tensors, aliases = files.map_tensors(file := self.folder / entry.file, size=entry.bytes)
        try:
            return tensors | {alias: tensors[name] for alias, name in json.loads(aliases).items()}
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise files.damaged(f"{file} whose tied weights cannot be read ({error})", "a teacher") from error

    def _read_delta(self, node: Node) -> Delta:
        parts, metadata = files.map_tensors(file := self.folder / node.file, size=node.bytes)
        return Delta.from_parts(metadata, parts, source=str(file))

    def _read_fitting(self, node: Node, teacher: Mapping[str, Tensor], before: list[Delta]) -> Delta:
        """Read a node; raise PathError unless it has the teacher's tensors, and ties the weights that node 1 ties."""
        delta = self._read_delta(node)
        odd = sorted({name for name, _ in _kinds(delta.layout).items() ^ _kinds(teacher).items()})
        if odd or any(delta.aliases != first.aliases for first in before[:1]):
            found = f"{self.folder / node.file} with other weights than the teacher, as {odd[:3]}"
            raise files.damaged(found, "the same names, shapes, kinds of dtype and tied weights")
        return delta


def copy_of(teacher: FullState) -> dict[str, Tensor]:
    """Return a copy of node 0 on the CPU, for a path that does not hold it.

    Raises:
        OptionError: If the teacher is sharded, so that no rank could keep a copy of it.
    """
    if teacher.sharded:
        raise OptionError(
            "a sharded teacher and a path without node 0 (keep_teacher=False)",
            expected="a path that holds node 0, of which each rank can read its part",
            cure="record with keep_teacher=True, or attach before sharding",
        )
    own = {name: teacher[name].cpu().clone(memory_format=torch.contiguous_format) for name in teacher.own()}
    return own | {alias: own[name] for alias, name in teacher.aliases.items()}


def _kinds(tensors: Mapping[str, Any]) -> dict[str, tuple[torch.Size, str]]:
    """Return shape and class of dtype of each tensor or `TensorMeta`."""
    return {name: (each.shape, dtype_class(each.dtype)) for name, each in tensors.items()}
