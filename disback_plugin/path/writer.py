"""What is added to a path's folder: each function writes a file whole, then the manifest that lists it.

Only one process runs them (`ranks.on_rank_zero`); the manifest that they write is read again by who asked for it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from disback_plugin.errors import OptionError, PathError, TrainingError
from disback_plugin.path import files
from disback_plugin.path.encoding import encode
from disback_plugin.path.manifest import CONFIG, Manifest, Node, Recording, Teacher, is_ours, node_file, training_file
from disback_plugin.path.model_card import card
from disback_plugin.path.probes import Probe
from disback_plugin.path.store import Storage
from disback_plugin.weights.checksum import checksum, fingerprint
from disback_plugin.weights.full_state import FullState

__all__ = ["add_node", "add_node_0", "begin", "check_due", "finish", "read_training", "remove_unlisted"]


def begin(root: Path, state: FullState, recording: Recording, generator: str | None, teacher_id: str | None) -> None:
    """Write a manifest and node 0 into a folder, which is made; what was made is taken away again if that fails.

    Raises:
        PathError: If the folder cannot be written.
        TrainingError: If the teacher holds a NaN.
    """
    for name in state.own():
        if state.layout[name].dtype.is_floating_point and state[name].isnan().any():
            raise TrainingError(f"NaN in {name} of the teacher", expected="numbers", cure="load it again")
    new = [parent for parent in (root, *root.parents) if not parent.exists()]
    node_0 = Teacher(fingerprint(state), checksum(state), teacher_id)
    manifest = Manifest(node_0, recording, generator)
    try:
        root.mkdir(parents=True, exist_ok=True)
        # Claimed before the first big write: a crash in between leaves a folder that is known to be ours.
        manifest.write(root)
        if manifest.teacher_missing:
            add_node_0(Storage(root), manifest, state)
    except (OSError, PathError) as error:
        for name in (CONFIG, node_0.file):
            (root / name).unlink(missing_ok=True) if root.is_dir() else None
        for parent in new:
            parent.rmdir() if parent.is_dir() else None
        raise PathError(
            f"a folder that cannot be written, {root} ({error})",
            expected="room and rights",
            cure="pass another path=",
        ) from error


def add_node_0(storage: Storage, manifest: Manifest, state: FullState) -> None:
    """Write the teacher."""
    overlapping, keep = state.overlapping(), _keep(state, storage.folder)
    tensors: dict[str, Tensor] = {}
    for name in state.own():
        tensor = keep(state[name].cpu().contiguous())
        tensors[name] = tensor.clone() if name in overlapping else tensor
    file = storage.folder / manifest.teacher.file
    entry = files.write_tensors(file, tensors, about=json.dumps(state.aliases, sort_keys=True))
    storage.trust(node_0 := replace(manifest.teacher, **entry))
    replace(manifest, teacher=node_0).write(storage.folder)


def check_due(manifest: Manifest, iteration: int) -> None:
    """Raise OptionError unless a node is due at this iteration."""
    index = len(manifest.nodes) + 1
    planned = Node(index, iteration, node_file(index), "", 0, 1.0, "exact", "", "", 0.0, None)
    if fault := replace(manifest, nodes=(*manifest.nodes, planned)).fault():
        raise OptionError(
            f"{fault} in append(iteration={iteration})",
            expected=f"the next iteration of {manifest.recording}",
            cure="append nodes when they are due",
        )


def add_node(
    storage: Storage,
    manifest: Manifest,
    state: FullState,
    iteration: int,
    *,
    probe: Probe | None,
    exactly: Collection[str],
    training: Mapping[str, Tensor] | None,
) -> None:
    """Write the next node, and what its recording needs to go on; the arguments are those of `DegradationPath.append`.

    Raises:
        TrainingError: If the weights are not finite, or equal the previous node's bit for bit.
    """
    previous, index = storage.node(manifest, len(manifest.nodes)), len(manifest.nodes) + 1
    codec, keep = manifest.recording.codec, _keep(state, storage.folder)
    made = encode(codec, state, previous, probe, exactly=exactly, keep=keep)
    file = storage.folder / node_file(index)
    entry = files.write_tensors(file, made.delta.parts, about=made.delta.metadata())
    node = Node(index, iteration, **entry, **made.measured())
    storage.trust(node)
    if training is not None:
        about = json.dumps({"iteration": iteration, "checksum": checksum(training)})
        files.write_tensors(storage.folder / training_file(index), training, about=about)
    replace(manifest, nodes=(*manifest.nodes, node)).write(storage.folder)


def read_training(folder: Path, manifest: Manifest) -> dict[str, Tensor] | None:
    """Return what was written as `training` beside the last node; None if nothing.

    Raises:
        PathError: If it was changed since.
    """
    file = folder / training_file(len(manifest.nodes))
    if not file.exists():
        return None
    tensors, about = files.map_tensors(file, size=file.stat().st_size)
    wanted = {"iteration": manifest.nodes[-1].iteration if manifest.nodes else 0, "checksum": checksum(tensors)}
    if about != json.dumps(wanted):
        raise PathError(
            f"{file} that is not as it was written",
            expected="the state of the recording at the last node",
            cure="delete it: the recording then goes on from the last node, with fresh optimizer state",
        )
    return tensors


def finish(folder: Path, manifest: Manifest) -> None:
    """Write the model card, and the recording down as complete."""
    # The state goes first: a path that is complete holds nothing else.
    remove_unlisted(folder, manifest, keep_training=False)
    files.write_text(folder / "README.md", card(manifest))
    replace(manifest, complete=True).write(folder)


def remove_unlisted(folder: Path, manifest: Manifest, *, keep_training: bool = True) -> None:
    """Remove what is older than the last node, or was left behind by a crash before the manifest listed it."""
    listed = {entry.file for entry in manifest.entries}
    if keep_training:
        listed.add(training_file(len(manifest.nodes)))
    for entry in list(folder.iterdir()):
        if files.is_leftover(entry.name) or (is_ours(entry.name) and entry.name not in listed):
            entry.unlink()


def _keep(state: FullState, folder: Path) -> Callable[[Tensor], Tensor]:
    """Return how tensors made of a state are kept until a file is written: those of a network that no process holds as
    a whole may not fit into memory.
    """
    return (lambda tensor: files.spool(tensor, folder)) if state.sharded else (lambda tensor: tensor)
