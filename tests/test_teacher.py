from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch
from torch import nn
from worlds import Run, clone, difference

import disback_plugin as disback
from disback_plugin.errors import PathError
from disback_plugin.path.delta import NodeSource
from disback_plugin.schedules import Fixed, Ramp
from disback_plugin.teacher import Prefetcher
from disback_plugin.weights.network import ScoreNetwork


@pytest.fixture
def folder(tmp_path):
    run = Run()
    disback.record(run.teacher, run.fake_score, run.fake_step, path=tmp_path / "p", iterations=6, every=2)
    return tmp_path / "p"


def in_thread(monkeypatch, name, action):
    """Do something at each read of a node in one thread."""
    read = NodeSource.read

    def watched(self, *arguments, **options):
        if threading.current_thread().name.startswith(name):
            action()
        return read(self, *arguments, **options)

    monkeypatch.setattr(NodeSource, "read", watched)


def threads():
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("disback")]


def await_threads():
    """Wait until no prefetching thread is left; each ends by itself soon after its result is there."""
    while threads():
        time.sleep(0.001)


@pytest.mark.parametrize("schedule", [Fixed(2, 1), Ramp(5)])
def test_positions_are_the_same_bit_for_bit_with_and_without_prefetching(folder, schedule):
    walks = []
    for prefetch in (False, True):
        run, seen = Run(), []
        scheduler = disback.TrajectoryScheduler(folder, run.teacher, schedule=schedule, prefetch=prefetch)
        scheduler.start()
        for update in range(8):
            seen.append([scheduler.position, clone(dict(run.teacher.state_dict()))])
            if update == 2:
                with scheduler.original_teacher():
                    assert difference(dict(run.teacher.state_dict()), dict(Run().teacher.state_dict())) == []
            scheduler.step()
        walks.append(seen)
        scheduler.restore_teacher()
    assert difference(*walks) == []
    await_threads()


def test_the_next_position_is_decoded_before_the_move(folder, monkeypatch):
    run = Run()
    scheduler = disback.TrajectoryScheduler(folder, run.teacher, schedule=Fixed(2, 1), prefetch=True)
    scheduler.start()
    await_threads()  # the next update stays where it is
    scheduler.step()
    scheduler._teacher._prefetcher._decoding.result()
    in_thread(monkeypatch, "MainThread", lambda: pytest.fail("decoded in the hot path"))
    scheduler.step()
    assert scheduler.position == 1.0


def test_a_slow_read_does_not_delay_the_training_step(folder, monkeypatch):
    run = Run()
    scheduler = disback.TrajectoryScheduler(folder, run.teacher, schedule=Fixed(1, 3), prefetch=True)
    readable = threading.Event()
    in_thread(monkeypatch, "disback-prefetch", readable.wait)
    scheduler.start()  # returns, though nothing can be read
    assert threads() == ["disback-prefetch_0"]
    readable.set()
    scheduler.step()
    assert scheduler.position == 1.0


def test_an_error_in_the_thread_is_raised_at_the_move_and_nothing_is_written(folder, monkeypatch):
    run = Run()
    scheduler = disback.TrajectoryScheduler(folder, run.teacher, schedule=Fixed(1, 3), prefetch=True)

    def broken():
        raise PathError("a disk that is gone", expected="a disk", cure="mount it again")

    with monkeypatch.context() as patch:
        in_thread(patch, "disback-prefetch", broken)
        scheduler.start()
        held = clone(dict(run.teacher.state_dict()))
        with pytest.raises(PathError, match="a disk that is gone"):
            scheduler.step()
    assert difference(dict(run.teacher.state_dict()), held) == []


def test_a_node_that_decodes_to_something_else_is_not_written(folder):
    run = Run()
    scheduler = disback.TrajectoryScheduler(folder, run.teacher, schedule=Fixed(1, 3), prefetch=True)
    scheduler.start()
    held = clone(dict(run.teacher.state_dict()))
    scheduler._teacher._prefetcher._decoding.result()
    state, _ = scheduler._teacher._prefetcher._decoding.result()
    next(iter(state.values())).view(-1)[0] += 1
    scheduler._teacher._prefetcher._decoding = Future()
    scheduler._teacher._prefetcher._decoding.set_result((state, "0" * 32))
    with pytest.raises(PathError, match="decodes to checksum"):
        scheduler.step()
    assert difference(dict(run.teacher.state_dict()), held) == []


def test_prefetching_is_off_for_a_teacher_on_the_host(folder):
    assert disback.TrajectoryScheduler(folder, Run().teacher)._teacher._prefetcher is None


def test_the_memory_of_a_position_is_reused():
    net = ScoreNetwork(nn.Linear(64, 64))
    ahead = Prefetcher(net)
    places = []
    for value in (1.0, 2.0):
        state = {name: torch.full_like(tensor, value) for name, tensor in net.state_dict().items()}
        ahead.begin(value, NodeSource(state, ()))
        decoded, _ = ahead.wait_for(value)
        places.append([tensor.data_ptr() for tensor in decoded.values()])
        ahead.write(decoded)
        assert net.first_parameter()[0, 0] == value
    assert places[0] == places[1]
    assert ahead.wait_for(2.0) is None


def test_a_file_that_changes_after_it_was_prefetched_is_noticed(folder):
    run = Run()
    scheduler = disback.TrajectoryScheduler(folder, run.teacher, schedule=Ramp(6), prefetch=True)
    scheduler.start()
    scheduler._teacher._prefetcher._decoding.result()
    held = clone(dict(run.teacher.state_dict()))
    content = bytearray((folder / "node-003.safetensors").read_bytes())
    content[-3] ^= 1
    (folder / "node-003.safetensors").write_bytes(content)
    with pytest.raises(PathError, match="SHA-256"):
        scheduler.step()
    assert difference(dict(run.teacher.state_dict()), held) == []
    with pytest.raises(disback.DisbackError, match="last move failed"):
        scheduler.wrap(lambda: None)()


@pytest.mark.slow
def test_a_script_that_ends_during_a_prefetch_exits_with_0(folder):
    script = """
import sys, time
import disback_plugin as disback
from disback_plugin.path.delta import NodeSource
from disback_plugin.schedules import Ramp
from worlds import Run
read = NodeSource.read
NodeSource.read = lambda self, *a, **k: (time.sleep(0.02), read(self, *a, **k))[1]
scheduler = disback.TrajectoryScheduler(sys.argv[1], Run().teacher, schedule=Ramp(6), prefetch=True)
scheduler.start()
"""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    assert subprocess.run([sys.executable, "-c", script, str(folder)], env=environment, check=False).returncode == 0


def test_restore_teacher_frees_the_memory(folder):
    scheduler = disback.TrajectoryScheduler(folder, Run().teacher, schedule=Ramp(6), prefetch=True)
    scheduler.start()
    scheduler.step()
    assert scheduler._teacher._prefetcher._memory
    scheduler.restore_teacher()
    assert not scheduler._teacher._prefetcher._memory
