"""Measure moves of a sharded teacher (FSDP2) at 1, 2 and 4 processes, and the cost of DisBack without a path.

Goals: each rank reads <= 1.1 of its share of the files, sends nothing, and needs <= the memory of the largest tensor;
attached with the teacher only, <= 1 % of a step on the small U-Net (`bench_hooks` holds the scheduler to 5 us).

Bytes are counted where everything that is read passes: a call of `NodeSource.read` touches a slice of the teacher's
file and, of every node up to there, the slice of its coded differences. What is sent is counted at torch's functions
and by its CommDebugMode. Memory is the anonymous memory of the process, looked at every two milliseconds. The time is
the processor's, of the rank that needed most: by the clock, ranks that share one machine share its cores and memory.
Each tensor costs a tenth of a millisecond beside its values, which is what keeps small networks from scaling.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

import pytest
import torch
from bench_swap import Peak, network
from ranks import Nursery, returned
from sharded_runs import Counted
from small_unet_loop import Loop

import disback_plugin as disback
from disback_plugin.path.codecs import BLOCK
from disback_plugin.path.degradation_path import DegradationPath
from disback_plugin.path.delta import NodeSource
from disback_plugin.path.manifest import Recording
from disback_plugin.weights.network import ScoreNetwork

ROUNDS = 5
RANKS = (1, 2, 4)

# Of Stable Diffusion 1.5's shape and a sixth of its size.
SMALL = {
    "sample_size": 64,
    "cross_attention_dim": 192,
    "attention_head_dim": 8,
    "block_out_channels": (128, 256, 512, 512),
    "norm_num_groups": 16,
}


@pytest.fixture(scope="module")
def folder():
    with tempfile.TemporaryDirectory() as place:
        state = {name: t.clone() for name, t in ScoreNetwork(network(SMALL)).state_dict().items()}
        path = DegradationPath.create(Path(place, "path"), state, Recording(2, 1))
        stream = torch.Generator().manual_seed(1)
        for iteration in (1, 2):
            for tensor in state.values():
                tensor.add_(torch.randn(tensor.shape, generator=stream), alpha=5e-4)
            path.append(state, iteration=iteration)
        path.finish()
        yield str(path.folder)


class Bytes:
    """Count the bytes that are read from a path."""

    def __enter__(self):
        self.read, self._old = 0, NodeSource.read
        counter = self

        def read(node, name, start, stop, out=None):
            stored = node.aliases.get(name, name)
            counter.read += (stop - start) * node.teacher[stored].element_size()
            for delta in node.deltas:
                assert delta.entries[stored].code in ("int8", "same")
                if delta.entries[stored].code == "int8":
                    counter.read += stop - start + 2 * -(-(stop - start) // BLOCK)
            return counter._old(node, name, start, stop, out)

        NodeSource.read = read
        return self

    def __exit__(self, *_):
        NodeSource.read = self._old


def moves(folder):
    """Return the measurements of one rank of moves to the last node."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    net = network(SMALL)
    for block in (*net.down_blocks, net.mid_block, *net.up_blocks):
        fully_shard(block)
    fully_shard(net)
    role, path = ScoreNetwork(net), DegradationPath(folder)
    last = len(path) - 1
    largest = max(4 * tensor.numel() for _, tensor in role.named_tensors())
    source = path.source(last)
    role.write(source)
    with Bytes() as counted:
        role.write(source)
    with Counted() as sent:
        role.write(source)
    with Peak() as peak:
        role.write(source)
    seconds = []
    for _ in range(ROUNDS):
        dist.barrier()
        start = time.process_time()
        role.write(source)
        seconds.append(time.process_time() - start)
    return {"bytes": counted.read, "sent": sent.calls, "extra": peak.extra, "largest": largest, "seconds": seconds}


def bench_moves_of_a_sharded_teacher(benchmark, folder):
    benchmark.group = "sharded moves"
    nursery, seen = Nursery(), {}

    def all_sizes():
        for ranks in RANKS:
            seen[ranks] = returned(nursery.play(moves, ranks, folder, limit=300))

    try:
        benchmark.pedantic(all_sizes, rounds=1)
    finally:
        nursery.close()
    everything = seen[1][0]["bytes"]
    alone = statistics.median(seen[1][0]["seconds"])
    print(f"\n{everything / 1e6:.0f} MB to read in all; largest tensor {seen[1][0]['largest'] / 1e6:.1f} MB")
    print("| ranks | read, of a rank's share | sent | extra memory, largest tensors | processor s | times as fast |")
    print("|---|---|---|---|---|---|")
    for ranks, found in seen.items():
        share = max(result["bytes"] for result in found) / (everything / ranks)
        extra = max(result["extra"] / result["largest"] for result in found)
        slowest = statistics.median(max(times) for times in zip(*(r["seconds"] for r in found), strict=True))
        calls = sum(len(result["sent"]) for result in found)
        print(f"| {ranks} | {share:.3f} | {calls} | {extra:.2f} | {slowest:.3f} | {alone / slowest:.2f} |")
        benchmark.extra_info[f"{ranks} ranks"] = {"share": share, "extra": extra, "ratio": alone / slowest}
        assert share <= 1.1
        assert calls == 0
        assert extra <= 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def bench_a_plug_in_without_a_path_costs_less_than_a_hundredth_of_a_step(benchmark):
    """Measure the U-Net's whole step, and separately the time that the hooks add to two optimizer steps.

    Whole steps vary by more than a hundredth; the work of the hooks does not depend on the optimizer.
    """
    benchmark.group = "attached, teacher only"
    loop, steps = Loop(), []
    generator, fake = loop.optimizers.values()
    both = {"attached": [], "alone": []}

    def interleaved():
        start = time.perf_counter()
        loop.step()
        steps.append(time.perf_counter() - start)
        for name in both:
            roles = {"teacher": loop.teacher, "fake_score": loop.fake}
            handle = (
                disback.attach(**roles, generator_optimizer=generator, fake_score_optimizer=fake, record=0)
                if name == "attached"
                else None
            )
            for optimizer in (generator, fake):
                optimizer.zero_grad()
            start = time.perf_counter()
            for _ in range(20):
                generator.step()
                fake.step()
            both[name].append((time.perf_counter() - start) / 20)
            if handle is not None:
                handle.detach()

    benchmark.pedantic(interleaved, rounds=10, warmup_rounds=1)
    step = statistics.median(steps[1:])
    added = statistics.median(both["attached"][1:]) - statistics.median(both["alone"][1:])
    print(f"step of {1e3 * step:.0f} ms; hooks {1e6 * added:.0f} us: {100 * added / step:.3f} %")
    benchmark.extra_info |= {"step": step, "hooks": added}
    assert added <= 0.01 * step
