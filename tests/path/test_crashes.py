"""Recordings killed at any moment: what is left opens, verifies, and goes on to the very path of an undisturbed run."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

# One process imports torch once and forks the recordings, each of which it kills at a random moment: again and again,
# until one gets to its end. A fork has no memory of the one before it: all that survives is on disk.
NURSERY = """
import hashlib, json, logging, os, random, signal, sys, threading, time
from pathlib import Path
import torch
import torch._dynamo  # a first optimizer step would import it, in every fork anew
from torch import nn
import disback_plugin as disback
from tqdm import tqdm

# By default all forks share one semaphore, which a fork that is killed while it holds it never releases.
tqdm.set_lock(threading.RLock())
tqdm.monitor_interval = 0  # no thread that could hold a lock in the moment of a fork
torch.set_num_threads(1)
logging.disable(logging.CRITICAL)
folder, wanted = Path(sys.argv[1]), int(sys.argv[2])
luck = random.Random(int(sys.argv[3]))
CODECS = ["int8", "exact"]

def record(path, codec, keep):
    torch.manual_seed(0)
    teacher, generator = nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32), nn.Linear(32, 8)), nn.Linear(4, 8)
    def sample():
        return generator(torch.randn(32, 4)).detach()
    def loss(net, x_0):
        return (nn.functional.dropout(net(x_0 + torch.randn_like(x_0)), 0.1) - x_0).square().mean()
    return disback.record(teacher, sample=sample, loss=loss, path=path, iterations=10, every=2, learning_rate=1e-2,
                          codec=codec, keep_teacher=keep)

def content(path):
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(path.iterdir())}

def fork(action):
    child = os.fork()
    if child:
        return child
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # the progress bar
        action()
        os._exit(0)
    except BaseException as error:
        Path(folder / "error").write_text(f"{type(error).__name__}: {error}")
        os._exit(1)

def run_to_the_end(action):
    return os.waitstatus_to_exitcode(os.waitpid(fork(action), 0)[1])

record(folder / "first", "int8", True)  # what a recording imports is imported once, not in every fork
references, seconds = {}, {}
for codec in CODECS:
    for keep in (True, False):
        start = time.perf_counter()
        path = folder / f"{codec}-{keep}"
        assert run_to_the_end(lambda: record(path, codec, keep)) == 0, (folder / "error").read_text()
        seconds[codec, keep] = time.perf_counter() - start
        references[codec, keep] = content(folder / f"{codec}-{keep}")

kills, finished, moments = 0, 0, set()
while kills < wanted:
    codec, keep = luck.choice(CODECS), luck.random() < 0.8
    path = folder / f"run-{finished}"
    while True:
        child = fork(lambda: record(path, codec, keep))
        time.sleep(luck.random() * seconds[codec, keep])
        os.kill(child, signal.SIGKILL)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status in (0, -signal.SIGKILL), (folder / "error").read_text()
        kills += status != 0
        if (path / "config.json").exists():
            left = disback.DegradationPath(path)
            left.verify()
            moments.add((len(left), left.complete, tuple(sorted(set(content(path)) - {"config.json"}))))
        if status == 0 or kills >= wanted:
            break
    assert run_to_the_end(lambda: record(path, codec, keep)) == 0, (folder / "error").read_text()
    odd = [name for name, _ in content(path).items() ^ references[codec, keep].items()]
    assert not odd, f"{path} of {codec} differs from an undisturbed recording in {odd}"
    finished += 1
print(json.dumps({"kills": kills, "recordings": finished, "different moments": len(moments)}))
"""


def killed(folder, kills, seed):
    command = [sys.executable, "-c", NURSERY, str(folder), str(kills), str(seed)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.mark.slow
def test_five_hundred_recordings_killed_at_random_end_as_the_path_of_an_undisturbed_one(tmp_path):
    seen = killed(tmp_path, 500, seed=1)
    print(seen)  # noqa: T201
    assert seen["kills"] == 500
    assert seen["different moments"] >= 15
