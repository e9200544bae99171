from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from disback_plugin.errors import OptionError
from disback_plugin.schedules import Auto, Fixed, GradientRamp, Ramp, Target, WarmStart, parse

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
def test_numbers_out_of_their_domain_are_refused(wrong):
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
