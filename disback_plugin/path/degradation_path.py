"""The degradation path {s'_i | i = 0 ... N} as a folder: node 0 is the teacher, node N fits the first student.

    config.json             the manifest: teacher, generator, plan of the recording, nodes and their SHA-256
    teacher.safetensors     s'_0, unless the path was recorded without it
    node-001.safetensors …  s'_1 to s'_N, one file a node
    README.md               model card, once the recording is complete

A file is written under a temporary name, flushed to disk and renamed, and then `config.json` lists it: a crash at any
moment leaves a path that opens with the nodes finished so far. Only safetensors and JSON are read.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Collection, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from huggingface_hub import ModelHubMixin, snapshot_download
from torch import Tensor

from disback_plugin import distributed
from disback_plugin.errors import OptionError, PathError
from disback_plugin.path import files
from disback_plugin.path.delta import InterpolatedSource
from disback_plugin.path.manifest import CONFIG, Manifest, Node, Recording
from disback_plugin.path.store import Store, require_whole
from disback_plugin.weights.checksum import checksum, fingerprint
from disback_plugin.weights.sharding import FullState
from disback_plugin.weights.tensors import Part, Source

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
        manifest: Its manifest, if another rank has read that already; None reads it.

    Raises:
        PathError: If there is no path, its manifest is broken, or this version does not read its format or codec.

    Example:
        >>> import tempfile, torch
        >>> plan = Recording(iterations=2, every=1, codec="exact")
        >>> path = DegradationPath.create(tempfile.mkdtemp(), {"w": torch.zeros(2)}, plan)
        >>> path.append({"w": torch.ones(2)}, iteration=1)
        >>> len(path), path[1]["w"].tolist(), path.complete
        (2, [1.0, 1.0], False)
    """

    def __init__(self, folder: str | os.PathLike[str], manifest: Manifest | None = None) -> None:
        self.folder = Path(folder).absolute()  # a run may change its directory
        self._store = Store(self.folder, Manifest.read(self.folder) if manifest is None else manifest)
        if manifest is None:
            self._store.refuse_retired_nodes()

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
            folder: The folder, which is made if it is missing.
            teacher: All weights of the teacher s'_0, under canonical names.
            recording: The plan.
            generator: Fingerprint of the initial generator, if known.
            teacher_id: Hub id that the teacher comes from; for people only.

        Raises:
            PathError: If the folder holds anything, or cannot be written.
            OptionError: If the teacher is sharded and the path shall not hold it.
            TrainingError: If the teacher holds a NaN.
        """
        root, state = Path(folder).absolute(), FullState.of(teacher)
        if not recording.keep_teacher:
            require_whole(state)
        args = root, state, recording, generator, teacher_id
        path = cls(root, distributed.on_main_process(lambda: Store.create(*args), state))
        if recording.keep_teacher:
            path._store.mark_verified(path.manifest.teacher)
        else:
            path._store.keep_teacher(state)
        return path

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
        """Return whether the folder holds a path, finished or not; raise PathError if it holds something else."""
        return files.holds(Path(folder), CONFIG)

    # -- read ---------------------------------------------------------------------------------------------------------

    def __fspath__(self) -> str:
        """Return the folder, so that a path can be passed wherever its folder can."""
        return str(self.folder)

    def __len__(self) -> int:
        """Return the number of nodes recorded so far, the teacher among them: N + 1 at the end."""
        return 1 + len(self.manifest.nodes)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return all weights of node `index` on the CPU, under canonical names; negative indices count from the end.

        Raises:
            IndexError: If there is no such node.
            PathError: If a file is missing, cannot be read, or decodes to other weights than were recorded.
        """
        if not -len(self) <= index < len(self):
            raise IndexError(f"node {index} of a path with nodes 0 to {len(self) - 1}")
        index %= len(self)
        state = self._store.source(index, verified=False).state_dict()
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
        node = self._store.source(index)
        return node if position == index else InterpolatedSource(node, position - (index - 1))

    def teacher_source(self) -> Source:
        """Return node 0 as it was first read, to restore the teacher at the end, though its file may be gone by now.

        Raises:
            PathError: If it is not what was recorded any more.
        """
        return self._store.teacher_source()

    def part_checksums(self, parts: Mapping[str, Part]) -> list[str]:
        """Return the checksum of what one process holds of each node (`ScoreNetwork.parts`), after `verify`."""
        return self._store.part_checksums(parts)

    def verify_checksum(self, index: int, found: str, expected: str | None = None) -> None:
        """Raise PathError unless decoded weights have the checksum of node `index`, or that of a part of it."""
        self._store.verify_checksum(index, found, expected)

    @property
    def manifest(self) -> Manifest:
        """The content of `config.json`."""
        return self._store.manifest

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
        return self.manifest.identity.digest()

    def log_fields(self) -> dict[str, Any]:
        """Return what tells this path from others in a log: folder, identity, fingerprints of teacher and generator."""
        names = {"folder": str(self.folder), "path": self.identity}
        return names | {"teacher": self.manifest.teacher.fingerprint, "generator": self.manifest.generator}

    def nodes_digest(self, iteration: int | None = None) -> str:
        """Return a digest of the files of the nodes recorded up to an iteration; None: of all."""
        nodes = [n.sha256 for n in self.nodes if iteration is None or n.iteration <= iteration]
        return sha256(json.dumps(nodes).encode()).hexdigest()

    def verify(self) -> None:
        """Read every file, decode every node, and compare both with what was recorded.

        Raises:
            PathError: If a file is missing, changed or foreign, or holds no node.
        """
        self._store.verify()

    def verify_teacher(self, state: Mapping[str, Tensor]) -> None:
        """Raise PathError unless `state` is the teacher that this path was recorded from, bit for bit.

        A path that does not hold node 0 keeps a copy of it. All ranks must call with a sharded teacher.
        """
        whole = FullState.of(state)
        found = distributed.on_main_process(lambda: fingerprint(whole), whole) if whole.sharded else fingerprint(whole)
        self.manifest.require_teacher(found, self.folder)
        if not self.manifest.recording.keep_teacher:
            self._store.keep_teacher(whole)

    # -- write --------------------------------------------------------------------------------------------------------

    def write_teacher(self, teacher: Mapping[str, Tensor]) -> None:
        """Write node 0 unless it is there; call `verify_teacher` with the same weights before."""
        if self.manifest.teacher_missing:
            state = FullState.of(teacher)
            self._on_rank_zero(lambda: self._store.write_teacher(state), state)

    def append(
        self,
        state: Mapping[str, Tensor],
        *,
        iteration: int,
        exactly: Collection[str] = (),
        training: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Add the next node.

        Args:
            state: All weights of s'_i, under canonical names. All ranks must call, if there are several.
            iteration: Updates of s' before this node, more than before the last one.
            exactly: Names of tensors that are stored whole, whatever the codec: those of buffers.
            training: What a recording needs to go on from here bit for bit (`training_state` returns it), kept until
                the next node or the end.

        Raises:
            OptionError: If no node is due at this iteration. Then nothing was written.
            TrainingError: If the weights are not finite, or equal the previous node's bit for bit.
            PathError: If the folder cannot be written.
        """
        self.manifest.require_due(iteration)
        whole = FullState.of(state)
        self._on_rank_zero(lambda: self._store.append(whole, iteration, exactly, training), whole)
        self.remove_leftovers()

    def training_state(self) -> dict[str, Tensor] | None:
        """Return what `append` was given as `training` with the last node, or None; PathError if it was changed."""
        return self._store.read_training()

    def update_manifest(self, **known: Any) -> None:
        """Write fields of `Manifest` that became known: `fitted`, `ended`, `learning_rate`, `learning_rate_factor`."""
        self._on_rank_zero(lambda: self._store.write_manifest(**known))

    def finish(self) -> None:
        """Write the model card, and mark the recording as complete."""
        self._on_rank_zero(self._store.finish)

    def remove_nodes_after(self, iteration: int) -> None:
        """Remove the nodes after `iteration`, to record them again from a training state saved there."""
        kept = tuple(node for node in self.nodes if node.iteration <= iteration)
        complete = self.complete and iteration >= self.manifest.iterations
        if (kept, complete) != (self.nodes, self.complete):
            self._on_rank_zero(lambda: self._store.write_manifest(nodes=kept, complete=complete))
            distributed.on_main_process(self._store.remove_unlisted)

    def remove_leftovers(self) -> None:
        """Remove training states before the last node, and what a crash left before the manifest listed it."""
        if not self.complete:
            distributed.on_main_process(self._store.remove_unlisted)

    def _on_rank_zero(self, write: Callable[[], Manifest], state: FullState | None = None) -> None:
        def written() -> Manifest:
            try:
                return write()
            except OSError as error:
                raise files.unwritable(self.folder, error) from error

        self._store.manifest = distributed.on_main_process(written, state)

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> str | None:
        """Copy the path into another folder, as every hub object does.

        Args:
            save_directory: The other folder, empty or missing.
            options: `push_to_hub=True` and `repo_id=...` upload it too.

        Raises:
            PathError: If the path is broken. Then nothing was written.
            OptionError: If the folder holds anything.
        """
        self.verify()
        if Path(save_directory).is_dir() and files.visible(Path(save_directory)):
            raise OptionError(
                f"save_pretrained({str(save_directory)!r}) into a folder that holds something",
                expected="an empty or missing folder",
                cure="pass another folder, nothing there was touched; push_to_hub(repo_id) publishes the path",
            )
        return super().save_pretrained(save_directory, **options)

    def _save_pretrained(self, save_directory: Path) -> None:
        from disback_plugin.path.model_card import model_card

        for entry in self.manifest.entries:
            if entry.sha256:
                files.copy(self.folder / entry.file, save_directory / entry.file)
        files.write_text(save_directory / "README.md", model_card(self.manifest))
        self.manifest.write(save_directory)

    def __str__(self) -> str:
        state = "complete" if self.complete else "unfinished"
        return f"DegradationPath({str(self.folder)!r}, nodes 0 to {len(self) - 1}, {state})"

    def __repr__(self) -> str:
        from disback_plugin._text_table import aligned
        from disback_plugin.path.model_card import node_table

        return f"{self}\n{aligned(node_table(self.manifest))}"

    def _repr_html_(self) -> str:
        from disback_plugin._text_table import html_table
        from disback_plugin.path.model_card import node_table

        return html_table(str(self), node_table(self.manifest))
