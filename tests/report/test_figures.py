"""The figures of a report hold the numbers of the logs."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from logs import Page
from worlds import Run

import disback_plugin as disback
from disback_plugin.plugins.log_reader import last_run, read
from disback_plugin.plugins.run_log import RunLog
from disback_plugin.report import page
from disback_plugin.report.figures import OWN_NUMBERS, compare, crossing, panels, svg
from disback_plugin.schedules import GradientRamp


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


def test_each_curve_has_one_figure_and_one_table_with_the_numbers_of_the_log(two, page_of_two):
    drawn = [panel for panel in panels(two) if panel.has_course]
    figures = Page(page_of_two).figures
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


def test_a_single_value_is_a_line_of_the_table_and_no_figure(page_of_two, tmp_path):
    assert "masked samples" not in {figure["title"] for figure in Page(page_of_two).figures}
    assert re.search(r"masked samples</th><td>.*3.*</td><td>.*3.*</td>", page_of_two)
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
