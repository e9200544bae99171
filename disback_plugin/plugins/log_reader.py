"""Read a run's log (`run_log`): the lines of several processes, killed and resumed, as the history of one run.

Where a run was resumed, the lines that the killed process wrote after that moment do not count. A new run on a finished
path keeps only the recording of the run before.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from disback_plugin.errors import PathError
from disback_plugin.plugins.run_log import RESERVED, SUFFIX, RunLog

__all__ = ["OWN_NUMBERS", "Curve", "History", "find", "last_run", "load_all", "read"]

# Names of the numbers that DisBack logs by itself during backtracking, and the last three while recording (see the hook
# `disback_log`). All other numbers are the loop's.
OWN_NUMBERS = (
    "position",
    "node",
    "gradient",
    "swap_ms",
    "delta_norm",
    "masked_samples",
    "stalled",
    "diverged",
    "agreement",
    "path_bytes",
    "node_seconds",
)

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
            if ("recording" in line) == recording:
                for name, value in _numbers(line):
                    found.setdefault(name, {})[_moment(line)[1]] = value
        return {name: sorted(points.items()) for name, points in found.items()}

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
        if "begin" in line:
            if line.get("resumed"):
                start = _until(line, [run for run in runs if _is_on_path_of(line, run)] or runs)
            elif "recording" not in line and _is_on_path_of(line, runs[-1]):
                start = [known for known in runs[-1] if "recording" in known]
            else:
                start = []
            runs.append([*start, line])
        elif "resume" in line:
            runs.append(_resumed(runs, line))
        else:
            runs[-1].append(line)
    begun = [line for line in runs[-1] if "begin" in line]
    others = [line for line in runs[-1] if "begin" not in line]
    return History(begun=begun, lines=sorted(others, key=_moment))  # stable: of one moment the last stays the last


def _resumed(runs: Sequence[list[Line]], line: Line) -> list[Line]:
    """Return the lines that count when the latest process loads a state."""
    own = next((known for known in reversed(runs[-1]) if "begin" in known), None)
    if own is None:
        return [*_until(line, runs), line]
    candidates = [run for run in runs[:-1] if _is_on_path_of(own, run)]
    # A process that has only just attached has no past of its own; the state is of an earlier process.
    if not candidates or any("begin" not in known and _moment(known) > _moment(own) for known in runs[-1]):
        candidates.append(runs[-1])
    start = _until(line, candidates)
    return [*start, *([] if any(known is own for known in start) else [own]), line]


def _until(line: Line, runs: Sequence[list[Line]]) -> list[Line]:
    """Return the lines, up to the moment of `line`, of the last run that got as far."""
    moment = _moment(line)
    reached = [run for run in runs if any("begin" not in known and _moment(known) >= moment for known in run)]
    return [known for known in (reached or runs)[-1] if _moment(known) <= moment]


def _is_on_path_of(begin: Line, run: Sequence[Line]) -> bool:
    """Return whether the last process of a run has the path of a line that begins a process."""
    last = next((known for known in reversed(run) if "begin" in known), None)
    return last is not None and last.get("path") == begin.get("path")


def _moment(line: Line) -> tuple[int, int]:
    """Return (0, recording iterations) while recording, then (1, generator updates)."""
    return (0, line["recording"]) if "recording" in line else (1, line["update"])


# -- files ------------------------------------------------------------------------------------------------------------


def read(file: Path) -> History:
    """Return the history in a log.

    Raises:
        PathError: If there is no such file, or it has no line of a log.
    """
    try:
        texts = file.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise PathError(
            f"{file}, which cannot be read ({error.strerror})",
            expected="the log of a run",
            cure="name the run's *.log.jsonl, its path, or a folder of logs",
        ) from error
    parsed = [_parsed(text) for text in texts if text.strip()]
    lines = [line for line in parsed if line is not None]
    if not lines:
        raise PathError(f"no line of a log in {file}", expected="JSON lines with an update", cure="name a *.log.jsonl")
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
    for name in {history.name for history in found.values()}:
        same = [history for history in found.values() if history.name == name]
        folders = [history.file.absolute().parent.parts[::-1] for history in same]
        apart = next(n for n in count() if len({folder[:n] for folder in folders}) == len({*folders}))
        for history, folder in zip(same, folders, strict=True):
            history.name = "/".join((*folder[:apart][::-1], name))
    return list(found.values())


def find(run: Path) -> list[Path]:
    """Return the logs that a run's name stands for: a log, the log of a path, or all logs in a folder.

    The log of a path lies beside the path under its name, or under another one (`attach(log=)`) that names the path.

    Raises:
        PathError: If there is none.
    """
    if run.is_file():
        return [run]
    beside = RunLog.beside(run).file
    if beside.is_file():
        return [beside]
    neighbours = sorted(run.absolute().parent.glob(f"*{SUFFIX}"))
    inside = sorted(run.glob(f"*{SUFFIX}")) or [file for file in neighbours if _is_log_of(file, run)]
    if not run.is_dir() or not inside:
        raise PathError(
            f"no log of a run at {run}",
            expected=f"a file *{SUFFIX}, a path with one beside it, or a folder with some in it",
            cure="name one: `attach` and `record` write it beside the path, and `disback demo` into its --out",
        )
    return inside


def _is_log_of(file: Path, path: Path) -> bool:
    try:
        begun = read(file).begun
    except PathError:
        return False
    return bool(begun) and Path(str(begun[-1].get("folder"))).name == path.absolute().name


def _parsed(text: str) -> Line | None:
    try:
        line = json.loads(text)
    except ValueError:
        return None
    counts = isinstance(line, dict) and all(_is_count(line.get(key, 0)) for key in ("update", "recording"))
    return line if counts and "update" in line else None


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _numbers(line: Line) -> Iterator[tuple[str, float | None]]:
    for name, value in line.items():
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if name not in RESERVED and (value is None or number):
            yield name, value
