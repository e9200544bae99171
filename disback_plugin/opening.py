"""The path in a folder: a finished one of this teacher, its own unfinished one, or a new one; else a refusal."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable

from disback_plugin import distributed
from disback_plugin.errors import OptionError, PathError
from disback_plugin.path.degradation_path import DegradationPath
from disback_plugin.path.manifest import Manifest, Recording
from disback_plugin.weights.network import ScoreNetwork

__all__ = ["open_or_create"]

logger = logging.getLogger(__name__)


def open_or_create(
    folder: str | os.PathLike[str],
    teacher: ScoreNetwork,
    recording: Recording,
    *,
    generator: str | None = None,
    check: Callable[[int], None] = lambda nodes: None,
) -> DegradationPath:
    """Return the path in `folder`: a finished one of this teacher, its own unfinished one, or a new one.

    Args:
        folder: A folder that holds a path, is empty, or is missing.
        teacher: The teacher s_theta.
        recording: The plan. A finished path is used whatever its plan was; an unfinished one must have the same.
        generator: Fingerprint of the initial generator, if known.
        check: Called with the index N of the last node, before anything is written; raises if that does not fit.

    Raises:
        PathError: If the folder holds something else, or a path of another teacher, or an unfinished one of
            another plan or another initial generator.
    """
    opened: list[DegradationPath] = []

    def prepare() -> Manifest:
        if DegradationPath.exists(folder):
            opened.append(resume(DegradationPath(folder)))
        else:
            check(recording.nodes)
            opened.append(DegradationPath.create(folder, state, recording, generator=generator))
        return opened[0].manifest

    def resume(path: DegradationPath) -> DegradationPath:
        if path.complete:
            _check_fits(path, recording, check)
        else:
            check(recording.nodes)
        path.verify_teacher(state)
        _check_same_recording(path, recording, generator)
        path.write_teacher(state)
        path.remove_leftovers()
        path.verify()
        # A crash may have come between the last node and the mark that it was the last.
        if not path.complete and len(path) - 1 == path.manifest.last_node:
            path.finish()
        return path

    # One rank looks and acts; the others must not see the folder half way.
    state = teacher.full_state()
    manifest = distributed.on_main_process(prepare, state)
    path = opened[0] if opened else DegradationPath(folder, manifest)

    def look() -> None:
        # The rank that opened it has compared the teacher already, and the others' parts of a sharded one.
        if not opened and not state.sharded:
            path.verify_teacher(state)
        path.source(len(path) - 1)

    # But each rank decodes for itself: all find the files and the same teacher, or all raise.
    distributed.on_every_rank(look, "find the path and the same teacher")
    return path


def _check_fits(path: DegradationPath, recording: Recording, check: Callable[[int], None]) -> None:
    """Raise unless a finished path fits; what a new recording would have made has nothing to do with it."""
    try:
        check(len(path) - 1)
    except OptionError as error:
        raise OptionError(
            f"{error.found}: the finished one in {path.folder}, of {path.manifest.iterations} updates",
            expected=error.expected,
            cure=f"pass another path=, where {recording.iterations} updates would make {recording.nodes} nodes, or a "
            "schedule that fits this one",
        ) from error


def _check_same_recording(path: DegradationPath, recording: Recording, generator: str | None) -> None:
    recorded = path.manifest
    other_student = None not in (generator, recorded.generator) and generator != recorded.generator
    if path.complete:
        if other_student:
            logger.warning("%s was recorded on another initial generator than the one at hand", path.folder)
        if recording not in (recorded.recording, Recording()):  # asked for, and not what is there
            logger.warning("%s is finished, and used as it is: %s, not %s", path.folder, recorded.recording, recording)
        return
    if other_student or recorded.recording != recording:
        raise PathError(
            f"an unfinished recording of {'another initial generator' if other_student else recorded.recording}",
            expected=f"the recording that {path.folder} began, to resume it, not {recording}",
            cure="pass the same generator, record=, every=, codec= and keep_teacher=, or another path=",
        )
