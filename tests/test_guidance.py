"""What depends on the node, as a guidance scale, follows it from the very update that the node is in."""

from __future__ import annotations

import pytest
from worlds import Run

import disback_plugin as disback
from disback_plugin.schedules import Fixed, Ramp


class Guided(Run):
    """A run whose loss reads a guidance scale; it keeps the scale and the position of each loss."""

    def __init__(self):
        super().__init__()
        self.guidance, self.handle, self.read = Guidance(), None, []

    def generator_loss(self):
        if self.handle.phase != "recording":
            self.read.append((self.handle.position, self.guidance.scale))
        return super().generator_loss() * self.guidance.scale

    def attach(self, path, **options):
        self.handle = disback.attach(**self.roles(), path=path, record=3, every=1, plugins=(self.guidance,), **options)
        return self.handle


class Guidance:
    scale = 8.0

    @disback.hookimpl
    def disback_after_node_swapped(self, scheduler, position):
        self.scale = scale_at(position)


def scale_at(position):
    return 1.0 + 7.0 * (1.0 - position / 3)


@pytest.mark.parametrize("schedule", [Fixed(2, 1), Ramp(4)], ids=repr)
def test_a_guidance_scale_is_in_effect_in_the_very_update_that_its_node_is_in(tmp_path, schedule):
    run = Guided()
    with run.attach(tmp_path, schedule=schedule):
        run.steps(3)
        assert run.guidance.scale != 8.0, "in effect before the first update"
        run.steps(6)
    first = [2, 2, 1] if schedule == Fixed(2, 1) else [2.7, 2.025, 1.35]
    assert [position for position, _ in run.read[:3]] == pytest.approx(first)
    assert [scale for _, scale in run.read] == [scale_at(position) for position, _ in run.read]
    assert run.read[-1] == (0.0, 8.0)


@pytest.mark.parametrize("order", ["load_state_dict", "state="])
@pytest.mark.parametrize("moment", [2, 3, 4, 5, 6, 8])
def test_a_guidance_scale_is_right_in_the_first_update_after_a_resume(tmp_path, moment, order):
    whole, first, second = Guided(), Guided(), Guided()
    whole.attach(tmp_path / "whole", schedule=Fixed(2, 1))
    whole.steps(9)
    handle = first.attach(tmp_path / "split", schedule=Fixed(2, 1))
    first.steps(moment)
    saved, state = first.checkpoint(), handle.state_dict()
    handle.path.lock.release()  # as the end of its process does
    if order == "state=":
        second.load(saved)
        second.attach(tmp_path / "split", schedule=Fixed(2, 1), state=state)
    else:
        handle = second.attach(tmp_path / "split", schedule=Fixed(2, 1))
        second.load(saved)
        handle.load_state_dict(state)
    second.steps(9 - moment)
    assert first.read + second.read == whole.read
