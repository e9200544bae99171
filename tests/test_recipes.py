"""The paper's settings: that the numbers are the quoted ones, and that none is used on a path that it does not fit."""

from __future__ import annotations

import re

import pytest
from worlds import Run

import disback_plugin as disback
from disback_plugin.cli import parser
from disback_plugin.commands.run import _recording_and_schedule
from disback_plugin.errors import OptionError
from disback_plugin.schedules import Fixed, parse, recipe, recipes

# What the paper says of each node of index i, by the quotes that speak of steps.
STEPS = {
    "edm-64": lambda i: 1_000 if i >= 3 else 10_000,
    "lsun-256": lambda i: 500 if i >= 3 else 1_000,
    "sdxl": lambda i: 1_000,
}
STATED = tuple(STEPS)


@pytest.mark.parametrize("name", recipes())
def test_a_recipe_fits_the_path_of_its_own_recording_and_ends_at_the_teacher(name):
    found = recipe(name)
    schedule = parse(name)
    schedule.validate(found.nodes)
    assert len(found.budgets) == found.nodes - 1, "a budget for each node between s'_N and the teacher"
    assert found.nodes * found.every == found.record
    assert schedule(0, found.nodes).position == found.nodes - 1
    assert schedule.horizon(found.nodes) == sum(found.budgets)
    assert schedule(sum(found.budgets), found.nodes) == (0.0, 1.0)


@pytest.mark.parametrize("name", STATED)
def test_each_number_is_in_the_quoted_words_and_each_quoted_number_is_used(name):
    found = recipe(name)
    quoted = {int(number.replace(",", "")) for quote in found.quotes for number in re.findall(r"\d[\d,]*", quote)}
    assert {found.record, found.every, *found.budgets} <= quoted
    assert quoted - {found.record, found.every, *found.budgets} <= {3}, "but the node that the paper divides at"


@pytest.mark.parametrize("name", STATED)
def test_the_budgets_go_down_the_path_as_the_paper_gives_them_to_nodes(name):
    found = recipe(name)
    assert found.budgets == tuple(STEPS[name](i) for i in range(found.nodes - 1, 0, -1))


def test_the_one_that_the_paper_does_not_state_says_so():
    found = recipe("lcm-lora")
    assert (found.training, found.quotes) == ("not stated", ("200 iterations in most cases",))
    assert "no count" in found.note


@pytest.mark.parametrize("name", recipes())
def test_a_recipe_on_another_path_is_refused_with_its_own_recording_as_the_cure(name):
    found = recipe(name)
    for nodes in (1, found.nodes - 1, found.nodes + 1):
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
    assert handle.state_dict()["schedule"] == "Fixed(1000, 10000, 10000, of='edm-64')"
    handle.detach()
    with pytest.raises(OptionError, match="schedule 'sdxl' for a path whose last node is 4"):
        disback.attach(**run.roles(), path=tmp_path / "path", **recipe("sdxl").options)  # reuses the path that is there


def test_a_recipe_is_its_schedule_under_another_name_only():
    named, plain = parse("edm-64"), Fixed(1_000, 10_000, 10_000)
    assert [named(u, 4) for u in range(0, 25_000, 500)] == [plain(u, 4) for u in range(0, 25_000, 500)]
    assert named != plain
    assert repr(plain) == "Fixed(1000, 10000, 10000)"


def test_an_unknown_recipe_is_named_with_those_there_are():
    for wrong in (lambda: recipe("edm"), lambda: Fixed(5, of="edm"), lambda: parse("edm")):
        with pytest.raises(OptionError, match="edm-64, lsun-256, sdxl, lcm-lora"):
            wrong()


def _options(*arguments):
    return parser().parse_args(["run", "--adapter", "sid", *arguments, "script.py"])


def test_the_command_takes_a_recipe_or_the_three_options_but_not_both():
    assert _recording_and_schedule(_options("--recipe", "sdxl")) == {"record": 1_000, "every": 100, "schedule": "sdxl"}
    assert _recording_and_schedule(_options("--record", "0")) == {"record": 0}
    assert _recording_and_schedule(_options()) == {}
    with pytest.raises(OptionError, match="--recipe sdxl and --record, --schedule"):
        _recording_and_schedule(_options("--recipe", "sdxl", "--record", "5", "--schedule", "warm"))
    with pytest.raises(OptionError, match="one of edm-64"):
        _recording_and_schedule(_options("--recipe", "edm"))
