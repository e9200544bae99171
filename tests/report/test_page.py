"""The report shows what the logs say."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from worlds import Run

import disback_plugin as disback
from disback_plugin import cli
from disback_plugin.plugins.log_reader import last_run, read
from disback_plugin.plugins.run_log import RunLog
from disback_plugin.report import page, summary
from disback_plugin.report.figures import OWN_NUMBERS, compare, crossing, panels, svg
from disback_plugin.schedules import GradientRamp

VOID = {"meta", "link", "img", "br", "hr", "input"}


class Page(HTMLParser):
    """A page whose tags all close in order; its tags, texts, addresses and the numbers of each figure's table."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.addresses, self.ids, self.figures = [], [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append(tag)
        self.addresses += [attributes[name] for name in ("src", "href") if name in attributes]
        self.ids += [attributes["id"]] if "id" in attributes else []
        if tag == "figure" and attributes.get("class") == "card":
            self.figures.append({"title": "", "rows": [], "svg": 0})
        elif tag == "svg" and "figure" in self.open:
            self.figures[-1]["svg"] += 1
        elif tag == "tr" and "figure" in self.open and "tbody" in self.open:
            self.figures[-1]["rows"].append([])
        elif tag == "td" and "figure" in self.open:
            self.figures[-1]["rows"][-1].append(None)
        elif tag == "data" and "figure" in self.open:
            self.figures[-1]["rows"][-1][-1] = float(attributes["value"])
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> without a beginning"
        assert self.open.pop() == tag

    def handle_data(self, text):
        if self.open and self.open[-1] == "h3" and "figure" in self.open:
            self.figures[-1]["title"] += text


PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010806000000"
    "1f15c4890000000d49444154789c6360606060000000050001a5f645400000000049454e44ae426082"
)


def a_log(folder, name, scale=1.0):
    """A run with everything that a log can have."""
    (folder / f"{name}.png").write_bytes(PNG)
    log = RunLog(folder / f"{name}.log.jsonl")
    log.begin("attach", recording=0, teacher="f" * 64, settings={"schedule": "<Ramp & co>", "record": 10})
    for i in range(2, 11):
        log.log({"agreement": scale * (1 - i / 8)}, 0, recording=i)
        log.log({"loss": 3.0 / i}, 0, recording=i)
    for index in (1, 2):
        node = {"index": index, "iteration": 5 * index, "bytes": 700, "delta_norm": 0.3}
        log._write({"update": 0, "recording": 5 * index, "recorded": node | {"weight_error": 0.004 * scale}})
    log._write({"update": 0, "recording": 10, "completed": {"iterations": 10, "fitted": 8, "ended": None}})
    for update in range(0, 41, 10):
        moved = {
            "position": 2 - update / 20,
            "node": 2,
            "gradient": 0.2 + update / 50,
            "swap_ms": 0.7,
            "delta_norm": 0.1,
        }
        log.log(moved, update)
        log.log({"distance": scale * (50 - update) / 3, "loss": float("nan") if update == 20 else 1.0}, update)
    log.log({"masked_samples": 3, "samples": folder / f"{name}.png"}, 40)
    return log.file


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    return [read(a_log(folder, name, scale)) for name, scale in (("a <baseline>", 1.0), ("disback", 0.5))]


def test_the_page_is_well_formed_and_asks_nothing_of_a_network(two):
    text = page(two)
    parsed = Page(text)
    assert all(address.startswith(("data:", "#")) for address in parsed.addresses), parsed.addresses
    assert "://" not in text
    assert not re.search(r"url\((?!#)", text)
    assert len(parsed.ids) == len(set(parsed.ids))
    assert "script" not in parsed.tags
    assert "a &lt;baseline&gt;" in text
    assert "&lt;Ramp &amp; co&gt;" in text
    assert "prefers-color-scheme: dark" in text
    assert "currentColor" in text
    assert text.count("data:image/png;base64,") == 2


def test_each_curve_has_one_figure_and_one_table_with_the_numbers_of_the_log(two):
    drawn = [panel for panel in panels(two) if panel.has_course]
    figures = Page(page(two)).figures
    assert [figure["svg"] for figure in figures] == [1] * len(drawn)
    titles = {figure["title"] for figure in figures}
    wanted = {
        "distance",
        "position",
        "gradient factor",
        "swap time, ms",
        "gradient agreement",
        "loss",
        "loss, while recording",
    }
    assert wanted | {"codec error in the weights, %", "step to a node"} == titles
    for panel, figure in zip(drawn, figures, strict=True):
        for column, curve in enumerate(panel.curves.values(), start=1):
            shown = [(row[0], row[column]) for row in figure["rows"] if row[column] is not None]
            assert shown == [(x, y) for x, y in curve if y is not None], panel.title


def test_the_panels_hold_what_the_history_holds(two):
    by_title = {(panel.section, panel.title): panel for panel in panels(two)}
    for i, run in enumerate(two):
        curves, recording = run.curves(), run.curves(recording=True)
        for title, name in (("distance", "distance"), ("position", "position"), ("swap time, ms", "swap_ms")):
            (panel,) = [panel for (_, known), panel in by_title.items() if known == title]
            assert panel.curves[i] == curves[name]
        agreement = by_title["Recording", "gradient agreement"]
        assert agreement.curves[i] == recording["agreement"]
        assert agreement.marks[i] == 8


def test_several_runs_are_compared_with_the_first(two):
    rows = compare(two)
    assert [(row["measure"], row["run"]) for row in rows] == [("distance", "a <baseline>"), ("distance", "disback")]
    first, second = rows
    assert first["last ratio"] == first["updates ratio"] == 1
    assert second["last ratio"] == 0.5
    assert first["threshold"] == pytest.approx(10 / 3)
    assert (first["updates"], second["updates"]) == (pytest.approx(40), pytest.approx(30))
    assert second["updates ratio"] == pytest.approx(40 / 30)
    assert compare(two[:1]) == []


@settings(deadline=None, max_examples=100)
@given(st.lists(st.floats(-5, 5), min_size=1, max_size=12), st.floats(-5, 5))
def test_a_crossing_is_at_the_first_value_below_or_just_before_it(values, threshold):
    found = crossing(list(enumerate(values)), threshold)
    below = [i for i, value in enumerate(values) if value <= threshold]
    assert (found is None) == (not below)
    if below:
        assert max(below[0] - 1, 0) <= found <= below[0]


def test_alarms_are_drawn_as_disbacks_own_and_everything_that_a_run_logs_by_itself_is_known(tmp_path):
    run = last_run([{"update": 7, "stalled": 1.0}, {"update": 9, "diverged": 1.0}, {"update": 9, "loss": 2.0}])
    sections = {panel.title: panel.section for panel in panels([run])}
    assert sections == {"loss": "Measured by the loop", "stalled": "Backtracking", "diverged": "Backtracking"}

    logged = set()

    class Names:
        @disback.hookimpl
        def disback_log(self, values):
            logged.update(name.removeprefix("disback/") for name in values)

    run = Run()
    options = {"record": 10, "every": 5, "schedule": "ramp:4", "plugins": (Names(),)}
    with disback.attach(**run.roles(), path=tmp_path / "path", **options):
        run.steps(20)
    assert {"position", "gradient", "agreement"} < logged
    assert logged - {"recording"} <= {*OWN_NUMBERS}


NAMES = st.sampled_from(
    ["position", "gradient", "swap_ms", "agreement", "loss", "distance", "<b>&\"'", "masked_samples"]
)
NUMBERS = st.none() | st.floats(-1e30, 1e30) | st.integers(-5, 5)
LINES = st.lists(
    st.fixed_dictionaries({"update": st.integers(0, 50)}, optional={"recording": st.integers(0, 20)}).flatmap(
        lambda line: st.dictionaries(NAMES, NUMBERS, max_size=3).map(lambda values: values | line)
    ),
    min_size=1,
    max_size=8,
)


@settings(deadline=None, max_examples=12)
@given(st.lists(LINES, min_size=1, max_size=3))
def test_any_log_makes_a_well_formed_page(runs):
    histories = [last_run(lines) for lines in runs]
    assert len(Page(page(histories)).figures) == sum(panel.has_course for panel in panels(histories))


def test_a_figure_takes_its_colours_from_the_page(two):
    for i, panel in enumerate(panels(two)):
        text = svg(panel, f"p{i}")
        # White and black of the clip paths and of nothing are matplotlib's own.
        assert not set(re.findall(r"(?:fill|stroke): (#[0-9a-f]+)", text)), panel.title
        assert {f"var(--run-{run})" for run in panel.curves} <= set(re.findall(r"var\(--run-\d\)", text))


def test_the_command_writes_a_page_of_a_folder_and_says_so_in_json(two, tmp_path, capsys):
    folder, out = two[0].file.parent, tmp_path / "new" / "report.html"
    assert cli.main(["report", str(folder), "--out", str(out), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["out"] == str(out)
    assert [run["run"] for run in told["runs"]] == ["a <baseline>", "disback"]
    assert told["comparison"] == compare(two)
    assert out.read_text() == page(two)
    assert cli.main(["report", str(two[1].file), "--out", str(out)]) == 0
    assert "1 run," in capsys.readouterr().out


def test_without_matplotlib_it_says_what_to_install(two, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert cli.main(["report", str(two[0].file), "--out", str(tmp_path / "x.html")]) == 2
    assert "pip install 'disback-plugin[plots]'" in capsys.readouterr().err
    assert not (tmp_path / "x.html").exists()


def test_no_log_is_one_line_and_exit_code_1(tmp_path, capsys):
    assert cli.main(["report", str(tmp_path / "nothing"), "--out", str(tmp_path / "x.html")]) == 1
    told = capsys.readouterr().err
    assert told.startswith("disback: found no log of a run at")
    assert told.count("\n") == 1


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")
@pytest.mark.parametrize("width", [360, 1440])
def test_a_browser_shows_it_without_errors_and_without_scrolling_sideways(two, width):
    with tempfile.TemporaryDirectory() as folder:
        file, probe = Path(folder) / "report.html", "<script>document.title = innerWidth + ' ' + document."
        probe += "documentElement.scrollWidth + ' ' + document.querySelectorAll('.card svg').length</script></body>"
        frame = f"<iframe id='f' width='{width}' height='900' srcdoc='{{}}'></iframe>"
        text = page(two).replace("</body>", probe)
        escaped = text.replace("&", "&amp;").replace("'", "&#39;")
        script = "<script>onload = () => { document.body.dataset.seen = f.contentDocument.title }</script>"
        file.write_text(f"<!doctype html><body>{frame.format(escaped)}{script}</body>")
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=4000", "--dump-dom"]
        options += ["--enable-logging=stderr", f"--user-data-dir={folder}/profile", f"file://{file}"]
        out = subprocess.run([CHROMIUM, *options], capture_output=True, text=True, check=True)
    inner, needed, figures = map(int, re.search(r'data-seen="(\d+) (\d+) (\d+)"', out.stdout).groups())
    assert needed <= inner <= width
    assert figures == sum(panel.has_course for panel in panels(two))
    assert "CONSOLE" not in out.stderr


def test_a_second_process_shows_only_what_differs_and_where_it_went_on(tmp_path):
    for process in range(2):
        log = RunLog(tmp_path / "x.log.jsonl")
        log.begin("attach", settings={"schedule": "auto", "rate": f"1e-{process}"})
        if process:
            log.resume(update=3)
        log.log({"loss": 1.0}, 3 + process)
    text = page([read(log.file)])
    assert text.count("settings: schedule") == 1
    assert text.count("settings: rate") == 2
    assert text.count("versions: torch") == 1
    assert "A state was loaded at generator update 3." in text


def test_a_single_value_is_a_line_of_the_table_and_no_figure(two, tmp_path):
    assert "masked samples" not in {figure["title"] for figure in Page(page(two)).figures}
    assert re.search(r"masked samples</th><td>.*3.*</td><td>.*3.*</td>", page(two))
    log = RunLog(tmp_path / "x.log.jsonl")
    log.begin("attach")
    node = {"index": 1, "iteration": 10, "bytes": 700, "delta_norm": 0.25, "weight_error": 0.004}
    log._write({"update": 0, "recording": 10, "recorded": node})
    log.log({"agreement": 0.5}, 0, recording=2)
    log.log({"stalled": 1.0}, 30)
    text = page([read(log.file)])
    assert Page(text).figures == []
    for line in (
        r"step to a node</th><td>.*0\.25",
        r"stalled</th><td>.*30",
        r"codec error in the weights, %</th><td>.*0\.4",
    ):
        assert re.search(line, text), line


@pytest.mark.parametrize("schedule", ["ramp:20", GradientRamp(50)])
def test_a_detached_runs_restoration_is_not_drawn_as_a_move(tmp_path, schedule):
    run, recorded = Run(), isinstance(schedule, str)
    plan = {"path": tmp_path / "path", "record": 4, "every": 2} if recorded else {"record": 0}
    with disback.attach(**run.roles(), **plan, schedule=schedule, log=tmp_path / "x.log.jsonl"):
        run.steps(4 + 5)
    history = read(tmp_path / "x.log.jsonl")
    curves = history.curves()
    assert curves["gradient"][-1][1] < 1, "the factor of the last update"
    assert "detached" not in {panel.title for panel in panels([history])}
    if recorded:
        assert curves["position"][-1][1] > 0
        assert history.detached == 5
        assert "where it was detached" in page([history])


def test_a_run_that_went_on_after_it_was_detached_is_not_called_detached(tmp_path):
    run, plan = Run(), {"path": tmp_path / "path", "record": 4, "every": 2, "schedule": "ramp:10"}
    with disback.attach(**run.roles(), **plan) as handle:
        run.steps(8)
        state = handle.state_dict()
    with disback.attach(**run.roles(), **plan, state=state):
        run.steps(8)
    history = read(tmp_path / "path.log.jsonl")
    assert history.detached is None
    assert [y for _, y in history.curves()["position"]][-1] == 0


SENTENCES = {
    "recording": ("the recording came to iteration 3 and 1 node", 3, "auto"),
    "on the way": ("2 nodes were recorded in 4 iterations", 7, "ramp:10"),
    "done": ("to itself by generator update 4; the log ends at generator update 6", 10, "ramp:4"),
}


@pytest.mark.parametrize(("text", "steps", "schedule"), SENTENCES.values(), ids=SENTENCES)
def test_the_page_begins_with_a_sentence_on_what_happened(tmp_path, text, steps, schedule):
    run = Run()
    handle = disback.attach(**run.roles(), path=tmp_path / "path", record=4, every=2, schedule=schedule)
    for _ in range(steps):
        run.step()
        handle.log({"distance": 1.0})
    history = read(tmp_path / "path.log.jsonl")
    handle.detach()
    assert text.lower() in summary(history).lower()
    first_screen = page([history]).partition("In short")[2].partition("<table")[0]
    assert summary(history) in first_screen


def test_the_sentence_tells_a_gradient_ramp_from_a_path_and_the_last_move_from_the_last_line(tmp_path):
    run = Run()
    with disback.attach(**run.roles(), record=0, schedule=GradientRamp(3), log=tmp_path / "ramp.log.jsonl"):
        run.steps(5)
    assert summary(read(tmp_path / "ramp.log.jsonl")).startswith(
        "The teacher did not move, and the generator's gradient was scaled to update 3"
    )
    lines = [{"update": u, "position": p, "gradient": g} for u, p, g in ((0, 0.9, 0.1), (2, 0.0, 0.4), (6, 0.0, 1.0))]
    assert summary(last_run(lines)) == "The teacher moved back from position 0.9 to itself by generator update 2."
    node = {"index": 1, "iteration": 3, "bytes": 1}
    recorded = [
        {"update": 0, "recording": 3, key: value}
        for key, value in (("recorded", node), ("completed", {"iterations": 3}))
    ]
    assert summary(last_run([*recorded, *lines])).startswith("1 node was recorded in 3 iterations")


def test_pictures_are_shown_though_no_number_was_logged(tmp_path):
    (tmp_path / "x.png").write_bytes(PNG)
    log = RunLog(tmp_path / "x.log.jsonl")
    log.begin("test")
    log.log({"position": 1.0, "samples": tmp_path / "x.png", "gone": tmp_path / "y.png"}, 7)
    text = page([read(log.file)])
    assert text.count("data:image/png;base64,") == 1
    assert "y.png is missing" in text


def test_runs_of_one_name_in_two_folders_are_told_apart(tmp_path, capsys):
    for folder in ("baseline", "ours"):
        (tmp_path / folder / "runs").mkdir(parents=True)
        RunLog(tmp_path / folder / "runs" / "path.log.jsonl").begin("attach")
    runs = [str(tmp_path / folder / "runs" / "path.log.jsonl") for folder in ("baseline", "ours")]
    assert cli.main(["report", *runs, "--out", str(tmp_path / "page.html"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["runs"]
    assert [run["run"] for run in told] == ["baseline/runs/path", "ours/runs/path"]
