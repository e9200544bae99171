"""What only real processes show: a run killed in the middle, and several ranks."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from worlds import Run, difference

import disback_plugin as disback
from disback_plugin.schedules import Ramp

HERE = Path(__file__).parent

TRAIN = """
import sys, os, json, signal, torch
sys.path.insert(0, {here!r})
torch.set_num_threads(1)
from worlds import Run
import disback_plugin as disback
from disback_plugin.schedules import Ramp

folder, steps, kill_at = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
run = Run()
handle = disback.attach(**run.roles(), path=folder + "/path", record=5, every=2, schedule=Ramp(6))
checkpoint = folder + "/checkpoint.pt"
done = 0
if os.path.exists(checkpoint):
    saved = torch.load(checkpoint, weights_only=True)
    run.load(saved["trainer"])
    handle.load_state_dict(saved["disback"])
    done = saved["done"]
for step in range(done + 1, steps + 1):
    run.step()
    if step % 3 == 0:
        torch.save({{"trainer": run.checkpoint(), "disback": handle.state_dict(), "done": step}}, checkpoint + ".new")
        os.replace(checkpoint + ".new", checkpoint)
    if step == kill_at:
        os.kill(os.getpid(), signal.SIGKILL)
torch.save({{"trainer": run.checkpoint(), "teacher": run.teacher.state_dict()}}, folder + "/end.pt")
"""


def train(folder, *, steps, kill_at=0):
    script = TRAIN.format(here=str(HERE))
    return subprocess.run([sys.executable, "-c", script, str(folder), str(steps), str(kill_at)], check=False).returncode


@pytest.mark.slow
@pytest.mark.parametrize("kill_at", [4, 8])  # while recording; on the ramp
def test_a_killed_run_resumed_in_a_new_process_equals_the_uninterrupted_one_bit_for_bit(tmp_path, kill_at):
    whole = Run()
    with disback.attach(**whole.roles(), path=tmp_path / "whole", record=5, every=2, schedule=Ramp(6)):
        whole.steps(13)
        teacher = whole.teacher.state_dict()
        assert train(tmp_path, steps=13, kill_at=kill_at) == -signal.SIGKILL
        assert train(tmp_path, steps=13) == 0
        end = torch.load(tmp_path / "end.pt", weights_only=True)
        assert difference(end["trainer"], whole.checkpoint()) == []
        assert difference(dict(end["teacher"]), dict(teacher)) == []
    nodes = [disback.DegradationPath(tmp_path / name).nodes for name in ("whole", "path")]
    assert nodes[0] == nodes[1]


RANK = """
import gc, sys, json, time, torch, torch.distributed as dist
sys.path.insert(0, {here!r})
torch.set_num_threads(1)
from torch.nn.parallel import DistributedDataParallel
from worlds import Run
import disback_plugin as disback
from disback_plugin.path.manifest import Manifest
from disback_plugin.schedules import Fixed
from disback_plugin.weights.network import ScoreNetwork

folder = sys.argv[1]
dist.init_process_group("gloo")
rank = dist.get_rank()
run = Run()
run.stream.manual_seed(rank)
original = ScoreNetwork(run.teacher).fingerprint()
teacher = run.teacher
run.fake_score = DistributedDataParallel(run.fake_score, broadcast_buffers=True)
run.generator = DistributedDataParallel(run.generator)
run.optimizer_g = torch.optim.Adam(run.generator.parameters(), lr=1e-2)
run.optimizer_f = torch.optim.Adam(run.fake_score.parameters(), lr=1e-2)
slow = int(sys.argv[2])
if rank == slow:  # what this rank reads is late: rank 0 must not be seen half way, or too far
    read = Manifest.read.__func__
    Manifest.read = classmethod(lambda cls, folder: (time.sleep(0.3), read(cls, folder))[1])
dist.barrier()
time.sleep(0.3 * (rank == slow))
handle = disback.attach(**run.roles(), path=folder + "/path", record=4, every=2, schedule=Fixed(2))
seen = []
for _ in range(8):
    run.step()
    seen.append([handle.phase, handle.position, handle.generator_updates, ScoreNetwork(teacher).fingerprint()])
end = ScoreNetwork(run.generator).fingerprint()
handle.detach()
result = {{"seen": seen, "generator": end, "restored": ScoreNetwork(teacher).fingerprint() == original}}
open(f"{{folder}}/rank{{rank}}.json", "w").write(json.dumps(result))
dist.barrier()  # a rank that is gone takes the other's threads with it
del run, handle  # and what holds a process group is let go before it: its threads end in any order otherwise
gc.collect()
dist.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize("slow", [0, 1])
def test_two_ranks_walk_together_and_rank_0_writes_the_path(tmp_path, slow):
    script = tmp_path / "rank.py"
    script.write_text(RANK.format(here=str(HERE)))
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node=2",
        "--standalone",
        script,
        tmp_path,
        str(slow),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    out = subprocess.run(launch, capture_output=True, text=True, check=False, env=environment, timeout=120)
    assert out.returncode == 0, out.stderr[-3000:]
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    assert first["restored"]
    assert [position for _, position, _, _ in first["seen"]] == [0, 0, 0, 1, 1, 0, 0, 0]
    path = disback.DegradationPath(tmp_path / "path")
    path.verify()
    assert [node.iteration for node in path.nodes] == [2, 4]


GUIDE = (HERE.parent / "disback_plugin" / "weights" / "README.md").read_text()
SCRIPT = re.search(r"```py\n(.*?)```", GUIDE, flags=re.DOTALL).group(1)
COMMANDS = re.findall(r"^((?:torchrun|accelerate launch) .* train\.py)$", GUIDE, flags=re.MULTILINE)


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_the_launches_of_the_guide_run_as_they_are_written(tmp_path, command):
    (tmp_path / "train.py").write_text(SCRIPT)
    # The very package that is tested, with this interpreter's commands.
    found = {"PYTHONPATH": str(HERE.parent), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    environment = os.environ | found | {"OMP_NUM_THREADS": "1"}
    out = subprocess.run(
        command.split(), cwd=tmp_path, capture_output=True, text=True, check=False, env=environment, timeout=120
    )
    assert out.returncode == 0, out.stderr[-3000:]
    assert "disback done" in out.stdout
    path = disback.DegradationPath(tmp_path / "runs" / "path")
    path.verify()
    assert len(path) == 3


def test_the_guide_shows_both_launchers():
    assert {command.split()[0] for command in COMMANDS} == {"torchrun", "accelerate"}
