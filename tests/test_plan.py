"""A plan is a pure schedule and two counts; what a plug-in overrules moves the counts only."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from disback_plugin.schedule_cursor import Plan, length
from disback_plugin.schedules import Fixed, GradientRamp, Ramp, WarmStart

NODES = st.integers(1, 6)
FIXED = NODES.flatmap(
    lambda n: st.tuples(st.lists(st.integers(1, 5), min_size=1, max_size=max(n - 1, 1)), st.just(n))
).filter(lambda case: len(case[0]) < case[1])
ANSWERS = st.lists(st.sampled_from([None, True, False]), max_size=60)


def walk(plan, answers, *, now=0):
    """The positions before each update."""
    for leave in answers:
        now += 1
        yield plan.target.position
        if not plan.finished:
            plan.go_to(plan.following(leave), now=now)


def started(schedule, nodes):
    plan = Plan(schedule, nodes)
    plan.go_to(0, now=0)
    return plan


@given(
    schedule=st.one_of(st.builds(Ramp, st.integers(1, 9)), st.just(WarmStart()), FIXED.map(lambda c: Fixed(*c[0]))),
    nodes=NODES,
)
def test_nobody_overrules_and_the_plan_is_the_schedule(schedule, nodes):
    positions = list(walk(started(schedule, nodes), [None] * 40))
    assert positions == [schedule(u, nodes).position if u < schedule.horizon(nodes) else 0.0 for u in range(40)]


@given(case=FIXED, answers=ANSWERS)
def test_whatever_is_answered_each_node_comes_in_order_and_none_twice(case, answers):
    budgets, nodes = case
    positions = list(walk(started(Fixed(*budgets), nodes), answers))
    visited = [p for i, p in enumerate(positions) if i == 0 or positions[i - 1] != p]
    assert visited == [float(node) for node in range(nodes - 1, nodes - 1 - len(visited), -1)]
    for before, after, leave in zip(positions, positions[1:], answers, strict=False):
        if before and leave is True:
            assert after == before - 1
        if leave is False:
            assert after == before


@given(case=FIXED, answers=ANSWERS, cut=st.integers(0, 60))
def test_two_counts_are_the_whole_state(case, answers, cut):
    budgets, nodes = case
    whole, first = started(Fixed(*budgets), nodes), started(Fixed(*budgets), nodes)
    expected = [*walk(whole, answers), whole.target.position, whole.node_since]
    cut = min(cut, len(answers))
    before = list(walk(first, answers[:cut]))
    second = Plan(Fixed(*budgets), nodes)
    second.go_to(first.updates, now=0)
    second.node_since = first.node_since
    assert [*before, *walk(second, answers[cut:], now=cut), second.target.position, second.node_since] == expected


@given(answers=ANSWERS)
def test_no_answer_moves_a_ramp(answers):
    plain, asked = started(Ramp(20), 4), started(Ramp(20), 4)
    assert list(walk(asked, answers)) == list(walk(plain, [None] * len(answers)))


@pytest.mark.parametrize(
    ("schedule", "nodes", "expected"),
    [
        (Fixed(1_000, 10_000), 4, [(0, 3.0), (1_000, 2.0), (11_000, 1.0), (21_000, 0.0)]),
        (Ramp(100), 4, [(0, 3.6), (17, 2.988), (45, 1.98), (73, 0.972), (100, 0.0)]),
        (WarmStart(), 4, [(0, 0.0)]),
        (GradientRamp(50), 0, [(0, 0.0), (50, 0.0)]),
    ],
)
def test_the_stages_are_the_updates_at_which_a_node_is_reached(schedule, nodes, expected):
    stages = Plan(schedule, nodes).stages()
    assert [(updates, pytest.approx(target.position)) for updates, target in stages] == expected


@given(norms=st.lists(st.floats(0, 10), min_size=1, max_size=5), data=st.data())
def test_the_length_of_a_walk_is_the_sum_of_its_legs(norms, data):
    a, b, c = sorted(data.draw(st.lists(st.floats(0, len(norms)), min_size=3, max_size=3)))
    assert length(norms, a, c) == length(norms, c, a) == pytest.approx(length(norms, a, b) + length(norms, b, c))
    assert length(norms, 0, len(norms)) == pytest.approx(sum(norms))
