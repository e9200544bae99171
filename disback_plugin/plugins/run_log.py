"""The log of a run: a file of JSON lines, beside the path as "PATH.log.jsonl".

    {"time": ..., "update": 0, "begin": "attach", "path": ..., "settings": {...}, "versions": {...}, ...}
    {"time": ..., "update": 0, "recording": 5, "agreement": 0.93}
    {"time": ..., "update": 0, "recording": 50, "recorded": {"index": 1, "bytes": ..., "weight_error": ...}}
    {"time": ..., "update": 12, "position": 1.4, "node": 2, "gradient": 0.7, "swap_ms": 0.8, "delta_norm": 0.1}
    {"time": ..., "update": 20, "loss": 0.3, "distance": 4.2}          numbers that the loop logs
    {"time": ..., "update": 20, "samples": "samples/020.png"}          a picture, relative to the log

`update` counts generator updates, and is 0 while recording, where `recording` counts recording iterations. Lines are
only appended: a run that is resumed at update 50 writes so, and readers ignore what the killed process wrote after
update 50 (`log_reader`). A number that is not finite is null. Nothing here imports torch or waits for a device.
"""

from __future__ import annotations

import json
import logging
import math
import os
import platform
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from disback_plugin.errors import OptionError
from disback_plugin.plugins.hookspecs import hookimpl

if TYPE_CHECKING:
    from disback_plugin.path.degradation_path import DegradationPath
    from disback_plugin.path.manifest import Node

logger = logging.getLogger(__name__)

SUFFIX = ".log.jsonl"
# The run log's name as a plug-in: "no:run_log" blocks it.
NAME = "run_log"
# Keys that say which kind of line it is, and when it was written.
RESERVED = frozenset(("time", "update", "recording", "begin", "resume", "recorded", "completed"))


class RunLog:
    """A plug-in that writes the log of one run. `attach` and `record` add one themselves.

    `TrajectoryScheduler(..., plugins=(log,))`, and a baseline without DisBack, use one explicitly. If a line cannot be
    written, as on a full disk, one warning says so and the run continues without a log.

    Args:
        file: The file to append to.

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
        folder = Path(path) if Path(path).name else Path(path).absolute()  # "." has no name
        return cls(folder.parent / f"{folder.name}{SUFFIX}")

    def begin(
        self, kind: str, *, update: int = 0, recording: int | None = None, resumed: bool = False, **about: Any
    ) -> None:
        """Write what kind of run begins, then the lines logged so far; they wait until then, so that a refused run
        leaves no file.

        Args:
            kind: "attach", "record", or a name of your own.
            update: Generator updates so far.
            recording: Recording iterations so far, while recording.
            resumed: Whether the run continues a run of this file; readers then ignore that run's lines after `update`.
            about: Plain values that describe the run; the versions of packages are added.
        """
        waiting, self._waiting = self._waiting or [], None
        first = {"begin": kind, "resumed": resumed, **about, "versions": versions()}
        self._write(_moment(update, recording) | first, *waiting)

    def resume(self, *, update: int, recording: int | None = None) -> None:
        """Write that the run continues from an earlier moment; readers then ignore the lines after it.

        Args:
            update: Generator updates at that moment.
            recording: Recording iterations at that moment, while recording.
        """
        self._write(_moment(update, recording) | {"resume": True})

    def log(self, values: Mapping[str, Any], update: int, *, recording: int | None = None) -> None:
        """Write numbers and the paths of pictures.

        Args:
            values: By name: plain numbers, tensors of one element, and `Path` objects of PNG files.
            update: Generator updates so far.
            recording: Recording iterations so far, while recording.

        Raises:
            OptionError: If a name is reserved, or a value is of another kind.
        """
        line = {name: self._plain(value) for name, value in valid_values(values).items()}
        self._write(_moment(update, recording) | line)

    @hookimpl
    def disback_log(self, values: Mapping[str, float], step: int) -> None:
        """Write the `values` at `step` generator updates, without the prefix "disback/"."""
        plain = {name.removeprefix("disback/"): value for name, value in values.items()}
        recording = plain.pop("recording", None)
        self.log(plain, step, recording=None if recording is None else int(recording))

    @hookimpl
    def disback_after_node_recorded(self, path: DegradationPath, node: Node) -> None:
        """Write what `path` says of a new `node`."""
        about = {key: value for key, value in vars(node).items() if key != "extra"}
        self._write(_moment(0, node.iteration) | {"recorded": about})

    @hookimpl
    def disback_after_path_completed(self, path: DegradationPath) -> None:
        """Write how the recording of `path` ended."""
        manifest = path.manifest
        ended = {"iterations": manifest.iterations, "fitted": manifest.fitted, "ended": manifest.ended}
        self._write(_moment(0, manifest.iterations) | {"completed": ended})

    def _plain(self, value: float | Path) -> float | str | None:
        """Return a value as JSON holds it: None for a number that is not finite, a picture relative to the log."""
        if not isinstance(value, Path):
            return value if math.isfinite(value) else None
        picture, folder = value.absolute(), self.file.parent.absolute()
        return (picture.relative_to(folder) if picture.is_relative_to(folder) else picture).as_posix()

    def _write(self, *lines: dict[str, Any]) -> None:
        """Append lines; before `begin`, keep them. The file is opened and closed each time, so that none is lost."""
        now = {"time": datetime.now(timezone.utc).isoformat(timespec="milliseconds")}
        if self._waiting is not None:
            self._waiting += [now | line for line in lines]
        elif not self._broken:
            text = "".join(f"{json.dumps(now | line, default=str)}\n" for line in lines)
            try:
                self.file.parent.mkdir(parents=True, exist_ok=True)
                with self.file.open("a", encoding="utf-8") as file:
                    # The process before may have been killed within a line, which must not swallow the first of ours.
                    file.write("\n" + text if "begin" in lines[0] and file.tell() else text)
            except OSError as error:
                self._broken = True
                logger.warning("the run continues without its log: %s cannot be written (%s)", self.file, error)


def valid_values(values: Mapping[str, Any]) -> dict[str, float | Path]:
    """Return the numbers among the values as floats, and the paths of pictures as they are.

    Raises:
        OptionError: If a name is reserved, or a value is of another kind.

    Example:
        >>> valid_values({"loss": 1, "samples": Path("samples.png")})
        {'loss': 1.0, 'samples': PosixPath('samples.png')}
    """
    found: dict[str, float | Path] = {}
    for name, value in values.items():
        if not isinstance(name, str) or not name or name in RESERVED:
            raise OptionError(f"the name {name!r}", expected=f"none of {', '.join(sorted(RESERVED))}", cure="rename it")
        try:
            found[name] = value if isinstance(value, Path) else float(value)
        except (TypeError, ValueError, RuntimeError) as error:
            raise OptionError(
                f"{name}={value!r:.60}, a {type(value).__name__}, to be logged",
                expected="a number, a tensor of one element, or the pathlib.Path of a PNG file",
                cure="log a mean of it, or save it as a picture",
            ) from error
    return found


def versions() -> dict[str, str]:
    """Return the versions that a bug report needs, by distribution; nothing is imported.

    Example:
        >>> list(versions())[:4]
        ['python', 'platform', 'disback-plugin', 'torch']
    """
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for name in ("disback-plugin", "torch", "diffusers", "accelerate", "timm", "peft", "pluggy"):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def _moment(update: int, recording: int | None) -> dict[str, Any]:
    return {"update": update} if recording is None else {"update": update, "recording": recording}
