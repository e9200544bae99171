"""A run, or several side by side, as one page of HTML that needs no network: figures, tables, samples and settings."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn
from xml.etree.ElementTree import Element, SubElement, tostring

from tqdm.auto import tqdm

from disback_plugin.plugins.log_reader import History
from disback_plugin.report.panels import MEASURED, Panel, compare, panels
from disback_plugin.report.plots import COLOURS, DASHES, svg

__all__ = ["page"]


def page(runs: Sequence[History]) -> str:
    """Return the report of runs as HTML; ratios are to the first of them.

    Raises:
        OptionError: If matplotlib is not installed.

    Example:
        >>> from disback_plugin.plugins.log_reader import settle
        >>> html = page([settle([{"update": 0, "loss": 2.0}, {"update": 9, "loss": 1.0}])])
        >>> html.startswith("<!doctype html>"), html.count("<figure"), "http" in html
        (True, 1, False)
    """
    html = Element("html", lang="en")
    _head(html, runs)
    body = SubElement(html, "body")
    _say(body, "h1", f"DisBack: {', '.join(run.name for run in runs)}")
    _say(body, "p", _dates(runs), "quiet")
    _legend(body, runs)
    main = SubElement(body, "main")
    _overview(main, runs)
    _comparison(main, runs)
    drawn = panels(runs)
    with tqdm(total=len(drawn), desc="drawing", unit="panel", leave=False, disable=None) as bar:
        _section(main, MEASURED, drawn, bar)
        _samples(main, runs)
        for section in dict.fromkeys(panel.section for panel in drawn if panel.section != MEASURED):
            _section(main, section, drawn, bar)
    _settings(main, runs)
    return f"<!doctype html>\n{tostring(html, 'unicode', method='html')}\n"


# -- elements ---------------------------------------------------------------------------------------------------------


def _say(parent: Element, tag: str, text: str, kind: str = "") -> Element:
    said = SubElement(parent, tag, {"class": kind} if kind else {})
    said.text = text
    return said


def _head(html: Element, runs: Sequence[History]) -> None:
    head = SubElement(html, "head")
    SubElement(head, "meta", charset="utf-8")
    SubElement(head, "meta", name="viewport", content="width=device-width, initial-scale=1")
    SubElement(head, "meta", name="color-scheme", content="light dark")
    SubElement(head, "link", rel="icon", href="data:,")  # or the browser asks for one
    _say(head, "title", f"DisBack: {', '.join(run.name for run in runs)}")
    _say(head, "style", (Path(__file__).parent / "report.css").read_text(encoding="utf-8"))


def _number(parent: Element, tag: str, value: float | None, form: str = ".4g") -> None:
    """Add a cell that shows a number shortly, and holds it in full."""
    cell = SubElement(parent, tag)
    if value is None:
        cell.text = "–"  # noqa: RUF001
        return
    SubElement(cell, "data", value=repr(value)).text = f"{value:,}" if isinstance(value, int) else format(value, form)


def _table(parent: Element, head: Iterable[str], label: str) -> Element:
    """Add a table, which scrolls in its own box if it is too wide, and return its body."""
    box = SubElement(parent, "div", {"class": "wide", "tabindex": "0", "role": "region", "aria-label": label})
    table = SubElement(box, "table")
    row = SubElement(SubElement(table, "thead"), "tr")
    for name in head:
        _say(row, "th", name).set("scope", "col")
    return SubElement(table, "tbody")


# -- sections ---------------------------------------------------------------------------------------------------------


def _dates(runs: Sequence[History]) -> str:
    times = sorted(str(line["time"])[:16].replace("T", " ") for run in runs for line in run.lines if "time" in line)
    return f"{times[0]} to {times[-1]} UTC" if times else ""


def _legend(parent: Element, runs: Sequence[History]) -> None:
    if len(runs) < 2:
        return
    legend = SubElement(parent, "ul", {"class": "legend", "aria-label": "runs"})
    for i, run in enumerate(runs):
        item = SubElement(legend, "li")
        sample = SubElement(item, "svg", {"viewBox": "0 0 36 12", "aria-hidden": "true"})
        stroke = {"stroke": f"var(--run-{i % len(COLOURS)})", "stroke-width": "2.5", "stroke-dasharray": DASHES[i % 6]}
        SubElement(sample, "path", {"d": "M0 6H36", "fill": "none"} | stroke)
        _say(item, "span", run.name)


def _overview(parent: Element, runs: Sequence[History]) -> None:
    _say(parent, "h2", "In short")
    body = _table(parent, ("", *(run.name for run in runs)), "in short")
    facts = [_facts(run) for run in runs]
    for name in facts[0]:
        row = SubElement(body, "tr")
        _say(row, "th", name).set("scope", "row")
        for known in facts:
            _number(row, "td", known[name])
    if any(run.torn for run in runs):
        lines = sum(run.torn for run in runs)
        _say(
            parent,
            "p",
            f"{lines} lines of the logs do not read, as a process leaves one that is killed in it.",
            "quiet",
        )


def _facts(run: History) -> dict[str, float | None]:
    nodes, position = run.nodes(), run.curves().get("position")
    begun_again = [begin for begin in run.begun if begin.get("resumed")]
    return {
        "recorded updates of s_phi": run.recorded or None,
        "s_phi fitted after": (run.completed() or {}).get("fitted"),
        "nodes": len(nodes) or None,
        "bytes of the nodes": sum(node["bytes"] for node in nodes) or None,
        "generator updates": run.updates,
        "position at the end": position[-1][1] if position else None,
        "resumed": len(begun_again) + sum("resume" in line for line in run.lines),
    }


def _comparison(parent: Element, runs: Sequence[History]) -> None:
    rows = compare(runs)
    if not rows:
        return
    _say(parent, "h2", "Side by side")
    _say(
        parent,
        "p",
        f"Ratios are to {runs[0].name}. Last value: below 1 is better. Updates to the lowest value that every run "
        "reached: above 1 is faster, the recording not counted.",
        "quiet",
    )
    for measure in dict.fromkeys(row["measure"] for row in rows):
        _say(parent, "h3", str(measure))
        of_it = [row for row in rows if row["measure"] == measure]
        body = _table(
            parent, ("run", "last", "ratio", f"updates to {of_it[0]['threshold']:.4g}", "ratio"), str(measure)
        )
        for row in of_it:
            line = SubElement(body, "tr")
            _say(line, "th", str(row["run"])).set("scope", "row")
            for name in ("last", "last ratio", "updates", "updates ratio"):
                value = row[name]
                assert not isinstance(value, str)
                _number(line, "td", value, ".3f" if name.endswith("ratio") else ".4g")


def _section(parent: Element, name: str, drawn: Sequence[Panel], bar: tqdm[NoReturn]) -> None:
    if all(panel.section != name for panel in drawn):
        return
    _say(parent, "h2", name)
    grid = SubElement(parent, "div", {"class": "grid"})
    for number, panel in enumerate(drawn):
        if panel.section == name:
            _figure(grid, panel, f"p{number}")
            bar.update()


def _figure(parent: Element, panel: Panel, key: str) -> None:
    figure = SubElement(parent, "figure", {"class": "card"})
    _say(figure, "h3", panel.title + (f", {panel.y}" if panel.y else ""))
    figure.append(svg(panel, key))
    _say(figure, "figcaption", panel.about)
    details = SubElement(figure, "details")
    _say(details, "summary", "Table")
    body = _table(details, (panel.x, *(series.label for series in panel.series)), panel.title)
    columns = [dict(series.points) for series in panel.series]
    for x in sorted({x for column in columns for x in column}):
        row = SubElement(body, "tr")
        _number(row, "td", x)
        for column in columns:
            _number(row, "td", column.get(x))


def _samples(parent: Element, runs: Sequence[History]) -> None:
    shown = [(run, name, series) for run in runs for name, series in run.pictures().items()]
    if not shown:
        return
    _say(parent, "h2", "Samples over time")
    for run, name, series in shown:
        _say(parent, "h3", run.name if name == "samples" else f"{run.name}: {name}")
        strip = SubElement(
            parent, "div", {"class": "samples", "tabindex": "0", "role": "region", "aria-label": run.name}
        )
        for update, file in series:
            figure = SubElement(strip, "figure")
            if file.is_file():
                data = base64.b64encode(file.read_bytes()).decode()
                alt = f"{name} of {run.name} at update {update}"
                SubElement(figure, "img", src=f"data:image/png;base64,{data}", alt=alt)
            else:
                _say(figure, "p", f"{file.name} is not there any more", "quiet")
            _say(figure, "figcaption", f"update {update:,}")


def _settings(parent: Element, runs: Sequence[History]) -> None:
    _say(parent, "h2", "Settings, versions, fingerprints")
    for run in runs:
        details = SubElement(parent, "details", {"class": "settings"} | ({"open": ""} if len(runs) == 1 else {}))
        _say(details, "summary", run.name)
        known: dict[str, str] = {}
        for begin in run.begun:
            _say(details, "h3", f"{begin['begin']}, {_when(begin)}" + (": what differs" if known else ""))
            body = SubElement(SubElement(details, "table", {"class": "facts"}), "tbody")
            facts = dict(_flat({k: v for k, v in begin.items() if k not in ("begin", "update", "recording")}))
            for name, value in facts.items():
                if known.get(name) != value:
                    row = SubElement(body, "tr")
                    _say(row, "th", name).set("scope", "row")
                    _say(row, "td", value)
            known |= facts
        resumes = [_when(line) for line in run.lines if "resume" in line]
        if resumes:
            _say(details, "p", f"A state was loaded {', '.join(resumes)}.", "quiet")
        if not run.begun:
            _say(details, "p", "The log does not say.", "quiet")


def _when(begin: Mapping[str, Any]) -> str:
    if "recording" in begin:
        return f"after {begin['recording']} recorded updates"
    return f"at generator update {begin['update']}"


def _flat(values: Mapping[str, Any], before: str = "") -> Iterable[tuple[str, str]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{before}{name}: ")
        elif value is not None:
            yield f"{before}{name}", str(value)
