"""Saved states: which are recognised, translated and refused, and other ways to keep one."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from ranks import returned
from sharded_runs import Sharded
from torch import nn
from worlds import Run, all_of, clone, difference

import disback_plugin as disback
from disback_plugin.errors import StateError
from disback_plugin.path.degradation_path import DegradationPath
from disback_plugin.path.manifest import Recording
from disback_plugin.progress import VERSION, upgrade_state
from disback_plugin.schedules import Ramp
from disback_plugin.weights.network import ScoreNetwork

PLAN = {"record": 5, "every": 2, "schedule": Ramp(6)}


def marks(folder, ranks):
    """Return this number of processes' mark of one network, and whether the network bears the marks of others."""
    run = Sharded("fsdp2" if ranks > 1 else "one")
    role = ScoreNetwork(run.fake_score)
    known = [Path(folder, name).read_text() for name in sorted(os.listdir(folder))]
    bears = [role.matches_checksum(mark) for mark in known]
    with torch.no_grad():
        run.fake_score.inner[2].bias.add_(1)
    return {"mark": ScoreNetwork(Sharded("fsdp2" if ranks > 1 else "one").fake_score).local_checksum(), "bears": bears,
            "bears now": [role.matches_checksum(mark) for mark in known]}  # fmt: skip


@pytest.mark.slow
def test_any_number_of_processes_recognises_the_weights_of_a_saved_moment(nursery, tmp_path):
    for ranks in (1, 2, 3):
        for rank, seen in enumerate(returned(nursery.play(marks, ranks, str(tmp_path), ranks))):
            Path(tmp_path, f"{ranks}-{rank}").write_text(seen["mark"])
            assert all(seen["bears"]), seen
            # A shard that does not hold what was changed cannot tell.
            assert len(seen["bears"]) == 0 or not all(seen["bears now"]), seen


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("moment", [3, 6])
def test_a_checkpoint_that_rounds_the_fake_score_is_recognised_and_named(tmp_path, caplog, dtype, moment):
    first, second = Run(), Run()
    options = {"path": tmp_path, "record": 4, "every": 2, "schedule": "ramp:4"}
    handle = disback.attach(**first.roles(), **options)
    first.steps(moment)
    saved, state, position = first.checkpoint(), handle.state_dict(), handle.position
    floating = {n: t.to(dtype) if t.is_floating_point() else t for n, t in saved["fake_score"].items()}
    second.load(saved | {"fake_score": floating})
    with disback.attach(**second.roles(), **options, state=state) as handle:
        assert handle.position == position
        second.steps(6)
        assert handle.phase == "done"
    assert "rounded to half precision" in caplog.text


def test_another_checkpoint_is_refused_rounded_or_not(tmp_path):
    first, second = Run(), Run()
    options = {"path": tmp_path, "record": 4, "every": 2, "schedule": "ramp:4"}
    handle = disback.attach(**first.roles(), **options)
    first.steps(3)
    state = handle.state_dict()
    first.steps(1)
    second.load(first.checkpoint())
    second.fake_score.bfloat16().float()
    with pytest.raises(StateError, match="not those of the saved moment"):
        disback.attach(**second.roles(), **options, state=state)


@pytest.mark.parametrize("own", [Ramp(np.int64(4)), Ramp(np.float64(4.0)), Ramp(4)])
@pytest.mark.parametrize("saved", ["4", '"np.int64(4)"', "4.0"])
def test_a_schedule_is_known_by_the_values_of_its_numbers(tmp_path, own, saved):
    first, second = Run(), Run()
    handle = disback.attach(**first.roles(), path=tmp_path, record=2, every=1, schedule=Ramp(4))
    first.steps(4)
    state = handle.state_dict()
    state["schedule"] = state["schedule"].replace('"updates": 4', f'"updates": {saved}')
    second.load(first.checkpoint())
    with disback.attach(**second.roles(), path=tmp_path, record=2, every=1, schedule=own, state=state) as handle:
        second.step()
        assert json.loads(json.dumps(handle.state_dict()))["generator_updates"] == 3


# -- other ways to keep a state ---------------------------------------------------------------------------------------


def test_accelerate_saves_and_loads_the_handles_state(tmp_path):
    from accelerate import Accelerator

    def prepared(path):
        run = Run()
        accelerator = Accelerator(cpu=True)
        run.fake_score, run.generator, run.optimizer_f, run.optimizer_g = accelerator.prepare(
            run.fake_score, run.generator, run.optimizer_f, run.optimizer_g
        )
        handle = disback.attach(**run.roles(), path=path, **PLAN)
        accelerator.register_for_checkpointing(handle)
        return run, accelerator, handle

    run, accelerator, handle = prepared(tmp_path / "path")
    run.steps(8)
    accelerator.save_state(tmp_path / "state")
    stream = run.stream.get_state()
    run.steps(3)
    expected = all_of(run, handle)
    handle.detach()
    again, accelerator, other = prepared(tmp_path / "path")
    accelerator.load_state(tmp_path / "state")
    again.stream.set_state(stream)
    again.steps(3)
    assert difference(all_of(again, other), expected) == []
    other.detach()


def test_a_run_goes_on_without_the_plug_in_as_the_readme_says(tmp_path):
    run = Run()
    handle = disback.attach(**run.roles(), path=tmp_path / "path", **PLAN)
    original = clone(dict(run.teacher.state_dict()))
    run.steps(8)
    checkpoint, active = run.checkpoint(), clone(dict(run.teacher.state_dict()))
    handle.detach()
    assert difference(active, original)
    plain = Run()  # a new process, without the plug-in
    plain.load(checkpoint)
    plain.teacher.load_state_dict(active)  # of a trainer whose checkpoint holds the teacher
    path = disback.DegradationPath.from_pretrained(tmp_path / "path")
    disback.ScoreNetwork(plain.teacher).load_state_dict(path[0])
    assert difference(dict(plain.teacher.state_dict()), original) == []


class Golden(nn.Module):
    def __init__(self, first):
        super().__init__()
        self.w = nn.Parameter(torch.arange(first, first + 8, dtype=torch.float32).view(2, 4) / 8)


def golden(folder):
    """Return the path and the roles of a state that version 1 wrote, on numbers that are the same everywhere."""
    teacher, fake, generator = Golden(0), Golden(0), Golden(3)
    path = DegradationPath.create(folder, ScoreNetwork(teacher).full_state(), Recording(2, 1, "int8"))
    for iteration in (1, 2):
        path.append({"w": teacher.w.detach() + iteration * 0.5}, iteration=iteration)
    path.finish()
    fake.load_state_dict({"w": teacher.w.detach() + 7})
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.125) for net in (generator, fake)]
    return path, {
        "teacher": teacher, "fake_score": fake,
        "generator_optimizer": optimizers[0], "fake_score_optimizer": optimizers[1],
    }  # fmt: skip


GOLDEN = {
    "version": 1,
    "fit": "",
    "schedule": "Fixed(3)",
    "phase": "backtracking",
    "recording_iteration": 0,
    "generator_updates": 2,
    "plan_updates": 2,
    "node_since": 0,
    "fake_score_updates": 5,
    "restore": "",
    "path": "7e4707188dac1f3a1a05cb36389002dd7c9788f8e75abd9c2b11920ddc3eb690",
    "nodes": "95ee0c9e3e24049f2eb9e50d6cc36a7310b4c2ee8913b39ebe64c7d2c33e34d2",
    "fake_score": "43feb783275b5356f694d83c053e77ad",
}


def test_a_state_of_version_1_is_loaded_and_one_of_a_newer_version_is_refused(tmp_path):
    path, roles = golden(tmp_path / "path")
    handle = disback.attach(**roles, path=path, schedule="fixed:3", state=GOLDEN)
    assert (handle.position, handle.generator_updates, handle.fake_score_updates) == (1.0, 2, 5)
    state = handle.state_dict()
    assert state.keys() == upgrade_state(GOLDEN).keys()
    same = ("path", "nodes", "phase", "schedule_step", "node_since", "restore", "fake_score")
    assert {key: state[key] for key in same} == {key: upgrade_state(GOLDEN)[key] for key in same}
    assert (state["version"], state["recorded"]) == (VERSION, 2)
    handle.load_state_dict(GOLDEN)
    assert handle.state_dict() == state
    with pytest.raises(StateError, match="a state of version 3; expected at most 2; to mend it, upgrade"):
        handle.load_state_dict(state | {"version": 3})
    handle.detach()


@pytest.mark.parametrize("moment", [3, 7, 13])
def test_a_state_of_version_1_is_translated_in_every_phase(tmp_path, moment):
    names = {"recorded": "recording_iteration", "schedule_step": "plan_updates"}
    run = Run()
    with disback.attach(**run.roles(), path=tmp_path / "path", **PLAN) as handle:
        run.steps(moment)
        state = handle.state_dict()
        old = {names.get(key, key): value for key, value in state.items()}
        old |= {"version": 1, "schedule": repr(PLAN["schedule"])}
        if state["phase"] != "recording":
            old["recording_iteration"] = 0
        handle.load_state_dict(old)
        assert handle.state_dict() == state


def test_a_key_that_a_later_version_adds_to_a_state_is_ignored(tmp_path):
    run = Run()
    with disback.attach(**run.roles(), path=tmp_path / "path", **PLAN) as handle:
        run.steps(7)
        state = handle.state_dict()
        handle.load_state_dict(state | {"news": 1})
        assert handle.state_dict() == state


@pytest.mark.parametrize(
    "change", [{"phase": "resting"}, {"recorded": -1}, {"node_since": 99}, {"generator_updates": 1.0}], ids=repr
)
def test_a_state_with_a_value_out_of_its_domain_is_refused_and_changes_nothing(tmp_path, change):
    run = Run()
    with disback.attach(**run.roles(), path=tmp_path / "path", **PLAN) as handle:
        run.steps(7)
        before = all_of(run, handle)
        with pytest.raises(StateError, match=next(iter(change))):
            handle.load_state_dict(handle.state_dict() | change)
        assert difference(all_of(run, handle), before) == []


def test_a_state_edited_to_the_recording_phase_is_refused_without_a_path():
    with disback.attach(**Run().roles(), record=0) as handle:
        state = handle.state_dict()
        with pytest.raises(StateError, match="'recording', without a path"):
            handle.load_state_dict(state | {"phase": "recording"})
        assert handle.state_dict() == state


def test_a_state_saved_after_s_phi_went_on_beyond_the_last_node_resumes_as_the_run_went_on(tmp_path):
    whole = Run()
    with disback.attach(**whole.roles(), path=tmp_path, **PLAN) as handle:
        for _ in range(7):  # node N is saved after five of them
            whole.fake_step()
        saved, state = clone(whole.checkpoint()), handle.state_dict()
        assert state["phase"] == "recording"
        whole.generator_step()
        ended = all_of(whole, handle)
    resumed = Run()
    with disback.attach(**resumed.roles(), path=tmp_path, **PLAN) as handle:
        resumed.load(saved)
        handle.load_state_dict(state)
        resumed.generator_step()
        assert difference(all_of(resumed, handle), ended) == []
