"""The text of a handle: the run's progress, the roles and the timeline."""

from __future__ import annotations

import pytest
from worlds import Run, hooks

import disback_plugin as disback
from disback_plugin.errors import RoleError
from disback_plugin.schedules import Fixed, GradientRamp


def lines(handle):
    return [" ".join(line.split()) for line in repr(handle).splitlines()]


def test_a_handle_shows_the_networks_their_roles_and_the_schedule(tmp_path):
    run = Run()
    weights = sum(p.numel() for p in run.generator.parameters())
    options = {"path": tmp_path, "record": 6, "every": 2, "schedule": Fixed(2, 3)}
    with disback.attach(**run.roles(), **options) as handle:
        run.steps(3)
        shown = lines(handle)
        assert shown[0].startswith(f"<disback recording: position 0 (N = 3, {tmp_path}), Fixed(2, 3), 0 generator")
        assert shown[1].startswith("teacher Score, ")
        assert shown[1].endswith(" weights, torch.float32, cpu")
        assert shown[2].startswith("fake score Score, ")
        assert shown[2].endswith(" weights, torch.float32, cpu; Adam, learning rate 0.01")
        assert shown[3] == f"generator {weights} weights, torch.float32, cpu; Adam, learning rate 0.01"
        assert shown[4:] == [
            "-> recording 3 of 6 fake-score updates, nodes s'_1 to s'_3",
            "generator update 0 teacher at position 2",
            "generator update 2 teacher at position 1",
            "generator update 5 teacher at position 0",
        ]
        run.steps(3 + 2)
        assert lines(handle)[4:] == [
            "recording 6 of 6 fake-score updates, nodes s'_1 to s'_3",
            "generator update 0 teacher at position 2",
            "-> generator update 2 teacher at position 1",
            "generator update 5 teacher at position 0",
        ]
        run.steps(9)
        assert lines(handle)[-1] == "-> generator update 5 teacher at position 0"
    assert lines(handle)[-1].endswith("teacher at position 0")


def test_a_node_that_a_plug_in_keeps_is_shown_to_end_later(tmp_path):
    class Stay:
        @disback.hookimpl
        def disback_should_advance(self, position):
            return False if position == 2 else None

    run = Run()
    options = {"path": tmp_path, "record": 6, "every": 2, "schedule": Fixed(2, 3), "plugins": (Stay(),)}
    with disback.attach(**run.roles(), **options) as handle:
        run.steps(6 + 10)
        # The next update would be the first of node 1.
        assert lines(handle)[-3:] == [
            "-> generator update 0 teacher at position 2",
            "generator update 11 teacher at position 1",
            "generator update 14 teacher at position 0",
        ]


def test_a_node_that_a_plug_in_ended_is_shown_to_have_ended_early(tmp_path):
    class Leave:
        @disback.hookimpl
        def disback_should_advance(self):
            return True

    run = Run()
    options = {"path": tmp_path, "record": 6, "every": 2, "schedule": Fixed(2, 3), "plugins": (Leave(),)}
    with disback.attach(**run.roles(), **options) as handle:
        run.steps(6 + 1)
        assert lines(handle)[-2:] == [
            "-> generator update 1 teacher at position 1",
            "generator update 4 teacher at position 0",
        ]
        run.steps(5)
        assert lines(handle)[-1] == "-> generator update 2 teacher at position 0"


def test_without_a_path_the_timeline_shows_the_gradient_only():
    with disback.attach(**Run().roles(), record=0, schedule=GradientRamp(50)) as handle:
        assert lines(handle)[4:] == [
            "-> generator update 0 teacher at position 0, the generator's gradient times 0.01",
            "generator update 50 teacher at position 0",
        ]


@pytest.mark.parametrize(("steps", "shown"), [(3, "recording 3 of 6"), (8, "generator update 2 teacher at position 0")])
def test_a_detached_handle_says_so_and_shows_no_present_event(tmp_path, steps, shown):
    run = Run()
    with disback.attach(**run.roles(), path=tmp_path, record=6, every=2, schedule=Fixed(2, 3)) as handle:
        run.steps(steps)
        assert lines(handle)[0].startswith(f"<disback {handle.phase}: ")
        assert "->" in repr(handle)
    assert lines(handle)[0].startswith(f"<disback {handle.phase}, detached: position 0 (")
    assert lines(handle)[-1 if steps > 6 else 4].startswith(shown)
    assert "->" not in repr(handle)


@pytest.mark.parametrize("again", ["generator_optimizer", "fake_score_optimizer", "teacher"])
def test_a_handle_that_was_not_kept_is_named_and_can_be_had_and_detached(tmp_path, again):
    run, other = Run(), Run()
    disback.attach(**run.roles(), path=tmp_path / "first", record=2, every=1)
    shared = {again} | ({"fake_score"} if again == "fake_score_optimizer" else set())
    roles = other.roles() | {role: run.roles()[role] for role in shared}
    with pytest.raises(RoleError, match=rf"a {again} that a handle .*first'\).*Handle.attached\(\)"):
        disback.attach(**roles, path=tmp_path / "second")
    (handle,) = (each for each in disback.Handle.attached() if each.path and each.path.folder == tmp_path / "first")
    handle.detach()
    assert hooks(run) == [0, 0, 0, 0]
    disback.attach(**run.roles(), path=tmp_path / "first", record=2, every=1).detach()
