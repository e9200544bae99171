"""Write the report of one run, or of several side by side, as a page of HTML that loads nothing from a network."""

from __future__ import annotations

import base64
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from disback_plugin.plugins.log_reader import History
from disback_plugin.report.figures import DASHES, MEASURED, Panel, compare, panels, svg

__all__ = ["page"]


def page(runs: Sequence[History]) -> str:
    """Return the report of runs as HTML; ratios are to the first run.

    Raises:
        OptionError: If matplotlib is not installed.

    Example:
        >>> from disback_plugin.plugins.log_reader import last_run
        >>> html = page([last_run([{"update": 0, "loss": 2.0}, {"update": 9, "loss": 1.0}])])
        >>> html.startswith("<!doctype html>"), html.count("<figure"), "http" in html
        (True, 1, False)
    """
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    sections: dict[str, list[tuple[Panel, list[str], str]]] = {}
    facts = [_facts(run) for run in runs]
    for i, panel in enumerate(panels(runs)):
        if panel.has_course:
            names = [runs[run].name for run in panel.curves]
            sections.setdefault(panel.section, []).append((panel, names, svg(panel, f"p{i}")))
            continue
        for run, known in enumerate(facts):
            known[panel.title] = panel.single(run)
    times = sorted(str(line["time"])[:16].replace("T", " ") for run in runs for line in run.lines if "time" in line)
    return environment.get_template("page.html.j2").render(
        runs=runs,
        dashes=DASHES,
        dates=f"{times[0]} to {times[-1]} UTC" if times else "",
        facts=facts,
        sentences=[summary(run) for run in runs],
        comparison=compare(runs),
        sections=sections,
        measured=MEASURED,
        pictures=[(run, name, map(_picture, files)) for run in runs for name, files in run.pictures().items()],
        processes=[list(_processes(run)) for run in runs],
        resumes=[[_when(line) for line in run.lines if "resume" in line] for run in runs],
    )


def summary(run: History) -> str:
    """Return in one sentence what happened in a run: what was recorded, and how far the teacher moved back.

    Example:
        >>> from disback_plugin.plugins.log_reader import last_run
        >>> summary(last_run([{"update": 0, "position": 2.0}, {"update": 9, "position": 0.5}]))
        'The teacher moved back from position 2 to position 0.5 by generator update 9.'
    """
    completed, nodes, parts = run.completed(), len(run.nodes()), []
    if completed is not None:
        fit = f"fitted after {completed['fitted']}" if completed.get("fitted") else "not seen to be fitted"
        were = "node was" if nodes == 1 else "nodes were"
        parts.append(f"{nodes} {were} recorded in {completed['iterations']} iterations ({fit})")
    elif run.recorded:
        parts.append(f"the recording came to iteration {run.recorded} and {nodes} node{'s' * (nodes != 1)}")
    moves = [(update, position) for update, position in run.curves().get("position", []) if position is not None]
    if moves and moves[0][1]:
        first, last = moves[0][1], moves[-1][1]
        where = "itself" if last == 0 else f"position {last:g}"
        when = f"generator update {next(update for update, position in moves if position == last)}"
        if run.detached is not None:
            when = f"update {run.detached}, where it was detached"
        parts.append(f"the teacher moved back from position {first:g} to {where} by {when}")
    elif moves and "gradient" in run.curves():
        parts.append(f"the teacher did not move, and the generator's gradient was scaled to update {moves[-1][0]}")
    if not parts or run.updates > (moves[-1][0] if moves else 0):
        parts.append(f"the log ends at generator update {run.updates}")
    text = "; ".join(parts)
    return f"{text[0].upper()}{text[1:]}."


def _facts(run: History) -> dict[str, float | None]:
    nodes, position = run.nodes(), run.curves().get("position")
    node_seconds = run.curves(recording=True).get("node_seconds")
    return {
        "recording iterations": run.recorded or None,
        "s_phi fitted after": (run.completed() or {}).get("fitted"),
        "nodes": len(nodes) or None,
        "bytes of the nodes": sum(node["bytes"] for node in nodes) or None,
        "mean seconds to save a node": node_seconds[-1][1] if node_seconds else None,
        "generator updates": run.updates,
        "position at the end": position[-1][1] if position else None,
        "resumed": sum(bool(begin.get("resumed")) for begin in run.begun) + sum("resume" in line for line in run.lines),
    }


def _picture(at: tuple[int, Path]) -> tuple[int, Path, str]:
    """Return a picture with its content in base64, "" if the file is missing."""
    update, file = at
    return update, file, base64.b64encode(file.read_bytes()).decode() if file.is_file() else ""


def _processes(run: History) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield, for each process of a run, when it began, and the facts that differ from the process before."""
    known: dict[str, str] = {}
    for begin in run.begun:
        facts = dict(_flat({k: v for k, v in begin.items() if k not in ("begin", "update", "recording")}))
        differing = {name: value for name, value in facts.items() if known.get(name) != value}
        yield f"{begin['begin']}, {_when(begin)}" + (": what differs" if known else ""), differing
        known |= facts


def _when(line: Mapping[str, Any]) -> str:
    if "recording" in line:
        return f"after {line['recording']} recording iterations"
    return f"at generator update {line['update']}"


def _flat(values: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, str]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{name}: ")
        elif value is not None:
            yield f"{before}{name}", str(value)
