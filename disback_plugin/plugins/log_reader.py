"""What a log (`runlog`) says of the run that was last in it: a file of several processes, read as one history.

A run that was resumed goes on at a moment: what the killed one wrote after that is no part of the history. A new run on
a finished path keeps nothing of the one before but the path's recording.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from disback_plugin.errors import PathError
from disback_plugin.plugins.run_log import RESERVED, SUFFIX, RunLog

__all__ = ["OURS", "Curve", "History", "find", "load", "load_all", "read", "settle"]

Line = Mapping[str, Any]
# A moment of a run: (0, updates recorded) while recording, then (1, generator updates).
Moment = tuple[int, int]
Curve = list[tuple[int, float | None]]

# Numbers that DisBack itself reports; all others are the loop's.
OURS = ("position", "node", "gradient", "swap_ms", "delta_norm", "masked_samples", "agreement")


@dataclass
class History:
    """The lines of a run that count, in the order of its moments.

    Attributes:
        name: Of the run: that of its file, without ".log.jsonl".
        file: The log.
        begun: Lines that say what a process began with: settings, versions, fingerprints; the last is the present one.
        lines: All others, those that say where a run was resumed included.
        torn: Lines of the file that do not read, as the last one of a process that was killed while writing it.
    """

    name: str = ""
    file: Path = Path()
    begun: list[Line] = field(default_factory=list)
    lines: list[Line] = field(default_factory=list)
    torn: int = 0

    @property
    def updates(self) -> int:
        """Generator updates that the log knows of."""
        return max((line["update"] for line in self.lines), default=0)

    @property
    def recorded(self) -> int:
        """Updates of s_phi that were recorded, as far as the log knows."""
        return max((line.get("recording", 0) for line in self.lines), default=0)

    def curves(self, *, recording: bool = False) -> dict[str, Curve]:
        """Return every number over generator updates, by name; or, while recording, over updates of s_phi.

        Of two at one moment the later counts. None stands for what was not finite.
        """
        found: dict[str, dict[int, float | None]] = {}
        for line in self.lines:
            if ("recording" in line) == recording:
                for name, value in _numbers(line):
                    found.setdefault(name, {})[_moment(line)[1]] = value
        return {name: sorted(points.items()) for name, points in found.items()}

    def pictures(self) -> dict[str, list[tuple[int, Path]]]:
        """Return the pictures by name, with the generator updates of each."""
        found: dict[str, dict[int, Path]] = {}
        for line in self.lines:
            for name, value in line.items():
                if name not in RESERVED and isinstance(value, str):
                    found.setdefault(name, {})[line["update"]] = self.file.parent / value
        return {name: sorted(points.items()) for name, points in found.items()}

    def nodes(self) -> list[Mapping[str, Any]]:
        """Return what was recorded, node by node."""
        by_index = {line["recorded"]["index"]: line["recorded"] for line in self.lines if "recorded" in line}
        return [by_index[index] for index in sorted(by_index)]

    def completed(self) -> Mapping[str, Any] | None:
        """Return how the recording ended, if it did: "iterations", "fitted" and "ended"."""
        return next((line["completed"] for line in reversed(self.lines) if "completed" in line), None)


def settle(lines: Iterable[Line]) -> History:
    """Return the history of the last run among the lines of a log.

    Example:
        >>> begin = {"update": 0, "begin": "attach", "resumed": False}
        >>> killed = [begin, {"update": 10, "loss": 3.0}, {"update": 30, "loss": 2.0}]
        >>> resumed = [begin, {"update": 20, "resume": True}, {"update": 40, "loss": 1.0}]
        >>> settle([*killed, *resumed]).curves()
        {'loss': [(10, 3.0), (40, 1.0)]}
    """
    past: list[History] = []
    now = History()
    for line in lines:
        if "begin" in line:
            past.append(now)
            same = [history for history in past if _same_path(history, line)]
            now = _resumed(same or past, line) if line.get("resumed") else _begun(now, line)
            now.begun.append(line)
        elif "resume" in line:
            began = now.begun[-1:]
            known = [history for history in past if not began or _same_path(history, began[0])]
            if not began or any(_moment(each) > _moment(began[0]) for each in now.lines):
                known.append(now)  # else it has only just been attached, and loads a state
            past.append(now)
            now = _resumed(known or [now], line)
            now.begun += [begin for begin in began if not any(begin is other for other in now.begun)]
            now.lines.append(line)
        else:
            now.lines.append(line)
    now.lines = sorted(now.lines, key=_moment)  # stable: of one moment the last stays the last
    return now


def read(file: Path) -> History:
    """Return the history in a log.

    Raises:
        PathError: If there is no such file, or no line of it is one of a log.
    """
    try:
        texts = file.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise PathError(
            f"{file}, which does not read ({error.strerror})",
            expected="the log of a run",
            cure="name the run's *.log.jsonl, its path, or a folder of logs",
        ) from error
    lines = [_parsed(text) for text in texts if text.strip()]
    found = [line for line in lines if line is not None]
    if not found:
        raise PathError(f"no line of a log in {file}", expected="JSON lines with an update", cure="name a *.log.jsonl")
    history = settle(found)
    history.name, history.file, history.torn = file.name.removesuffix(SUFFIX), file, len(lines) - len(found)
    return history


def load(run: Path) -> list[History]:
    """Return the histories that a run's name stands for (`find`); of a folder the one that began first comes first.

    Raises:
        PathError: If there is none, or one does not read.
    """
    histories = [read(file) for file in find(run)]
    return sorted(histories, key=lambda history: str(history.begun[0].get("time", "")) if history.begun else "")


def load_all(runs: Iterable[Path]) -> list[History]:
    """Return the histories that several names stand for (`load`), each once, and by names that tell them apart.

    Raises:
        PathError: If a name stands for none, or one does not read.
    """
    found = list({history.file.absolute(): history for run in runs for history in load(run)}.values())
    for name in {history.name for history in found}:
        same = [history for history in found if history.name == name]
        folders = [history.file.absolute().parent.parts[::-1] for history in same]
        apart = next(n for n in count() if len({folder[:n] for folder in folders}) == len({*folders}))
        for history, folder in zip(same, folders, strict=True):
            history.name = "/".join((*folder[:apart][::-1], name))
    return found


def find(run: Path) -> list[Path]:
    """Return the logs that a run's name stands for: a file, that of a path, or all in a folder.

    A path's log lies beside it under its name, or under another (`attach(log=)`) and says whose it is.

    Raises:
        PathError: If there is none.
    """
    beside = RunLog.beside(run).file
    if run.is_file():
        return [run]
    if beside.is_file():
        return [beside]
    above = run.absolute().parent
    inside = sorted(run.glob(f"*{SUFFIX}")) or [file for file in sorted(above.glob(f"*{SUFFIX}")) if _is_of(run, file)]
    if not run.is_dir() or not inside:
        raise PathError(
            f"no log of a run at {run}",
            expected=f"a file *{SUFFIX}, a path with one beside it, or a folder with some in it",
            cure="name one: `attach` and `record` write it beside the path, and `disback demo` into its --out",
        )
    return inside


def _is_of(path: Path, file: Path) -> bool:
    """Whether the last run in a log beside a path is on that path."""
    try:
        begun = read(file).begun
    except PathError:
        return False
    return bool(begun) and Path(str(begun[-1].get("folder"))).name == path.absolute().name


# -- one line -------------------------------------------------------------------------------------------------------


def _parsed(text: str) -> Line | None:
    try:
        line = json.loads(text)
    except ValueError:
        return None
    whole = isinstance(line, dict) and all(_is_count(line.get(key, 0)) for key in ("update", "recording"))
    return line if whole and "update" in line else None


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _numbers(line: Line) -> Iterator[tuple[str, float | None]]:
    for name, value in line.items():
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if name not in RESERVED and (value is None or number):
            yield name, value


def _moment(line: Line) -> Moment:
    return (0, line["recording"]) if "recording" in line else (1, line["update"])


# -- runs that follow each other --------------------------------------------------------------------------------------


def _same_path(history: History, line: Line) -> bool:
    return bool(history.begun) and history.begun[-1].get("path") == line.get("path")


def _begun(before: History, line: Line) -> History:
    """Return the beginning of a new run; on a finished path it keeps that one's recording."""
    if "recording" in line or not _same_path(before, line):
        return History()
    recorded = [known for known in before.lines if "recording" in known]
    return History(begun=[b for b in before.begun if "recording" in b], lines=recorded)


def _resumed(past: list[History], line: Line) -> History:
    """Return what a resumed run goes on from: the last one that got as far as this moment."""
    moment = _moment(line)
    reached = [history for history in past if any(_moment(known) >= moment for known in history.lines)]
    before = (reached or past or [History()])[-1]
    return History(begun=list(before.begun), lines=[known for known in before.lines if _moment(known) <= moment])
