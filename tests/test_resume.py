"""Interrupted and resumed is the same as never interrupted: weights, positions, counters and random streams."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from ranks import returned
from sharded_runs import Sharded, weights_of
from torch import nn
from worlds import Run, clone, difference

import disback_plugin as disback
from disback_plugin.errors import StateError
from disback_plugin.path.degradation_path import DegradationPath
from disback_plugin.path.manifest import Recording
from disback_plugin.progress import VERSION, upgrade_state
from disback_plugin.schedules import Ramp
from disback_plugin.weights.network import ScoreNetwork

PLAN = {"record": 5, "every": 2, "schedule": Ramp(6)}
STEPS = 14


def all_of(run, handle):
    """Everything that a run is, as it could be compared."""
    return run.checkpoint() | {
        "teacher": clone(dict(run.teacher.state_dict())),
        "state": {k: v for k, v in handle.state_dict().items() if k != "path"},
        "position": handle.position,
    }


def mortal(folder, delay):
    """Train to the end with a checkpoint after each second step, unless killed after `delay` seconds of training.

    Returns the seconds of training.
    """
    torch.set_num_threads(1)
    run, file, done = Run(), Path(folder, "checkpoint.pt"), 0
    if file.exists():
        saved = torch.load(file, weights_only=True)
        run.load(saved["trainer"])
        handle = disback.attach(**run.roles(), path=folder + "/path", state=saved["disback"], **PLAN)
        done = saved["done"]
    else:
        shutil.rmtree(folder + "/path", ignore_errors=True)
        handle = disback.attach(**run.roles(), path=folder + "/path", **PLAN)
    if delay is not None:
        killer = threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL))
        killer.daemon = True
        killer.start()
    start = time.perf_counter()
    for step in range(done + 1, STEPS + 1):
        run.step()
        if step % 2 == 0:
            saved = {"trainer": run.checkpoint(), "disback": handle.state_dict(), "done": step}
            torch.save(saved, f"{file}.new")
            os.replace(f"{file}.new", file)
    end, seconds = all_of(run, handle), time.perf_counter() - start
    if delay is not None:
        killer.cancel()
    torch.save(end, folder + "/end.pt")
    return seconds


def killed_and_resumed(nursery, folder, kills, luck):
    (folder / "whole").mkdir()
    (seconds,) = returned(nursery.play(mortal, 1, str(folder / "whole"), None))
    expected = torch.load(folder / "whole" / "end.pt", weights_only=True)
    seen, at, number = 0, set(), 0
    while seen < kills:
        number += 1
        here = folder / f"{number}"
        here.mkdir()
        while True:
            (result,) = nursery.play(mortal, 1, str(here), luck.random() * seconds if seen < kills else None)
            if not isinstance(result, dict):
                break
            assert result["status"] == -signal.SIGKILL, result
            seen += 1
            file = here / "checkpoint.pt"
            at.add(torch.load(file, weights_only=True)["done"] if file.exists() else 0)
        assert difference(torch.load(here / "end.pt", weights_only=True), expected) == []
        content = [{f.name: f.read_bytes() for f in (folder / w / "path").iterdir()} for w in ("whole", f"{number}")]
        assert content[0] == content[1]
    return at


@pytest.mark.slow
def test_a_run_killed_again_and_again_equals_the_uninterrupted_one_bit_for_bit(nursery, tmp_path):
    assert len(killed_and_resumed(nursery, tmp_path, 6, random.Random(0))) >= 2


@pytest.mark.slow
def test_fifty_kills_leave_the_uninterrupted_run_bit_for_bit(nursery, tmp_path):
    assert len(killed_and_resumed(nursery, tmp_path, 50, random.Random(1))) >= 5


# -- sharded, with torch.distributed.checkpoint -----------------------------------------------------------------------


def with_dcp(folder, first, last):
    """Train from one step to another; what was before comes from a distributed checkpoint."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

    run = Sharded("fsdp2")
    handle = disback.attach(**run.roles(), path=folder + "/path", record=4, every=2, schedule="ramp:4")
    pairs = {"generator": (run.generator, run.optimizer_g), "fake_score": (run.fake_score, run.optimizer_f)}

    def state():
        parts = {
            name: dict(zip(("model", "optimizer"), get_state_dict(*pair), strict=True)) for name, pair in pairs.items()
        }
        return parts | {"disback": handle.state_dict(), "stream": run.stream.get_state()}

    if first:
        for optimizer in (run.optimizer_g, run.optimizer_f):  # Adam's moments have to be there to be loaded
            assert not optimizer.state
        saved = state()
        dcp.load(saved, checkpoint_id=f"{folder}/{first}")
        for name, (module, optimizer) in pairs.items():
            set_state_dict(
                module, optimizer,
                model_state_dict=saved[name]["model"], optim_state_dict=saved[name]["optimizer"],
            )  # fmt: skip
        run.stream.set_state(saved["stream"])
        handle.load_state_dict(saved["disback"])
    for _ in range(first, last):
        run.step()
    if not Path(f"{folder}/{last}").exists():
        dcp.save(state(), checkpoint_id=f"{folder}/{last}")
    # Of s_phi and of its gradients each rank has its own part.
    plain = {key: value for key, value in handle.state_dict().items() if key not in ("fake_score", "fit")}
    return {"generator": weights_of(run.generator), "fake": weights_of(run.fake_score), "state": plain}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_sharded_run_resumes_from_a_distributed_checkpoint_bit_for_bit(nursery, tmp_path):
    ends = returned(nursery.play(with_dcp, 2, str(tmp_path), 0, 6))
    uninterrupted = returned(nursery.play(with_dcp, 2, str(tmp_path), 6, 9))
    shutil.rmtree(tmp_path / "path")
    whole_run = returned(nursery.play(with_dcp, 2, str(tmp_path), 0, 9))
    assert ends[0] == ends[1]
    assert uninterrupted == whole_run


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


# -- in any order -----------------------------------------------------------------------------------------------------


class AnyOrder(RuleBasedStateMachine):
    """Attach, step, save, load, detach, look at the original teacher, crash: always where the straight run was."""

    straight = None

    @initialize()
    def begin(self):
        self.folder = Path(tempfile.mkdtemp())
        if AnyOrder.straight is None:
            run, seen = Run(), []
            with disback.attach(**run.roles(), path=self.folder / "straight", **PLAN) as handle:
                for _ in range(STEPS + 1):
                    seen.append(clone(all_of(run, handle)))
                    run.step()
            AnyOrder.straight = seen
        self.saved, self.done = None, 0
        self.fresh()

    def fresh(self):
        """New objects, as in a new process: from the last checkpoint, or from nothing."""
        self.run = Run()
        if self.saved is None:
            shutil.rmtree(self.folder / "path", ignore_errors=True)
            self.done = 0
            self.handle = disback.attach(**self.run.roles(), path=self.folder / "path", **PLAN)
            return
        self.done, checkpoint, state, teacher = self.saved
        self.run.load(checkpoint)
        self.run.teacher.load_state_dict(teacher)
        self.handle = disback.attach(**self.run.roles(), path=self.folder / "path", state=state, **PLAN)

    @precondition(lambda self: self.done < STEPS)
    @rule(count=st.integers(1, 3))
    def step(self, count):
        for _ in range(min(count, STEPS - self.done)):
            self.run.step()
            self.done += 1

    @rule()
    def save(self):
        teacher = clone(dict(self.run.teacher.state_dict()))
        self.saved = self.done, self.run.checkpoint(), self.handle.state_dict(), teacher

    @precondition(lambda self: self.saved is not None)
    @rule()
    def load(self):
        self.done, checkpoint, state, teacher = self.saved
        self.run.load(checkpoint)
        self.run.teacher.load_state_dict(teacher)
        self.handle.load_state_dict(state)

    @rule()
    def crash(self):
        self.handle._session.hooks.remove()  # the process is gone: nothing is put back
        self.fresh()

    @rule()
    def detach_and_attach_again(self):
        state, checkpoint = self.handle.state_dict(), self.run.checkpoint()
        self.handle.detach()
        assert difference(clone(dict(self.run.teacher.state_dict())), self.straight[0]["teacher"]) == []
        assert difference(self.run.checkpoint(), checkpoint) == []
        self.handle = disback.attach(**self.run.roles(), path=self.folder / "path", state=state, **PLAN)

    @rule()
    def look_at_the_original_teacher(self):
        with self.handle.original_teacher():
            assert difference(clone(dict(self.run.teacher.state_dict())), self.straight[0]["teacher"]) == []

    @invariant()
    def it_is_where_the_straight_run_was(self):
        assert difference(all_of(self.run, self.handle), self.straight[self.done]) == []

    def teardown(self):
        if hasattr(self, "handle"):
            self.handle.detach()
            shutil.rmtree(self.folder)


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=12, stateful_step_count=12, deadline=None)
