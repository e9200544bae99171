"""The degradation path {s'_i | i = 0 ... N} as a folder: node 0 is the teacher, node N fits the first student.

    config.json             the manifest: teacher, generator, plan of the recording, nodes and their SHA-256
    teacher.safetensors     s'_0, unless the path was recorded without it
    node-001.safetensors …  s'_1 to s'_N, one file a node
    README.md               model card, once the recording is complete

A file is written under a temporary name, flushed and renamed, and then `config.json` lists it: after a crash at any
moment the path opens with the nodes finished so far. Only safetensors and JSON are read.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelHubMixin, snapshot_download
from torch import Tensor

from disback_plugin import distributed
from disback_plugin.errors import OptionError, PathError, TrainingError
from disback_plugin.path import files
from disback_plugin.path.delta import encode
from disback_plugin.path.manifest import CONFIG, FORMAT, Manifest, Node, Recording, Teacher
from disback_plugin.path.reader import PathReader, copy_of
from disback_plugin.weights.sharding import FullState
from disback_plugin.weights.tensors import checksum, fingerprint


class DegradationPath(
    PathReader,
    ModelHubMixin,
    library_name="disback",
    tags=["disback", "score-distillation", "diffusion-distillation"],
    paper_url="https://arxiv.org/abs/2408.15991",
    model_card_template=Path(__file__).with_name("model_card.md.j2").read_text(encoding="utf-8"),
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
        kept = None if recording.keep_teacher else copy_of(state)

        def begin() -> DegradationPath:
            if cls.exists(root):
                raise PathError(f"a path in {root}", expected="an empty or missing folder", cure="pass another path=")
            for name in state.own():
                if state[name].isnan().any():
                    raise TrainingError(f"NaN in {name} of the teacher", expected="numbers", cure="load it again")
            path = cls(root, Manifest(Teacher(fingerprint(state), checksum(state), teacher_id), recording, generator))
            new = [parent for parent in (root, *root.parents) if not os.path.exists(parent)]
            with files.writing(root):
                root.mkdir(parents=True, exist_ok=True)
            path.lock.acquire()
            try:
                with path.lock:
                    path.update_manifest()  # before the first big file: what a crash leaves is recognized as a path
                    path.write_teacher(state)
            except PathError:
                with suppress(OSError):
                    for file in (CONFIG, path.manifest.teacher.file):
                        (root / file).unlink(missing_ok=True)
                    for parent in new:
                        parent.rmdir()
                raise
            return path

        path = distributed.on_main_process(begin, state)
        path._teacher = kept
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
        if os.path.isdir(path):
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
        root = Path(folder)
        if os.path.isfile(root / CONFIG):  # no error of a name that is too long
            return True
        held = [str(root)] if os.path.isfile(root) else files.visible(root) if os.path.isdir(root) else []
        if held:
            raise PathError(
                f"{root} without a {CONFIG} but with {held[:3]}",
                expected="a degradation path, an empty folder or none",
                cure="pass another path=; nothing there was touched",
            )
        return False

    def verify_teacher(self, state: Mapping[str, Tensor]) -> None:
        """Raise PathError unless `state` is the teacher that this path was recorded from, bit for bit.

        A path that does not hold node 0 keeps a copy of it. All ranks must call with a sharded teacher.
        """
        whole = FullState.of(state)
        found = whole.fingerprint()
        expected = self.manifest.teacher.fingerprint
        if found != expected:
            why = whole.read(self.difference)
            raise PathError(
                f"another teacher (fingerprint {found[:12]}...{why})",
                expected=f"the one that {self.folder} was recorded from ({expected[:12]}...)",
                cure="load its running statistics again, which a forward in training mode changes: call teacher.eval()"
                if "buffers" in why
                else "load the teacher's own weights before attaching (a trainer's checkpoint may hold another node), "
                "or pass another path=",
            )
        if not self.manifest.recording.keep_teacher and self._teacher is None:
            self._teacher = copy_of(whole)

    def node_held(self, state: Mapping[str, Tensor]) -> int | None:
        """Return the index of the node whose weights are those of `state`, or None. All ranks must call if sharded."""
        held = checksum(FullState.of(state))
        return next((node.index for node in self.nodes if node.checksum == held), None)

    # -- write --------------------------------------------------------------------------------------------------------

    def _update(self, write: Callable[[], dict[str, Any]], state: FullState | None = None) -> None:
        """Write files on rank 0, then the manifest with the fields that `write` returns, which all ranks receive."""

        def written() -> Manifest:
            self.lock.acquire()
            with files.writing(self.folder):
                manifest = replace(self.manifest, format=FORMAT, **write())
                manifest.write(self.folder)
            return manifest

        self.manifest = distributed.on_main_process(written, state)

    def update_manifest(self, **known: Any) -> None:
        """Write fields of `Manifest` that became known: `fitted`, `ended`, `learning_rate`, `learning_rate_factor`."""
        self._update(lambda: known)

    def write_teacher(self, teacher: Mapping[str, Tensor]) -> None:
        """Write node 0, the weights of `teacher`, unless it is there; call `verify_teacher` with them before."""
        if not self.manifest.teacher_missing:
            return
        state = FullState.of(teacher)

        def write() -> dict[str, Any]:
            overlapping = state.overlapping()
            tensors = {name: state[name].cpu().contiguous() for name in state.own()}
            tensors |= {name: tensors[name].clone() for name in overlapping}
            file, metadata = self.folder / self.manifest.teacher.file, json.dumps(state.aliases, sort_keys=True)
            entry = replace(self.manifest.teacher, **files.write_tensors(file, tensors, metadata=metadata))
            self._verified[entry.file] = self._stamp(entry)
            return {"teacher": entry}

        self._update(write, state)

    def append(
        self, state: Mapping[str, Tensor], *, iteration: int, training: Mapping[str, Tensor] | None = None
    ) -> None:
        """Add the next node.

        Args:
            state: All weights of s'_i, under canonical names. Where some are parameters, the others, as running
                statistics, are stored whole. All ranks must call, if there are several.
            iteration: Updates of s' before this node, more than before the last one.
            training: What a recording needs to go on from here bit for bit (`training_state` returns it), kept until
                the next node or the end.

        Raises:
            OptionError: If no node is due at this iteration. Then nothing was written.
            TrainingError: If the weights are not finite, or equal the previous node's bit for bit.
            PathError: If the folder cannot be written.
        """
        known, whole, index = self.manifest, FullState.of(state), len(self)
        if index > known.last_node or known.teacher_missing or iteration != known.due_iteration(index):
            raise OptionError(
                f"append(iteration={iteration!r}) to {index - 1} of {known.last_node} nodes",
                expected=f"the next iteration of {known.recording}",
                cure="append nodes when they are due",
            )

        def write() -> dict[str, Any]:
            delta, measured = encode(known.recording.codec, whole, self._node(index - 1))
            file = self.folder / files.node_file(index)
            listed = files.write_tensors(file, delta.parts, metadata=delta.metadata())
            if training is not None:
                metadata = _training_metadata(iteration, training)
                files.write_tensors(self.folder / files.training_file(index), training, metadata=metadata)
            node = Node(index, iteration, **listed, **measured)
            self._verified[node.file] = self._stamp(node)
            return {"nodes": (*self.nodes, node)}

        self._update(write, whole)
        self.remove_leftovers()

    def training_state(self) -> dict[str, Tensor] | None:
        """Return what `append` was given as `training` with the last node, or None; PathError if it was changed."""
        file = self.folder / files.training_file(len(self.nodes))
        if not file.exists():
            return None
        tensors, metadata = files.map_tensors(file, size=file.stat().st_size)
        if metadata != _training_metadata(self.nodes[-1].iteration if self.nodes else 0, tensors):
            raise PathError(
                f"{file} that is not as it was written",
                expected="the state of the recording at the last node",
                cure="delete it: the recording then goes on from the last node, with fresh optimizer state",
            )
        return tensors

    def finish(self) -> None:
        """Write the model card, and mark the recording as complete."""

        def write() -> dict[str, Any]:
            self._remove_unlisted()  # the training state goes first: a complete path does not hold it
            files.write_text(self.folder / "README.md", str(self.generate_model_card()))
            self.lock.release()  # before the mark: nobody locks a complete path, and would remove what a crash leaves
            return {"complete": True}

        self._update(write)

    def remove_nodes_after(self, iteration: int) -> None:
        """Remove the nodes after `iteration`, to record them again from a training state saved there."""
        kept = tuple(node for node in self.nodes if node.iteration <= iteration)
        complete = self.complete and iteration >= self.manifest.iterations
        if (kept, complete) != (self.nodes, self.complete):
            self.update_manifest(nodes=kept, complete=complete)
            self.remove_leftovers()

    def remove_leftovers(self) -> None:
        """Remove training states before the last node, and what a crash left before the manifest listed it."""
        if not self.complete:
            distributed.on_main_process(lambda: self._remove_unlisted(files.training_file(len(self.nodes))))

    def _remove_unlisted(self, *kept: str) -> None:
        listed = {*kept, *(entry.file for entry in self.manifest.entries)}
        for file in list(self.folder.iterdir()):
            if files.is_leftover(file) or (files.is_path_file(file.name) and file.name not in listed):
                file.unlink()

    # -- share ---------------------------------------------------------------------------------------------------------

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
        for entry in self.manifest.entries:
            if entry.sha256:
                files.copy(self.folder / entry.file, save_directory / entry.file)
        self.manifest.write(save_directory)

    def generate_model_card(self, *args: Any, **kwargs: Any) -> ModelCard:
        """Return the model card: teacher, nodes, codec and errors, and how to use the path.

        `args` and `kwargs` are what the hub's mixin passes to a card's template; this template needs none of it.
        """
        return super().generate_model_card(manifest=self.manifest, version=FORMAT)


def _training_metadata(iteration: int, training: Mapping[str, Tensor]) -> str:
    return json.dumps({"iteration": iteration, "checksum": checksum(training)})
