"""Two runs on one folder: one is refused at once; a crash leaves no lock; readers and finished paths need none."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from worlds import Run

import disback_plugin as disback
from disback_plugin.errors import PathError, StateError
from disback_plugin.path.degradation_path import DegradationPath
from disback_plugin.path.lock import FolderLock
from disback_plugin.path.manifest import Recording

PLAN = {"record": 4, "every": 2, "schedule": "ramp:4"}


def test_a_second_run_on_a_folder_is_refused_while_the_first_records(tmp_path):
    one, other = Run(), Run()
    with disback.attach(**one.roles(), path=tmp_path, **PLAN) as handle:
        with pytest.raises(PathError, match=r"another run that records into .*detach\(\)"):
            disback.attach(**other.roles(), path=tmp_path, **PLAN)
        one.steps(3)
        DegradationPath(tmp_path).verify()  # a reader beside the writer
        one.steps(3)
        assert handle.phase == "backtracking"
        with disback.attach(**other.roles(), path=tmp_path, **PLAN) as second:  # the path is finished
            other.steps(2)
            assert second.phase == "backtracking"
        one.steps(4)
        assert handle.phase == "done"


def test_a_recording_by_hand_is_refused_beside_another(tmp_path):
    run = Run()
    with disback.attach(**run.roles(), path=tmp_path, **PLAN):
        other = Run()
        with pytest.raises(PathError, match="another run that records"):
            disback.record(other.teacher, other.fake_score, other.fake_step, path=tmp_path, iterations=4, every=2)


@pytest.mark.parametrize("how", ["detach", "an error in record", "an error in attach", "a lost path"])
def test_the_end_of_a_run_frees_the_folder(tmp_path, how):
    run = Run()
    if how == "detach":
        handle = disback.attach(**run.roles(), path=tmp_path, **PLAN)
        run.step()
        handle.detach()
    elif how == "an error in record":

        def interrupted():
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt) as error:
            disback.record(run.teacher, run.fake_score, interrupted, path=tmp_path, iterations=4, every=2)
        assert error.tb is not None  # its frames are alive
    elif how == "an error in attach":
        with disback.attach(**run.roles(), path=tmp_path, **PLAN) as handle:
            state = handle.state_dict() | {"nodes": "others"}
        with pytest.raises(StateError) as error:
            disback.attach(**run.roles(), path=tmp_path, **PLAN, state=state)
        assert error.tb is not None
    else:
        DegradationPath.create(tmp_path, {"w": torch.zeros(1)}, Recording(4, 2))
    FolderLock(tmp_path).acquire()


def test_a_run_of_the_same_process_that_a_state_continues_gives_the_folder_up(tmp_path):
    run, late = Run(), Run()
    handle = disback.attach(**run.roles(), path=tmp_path, **PLAN)
    run.steps(3)
    late.load(run.checkpoint())
    with disback.attach(**late.roles(), path=tmp_path, **PLAN, state=handle.state_dict()) as resumed:
        late.steps(2)
        assert resumed.phase == "backtracking"


HOLDER = """
import os, sys, time
from pathlib import Path
from disback_plugin.path.lock import FolderLock
lock = FolderLock(Path(sys.argv[1]))
lock.acquire()
if sys.argv[2] == "worker" and os.fork() == 0:  # a worker of a data loader, which outlives the killed run
    print("worker", flush=True)
    time.sleep(60)
    os._exit(0)
print("locked", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("kind", ["alone", "worker"])
def test_a_killed_run_leaves_no_lock(tmp_path, kind):
    command = [sys.executable, "-c", HOLDER, str(tmp_path), kind]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as holder:
        try:
            for _ in range(1 + (kind == "worker")):
                assert holder.stdout.readline()
            lock = FolderLock(tmp_path)
            with pytest.raises(PathError, match="another run"):
                lock.acquire()
            holder.send_signal(signal.SIGKILL)
            deadline = time.monotonic() + 30
            while holder.poll() is None and time.monotonic() < deadline:
                time.sleep(0.01)
            lock.acquire()
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(holder.pid, signal.SIGKILL)


def test_a_lock_that_another_run_has_just_removed_is_not_trusted(tmp_path, monkeypatch):
    import fcntl

    first, flock = FolderLock(tmp_path), fcntl.flock
    first.acquire()

    def removed(held, how):
        monkeypatch.setattr(fcntl, "flock", flock)
        first.release()  # between the other's open and its lock
        flock(held, how)

    monkeypatch.setattr(fcntl, "flock", removed)
    second, third = FolderLock(tmp_path), FolderLock(tmp_path)
    second.acquire()
    with pytest.raises(PathError):
        third.acquire()
    second.release()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_without_locks_is_used_and_said_once(tmp_path, monkeypatch, caplog):
    import fcntl

    def unknown(held, how):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", unknown)
    run = Run()
    with disback.attach(**run.roles(), path=tmp_path, **PLAN):
        run.steps(6)
    said = [message for message in caplog.messages if "cannot lock files" in message]
    assert len(said) == 1
