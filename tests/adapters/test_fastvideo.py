"""FastVideo's trainer with the callback of its adapter, saved and resumed by torch's distributed checkpoint."""

from __future__ import annotations

import itertools

import pytest
from worlds import clone, difference

import disback_plugin as disback
from disback_plugin.errors import RoleError
from disback_plugin.testing import check_adapter

OPTIONS = {"record": 4, "every": 2, "schedule": "ramp:4"}


@pytest.fixture
def fastvideo(stand_in):
    return stand_in("fastvideo")


def everything(method):
    state = {role: getattr(method, role).transformer.state_dict() for role in ("student", "teacher", "critic")}
    return clone(state | {"optimizer": method._student_optimizer.state_dict()})


@pytest.mark.filterwarnings("ignore:.*torch.distributed is:UserWarning", "ignore:TypedStorage:UserWarning")
@pytest.mark.parametrize("moment", [3, 9])
def test_a_run_that_was_killed_resumes_in_either_stage(fastvideo, tmp_path, moment):
    from disback_adapters.fastvideo import callback

    ends = []
    for folder in ("whole", "split"):
        stops = [16] if folder == "whole" else [moment, 16]
        for stop in stops:
            method, own = fastvideo.DMD2Method(), callback(str(tmp_path / folder / "path"), **OPTIONS)
            start, teacher = clone(method.student.transformer.state_dict()), everything(method)["teacher"]
            trainer = fastvideo.Trainer(own, tmp_path / folder / "checkpoints")
            if stop == moment:
                own.on_train_end = lambda *args, **kwargs: None  # killed
            trainer.run(method, stop, save_at=[moment])
            if stop == 3:
                assert own.handle.phase == "recording"
                assert difference(method.student.transformer.state_dict(), start) == []
        assert own.handle.phase == "done"
        assert own.handle.fake_score_updates == 16
        ends.append(everything(method))
        assert difference(ends[-1]["teacher"], teacher) == []
    assert difference(*ends) == []


def test_a_method_of_fastvideo_needs_one_statement(fastvideo):
    def make():
        method, steps = fastvideo.DMD2Method(interval=1), itertools.count(1)
        return method, lambda: method.step(next(steps))

    check_adapter("fastvideo", make)


def test_a_method_without_a_critic_is_refused_with_the_reason(fastvideo, tmp_path):
    with pytest.raises(RoleError, match="DMD2Method without teacher or critic"):
        disback.attach(fastvideo.DMD2Method(critic=False), adapter="fastvideo", path=tmp_path)
