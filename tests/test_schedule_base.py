"""A schedule on one path as pure functions of its step, and the text under which a saved state knows a schedule."""

from __future__ import annotations

import json
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from disback_plugin.errors import StateError
from disback_plugin.progress import Phase, Progress
from disback_plugin.schedule_base import Plan, Schedule, Target, to_config, validate_config
from disback_plugin.schedules import Auto, Fixed, GradientRamp, Ramp, WarmStart, parse

NODES = st.integers(1, 6)
FIXED = NODES.flatmap(
    lambda n: st.tuples(st.lists(st.integers(1, 5), min_size=1, max_size=max(n - 1, 1)), st.just(n))
).filter(lambda case: len(case[0]) < case[1])
ANSWERS = st.lists(st.sampled_from([None, True, False]), max_size=60)


def positions(plan, answers, *, step=0):
    """The position before each answer, and the step after the last one."""
    found = []
    for leave in answers:
        found.append(plan.target(step).position)
        if step < plan.horizon:
            step = plan.next_step(step, leave)
    return found, step


@given(
    schedule=st.one_of(st.builds(Ramp, st.integers(1, 9)), st.just(WarmStart()), FIXED.map(lambda c: Fixed(*c[0]))),
    nodes=NODES,
)
def test_without_a_plug_in_the_plan_is_the_schedule(schedule, nodes):
    found, _ = positions(Plan(schedule, nodes), [None] * 40)
    assert found == [schedule(u, nodes).position if u < schedule.horizon(nodes) else 0.0 for u in range(40)]


@given(case=FIXED, answers=ANSWERS)
def test_each_node_comes_in_order_and_once_for_any_answers(case, answers):
    budgets, nodes = case
    found, _ = positions(Plan(Fixed(*budgets), nodes), answers)
    visited = [p for i, p in enumerate(found) if i == 0 or found[i - 1] != p]
    assert visited == [float(node) for node in range(nodes - 1, nodes - 1 - len(visited), -1)]
    for before, after, leave in zip(found, found[1:], answers, strict=False):
        if before and leave is True:
            assert after == before - 1
        if leave is False:
            assert after == before


@given(case=FIXED, answers=ANSWERS, cut=st.integers(0, 60))
def test_the_step_is_the_whole_state(case, answers, cut):
    budgets, nodes = case
    whole, end = positions(Plan(Fixed(*budgets), nodes), answers)
    first, step = positions(Plan(Fixed(*budgets), nodes), answers[:cut])
    second, resumed_end = positions(Plan(Fixed(*budgets), nodes), answers[cut:], step=step)
    assert (first + second, resumed_end) == (whole, end)


@given(answers=ANSWERS)
def test_no_answer_moves_a_ramp(answers):
    assert positions(Plan(Ramp(20), 4), answers) == positions(Plan(Ramp(20), 4), [None] * len(answers))


@pytest.mark.parametrize(
    ("schedule", "nodes", "expected"),
    [
        (Fixed(1_000, 10_000), 4, [(0, 3.0), (1_000, 2.0), (11_000, 1.0), (21_000, 0.0)]),
        (Ramp(100), 4, [(0, 3.6), (17, 2.988), (45, 1.98), (73, 0.972), (100, 0.0)]),
        (WarmStart(), 4, [(0, 0.0)]),
        (GradientRamp(50), 0, [(0, 0.0), (50, 0.0)]),
    ],
)
def test_the_timeline_has_the_updates_at_which_a_node_is_reached(schedule, nodes, expected):
    timeline = Plan(schedule, nodes).timeline(Progress())
    assert [(updates, pytest.approx(target.position)) for updates, target in timeline] == expected


def test_after_backtracking_the_timeline_is_its_end():
    assert Plan(Fixed(2), 4).timeline(Progress(Phase.DONE, generator_updates=9, node_since=6)) == [(6, (0.0, 1.0))]


# -- in a saved state -------------------------------------------------------------------------------------------------

counts = st.integers(1, 60)
schedules = st.one_of(
    st.lists(counts, min_size=1, max_size=4).map(lambda b: Fixed(*b)),
    st.sampled_from(["edm-64", "sdxl"]).map(parse),
    st.builds(Ramp, counts, start=st.floats(0.1, 1), amplitude=st.booleans()),
    st.just(WarmStart()),
    st.builds(Auto, st.none() | counts),
    st.builds(GradientRamp, counts, depth=st.floats(0, 1)),
)


def same(schedule, text):
    """Return whether a saved text is accepted for a schedule."""
    try:
        validate_config(schedule, text)
    except StateError:
        return False
    return True


@given(first=schedules, second=schedules)
def test_a_schedule_is_the_same_under_its_own_text_and_its_repr_only(first, second):
    for text in (to_config(first), repr(first)):
        assert same(first, text)
        assert same(second, text) == (second == first)


@pytest.mark.parametrize(
    ("text", "schedule"),
    [
        ("Fixed(1000, 10000)", Fixed(1_000, 10_000)),
        ("Fixed(1000, 10000, 10000, of='edm-64')", parse("edm-64")),
        ("Ramp(updates=7, start=0.9, amplitude=True)", Ramp(7)),
        ("Ramp(updates=7)", Ramp(7)),
        ("Auto(fitted=None)", Auto()),
        ("WarmStart()", WarmStart()),
        ("GradientRamp(updates=100, depth=0.99)", GradientRamp()),
    ],
)
def test_a_repr_in_a_state_of_version_1_is_understood(text, schedule):
    validate_config(schedule, text)


@dataclass(frozen=True)
class Halves(Schedule):
    every: int

    def __call__(self, updates, nodes):
        return Target(0.0)

    def horizon(self, nodes):
        return self.every


def test_a_new_argument_with_a_default_refuses_no_old_state_and_another_value_does():
    old, old_repr = to_config(Halves(10)), repr(Halves(10))

    @dataclass(frozen=True)
    class Grown(Halves):
        floor: float = 0.25
        nodes: tuple = (1, 2)

    Grown.__name__ = Grown.__qualname__ = "Halves"
    for text in (old, old_repr):
        validate_config(Grown(10), text)
        assert not same(Grown(10, floor=0.5), text)
        assert not same(Grown(11), text)
    validate_config(Grown(10, floor=0.5), to_config(Grown(10, floor=0.5)))
    with pytest.raises(StateError, match=r'"floor": 0.25.*in a version that knows its arguments'):
        validate_config(Halves(10), to_config(Grown(10)))


def test_a_schedule_whose_arguments_have_another_meaning_is_refused():
    class Turned(Ramp):
        version = 2

    Turned.__name__ = "Ramp"
    with pytest.raises(StateError, match="another schedule"):
        validate_config(Turned(7), to_config(Ramp(7)))


def test_a_state_of_a_schedule_that_is_gone_names_the_version_that_has_it():
    with pytest.raises(StateError, match=r"another schedule \(Adaptive.*disback-plugin 0.1.0, the last version"):
        validate_config(Auto(), "Adaptive(fitted=None)")


@pytest.mark.parametrize(
    "text", ["", "x", "{", "{}", "[]", '{"arguments": 3}', "Ramp", "Ramp(", "Ramp(f())", "Ramp(**1)"]
)
def test_a_text_that_is_no_schedule_is_another_schedule(text):
    with pytest.raises(StateError, match="another schedule"):
        validate_config(Ramp(7), text)


class Plain(Schedule):
    """A user's own class that is no dataclass: its repr identifies it."""

    def __init__(self, updates):
        self.updates = updates

    def __repr__(self):
        return f"Plain({self.updates})"

    def __call__(self, updates, nodes):
        return Target(0.5 * nodes if updates < self.updates else 0.0)

    def horizon(self, nodes):
        return self.updates


def test_a_schedule_that_is_no_dataclass_is_identified_by_its_repr():
    schedule = Plain(3)
    assert positions(Plan(schedule, 2), [None] * 5) == ([1.0, 1.0, 1.0, 0.0, 0.0], 3)
    assert same(schedule, "Plain(3)")
    assert same(schedule, to_config(Plain(3)))
    assert not same(schedule, to_config(Plain(4)))
    assert json.loads(to_config(schedule))["name"] == "Plain"
