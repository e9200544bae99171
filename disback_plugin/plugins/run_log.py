"""The log of a run: a file of JSON lines, beside the path as "PATH.log.jsonl", that people and `disback report` read.

    {"time": ..., "update": 0, "begin": "attach", "path": ..., "settings": {...}, "versions": {...}, ...}
    {"time": ..., "update": 0, "recording": 5, "agreement": 0.93}
    {"time": ..., "update": 0, "recording": 50, "recorded": {"index": 1, "bytes": ..., "weight_error": ...}}
    {"time": ..., "update": 12, "position": 1.4, "node": 2, "gradient": 0.7, "swap_ms": 0.8, "delta_norm": 0.1}
    {"time": ..., "update": 20, "loss": 0.3, "distance": 4.2}          what the loop logs itself
    {"time": ..., "update": 20, "samples": "samples/020.png"}          a picture, relative to the log

`update` counts the generator's, and is 0 while recording, where `recording` counts those of s_phi. Lines are only ever
added: a run that is resumed from update 50 says so, and what a killed one had written after its update 50 counts for
nothing (`histories`). A number that is not finite is null. Nothing here imports torch, or waits for a device.
"""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from disback_plugin.errors import OptionError
from disback_plugin.plugins.hookspecs import hookimpl
from disback_plugin.plugins.installed import environment

if TYPE_CHECKING:
    from disback_plugin.path.degradation_path import DegradationPath
    from disback_plugin.path.manifest import Node

__all__ = ["NAME", "RESERVED", "SUFFIX", "RunLog", "numbers_and_pictures"]

logger = logging.getLogger(__name__)

SUFFIX = ".log.jsonl"
# Under which it takes part in a run; "no:run_log" leaves it out.
NAME = "run_log"
# Keys that say what kind of line one is, and when.
RESERVED = frozenset(("time", "update", "recording", "begin", "resume", "recorded", "completed"))


class RunLog:
    """Writes the log of one run. `attach` and `record` have one by themselves; this is for loops that have neither.

    It is a plug-in too: `TrajectoryScheduler(..., plugins=(log,))`. Where a line cannot be written, as on a full disk,
    a warning says so, once, and the run goes on without a log.

    Args:
        file: Where to; lines are added to what is there.

    Example:
        >>> import tempfile
        >>> log = RunLog(Path(tempfile.mkdtemp()) / "baseline.log.jsonl")
        >>> log.begin("baseline", settings={"learning rate": 1e-3})
        >>> log.log({"distance": 4.2}, update=20)
        >>> [sorted(json.loads(line)) for line in log.file.read_text().splitlines()][-1]
        ['distance', 'time', 'update']
    """

    def __init__(self, file: str | os.PathLike[str]) -> None:
        self.file = Path(file)
        self._waiting: list[dict[str, Any]] | None = []
        self._broken = False

    @classmethod
    def beside(cls, path: str | os.PathLike[str]) -> RunLog:
        """Return the log of the path in a folder.

        Example:
            >>> RunLog.beside("runs/path").file.as_posix()
            'runs/path.log.jsonl'
        """
        folder = Path(path) if Path(path).name else Path(path).absolute()  # as of "."
        return cls(folder.parent / f"{folder.name}{SUFFIX}")

    def begin(
        self, kind: str, *, update: int = 0, recording: int | None = None, resumed: bool = False, **about: Any
    ) -> None:
        """Write what a run is, and then what was logged before; until then every line waits, so that a run that is
        refused leaves nothing behind.

        Args:
            kind: What began: "attach", "record", or a name of your own.
            update: Generator updates so far.
            recording: Recorded updates of s_phi so far, while recording.
            resumed: Whether it goes on from a run that this file knows: then lines after this moment count no more.
            about: Whatever else describes the run, as plain values; versions are added.
        """
        waiting, self._waiting = self._waiting or [], None
        where = {"update": update} if recording is None else {"update": update, "recording": recording}
        self._write(
            [where | {"begin": kind, "resumed": resumed} | about | {"versions": environment()}, *waiting], anew=True
        )

    def resume(self, *, update: int, recording: int | None = None) -> None:
        """Note that the run goes on from here, whatever was written after this moment.

        Args:
            update: Generator updates of the moment.
            recording: Recorded updates of s_phi, while recording.
        """
        self._write([{"update": update, "resume": True} | ({} if recording is None else {"recording": recording})])

    def log(self, values: Mapping[str, Any], update: int, *, recording: int | None = None) -> None:
        """Write numbers, and the paths of pictures, under the present update.

        Args:
            values: By name: plain numbers, tensors of one element, and `Path` objects of PNG files.
            update: Generator updates so far.
            recording: Recorded updates of s_phi, while recording.

        Raises:
            OptionError: If a name is taken, or a value is something else.
        """
        numbers, pictures = numbers_and_pictures(values)
        line: dict[str, Any] = {"update": update} | ({} if recording is None else {"recording": recording})
        line |= {name: value if math.isfinite(value) else None for name, value in numbers.items()}
        self._write([line | {name: self._relative(picture) for name, picture in pictures.items()}])

    # -- what a run tells a plug-in -----------------------------------------------------------------------------------

    @hookimpl
    def disback_log(self, values: Mapping[str, float], step: int) -> None:
        """Write the `values` of a run at `step` generator updates, without their "disback/"."""
        plain = {name.removeprefix("disback/"): value for name, value in values.items()}
        recording = plain.pop("recording", None)
        self.log(plain, step, recording=None if recording is None else int(recording))

    @hookimpl
    def disback_after_node_recorded(self, path: DegradationPath, node: Node) -> None:
        """Write what a `node` of the `path` is."""
        self._write(
            [
                {
                    "update": 0,
                    "recording": node.iteration,
                    "recorded": {k: v for k, v in vars(node).items() if k != "extra"},
                }
            ]
        )

    @hookimpl
    def disback_after_path_completed(self, path: DegradationPath) -> None:
        """Write how the recording of the `path` ended."""
        manifest = path.manifest
        ended = {"iterations": manifest.iterations, "fitted": manifest.fitted, "ended": manifest.ended}
        self._write([{"update": 0, "recording": manifest.iterations, "completed": ended}])

    # -- inside -------------------------------------------------------------------------------------------------------

    def _torn(self) -> bool:
        """Whether the file ends within a line."""
        size = self.file.stat().st_size
        if not size:  # or a device
            return False
        with self.file.open("rb") as file:
            file.seek(size - 1)
            return file.read(1) != b"\n"

    def _relative(self, picture: Path) -> str:
        folder, picture = self.file.parent.absolute(), picture.absolute()
        return (picture.relative_to(folder) if picture.is_relative_to(folder) else picture).as_posix()

    def _write(self, lines: list[dict[str, Any]], *, anew: bool = False) -> None:
        """Add lines, or let them wait. The file is open only meanwhile: nothing is lost, and nothing to be closed."""
        now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        lines = [{"time": now} | line for line in lines]
        if self._waiting is not None:
            self._waiting += lines
        elif not self._broken:
            text = "".join(f"{json.dumps(line, default=str)}\n" for line in lines)
            try:
                self.file.parent.mkdir(parents=True, exist_ok=True)
                with self.file.open("a", encoding="utf-8") as file:
                    # A run that was killed within a line must not swallow the first of this one.
                    file.write("\n" + text if anew and self._torn() else text)
            except OSError as error:
                self._broken = True
                logger.warning("the run goes on without its log: %s cannot be written (%s)", self.file, error)


def numbers_and_pictures(values: Mapping[str, Any]) -> tuple[dict[str, float], dict[str, Path]]:
    """Return numbers as floats, and the paths of pictures, apart.

    Raises:
        OptionError: If a name is taken, or a value is something else.

    Example:
        >>> numbers_and_pictures({"loss": 1, "samples": Path("samples.png")})
        ({'loss': 1.0}, {'samples': PosixPath('samples.png')})
    """
    pictures = {name: value for name, value in values.items() if isinstance(value, Path)}
    numbers = {}
    for name, value in values.items():
        if not isinstance(name, str) or not name or name in RESERVED:
            raise OptionError(f"the name {name!r}", expected=f"none of {', '.join(sorted(RESERVED))}", cure="rename it")
        if name in pictures:
            continue
        try:
            numbers[name] = float(value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise OptionError(
                f"{name}={value!r:.60}, a {type(value).__name__}, to be logged",
                expected="a number, a tensor of one element, or the pathlib.Path of a PNG file",
                cure="log a mean of it, or save it as a picture",
            ) from error
    return numbers, pictures
