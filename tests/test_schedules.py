"""Schedules as functions of updates, their names, and the paper's settings."""

from __future__ import annotations

import re
from collections import Counter
from importlib.resources import files

import pytest
from hypothesis import given
from hypothesis import strategies as st
from worlds import Run

import disback_plugin as disback
from disback_plugin.cli import parser
from disback_plugin.errors import OptionError
from disback_plugin.schedule_base import validate_config
from disback_plugin.schedules import (
    Auto,
    Fixed,
    GradientRamp,
    Ramp,
    Target,
    WarmStart,
    parse,
    recipe,
    recipes,
    recording_options,
    tomllib,
)

counts = st.integers(1, 60)
schedules = st.one_of(
    st.lists(counts, min_size=1, max_size=4).map(lambda b: Fixed(*b)),
    st.builds(Ramp, counts, start=st.floats(0.1, 1), amplitude=st.booleans()),
    st.just(WarmStart()),
    st.builds(Auto, st.none() | counts),
    st.builds(GradientRamp, counts, depth=st.floats(0, 1)),
)


@given(schedule=schedules, nodes=st.integers(0, 12))
def test_every_schedule_only_goes_down_and_ends_at_the_teacher(schedule, nodes):
    horizon = schedule.horizon(nodes)
    targets = [schedule(u, nodes) for u in range(horizon + 3)]
    positions, factors = [t.position for t in targets], [t.gradient for t in targets]
    assert positions == sorted(positions, reverse=True)
    assert factors == sorted(factors)
    assert all(0 <= p <= nodes for p in positions)
    assert all(0 <= f <= 1 for f in factors)
    assert targets[horizon:] == [Target(0.0, 1.0)] * 3
    assert schedule(10**9, nodes) == Target(0.0, 1.0)


@given(budgets=st.lists(counts, min_size=1, max_size=8))
def test_fixed_stays_on_each_node_for_its_budget(budgets):
    nodes = len(budgets) + 1
    schedule = Fixed(*budgets)
    schedule.validate(nodes)
    spent = Counter(int(schedule(u, nodes).position) for u in range(schedule.horizon(nodes)))
    assert spent == Counter({nodes - 1 - i: budget for i, budget in enumerate(budgets)})


def test_the_papers_schedule_on_its_five_nodes():
    # B.2: nodes 0 to 4; i >= 3 for 1,000 steps, i < 3 for 10,000 steps each, then the teacher.
    paper = Fixed(1_000, 10_000)
    assert [paper(u, 4).position for u in (0, 999, 1_000, 10_999, 11_000, 20_999, 21_000)] == [3, 3, 2, 2, 1, 1, 0]


def test_the_papers_schedule_for_sdxl():
    # B.2: nodes 0 to 9, each for 1,000 steps.
    sdxl = Fixed(1_000)
    assert [sdxl(u, 9).position for u in (0, 1_000, 7_999, 8_000)] == [8, 7, 1, 0]


def test_a_ramp_needs_no_nodes_between():
    assert [Ramp(10)(u, 1) for u in (0, 5, 10)] == [(0.9, pytest.approx(0.1)), (0.45, 0.55), (0.0, 1.0)]


def test_a_path_with_only_the_teacher_leaves_every_path_schedule_idle():
    for schedule in (Fixed(5), Ramp(5), WarmStart(), Auto(5)):
        assert schedule(0, 0) == Target(0.0, 1.0)
        assert schedule.horizon(0) == 0


def test_budgets_that_have_no_node_are_refused():
    with pytest.raises(OptionError, match=r"Fixed\(5, 5\) for a path whose last node is 2; expected at most 1"):
        Fixed(5, 5).validate(2)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: Fixed(),
        lambda: Fixed(0),
        lambda: Ramp(0),
        lambda: Ramp(start=1.5),
        lambda: GradientRamp(depth=2),
        lambda: Auto(0),
    ],
)
def test_arguments_out_of_their_domain_are_refused(wrong):
    with pytest.raises(OptionError):
        wrong()


@pytest.mark.parametrize(
    ("text", "schedule"),
    [
        ("auto", Auto()),
        ("warm", WarmStart()),
        ("ramp", Ramp(100)),
        ("ramp:7", Ramp(7)),
        ("plain-ramp:7", Ramp(7, amplitude=False)),
        ("grad-ramp", GradientRamp(100)),
        ("fixed:3,4", Fixed(3, 4)),
    ],
)
def test_names_of_the_command_line(text, schedule):
    assert parse(text) == schedule


@pytest.mark.parametrize(
    "text", ["", "linear", "ramp:x", "ramp:1,2", "fixed", "fixed:", "fixed:1.5", "warm:3", "ramp:0"]
)
def test_texts_that_name_no_schedule_are_refused(text):
    with pytest.raises(OptionError):
        parse(text)


@given(fitted=counts)
def test_auto_takes_its_length_from_the_recording_once_and_no_other_schedule_does(fitted):
    settled = Auto().settle(fitted)
    assert settled == Auto(fitted)
    assert settled.settle(fitted + 1) is settled
    for schedule in (Fixed(5), Ramp(5), WarmStart(), GradientRamp(5)):
        assert not schedule.until_fitted
        assert schedule.settle(fitted) is schedule


@pytest.mark.parametrize("wrong", [Ramp, None, [3], lambda updates, nodes: Target(0.0)])
def test_an_object_that_is_no_schedule_is_refused(wrong):
    with pytest.raises(OptionError, match=r"inherits from disback_plugin\.schedules\.Schedule"):
        parse(wrong)


# -- the paper's settings ---------------------------------------------------------------------------------------------

# What the paper says of each node of index i, by the quotes that speak of steps.
STEPS = {
    "edm-64": lambda i: 1_000 if i >= 3 else 10_000,
    "lsun-256": lambda i: 500 if i >= 3 else 1_000,
    "sdxl": lambda i: 1_000,
}
STATED = tuple(STEPS)
SETTINGS = tomllib.loads(files("disback_plugin").joinpath("recipes.toml").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", recipes())
def test_a_recipe_fits_the_path_of_its_own_recording_and_ends_at_the_teacher(name):
    found, schedule = recipe(name), parse(name)
    nodes = found.record // found.every
    schedule.validate(nodes)
    assert len(found.budgets) == nodes - 1, "a budget for each node between s'_N and the teacher"
    assert nodes * found.every == found.record
    assert schedule(0, nodes).position == nodes - 1
    assert schedule.horizon(nodes) == sum(found.budgets)
    assert schedule(sum(found.budgets), nodes) == (0.0, 1.0)


@pytest.mark.parametrize("name", STATED)
def test_each_number_is_quoted_and_each_quoted_number_is_used(name):
    found = recipe(name)
    quoted = {
        int(number.replace(",", "")) for quote in SETTINGS[name]["quotes"] for number in re.findall(r"\d[\d,]*", quote)
    }
    assert {found.record, found.every, *found.budgets} <= quoted
    assert quoted - {found.record, found.every, *found.budgets} <= {3}, "but the node that the paper divides at"


@pytest.mark.parametrize("name", STATED)
def test_the_budgets_are_those_that_the_paper_gives_to_the_nodes(name):
    found = recipe(name)
    assert found.budgets == tuple(STEPS[name](i) for i in range(found.record // found.every - 1, 0, -1))


def test_the_recipe_without_counts_in_the_paper_says_so():
    found = SETTINGS["lcm-lora"]
    assert (found["training"], found["quotes"]) == ("not stated", ["200 iterations in most cases"])
    assert "no count" in found["note"]


@pytest.mark.parametrize("name", recipes())
def test_a_recipe_on_another_path_is_refused_with_its_own_recording_as_the_cure(name):
    found = recipe(name)
    last = found.record // found.every
    for nodes in (1, last - 1, last + 1):
        with pytest.raises(OptionError, match=rf"record={found.record}, every={found.every}"):
            parse(name).validate(nodes)


def test_attach_takes_a_recipe_whole_and_refuses_its_name_under_another_recording(tmp_path):
    run = Run()
    with pytest.raises(OptionError, match="record=1000, every=100"):
        disback.attach(**run.roles(), path=tmp_path / "path", schedule="sdxl")  # of 200 iterations, every 50
    assert not (tmp_path / "path").exists()
    handle = disback.attach(**run.roles(), path=tmp_path / "path", **recipe("edm-64").options)
    run.steps(205)
    assert (handle.phase, handle.position) == ("backtracking", 3.0)
    validate_config(parse("edm-64"), handle.state_dict()["schedule"])
    handle.detach()
    with pytest.raises(OptionError, match="schedule 'sdxl' for a path whose last node is 4"):
        disback.attach(**run.roles(), path=tmp_path / "path", **recipe("sdxl").options)  # reuses the path that is there


def test_a_recipes_schedule_is_fixed_under_another_name():
    named, plain = parse("edm-64"), Fixed(1_000, 10_000, 10_000)
    assert [named(u, 4) for u in range(0, 25_000, 500)] == [plain(u, 4) for u in range(0, 25_000, 500)]
    assert named != plain
    assert repr(plain) == "Fixed(1000, 10000, 10000)"


def test_an_error_on_an_unknown_recipe_lists_the_known_ones():
    for wrong in (lambda: recipe("edm"), lambda: Fixed(5, of="edm"), lambda: parse("edm")):
        with pytest.raises(OptionError, match="edm-64, lsun-256, sdxl, lcm-lora"):
            wrong()


def _options(*arguments):
    return parser().parse_args(["run", "--adapter", "sid", *arguments, "script.py"])


def test_the_command_takes_a_recipe_or_the_three_options_but_not_both():
    assert recording_options(_options("--recipe", "sdxl")) == {"record": 1_000, "every": 100, "schedule": "sdxl"}
    assert recording_options(_options("--record", "0")) == {"record": 0}
    assert recording_options(_options()) == {}
    with pytest.raises(OptionError, match="--recipe sdxl and --record, --schedule"):
        recording_options(_options("--recipe", "sdxl", "--record", "5", "--schedule", "warm"))
    with pytest.raises(OptionError, match="one of edm-64"):
        recording_options(_options("--recipe", "edm"))
