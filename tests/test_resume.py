"""Interrupted and resumed is the same as never interrupted: weights, positions, counters and random streams."""

from __future__ import annotations

import os
import random
import shutil
import signal
import tempfile
import threading
import time
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from ranks import returned
from sharded_runs import Sharded, weights_of
from worlds import Run, all_of, clone, difference

import disback_plugin as disback
from disback_plugin.schedules import Ramp

PLAN = {"record": 5, "every": 2, "schedule": Ramp(6)}

STEPS = 14


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
