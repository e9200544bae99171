"""Positions of a path in a teacher: moves that fail, and the length of a move."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from worlds import Run, difference

import disback_plugin as disback
from disback_plugin.errors import PathError, StateError
from disback_plugin.path.delta import NodeSource
from disback_plugin.teacher import TeacherWriter
from disback_plugin.weights.network import ScoreNetwork


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A path of nodes 0 to 4."""
    run = Run()
    return disback.record(
        run.teacher, run.fake_score, run.fake_step, path=tmp_path_factory.mktemp("recorded"), iterations=8, every=2
    )


@given(positions=st.lists(st.floats(0, 4), min_size=3, max_size=3))
def test_the_distance_between_two_positions_is_the_sum_of_its_legs(recorded, positions):
    teacher = TeacherWriter(ScoreNetwork(Run().teacher), recorded)
    a, b, c = sorted(positions)
    legs = teacher.distance(a, b) + teacher.distance(b, c)
    assert teacher.distance(a, c) == teacher.distance(c, a) == pytest.approx(legs)
    assert teacher.distance(4.0, 0.0) == pytest.approx(sum(node.delta_norm for node in recorded.nodes))


@pytest.mark.parametrize(
    ("owner", "function", "held"), [(disback.DegradationPath, "source", 3), (NodeSource, "read", 0)]
)
def test_a_move_that_fails_leaves_its_node_or_node_0_and_has_to_be_repeated(
    recorded, monkeypatch, owner, function, held
):
    run, errors = Run(), [PathError("a disk that is gone", expected="a disk", cure="mount it again")]
    teacher = TeacherWriter(ScoreNetwork(run.teacher), recorded)
    teacher.move_to(3.0)
    whole = getattr(owner, function)

    def fails_once(*arguments, **options):
        if errors:
            raise errors.pop()
        return whole(*arguments, **options)

    monkeypatch.setattr(owner, function, fails_once)
    with pytest.raises(PathError, match="a disk that is gone"):
        teacher.move_to(2.0)
    assert teacher.position == held
    assert difference(ScoreNetwork(run.teacher).state_dict(), recorded[held]) == []
    with pytest.raises(StateError, match="last move failed"):
        teacher.validate(0)
    teacher.move_to(2.0)
    teacher.validate(0)
    assert difference(ScoreNetwork(run.teacher).state_dict(), recorded[2]) == []
