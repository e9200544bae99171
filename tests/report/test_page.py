"""The page of a report shows what the logs say."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from logs import PNG, Page
from worlds import Run

import disback_plugin as disback
from disback_plugin import cli
from disback_plugin.plugins.log_reader import last_run, read
from disback_plugin.plugins.run_log import RunLog
from disback_plugin.report import page, summary
from disback_plugin.report.figures import compare, panels
from disback_plugin.schedules import GradientRamp


def test_the_page_is_well_formed_and_asks_nothing_of_a_network(page_of_two):
    text = page_of_two
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


def test_the_command_writes_a_page_of_a_folder_and_says_so_in_json(two, page_of_two, tmp_path, capsys):
    folder, out = two[0].file.parent, tmp_path / "new" / "report.html"
    assert cli.main(["report", str(folder), "--out", str(out), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["out"] == str(out)
    assert [run["run"] for run in told["runs"]] == ["a <baseline>", "disback"]
    assert told["comparison"] == compare(two)
    assert out.read_text() == page_of_two
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
def test_a_browser_shows_it_without_errors_and_without_scrolling_sideways(two, page_of_two, width):
    with tempfile.TemporaryDirectory() as folder:
        file, probe = Path(folder) / "report.html", "<script>document.title = innerWidth + ' ' + document."
        probe += "documentElement.scrollWidth + ' ' + document.querySelectorAll('.card svg').length</script></body>"
        frame = f"<iframe id='f' width='{width}' height='900' srcdoc='{{}}'></iframe>"
        text = page_of_two.replace("</body>", probe)
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
