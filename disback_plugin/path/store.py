"""The files of a path: written whole, mapped when they are needed, verified before they are used.

Only one process writes (`distributed.on_main_process`). A file is written before the manifest that lists it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from disback_plugin.errors import OptionError, PathError, TrainingError
from disback_plugin.path import files
from disback_plugin.path.codecs import Delta
from disback_plugin.path.delta import NodeSource, encode
from disback_plugin.path.files import damaged
from disback_plugin.path.manifest import CONFIG, FORMAT, Manifest, Node, Recording, Teacher
from disback_plugin.weights.checksum import Checksum, checksum, fingerprint
from disback_plugin.weights.sharding import FullState
from disback_plugin.weights.tensors import Part, TensorMeta, dtype_class, masked, pieces

__all__ = ["Store", "require_whole"]

# What tells a file from its later versions: inode, size, time of its last change, and the SHA-256 in the manifest.
Stamp = tuple[tuple[int, int, int] | None, str]


class Store:
    """Reads and writes the files that a manifest lists.

    Args:
        folder: The path's folder.
        manifest: Its manifest.

    Attributes:
        manifest: The manifest, replaced by whoever has written another one.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.manifest = folder, manifest
        self._teacher: dict[str, Tensor] | None = None  # of a path that does not hold node 0
        self._opened: dict[str, tuple[Stamp, Any]] = {}
        self._verified: dict[str, Stamp] = {}

    # -- read ---------------------------------------------------------------------------------------------------------

    def refuse_retired_nodes(self) -> None:
        """Raise PathError if a node of an earlier format is stored as only an earlier version reads it."""
        if self.manifest.format < FORMAT:
            for node in self.manifest.nodes:
                self._read_delta(node)

    def keep_teacher(self, teacher: FullState) -> None:
        """Keep a copy of node 0, for a path that does not hold it.

        Raises:
            OptionError: If the teacher is sharded.
        """
        require_whole(teacher)
        self._verified.clear()  # no node could be decoded before
        if self._teacher is None:
            own = {name: teacher[name].cpu().clone(memory_format=torch.contiguous_format) for name in teacher.own()}
            self._teacher = own | {alias: own[name] for alias, name in teacher.aliases.items()}

    def source(self, index: int, *, verified: bool = True) -> NodeSource:
        """Return node `index` >= 0, after `verify` unless the files are as they were when they were verified.

        Raises:
            PathError: If a file is missing, cannot be read, does not fit the teacher, or, with `verified`, has changed.
        """
        stamps = self._stamps(index)
        if verified and any(self._verified.get(file) != stamp for file, stamp in stamps.items()):
            self.verify()
            stamps = self._stamps(index)
        return self._source(index, stamps)

    def teacher_source(self) -> NodeSource:
        """Return node 0 as it was first read, even if its file is gone by now, after its values were verified.

        Raises:
            PathError: If they are not those that were recorded.
        """
        entry = self.manifest.teacher
        held, file = self._opened.get(entry.file), self.folder / entry.file
        was, now = held and held[0][0], files.stamp(file)
        if was and now and was[0] == now[0] and was[1] != now[1]:
            # This is the very file that is mapped: to read beyond its end would kill the process.
            raise damaged(f"{file} cut to {now[1]} bytes", f"{was[1]} bytes")
        teacher = held[1] if held else self._open_teacher((now, entry.sha256))
        self.verify_checksum(0, checksum(teacher))
        return NodeSource(teacher)

    def verify(self) -> None:
        """Read and decode everything, and compare it with the manifest.

        Raises:
            PathError: If a file is missing, changed or foreign, or holds no node.
        """
        manifest, stamps = self.manifest, self._stamps(len(self.manifest.nodes))
        for entry in (entry for entry in manifest.entries if entry.sha256):
            found = files.digest(file := self.folder / entry.file, size=entry.bytes)
            if found != entry.sha256:
                raise damaged(f"{file} with SHA-256 {found[:12]}...", f"{entry.sha256[:12]}... as {CONFIG} lists it")
        # Without the teacher no node can be decoded: then the files are verified again once it is there.
        decodable = self._teacher is not None or (manifest.recording.keep_teacher and not manifest.teacher_missing)
        if decodable:
            self._verify_values(self._source(len(manifest.nodes), stamps))
        unlisted = {name for name in files.visible(self.folder) if name[0] != "."} - {CONFIG, "README.md", *stamps}
        # A recording that was broken off may have left files, which its resumption removes.
        foreign = sorted(name for name in unlisted if manifest.complete or not files.is_path_file(name))
        if foreign:
            found = f"{foreign[:3]} in {self.folder}"
            raise PathError(found, expected=f"only the files that {CONFIG} lists", cure="move it elsewhere")
        self._verified = stamps if decodable else {}

    def _verify_values(self, last: NodeSource) -> None:
        """Decode all nodes in one pass and compare their checksums."""
        expected = self.manifest.teacher.fingerprint
        if fingerprint(last.teacher) != expected:
            found = f"a teacher in {self.folder} that is not the one it was recorded from"
            raise damaged(found, f"fingerprint {expected[:12]}...")
        totals = [Checksum() for _ in self.manifest.entries]
        for name, layout in last.layout().items():
            for start, stop in pieces(layout.shape.numel()):
                for node, (total, value) in enumerate(zip(totals, last.trace(name, start, stop), strict=True)):
                    total.add(name, value)
                    if value.isnan().any():
                        raise damaged(f"NaN in {name} of node {node} of {self.folder}", "numbers")
        for index, total in enumerate(totals):
            self.verify_checksum(index, total.digest())

    def part_checksums(self, parts: Mapping[str, Part]) -> list[str]:
        """Return, for each node, the checksum of the parts that one process holds; only those are read and decoded."""
        last = self.source(len(self.manifest.nodes))
        totals = [Checksum() for _ in self.manifest.entries]
        for name, part in parts.items():
            for cell in part.cells():
                for total, value in zip(totals, last.trace(name, cell.start, cell.stop), strict=True):
                    total.add(name, masked(value, cell))
        return [total.digest() for total in totals]

    def verify_checksum(self, index: int, found: str, expected: str | None = None) -> None:
        """Raise PathError unless `found` is the checksum that node `index` was recorded with, or the one expected."""
        expected = expected or self.manifest.entries[index].checksum
        if found != expected:
            what = f"node {index} of {self.folder} that decodes to checksum {found[:12]}..."
            raise damaged(what, f"{expected[:12]}...")

    def _stamps(self, index: int) -> dict[str, Stamp]:
        """Return the stamps of the files of nodes 0 to `index`."""
        manifest = self.manifest
        listed: list[Teacher | Node] = [manifest.teacher, *manifest.nodes[:index]]
        return {e.file: (files.stamp(self.folder / e.file), e.sha256) for e in listed if e.sha256}

    def _source(self, index: int, stamps: Mapping[str, Stamp]) -> NodeSource:
        """Return node `index`; only files that are new or have changed are opened."""
        teacher = self._open_teacher(stamps.get(self.manifest.teacher.file))
        deltas: list[Delta] = []
        for node in self.manifest.nodes[:index]:
            held = self._opened.get(node.file)
            if held is None or held[0] != stamps[node.file]:
                delta = self._read_delta(node)
                self._require_fit(node, delta, teacher, deltas[0] if deltas else delta)
                held = self._opened[node.file] = stamps[node.file], delta
            deltas.append(held[1])
        return NodeSource(teacher, deltas)

    def _open_teacher(self, stamp: Stamp | None) -> Mapping[str, Tensor]:
        if self._teacher is not None:
            return self._teacher
        entry = self.manifest.teacher
        if stamp is None:  # it is not kept, or was not written before a crash
            raise PathError(
                f"a path without its teacher in {self.folder}",
                expected=f"node 0, of fingerprint {entry.fingerprint[:12]}..., in the folder or at hand",
                cure="pass it to path.verify_teacher, as attach and TrajectoryScheduler do, or resume the recording",
            )
        held = self._opened.get(entry.file)
        if held is None or held[0] != stamp:
            self._opened.clear()  # the nodes were compared with another file
            held = self._opened[entry.file] = stamp, self._read_teacher(entry)
        tensors: dict[str, Tensor] = held[1]
        return tensors

    def _read_teacher(self, entry: Teacher) -> dict[str, Tensor]:
        tensors, aliases = files.map_tensors(file := self.folder / entry.file, size=entry.bytes)
        try:
            return tensors | {alias: tensors[name] for alias, name in json.loads(aliases).items()}
        except (KeyError, TypeError, ValueError, AttributeError, RecursionError) as error:
            raise damaged(f"{file} whose tied weights cannot be read ({error})", "a teacher") from error

    def _read_delta(self, node: Node) -> Delta:
        file = self.folder / node.file
        parts, metadata = files.map_tensors(file, size=node.bytes)
        return Delta.from_parts(metadata, parts, source=str(file))

    def _require_fit(self, node: Node, delta: Delta, teacher: Mapping[str, Tensor], first: Delta) -> None:
        """Raise PathError unless a node has the tensors of the teacher, and ties the weights that node 1 ties."""
        odd = [n for n in delta.layout.keys() | teacher.keys() if not _same_kind(delta.layout.get(n), teacher.get(n))]
        if odd or delta.aliases != first.aliases:
            found = f"{self.folder / node.file} with other weights than the teacher, as {sorted(odd)[:3]}"
            raise damaged(found, "the same names, shapes, kinds of dtype and tied weights")

    # -- write --------------------------------------------------------------------------------------------------------

    @classmethod
    def create(
        cls, folder: Path, state: FullState, recording: Recording, generator: str | None, teacher_id: str | None
    ) -> Manifest:
        """Write a manifest and node 0 into a new folder; if that fails, remove what was made.

        Raises:
            PathError: If the folder holds anything or cannot be written.
            TrainingError: If the teacher holds a NaN.
        """
        if files.holds(folder, CONFIG):
            raise PathError(f"a path in {folder}", expected="an empty or missing folder", cure="pass another path=")
        for name in state.own():
            if state.layout[name].dtype.is_floating_point and state[name].isnan().any():
                raise TrainingError(f"NaN in {name} of the teacher", expected="numbers", cure="load it again")
        new = [parent for parent in (folder, *folder.parents) if not parent.exists()]
        manifest = Manifest(Teacher(fingerprint(state), checksum(state), teacher_id), recording, generator)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # The manifest comes before the first big file: a folder that a crash leaves is recognized as a path.
            manifest.write(folder)
            return cls(folder, manifest).write_teacher(state) if recording.keep_teacher else manifest
        except (OSError, PathError) as error:
            with suppress(OSError):  # the folder may not exist
                for name in (CONFIG, manifest.teacher.file):
                    (folder / name).unlink(missing_ok=True)
                for parent in new:
                    parent.rmdir()
            raise files.unwritable(folder, error) from error

    def write_teacher(self, state: FullState) -> Manifest:
        """Write node 0, and return the manifest that lists it."""
        overlapping, keep = state.overlapping(), self._keep(state)
        tensors: dict[str, Tensor] = {}
        for name in state.own():
            tensor = keep(state[name].cpu().contiguous())
            tensors[name] = tensor.clone() if name in overlapping else tensor
        file = self.folder / self.manifest.teacher.file
        listed = files.write_tensors(file, tensors, metadata=json.dumps(state.aliases, sort_keys=True))
        teacher = replace(self.manifest.teacher, **listed)
        self.mark_verified(teacher)
        return self.write_manifest(teacher=teacher)

    def append(
        self, state: FullState, iteration: int, exactly: Collection[str], training: Mapping[str, Tensor] | None
    ) -> Manifest:
        """Write the next node, and return the manifest that lists it; the arguments are `DegradationPath.append`'s.

        Raises:
            TrainingError: If the weights are not finite, or equal the previous node's bit for bit.
        """
        nodes, codec = self.manifest.nodes, self.manifest.recording.codec
        index = len(nodes) + 1
        made = encode(codec, state, self.source(index - 1, verified=False), exactly=exactly, keep=self._keep(state))
        file = self.folder / files.node_file(index)
        listed = files.write_tensors(file, made.delta.parts, metadata=made.delta.metadata())
        if training is not None:
            metadata = _training_metadata(iteration, training)
            files.write_tensors(self.folder / files.training_file(index), training, metadata=metadata)
        measured = made.delta_norm, codec, made.checksum, made.recorded, made.weight_error
        node = Node(index, iteration, listed["file"], listed["sha256"], listed["bytes"], *measured)
        self.mark_verified(node)
        return self.write_manifest(nodes=(*nodes, node))

    def read_training(self) -> dict[str, Tensor] | None:
        """Return what was written as `training` beside the last node; None if nothing was.

        Raises:
            PathError: If it was changed since.
        """
        file = self.folder / files.training_file(len(self.manifest.nodes))
        if not file.exists():
            return None
        tensors, metadata = files.map_tensors(file, size=file.stat().st_size)
        if metadata != _training_metadata(self.manifest.nodes[-1].iteration if self.manifest.nodes else 0, tensors):
            raise PathError(
                f"{file} that is not as it was written",
                expected="the state of the recording at the last node",
                cure="delete it: the recording then goes on from the last node, with fresh optimizer state",
            )
        return tensors

    def finish(self) -> Manifest:
        """Write the model card, and return the manifest of a complete recording."""
        from disback_plugin.path.model_card import model_card

        # The training state goes first: a complete path does not hold it.
        self.remove_unlisted(keep_training=False)
        files.write_text(self.folder / "README.md", model_card(self.manifest))
        return self.write_manifest(complete=True)

    def remove_unlisted(self, *, keep_training: bool = True) -> None:
        """Remove training states before the last node, and what a crash left before the manifest listed it."""
        listed = {entry.file for entry in self.manifest.entries}
        if keep_training:
            listed.add(files.training_file(len(self.manifest.nodes)))
        for entry in list(self.folder.iterdir()):
            if files.is_leftover(entry.name) or (files.is_path_file(entry.name) and entry.name not in listed):
                entry.unlink()

    def write_manifest(self, **changes: Any) -> Manifest:
        """Write the manifest with some fields changed, in the newest format, and return it."""
        manifest = replace(self.manifest, format=FORMAT, **changes)
        manifest.write(self.folder)
        return manifest

    def mark_verified(self, entry: Teacher | Node) -> None:
        """Mark a file as verified that was written a moment ago."""
        self._verified[entry.file] = files.stamp(self.folder / entry.file), entry.sha256

    def _keep(self, state: FullState) -> Callable[[Tensor], Tensor]:
        """Return a function that keeps a tensor until its file is written: on disk if the network is sharded."""
        return (lambda tensor: files.spool(tensor, self.folder)) if state.sharded else (lambda tensor: tensor)


def require_whole(teacher: FullState) -> None:
    """Raise OptionError if a teacher is sharded, so that no rank could keep a copy of it."""
    if teacher.sharded:
        raise OptionError(
            "a sharded teacher and a path without node 0 (keep_teacher=False)",
            expected="a path that holds node 0, of which each rank can read its part",
            cure="record with keep_teacher=True, or attach before sharding",
        )


def _training_metadata(iteration: int, training: Mapping[str, Tensor]) -> str:
    return json.dumps({"iteration": iteration, "checksum": checksum(training)})


def _same_kind(a: TensorMeta | None, b: Tensor | None) -> bool:
    return a is not None and b is not None and a.shape == b.shape and dtype_class(a.dtype) == dtype_class(b.dtype)
