"""Read a run's log (`run_log`): the lines of several processes, killed and resumed, as the history of one run.

Where a run was resumed, the lines that the killed process wrote after that moment do not count. A new run on a finished
path keeps only the recording of the run before.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from disback_plugin.errors import PathError
from disback_plugin.plugins.run_log import RESERVED, SUFFIX, RunLog

Line = Mapping[str, Any]
# (updates, value); None stands for a value that was not finite.
Curve = list[tuple[int, float | None]]


@dataclass
class History:
    """One run, in the order of its updates.

    Attributes:
        name: Name of the run: that of its file without ".log.jsonl".
        file: The log.
        begun: Lines with which a process began: settings, versions, fingerprints. The last is the latest process's.
        lines: All other lines.
        torn: Number of lines that cannot be parsed, as a process leaves one when it is killed while it writes.
    """

    name: str = ""
    file: Path = Path()
    begun: list[Line] = field(default_factory=list)
    lines: list[Line] = field(default_factory=list)
    torn: int = 0

    @property
    def updates(self) -> int:
        """Generator updates so far."""
        return max((line["update"] for line in self.lines), default=0)

    @property
    def recorded(self) -> int:
        """Recording iterations so far."""
        return max((line.get("recording", 0) for line in self.lines), default=0)

    def curves(self, *, recording: bool = False) -> dict[str, Curve]:
        """Return every number by name, over generator updates; with `recording`, over recording iterations.

        Of two values at one update the later counts.
        """
        found: dict[str, dict[int, float | None]] = {}
        for line in self.lines:
            shown = ("recording" in line) == recording and not _is_end(line)
            for name, value in line.items() if shown else ():
                if name not in RESERVED and (value is None or type(value) in (int, float)):
                    found.setdefault(name, {})[_moment(line)[1]] = value
        return {name: sorted(points.items()) for name, points in found.items()}

    @property
    def detached(self) -> int | None:
        """Generator updates at which the run was detached while backtracking; None if it was not, or went on."""
        moves = [line for line in self.lines if "position" in line]
        return moves[-1]["update"] if moves and _is_end(moves[-1]) else None

    def pictures(self) -> dict[str, list[tuple[int, Path]]]:
        """Return the files of the pictures by name, with the generator updates of each."""
        found: dict[str, dict[int, Path]] = {}
        for line in self.lines:
            for name, value in line.items():
                if name not in RESERVED and isinstance(value, str):
                    found.setdefault(name, {})[line["update"]] = self.file.parent / value
        return {name: sorted(points.items()) for name, points in found.items()}

    def nodes(self) -> list[Mapping[str, Any]]:
        """Return the recorded nodes in order, as the manifest describes them."""
        by_index = {line["recorded"]["index"]: line["recorded"] for line in self.lines if "recorded" in line}
        return [by_index[index] for index in sorted(by_index)]

    def completed(self) -> Mapping[str, Any] | None:
        """Return "iterations", "fitted" and "ended" of the finished recording; None before that."""
        return next((line["completed"] for line in reversed(self.lines) if "completed" in line), None)


def last_run(lines: Iterable[Line]) -> History:
    """Return the history of the last run among the lines of a log.

    Example:
        >>> begin = {"update": 0, "begin": "attach", "resumed": False}
        >>> killed = [begin, {"update": 10, "loss": 3.0}, {"update": 30, "loss": 2.0}]
        >>> resumed = [begin, {"update": 20, "resume": True}, {"update": 40, "loss": 1.0}]
        >>> last_run([*killed, *resumed]).curves()
        {'loss': [(10, 3.0), (40, 1.0)]}
    """
    # The lines that count, as they were after each process; the last list grows.
    runs: list[list[Line]] = [[]]
    for line in lines:
        if "begin" not in line and "resume" not in line:
            runs[-1].append(line)
            continue
        begin = line if "begin" in line else _last_begin(runs[-1])
        on_path = [run for run in runs if _last_begin(run).get("path") == begin.get("path")]
        if "begin" not in line:
            # A process that has only just attached has no past of its own; the state is of an earlier process.
            if len(on_path) > 1 and _end(runs[-1]) <= _moment(begin):
                on_path.pop()
            kept = _until(_moment(line), on_path)
            runs.append([*kept, *([begin] if begin and begin not in kept else []), line])
        elif line.get("resumed"):
            runs.append([*_until(_moment(line), on_path or runs), line])
        else:
            again = "recording" not in line and _last_begin(runs[-1]).get("path") == line.get("path")
            runs.append([*(known for known in runs[-1] if again and "recording" in known), line])
    begun = [line for line in runs[-1] if "begin" in line]
    others = [line for line in runs[-1] if "begin" not in line]
    return History(begun=begun, lines=sorted(others, key=_moment))  # stable: of one moment the last stays the last


def _is_end(line: Line) -> bool:
    """Return whether a line was written as detaching restored the teacher, which is no part of the run's course."""
    return "detached" in line and "position" in line


def _last_begin(run: Sequence[Line]) -> Line:
    return next((line for line in reversed(run) if "begin" in line), {})


def _until(moment: tuple[int, int], runs: Sequence[list[Line]]) -> list[Line]:
    """Return the lines, up to a moment, of the last run that got as far."""
    run = next((run for run in reversed(runs) if _end(run) >= moment), runs[-1])
    return [line for line in run if _moment(line) <= moment]


def _end(run: Sequence[Line]) -> tuple[int, int]:
    return max((_moment(line) for line in run if "begin" not in line), default=(-1, 0))


def _moment(line: Line) -> tuple[int, int]:
    """Return (0, recording iterations) while recording, then (1, generator updates)."""
    return (0, line["recording"]) if "recording" in line else (1, line.get("update", 0))


# -- files ------------------------------------------------------------------------------------------------------------


def read(file: Path) -> History:
    """Return the history in a log.

    Raises:
        PathError: If there is no such file, or it has no line of a log.
    """
    try:
        texts = file.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise _no_log(f"{file}, which cannot be read ({error.strerror})") from error
    parsed = [_parsed(text) for text in texts if text.strip()]
    lines = [line for line in parsed if line is not None]
    if not lines:
        raise _no_log(f"no line of a log in {file}")
    history = last_run(lines)
    history.name, history.file, history.torn = file.name.removesuffix(SUFFIX), file, len(parsed) - len(lines)
    return history


def load_all(runs: Iterable[Path]) -> list[History]:
    """Return the histories that several names stand for (`find`), each once, with names that tell them apart.

    Of a folder the run that began first comes first.

    Raises:
        PathError: If a name stands for none, or a log cannot be read.
    """
    found: dict[Path, History] = {}
    for run in runs:
        histories = [read(file) for file in find(run)]
        for history in sorted(histories, key=lambda each: str(each.begun[0].get("time", "")) if each.begun else ""):
            found[history.file.absolute()] = history
    for file, history in found.items():
        folders = [other.parent for other in found if other.name == file.name]
        if len(folders) > 1:
            history.name = (file.parent.relative_to(os.path.commonpath(folders)) / history.name).as_posix()
    return list(found.values())


def find(run: Path) -> list[Path]:
    """Return the logs that a run's name stands for: a log, the log beside a path, or all logs in a folder.

    Raises:
        PathError: If there is none.
    """
    if os.path.isfile(run):  # no error of a name that is too long
        return [run]
    beside = RunLog.beside(run).file
    if os.path.isfile(beside):
        return [beside]
    inside = sorted(run.glob(f"*{SUFFIX}")) if os.path.isdir(run) else []
    if not inside:
        raise _no_log(f"no log of a run at {run}")
    return inside


def _no_log(found: str) -> PathError:
    return PathError(
        found,
        expected=f"a file *{SUFFIX} of JSON lines, a path with one beside it, or a folder with some in it",
        cure="name one: `attach` and `record` write it beside the path, and `disback demo` into its --out",
    )


def _parsed(text: str) -> Line | None:
    with suppress(ValueError):
        line = json.loads(text)
        counts = [line.get("update"), line.get("recording", 0)] if isinstance(line, dict) else [None]
        if all(type(count) is int and count >= 0 for count in counts):
            return line  # type: ignore[no-any-return]
    return None
