"""Real processes with a gloo group, forked from one that has imported torch already: a launch takes half a second.

A test calls `play(function, ranks, ...)` on a function at the top level of its module; each rank runs it
and returns JSON.
"""

from __future__ import annotations

import datetime
import gc
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

HERE = Path(__file__).parent


class Nursery:
    """A process that forks ranks when asked to."""

    def __init__(self):
        command = [sys.executable, str(HERE / "ranks.py")]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._process = subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, **pipes)

    def play(self, function, ranks, *arguments, timeout=60, limit=120, kill=None):
        """Run `function(*arguments)` on so many ranks; return what each returned, or {"error": ..., "status": ...}.

        `kill`: a rank, and after how many seconds it is killed.
        """
        with tempfile.TemporaryDirectory() as folder:
            order = {
                "file": sys.modules[function.__module__].__file__, "function": function.__name__, "ranks": ranks,
                "arguments": arguments, "folder": folder, "timeout": timeout, "limit": limit, "kill": kill,
            }  # fmt: skip
            self._process.stdin.write(json.dumps(order) + "\n")
            self._process.stdin.flush()
            statuses = json.loads(self._process.stdout.readline())
            results = []
            for rank, status in enumerate(statuses):
                file = Path(folder, f"{rank}.json")
                result = json.loads(file.read_text()) if file.exists() else {"error": "nothing"}
                results.append(result["returned"] if "returned" in result else result | {"status": status})
            return results

    def close(self):
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


def returned(results):
    """Return what the ranks returned; fail with the trace of the first that raised."""
    for result in results:
        if "'Stream' object has no attribute 'record_event'" in json.dumps(result):
            import pytest  # not where the ranks are forked

            pytest.skip("fully_shard runs on a CPU from torch 2.7 on")
        assert not (isinstance(result, dict) and "error" in result), result.get("trace", result)
    return results


def _rank(order, rank):
    import torch
    import torch.distributed as dist

    folder, result = Path(order["folder"]), {}
    with open(folder / f"{rank}.log", "w") as log:
        os.dup2(log.fileno(), 2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(order["ranks"]), "LOCAL_RANK": str(rank)}
    try:
        torch.manual_seed(0)
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=order["ranks"],
            timeout=datetime.timedelta(seconds=order["timeout"]),
        )  # fmt: skip
        spec = importlib.util.spec_from_file_location(Path(order["file"]).stem, order["file"])
        module = importlib.util.module_from_spec(spec)
        sys.path.insert(0, str(Path(order["file"]).parent))
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        result["returned"] = getattr(module, order["function"])(*order["arguments"])
    except BaseException as error:
        result["error"] = f"{type(error).__name__}: {error}"
        result["trace"] = traceback.format_exc()
    (folder / f"{rank}.tmp").write_text(json.dumps(result))
    (folder / f"{rank}.tmp").rename(folder / f"{rank}.json")
    if "returned" in result:
        dist.barrier()  # a rank that is gone takes the other's threads with it
        gc.collect()
        dist.destroy_process_group()
    os._exit(0 if "returned" in result else 1)


def _play(order):
    children = []
    for rank in range(order["ranks"]):
        child = os.fork()
        if not child:
            _rank(order, rank)
        children.append(child)
    start, statuses = time.monotonic(), {}
    while len(statuses) < len(children):
        since = time.monotonic() - start
        if order["kill"] and since > order["kill"][1] and children[order["kill"][0]] not in statuses:
            os.kill(children[order["kill"][0]], signal.SIGKILL)
        for child in children:
            if child not in statuses:
                if since > order["limit"]:
                    os.kill(child, signal.SIGKILL)
                done, status = os.waitpid(child, os.WNOHANG)
                if done:
                    statuses[child] = os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    return [statuses[child] for child in children]


if __name__ == "__main__":
    sys.path[:0] = [str(HERE)]
    import hypothesis  # noqa: F401
    import pytest  # noqa: F401
    import torch
    import torch._dynamo
    import torch.distributed.checkpoint
    import torch.distributed.fsdp

    import disback_plugin

    disback_plugin.attach  # noqa: B018
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # ranks share this memory, and attach does not search it for learning-rate schedulers
    for line in sys.stdin:
        print(json.dumps(_play(json.loads(line))), flush=True)  # noqa: T201
