"""The files of a path, mapped and decoded; opened when they are needed, and again when somebody wrote them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from disback_plugin.errors import COPY_AGAIN, PathError
from disback_plugin.path import files
from disback_plugin.path.delta import Decoded, Delta
from disback_plugin.path.manifest import CONFIG, Manifest, Node, Teacher, is_ours
from disback_plugin.weights.checksum import Checksum, checksum, fingerprint
from disback_plugin.weights.full_state import FullState
from disback_plugin.weights.sharding import Part, masked
from disback_plugin.weights.tensor_meta import TensorMeta, dtype_class, layout_of, pieces

__all__ = ["Storage"]

T = TypeVar("T")
Entry = TypeVar("Entry", Teacher, Node)
# What a file is known by: inode, size, time of its last change, and the SHA-256 that the manifest lists.
Stamp = tuple[tuple[int, int, int] | None, str]


class Storage:
    """Reads the nodes that a manifest lists.

    Args:
        folder: Where the files are.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._teacher: dict[str, Tensor] | None = None
        self._open: dict[str, tuple[Stamp, Any]] = {}
        self._verified: dict[str, Stamp] = {}

    def bind(self, teacher: FullState) -> None:
        """Keep a copy of node 0, for a path that does not hold it."""
        self._verified.clear()  # nothing could be decoded before
        if self._teacher is None:
            own = {name: teacher[name].cpu().clone(memory_format=torch.contiguous_format) for name in teacher.own()}
            self._teacher = own | {alias: own[name] for alias, name in teacher.aliases.items()}

    def node(self, manifest: Manifest, index: int) -> Decoded:
        """Return node `index` >= 0, to be decoded piece by piece.

        Raises:
            PathError: If a file is missing, does not read, or does not fit the teacher.
        """
        teacher = self._teacher_of(manifest)
        layout = layout_of(teacher)
        deltas = [self._delta(node) for node in manifest.nodes[:index]]
        for node, delta in zip(manifest.nodes[:index], deltas, strict=True):
            self._check_fits(node, delta, layout, deltas[0])
        return Decoded(teacher, deltas)

    def original(self, manifest: Manifest) -> Decoded:
        """Return node 0 as it was when it was first read, though its file may be gone; its values are compared first.

        Raises:
            PathError: If they are not those that were recorded.
        """
        held = self._open.get(manifest.teacher.file)
        file = self.folder / manifest.teacher.file
        was, now = held and held[0][0], files.stamp(file)
        if was and now and was[0] == now[0] and was[1] != now[1]:
            # The very file that is mapped: to read beyond its end kills the process.
            raise PathError(f"{file} cut to {now[1]} bytes", expected=f"{was[1]} bytes", cure=COPY_AGAIN)
        teacher: Mapping[str, Tensor] = self._teacher_of(manifest) if held is None else held[1]
        self.check_decoded(manifest, 0, checksum(teacher))
        return Decoded(teacher, ())

    def trust(self, entry: Teacher | Node) -> None:
        """Take a file as verified that was written a moment ago."""
        self._verified[entry.file] = files.stamp(self.folder / entry.file), entry.sha256

    def ensure(self, manifest: Manifest, index: int) -> None:
        """Verify everything, unless the files of the nodes up to `index` are as they were when they were verified."""
        stored = [entry for entry in manifest.entries[: index + 1] if entry.sha256]
        now = {entry.file: (files.stamp(self.folder / entry.file), entry.sha256) for entry in stored}
        if any(self._verified.get(file) != stamp for file, stamp in now.items()):
            self.verify(manifest)

    def verify(self, manifest: Manifest) -> None:
        """Read and decode everything and compare it with what the manifest says.

        Raises:
            PathError: If a file is missing, changed or foreign, or holds no node.
        """
        stamps: dict[str, Stamp] = {}
        for entry in manifest.entries:
            if entry.sha256:
                file = self.folder / entry.file
                stamps[entry.file] = files.stamp(file), entry.sha256
                found = files.digest(file, size=entry.bytes)
                if found != entry.sha256:
                    raise PathError(
                        f"{file} with SHA-256 {found[:12]}...",
                        expected=f"{entry.sha256[:12]}... as {CONFIG} lists it",
                        cure=COPY_AGAIN,
                    )
        looked_at = self._check_values(manifest)
        listed = {CONFIG, "README.md", *stamps}
        unknown = {name for name in files.visible(self.folder) if name not in listed and name[0] != "."}
        # What a crash left of a recording that is not at its end is no business of anybody else's.
        foreign = sorted(name for name in unknown if manifest.complete or not is_ours(name))
        if foreign:
            raise PathError(
                f"{foreign[:3]} in {self.folder}",
                expected=f"what {CONFIG} lists and nothing else",
                cure="move it elsewhere",
            )
        self._verified = stamps if looked_at else {}

    def _check_values(self, manifest: Manifest) -> bool:
        """Decode all nodes in one pass and compare their checksums; False if the teacher is not there to do so."""
        if manifest.teacher_missing or (self._teacher is None and not manifest.recording.keep_teacher):
            return False
        last = self.node(manifest, len(manifest.nodes))
        if fingerprint(last.teacher) != manifest.teacher.fingerprint:
            raise PathError(
                f"a teacher in {self.folder} that is not the one it was recorded from",
                expected=f"fingerprint {manifest.teacher.fingerprint[:12]}...",
                cure=COPY_AGAIN,
            )
        totals = [Checksum() for _ in range(len(manifest.nodes) + 1)]
        for name, layout in last.layout().items():
            for start, stop in pieces(layout.shape.numel()):
                for node, (total, value) in enumerate(zip(totals, last.trace(name, start, stop), strict=True)):
                    total.add(name, value)
                    if value.isnan().any():
                        raise PathError(
                            f"NaN in {name} of node {node} of {self.folder}", expected="numbers", cure=COPY_AGAIN
                        )
        for index, total in enumerate(totals):
            self.check_decoded(manifest, index, total.digest())
        return True

    def part_checksums(self, manifest: Manifest, parts: Mapping[str, Part]) -> list[str]:
        """Return the checksum of what one process holds of each node: only that is read and decoded."""
        last = self.node(manifest, len(manifest.nodes))
        totals = [Checksum() for _ in manifest.entries]
        for name, part in parts.items():
            for cell in part.cells(last.grain(name)):
                for total, value in zip(totals, last.trace(name, cell.start, cell.stop), strict=True):
                    total.add(name, masked(value, cell))
        return [total.digest() for total in totals]

    def check_decoded(self, manifest: Manifest, index: int, found: str, expected: str | None = None) -> None:
        """Raise PathError unless `found` is the checksum that node `index` was recorded with, or the one expected."""
        expected = expected or manifest.entries[index].checksum
        if found != expected:
            raise PathError(
                f"node {index} of {self.folder} that decodes to checksum {found[:12]}...",
                expected=f"{expected[:12]}...",
                cure=COPY_AGAIN,
            )

    def _teacher_of(self, manifest: Manifest) -> Mapping[str, Tensor]:
        if self._teacher is not None:
            return self._teacher
        if not manifest.recording.keep_teacher:
            raise PathError(
                f"a path recorded without its teacher in {self.folder}",
                expected=f"the teacher of fingerprint {manifest.teacher.fingerprint[:12]}... at hand",
                cure="call path.bind(teacher's state) first; attach, record and TrajectoryScheduler do",
            )
        if manifest.teacher_missing:
            raise PathError(
                f"a path without its teacher in {self.folder}, begun and broken off",
                expected="node 0 at least",
                cure="start the recording again with the same arguments; it resumes",
            )
        return self._opened(manifest.teacher, self._read_teacher)

    def _delta(self, node: Node) -> Delta:
        return self._opened(node, self._read_delta)

    def _opened(self, entry: Entry, read: Callable[[Entry], T]) -> T:
        """Return what a file holds; read it again only if somebody wrote it since."""
        now = files.stamp(self.folder / entry.file), entry.sha256
        held = self._open.get(entry.file)
        if held is None or held[0] != now:
            held = self._open[entry.file] = now, read(entry)
        value: T = held[1]
        return value

    def _read_teacher(self, entry: Teacher) -> dict[str, Tensor]:
        tensors, about = files.map_tensors(self.folder / entry.file, size=entry.bytes)
        try:
            return tensors | {alias: tensors[name] for alias, name in json.loads(about).items()}
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise PathError(
                f"{self.folder / entry.file} whose tied weights do not read ({error})",
                expected="a teacher",
                cure=COPY_AGAIN,
            ) from error

    def _read_delta(self, node: Node) -> Delta:
        file = self.folder / node.file
        parts, about = files.map_tensors(file, size=node.bytes)
        return Delta.from_parts(about, parts, source=str(file))

    def _check_fits(self, node: Node, delta: Delta, teacher: Mapping[str, TensorMeta], first: Delta) -> None:
        """Raise PathError unless a node has the tensors of the teacher, and ties the weights that node 1 ties."""
        layout = delta.layout()
        odd = [name for name in layout.keys() | teacher.keys() if not _fit(layout.get(name), teacher.get(name))]
        if odd or delta.aliases != first.aliases:
            raise PathError(
                f"{self.folder / node.file} with other weights than the teacher, as {sorted(odd or delta.aliases)[:3]}",
                expected="the same names, shapes and kinds of dtype",
                cure=COPY_AGAIN,
            )


def _fit(a: TensorMeta | None, b: TensorMeta | None) -> bool:
    return a is not None and b is not None and a.shape == b.shape and dtype_class(a.dtype) == dtype_class(b.dtype)
