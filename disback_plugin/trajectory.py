"""The degradation path {s'_i | i = 0 ... N} as a folder: node 0 is the teacher, node N fits the first student.

    config.json             what is there: teacher, generator, recording plan, nodes and their SHA-256
    teacher.safetensors     s'_0
    node-001.safetensors …  s'_1 to s'_N, one file a node
    README.md               model card, once the recording is complete

Every file is written under a temporary name, flushed to disk and renamed, and `config.json` after the file that it
lists: a crash at any moment leaves a path that opens with the nodes finished so far. Only safetensors and JSON are
ever read.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelHubMixin, snapshot_download
from torch import Tensor

from disback_plugin import files
from disback_plugin.errors import OptionError, PathError, TrainingError
from disback_plugin.manifest import CONFIG, Manifest, Node, Recording, Teacher, node_file
from disback_plugin.weights import fingerprint

__all__ = ["DegradationPath"]


class DegradationPath(
    ModelHubMixin,
    library_name="disback",
    tags=["disback", "score-distillation", "diffusion-distillation"],
    paper_url="https://arxiv.org/abs/2408.15991",
):
    """The nodes s'_0 (the teacher) to s'_N of one recording, in one folder.

    Args:
        folder: An existing path on disk; `DegradationPath.create` begins a new one.
        manifest: What another rank has read there already; None reads it.

    Raises:
        PathError: If there is no path, or its manifest is broken or of a newer format.

    Example:
        >>> import tempfile
        >>> path = DegradationPath.create(tempfile.mkdtemp(), {"w": torch.zeros(2)}, Recording(iterations=2, every=1))
        >>> path.append({"w": torch.ones(2)}, iteration=1)
        >>> len(path), path[1]["w"].tolist(), path.complete
        (2, [1.0, 1.0], False)
    """

    def __init__(self, folder: str | os.PathLike[str], manifest: Manifest | None = None) -> None:
        self.folder = Path(folder).absolute()  # a run may change its directory
        self.manifest = Manifest.read(self.folder) if manifest is None else manifest

    # -- open and create ----------------------------------------------------------------------------------------------

    @classmethod
    def create(
        cls,
        folder: str | os.PathLike[str],
        teacher: Mapping[str, Tensor],
        recording: Recording,
        *,
        generator: str | None = None,
        teacher_id: str | None = None,
    ) -> DegradationPath:
        """Begin a path in an empty or missing folder; node 0 is written at once.

        Args:
            folder: Where.
            teacher: State of the teacher s'_0, under canonical names.
            recording: The plan.
            generator: Fingerprint of the initial generator, if known.
            teacher_id: Where the teacher comes from, as a hub id; for people only.

        Raises:
            PathError: If the folder holds anything, or cannot be written.
            TrainingError: If the teacher holds a NaN.
        """
        root = Path(folder).absolute()
        broken = [name for name, tensor in teacher.items() if tensor.is_floating_point() and tensor.isnan().any()]
        if broken:
            raise TrainingError(f"NaN in {broken[0]} of the teacher", expected="numbers", cure="load its weights again")

        def write() -> Manifest:
            if cls.exists(root):
                raise PathError(f"a path in {root}", expected="an empty or missing folder", cure="pass another path=")
            new = [parent for parent in (root, *root.parents) if not parent.exists()]
            try:
                root.mkdir(parents=True, exist_ok=True)
                # Claimed before the first big write: a crash in between leaves a folder that is known to be ours.
                Manifest(Teacher(fingerprint(teacher), teacher_id), recording, generator).write(root)
                path = cls(root)
                path._write_teacher(teacher)
                return path.manifest
            except OSError as error:
                for name in (CONFIG, "teacher.safetensors"):
                    (root / name).unlink(missing_ok=True) if root.is_dir() else None
                for parent in new:
                    parent.rmdir() if parent.is_dir() else None
                raise PathError(
                    f"a folder that cannot be written, {root} ({error})",
                    expected="room and rights",
                    cure="pass another path=",
                ) from error

        return cls(root, files.on_rank_zero(write))

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str], **hub: Any) -> DegradationPath:  # type: ignore[override]
        """Open a path: a folder, or the id of a repository on the Hugging Face hub, which is downloaded.

        Args:
            path: Folder or hub id.
            hub: Passed to `huggingface_hub.snapshot_download` (revision, token, cache_dir, local_files_only).

        Raises:
            PathError: If there is no such folder or repository, or it holds no path.
        """
        if Path(path).is_dir():
            return cls(path)
        try:
            folder = snapshot_download(str(path), allow_patterns=[CONFIG, "README.md", "*.safetensors"], **hub)
        except (OSError, ValueError) as error:
            raise PathError(
                f"neither a folder nor a reachable hub repository at {str(path)!r} ({type(error).__name__})",
                expected="a recorded degradation path",
                cure="check the spelling, or record one with disback_plugin.record",
            ) from error
        return cls(folder)

    @classmethod
    def exists(cls, folder: str | os.PathLike[str]) -> bool:
        """Return whether the folder holds a path, finished or not.

        Raises:
            PathError: If it holds something else.
        """
        root = Path(folder)
        if (root / CONFIG).is_file():
            return True
        held = [str(root)] if root.is_file() else files.visible(root) if root.is_dir() else []
        if held:
            raise PathError(
                f"{root} without a {CONFIG} but with {sorted(held)[:3]}",
                expected="a degradation path, an empty folder or none",
                cure="pass another path=; nothing there was touched",
            )
        return False

    # -- read ---------------------------------------------------------------------------------------------------------

    def __fspath__(self) -> str:
        """Return the folder, so that a path can be passed wherever its folder can."""
        return str(self.folder)

    def __len__(self) -> int:
        """Return N + 1, as far as recorded."""
        return 1 + len(self.manifest.nodes)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return the full state of node `index` on the CPU, under canonical names; negative indices count from the end.

        Raises:
            IndexError: If there is no such node.
            PathError: If its file is missing, of another size than recorded, or unreadable.
        """
        if not -len(self) <= index < len(self):
            raise IndexError(f"node {index} of a path with nodes 0 to {len(self) - 1}")
        entry = self._entries()[index]
        return files.read_tensors(self.folder / entry.file, size=entry.bytes)

    @property
    def nodes(self) -> tuple[Node, ...]:
        """Nodes 1 ... N, as far as recorded: what the manifest says of them."""
        return self.manifest.nodes

    @property
    def complete(self) -> bool:
        """Whether the recording is finished."""
        return self.manifest.complete

    @property
    def identity(self) -> str:
        """Digest of what was, or is being, recorded: teacher, generator and plan, but not how far it got."""
        recorded = asdict(replace(self.manifest, nodes=(), complete=False))
        recorded["teacher"] = self.manifest.teacher.fingerprint
        return sha256(json.dumps(recorded, sort_keys=True).encode()).hexdigest()

    def digest(self, iteration: int | None = None) -> str:
        """Return a digest of the nodes recorded up to an iteration, or of all: of what is in them."""
        nodes = [n.sha256 for n in self.nodes if iteration is None or n.iteration <= iteration]
        return sha256(json.dumps(nodes).encode()).hexdigest()

    def verify(self) -> None:
        """Read every file and compare it with what was recorded.

        Raises:
            PathError: If a file is missing, changed or foreign.
        """
        for entry in self._entries():
            found = files.digest(self.folder / entry.file)
            if found != entry.sha256:
                raise PathError(
                    f"{self.folder / entry.file} with SHA-256 {found[:12]}...",
                    expected=f"{entry.sha256[:12]}... as {CONFIG} lists it",
                    cure=files.COPY_AGAIN,
                )
        self.check_teacher(self[0])
        listed = {CONFIG, "README.md", *(entry.file for entry in self._entries())}
        foreign = sorted(name for name in files.visible(self.folder) if name not in listed and name[0] != ".")
        if foreign:
            raise PathError(
                f"{foreign[:3]} in {self.folder}",
                expected=f"what {CONFIG} lists and nothing else",
                cure="move it elsewhere",
            )

    def check_teacher(self, state: Mapping[str, Tensor]) -> None:
        """Raise PathError unless `state` is the teacher that this path was recorded from, bit for bit."""
        found, expected = fingerprint(state), self.manifest.teacher.fingerprint
        if found != expected:
            raise PathError(
                f"another teacher (fingerprint {found[:12]}...)",
                expected=f"the one that {self.folder} was recorded from ({expected[:12]}...)",
                cure="load the teacher's own weights before attaching (a trainer's checkpoint may hold another node), "
                "or pass another path=",
            )

    # -- write --------------------------------------------------------------------------------------------------------

    def complete_node_0(self, teacher: Mapping[str, Tensor]) -> None:
        """Write node 0 if a crash at the very beginning left it out; `check_teacher` says whether `teacher` is it."""
        if not self.manifest.teacher.sha256:
            self._write_teacher(teacher)

    def append(self, state: Mapping[str, Tensor], *, iteration: int) -> None:
        """Add the next node.

        Args:
            state: All weights of s'_i, under canonical names.
            iteration: Updates of s' behind it, larger than the last node's.

        Raises:
            OptionError: If no node is due at this iteration. Then nothing was written.
            TrainingError: If the weights are not finite, or equal the previous node's bit for bit.
        """
        index = len(self)
        planned = replace(self.manifest, nodes=(*self.nodes, Node(index, iteration, node_file(index), "", 0, 0.0)))
        fault = planned.fault()
        if fault:
            raise OptionError(
                f"{fault} in append(iteration={iteration})",
                expected=f"the next iteration of {self.manifest.recording}",
                cure="append nodes when they are due",
            )
        delta_norm = _distance(state, self[-1])
        if not 0 < delta_norm < math.inf:
            raise TrainingError(
                f"weights that {'did not move' if delta_norm == 0 else 'are not finite'} by iteration {iteration}",
                expected="a fake score that its optimizer moves by finite amounts",
                cure="check the fake score's learning rate and loss, and that its dtype does not swallow the steps",
            )

        def write() -> None:
            entry = files.write_tensors(self.folder / node_file(index), state)
            node = Node(index, iteration, delta_norm=delta_norm, **entry)
            replace(self.manifest, nodes=(*self.nodes, node)).write(self.folder)

        self._on_rank_zero(write)

    def finish(self) -> None:
        """Mark the recording as complete and write the model card."""

        def write() -> None:
            files.write_text(self.folder / "README.md", self.manifest.card())
            replace(self.manifest, complete=True).write(self.folder)

        self._on_rank_zero(write)

    def rewind(self, iteration: int) -> None:
        """Forget the nodes after `iteration`, to record them again from a training state saved there."""
        kept = tuple(node for node in self.nodes if node.iteration <= iteration)
        complete = self.complete and iteration >= self.manifest.recording.iterations
        rewound = replace(self.manifest, nodes=kept, complete=complete)
        if rewound != self.manifest:
            self._on_rank_zero(lambda: rewound.write(self.folder))
            files.on_rank_zero(self._remove_unlisted)

    def tidy(self) -> None:
        """Remove a node that a crash left behind before the manifest listed it."""
        if not self.complete:
            files.on_rank_zero(self._remove_unlisted)

    def _remove_unlisted(self) -> None:
        listed = {node.file for node in self.nodes}
        for name in files.visible(self.folder):
            if re.fullmatch(r"node-\d{3}\.safetensors", name) and name not in listed:
                (self.folder / name).unlink()

    def _write_teacher(self, state: Mapping[str, Tensor]) -> None:
        def write() -> None:
            entry = files.write_tensors(self.folder / self.manifest.teacher.file, state)
            replace(self.manifest, teacher=replace(self.manifest.teacher, **entry)).write(self.folder)

        self._on_rank_zero(write)

    def _on_rank_zero(self, write: Callable[[], None]) -> None:
        def then_read() -> Manifest:
            write()
            return Manifest.read(self.folder)

        self.manifest = files.on_rank_zero(then_read)

    def _entries(self) -> tuple[Teacher | Node, ...]:
        if not self.manifest.teacher.sha256:
            raise PathError(
                f"a path without its teacher in {self.folder}, begun and broken off",
                expected="node 0 at least",
                cure="start the recording again with the same arguments; it resumes",
            )
        return (self.manifest.teacher, *self.nodes)

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> str | None:
        """Copy the path into another folder, as every hub object does.

        Args:
            save_directory: Where to; not the path's own folder.
            options: `push_to_hub=True` and `repo_id=...` upload it too.

        Raises:
            PathError: If the path is broken. Then nothing was written.
            OptionError: If it is the path's own folder.
        """
        self.verify()
        if Path(save_directory).resolve() == self.folder.resolve():
            raise OptionError(
                f"save_pretrained({str(save_directory)!r}) onto itself",
                expected="another folder",
                cure="leave it away, the path is saved; push_to_hub(repo_id) publishes it",
            )
        return super().save_pretrained(save_directory, **options)

    def _save_pretrained(self, save_directory: Path) -> None:
        for entry in self._entries():
            files.copy(self.folder / entry.file, save_directory / entry.file)
        files.write_text(save_directory / "README.md", self.manifest.card())
        self.manifest.write(save_directory)

    def __repr__(self) -> str:
        state = "complete" if self.complete else "unfinished"
        return f"DegradationPath({str(self.folder)!r}, nodes 0 to {len(self) - 1}, {state})"


def _distance(state: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """Return the Euclidean distance over all floating tensors, in float64, one tensor at a time."""

    def square(a: Tensor, b: Tensor) -> float:
        # Equal elements are at distance 0, be they infinite as in an attention mask.
        return float(torch.where(a == b, 0.0, a.double() - b.double()).square().sum())

    pairs = ((state[name].detach().cpu(), tensor) for name, tensor in other.items() if tensor.is_floating_point())
    return math.sqrt(sum(square(a, b) for a, b in pairs))
