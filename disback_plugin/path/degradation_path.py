"""The degradation path {s'_i | i = 0 ... N} as a folder: node 0 is the teacher, node N fits the first student.

    config.json             what is there: teacher, generator, recording plan, nodes and their SHA-256
    teacher.safetensors     s'_0, unless the path was recorded without it
    node-001.safetensors …  s'_1 to s'_N, one file a node: its coded difference to the node before
    README.md               model card, once the recording is complete

Every file is written under a temporary name, flushed to disk and renamed, and `config.json` after the file that it
lists: a crash at any moment leaves a path that opens with the nodes finished so far. Only safetensors and JSON are
ever read.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from huggingface_hub import ModelHubMixin, snapshot_download
from torch import Tensor

from disback_plugin import distributed
from disback_plugin.errors import OptionError, PathError
from disback_plugin.path import files, writer
from disback_plugin.path.delta import Between
from disback_plugin.path.manifest import CONFIG, Manifest, Node, Recording
from disback_plugin.path.model_card import aligned, card, html, short
from disback_plugin.path.probes import Probe
from disback_plugin.path.store import Storage
from disback_plugin.weights.checksum import checksum, fingerprint
from disback_plugin.weights.full_state import FullState
from disback_plugin.weights.inplace_copy import Source
from disback_plugin.weights.sharding import Part

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
        >>> import tempfile, torch
        >>> plan = Recording(iterations=2, every=1, codec="exact")
        >>> path = DegradationPath.create(tempfile.mkdtemp(), {"w": torch.zeros(2)}, plan)
        >>> path.append({"w": torch.ones(2)}, iteration=1)
        >>> len(path), path[1]["w"].tolist(), path.complete
        (2, [1.0, 1.0], False)
    """

    def __init__(self, folder: str | os.PathLike[str], manifest: Manifest | None = None) -> None:
        self.folder = Path(folder).absolute()  # a run may change its directory
        self.manifest = Manifest.read(self.folder) if manifest is None else manifest
        self._storage = Storage(self.folder)

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
            teacher: FullState of the teacher s'_0, under canonical names.
            recording: The plan.
            generator: Fingerprint of the initial generator, if known.
            teacher_id: Where the teacher comes from, as a hub id; for people only.

        Raises:
            PathError: If the folder holds anything, or cannot be written.
            TrainingError: If the teacher holds a NaN.
        """
        root, state = Path(folder).absolute(), FullState.of(teacher)
        if state.sharded and not recording.keep_teacher:
            raise OptionError(
                "keep_teacher=False and a sharded teacher, of which no rank could keep a copy",
                expected="a path that holds node 0",
                cure="leave keep_teacher= away",
            )

        def write() -> Manifest:
            if cls.exists(root):
                raise PathError(f"a path in {root}", expected="an empty or missing folder", cure="pass another path=")
            writer.begin(root, state, recording, generator, teacher_id)
            return Manifest.read(root)

        path = cls(root, distributed.on_rank_zero(write, state))
        if not recording.keep_teacher:
            path._storage.bind(state)
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
            PathError: If its file is missing, of another size than recorded, or unreadable, or decodes to something
                else than was recorded.
        """
        if not -len(self) <= index < len(self):
            raise IndexError(f"node {index} of a path with nodes 0 to {len(self) - 1}")
        index %= len(self)
        state = self._storage.node(self.manifest, index).state_dict()
        self.check_decoded(index, checksum(state))
        return state

    def source(self, position: float) -> Source:
        """Return the weights of a position, to be decoded piece by piece into a network (`ScoreNetwork.write`).

        Args:
            position: In [0, N]; between two nodes their weights are interpolated.

        Raises:
            PathError: If a file is missing or changed. All files are read and compared before the first use, and again
                when one of them was written since.
        """
        index = math.ceil(position)
        self._storage.ensure(self.manifest, index)
        node = self._storage.node(self.manifest, index)
        return node if position == index else Between(node, position - (index - 1))

    def original(self) -> Source:
        """Return node 0, to be written into the teacher at the end: as it was read, though its file may be gone by now.

        Raises:
            PathError: If it is not what was recorded any more.
        """
        return self._storage.original(self.manifest)

    def part_checksums(self, parts: Mapping[str, Part]) -> list[str]:
        """Return the checksum of what one process holds of each node (`ScoreNetwork.parts`), once all was verified.

        Raises:
            PathError: If a file is missing or changed.
        """
        self._storage.ensure(self.manifest, len(self) - 1)
        return self._storage.part_checksums(self.manifest, parts)

    def check_decoded(self, index: int, found: str, expected: str | None = None) -> None:
        """Raise PathError unless `found` is the checksum that node `index` was recorded with; of a part of it, the one
        expected.
        """
        self._storage.check_decoded(self.manifest, index, found, expected)

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
        for found_later in ("fitted", "ended", "haste", "learning_rate"):
            del recorded[found_later]
        recorded["teacher"] = self.manifest.teacher.fingerprint
        return sha256(json.dumps(recorded, sort_keys=True).encode()).hexdigest()

    def about(self) -> dict[str, Any]:
        """Return what tells this path from others, for a log: its folder, identity, and the networks' fingerprints."""
        names = {"folder": str(self.folder), "path": self.identity}
        return names | {"teacher": self.manifest.teacher.fingerprint, "generator": self.manifest.generator}

    def digest(self, iteration: int | None = None) -> str:
        """Return a digest of the nodes recorded up to an iteration, or of all: of what is in them."""
        nodes = [n.sha256 for n in self.nodes if iteration is None or n.iteration <= iteration]
        return sha256(json.dumps(nodes).encode()).hexdigest()

    def verify(self) -> None:
        """Read every file, decode every node, and compare both with what was recorded.

        Raises:
            PathError: If a file is missing, changed or foreign, or holds no node.
        """
        self._storage.verify(self.manifest)

    def bind(self, state: Mapping[str, Tensor]) -> None:
        """Make sure that `state` is the teacher that this path was recorded from, bit for bit; keep it if the path
        does not. All ranks must call with a sharded one.

        Raises:
            PathError: If it is another one.
        """
        whole = FullState.of(state)
        found = distributed.on_rank_zero(lambda: fingerprint(whole), whole) if whole.sharded else fingerprint(whole)
        expected = self.manifest.teacher.fingerprint
        if found != expected:
            raise PathError(
                f"another teacher (fingerprint {found[:12]}...)",
                expected=f"the one that {self.folder} was recorded from ({expected[:12]}...)",
                cure="load the teacher's own weights before attaching (a trainer's checkpoint may hold another node), "
                "or pass another path=",
            )
        if not self.manifest.recording.keep_teacher:
            if whole.sharded:
                raise PathError(
                    f"a path in {self.folder} without node 0, and a sharded teacher",
                    expected="a path that holds node 0, of which each rank can read its part",
                    cure="record with keep_teacher=True, or attach before sharding",
                )
            self._storage.bind(whole)

    # -- write --------------------------------------------------------------------------------------------------------

    def complete_node_0(self, teacher: Mapping[str, Tensor]) -> None:
        """Write node 0 unless it is there; `bind` says whether `teacher` is it."""
        if not self.manifest.teacher_missing:
            return

        state = FullState.of(teacher)
        self._on_rank_zero(lambda: writer.add_node_0(self._storage, self.manifest, state), state)

    def append(
        self,
        state: Mapping[str, Tensor],
        *,
        iteration: int,
        probe: Probe | None = None,
        exactly: Collection[str] = (),
        training: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Add the next node, coded as the difference to the last one.

        Args:
            state: All weights of s'_i, under canonical names. All ranks must call, if there are several.
            iteration: Updates of s' behind it, larger than the last node's.
            probe: What evaluates the network that holds `state`, to measure the codec's error; None: weights only.
            exactly: Names of tensors to be stored exactly, whatever the codec: those of buffers.
            training: What a recording needs to go on from here bit for bit (`training_state` returns it), kept until
                the next node or the end.

        Raises:
            OptionError: If no node is due at this iteration. Then nothing was written.
            TrainingError: If the weights are not finite, or equal the previous node's bit for bit.
            PathError: If the folder cannot be written.
        """
        writer.check_due(self.manifest, iteration)
        storage, whole = self._storage, FullState.of(state)

        def write() -> None:
            writer.add_node(storage, self.manifest, whole, iteration, probe=probe, exactly=exactly, training=training)

        self._on_rank_zero(write, whole)
        self.tidy()

    def training_state(self) -> dict[str, Tensor] | None:
        """Return what `append` was given as `training` with the last node; None if nothing.

        Raises:
            PathError: If it was changed since.
        """
        return writer.read_training(self.folder, self.manifest)

    def note(self, **known: Any) -> None:
        """Write down what is known of the recording: `fitted`, `ended`, `haste` or `learning_rate` of `Manifest`."""
        manifest = replace(self.manifest, **known)
        self._on_rank_zero(lambda: manifest.write(self.folder))

    def finish(self) -> None:
        """Mark the recording as complete and write the model card."""
        self._on_rank_zero(lambda: writer.finish(self.folder, self.manifest))

    def rewind(self, iteration: int) -> None:
        """Forget the nodes after `iteration`, to record them again from a training state saved there."""
        kept = tuple(node for node in self.nodes if node.iteration <= iteration)
        complete = self.complete and iteration >= self.manifest.iterations
        rewound = replace(self.manifest, nodes=kept, complete=complete)
        if rewound != self.manifest:
            self._on_rank_zero(lambda: rewound.write(self.folder))
            distributed.on_rank_zero(lambda: writer.remove_unlisted(self.folder, self.manifest))

    def tidy(self) -> None:
        """Remove what is older than the last node, or was left behind by a crash before the manifest listed it."""
        if not self.complete:
            distributed.on_rank_zero(lambda: writer.remove_unlisted(self.folder, self.manifest))

    def _on_rank_zero(self, write: Callable[[], None], state: FullState | None = None) -> None:
        def then_read() -> Manifest:
            try:
                write()
            except OSError as error:
                raise PathError(
                    f"a folder that cannot be written, {self.folder} ({error})",
                    expected="room and rights",
                    cure="make room, or pass another path=",
                ) from error
            return Manifest.read(self.folder)

        self.manifest = distributed.on_rank_zero(then_read, state)

    def save_pretrained(self, save_directory: str | Path, **options: Any) -> str | None:
        """Copy the path into another folder, as every hub object does.

        Args:
            save_directory: Where to; not the path's own folder.
            options: `push_to_hub=True` and `repo_id=...` upload it too.

        Raises:
            PathError: If the path is broken. Then nothing was written.
            OptionError: If it is the path's own folder, or one that holds anything.
        """
        self.verify()
        if Path(save_directory).resolve() == self.folder.resolve():
            raise OptionError(
                f"save_pretrained({str(save_directory)!r}) onto itself",
                expected="another folder",
                cure="leave it away, the path is saved; push_to_hub(repo_id) publishes it",
            )
        if Path(save_directory).is_dir() and files.visible(Path(save_directory)):
            raise OptionError(
                f"save_pretrained({str(save_directory)!r}) into a folder that holds something",
                expected="an empty or missing folder",
                cure="pass another folder; nothing there was touched",
            )
        return super().save_pretrained(save_directory, **options)

    def _save_pretrained(self, save_directory: Path) -> None:
        for entry in self.manifest.entries:
            if entry.sha256:
                files.copy(self.folder / entry.file, save_directory / entry.file)
        files.write_text(save_directory / "README.md", card(self.manifest))
        self.manifest.write(save_directory)

    def __str__(self) -> str:
        state = "complete" if self.complete else "unfinished"
        return f"DegradationPath({str(self.folder)!r}, nodes 0 to {len(self) - 1}, {state})"

    def __repr__(self) -> str:
        return f"{self}\n{aligned(short(self.manifest))}"

    def _repr_html_(self) -> str:
        return html(str(self), short(self.manifest))
