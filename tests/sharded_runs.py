"""Networks and runs that are sharded over ranks, for several test modules."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from worlds import Run, Score, clone

import disback_plugin as disback
from disback_plugin.path.degradation_path import DegradationPath
from disback_plugin.path.manifest import Recording
from disback_plugin.weights.network import ScoreNetwork


class Uneven(nn.Module):
    """What no number of ranks divides: rows, single elements, convolutions, tied weights, buffers, half a piece."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(3, 7), nn.BatchNorm1d(7), nn.Tanh(), nn.Linear(7, 3))
        self.scale = nn.Parameter(torch.ones(1))
        self.conv = nn.Conv2d(5, 3, 3)
        self.wide = nn.Linear(1 << 10, 1100, bias=False)  # more than a piece
        self.score = Score()

    def forward(self, x):
        y = self.inner(x) * self.scale
        y = y + self.conv(y.new_ones(1, 5, 3, 3)).sum() + self.score.left.weight.sum()
        return y + self.wide(y.new_ones(1, 1 << 10)).sum()


def net():
    torch.manual_seed(3)
    return Uneven()


def moved(state, seed):
    stream = torch.Generator().manual_seed(seed)
    made = {
        n: t + 1e-3 * torch.randn(t.shape, generator=stream).to(t.dtype) if t.is_floating_point() else t + 1
        for n, t in state.items()
    }
    made["score.right.weight"] = made["score.left.weight"]
    return made


def as_parameters(state):
    """The state with parameters for all tensors but buffers, which are stored whole."""
    return {n: t if "running" in n or "num" in n else nn.Parameter(t, requires_grad=False) for n, t in state.items()}


def write_path(folder, codec):
    """Record three nodes of the network without any process group; the path is node by node the same everywhere."""
    state = clone(ScoreNetwork(net()).state_dict())
    state["score.right.weight"] = state["score.left.weight"]
    path = DegradationPath.create(folder, state, Recording(3, 1, codec))
    for iteration in (1, 2, 3):
        state = moved(state, iteration)
        path.append(as_parameters(state), iteration=iteration)
    path.finish()
    return path


KINDS = ("all_", "broadcast", "gather", "scatter", "reduce", "send", "recv", "isend", "irecv", "barrier")


class Counted:
    """Counts what is sent inside: every operation of a process group goes through one of these."""

    def __enter__(self):
        from torch.distributed.tensor.debug import CommDebugMode

        self.calls, self._old = [], {}
        for name in (n for n in dist.distributed_c10d.__all__ if n.startswith(KINDS)):
            for where in (dist, dist.distributed_c10d):
                if hasattr(where, name):
                    self._old[where, name] = function = getattr(where, name)
                    setattr(where, name, lambda *a, _f=function, _n=name, **k: (self.calls.append(_n), _f(*a, **k))[1])
        self._debug = CommDebugMode()
        self._debug.__enter__()
        return self

    def __exit__(self, *error):
        self._debug.__exit__(*error)
        for (where, name), function in self._old.items():
            setattr(where, name, function)
        self.calls += [str(op) for op, n in self._debug.get_comm_counts().items() if n]


def whole(role):
    """Return the whole state on every rank, by torch's own means."""
    return {
        name: (t.full_tensor() if hasattr(t, "full_tensor") else t).clone() for name, t in role.state_dict().items()
    }


class Simple(nn.Module):
    """A score network without anything that a sum over processes would round differently at the start."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(3, 7), nn.Tanh(), nn.Linear(7, 2))

    def forward(self, x_t, sigma):
        return self.inner(torch.cat([x_t, sigma.expand(len(x_t), 1)], dim=1))


class Sharded(Run):
    """The run of `worlds`, sharded over all ranks (form "fsdp2"), wrapped in DDP ("ddp"), or as it is ("one").

    Every rank takes its share of one global batch.
    """

    BATCH = 24

    def __init__(self, form, optimizer="adam"):
        from torch.distributed.fsdp import fully_shard
        from torch.nn.parallel import DistributedDataParallel
        from worlds import OPTIMIZERS

        super().__init__(optimizer=optimizer)
        torch.manual_seed(1)
        self.teacher, self.fake_score = Simple(), Simple()
        self.generator = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 2))
        self.fake_score.load_state_dict(self.teacher.state_dict())
        self.teacher.eval().requires_grad_(False)
        if form == "fsdp2":
            for module in (self.teacher, self.fake_score):
                fully_shard(module.inner[0])
                fully_shard(module)
            fully_shard(self.generator)
        if form == "ddp":
            self.fake_score = DistributedDataParallel(self.fake_score)
            self.generator = DistributedDataParallel(self.generator)
        self.optimizer_g = OPTIMIZERS[optimizer](self.generator.parameters())
        self.optimizer_f = OPTIMIZERS[optimizer](self.fake_score.parameters())

    @property
    def dtype(self):
        return torch.float32

    def randn(self, *shape):
        whole = torch.randn(self.BATCH, *shape[1:], generator=self.stream)
        if not dist.is_initialized():
            return whole
        return whole.chunk(dist.get_world_size())[dist.get_rank()]


def weights_of(module):
    return {n: t.tolist() for n, t in whole(ScoreNetwork(module)).items()}


def trained(form, path, steps, record=4, codec="exact", optimizer="adam", schedule="fixed:2"):
    run = Sharded(form, optimizer)
    start = weights_of(run.generator)
    original = ScoreNetwork(run.teacher).fingerprint()
    plan = {"record": record, "every": 2, "codec": codec, "schedule": schedule}
    handle = disback.attach(**run.roles(), path=path, **plan)
    seen = []
    for _ in range(steps):
        run.step()
        seen.append([handle.phase, handle.position, handle.generator_updates])
        if handle.phase == "recording":
            assert weights_of(run.generator) == start, "the generator moved while recording"
            assert not run.optimizer_g.state, "its optimizer has a state"
    state = handle.state_dict()
    assert all(type(value) in (int, float, str, bool) for value in state.values())
    handle.detach()
    assert ScoreNetwork(run.teacher).fingerprint() == original
    return {"seen": seen, "generator": weights_of(run.generator), "fake_score": weights_of(run.fake_score)}


def distance(a, b):
    """Largest difference of two runs' weights."""
    return max(
        (torch.tensor(a[role][n]) - torch.tensor(b[role][n])).abs().max().item()
        for role in ("generator", "fake_score")
        for n in a[role]
    )


def content(folder):
    return {file.name: file.read_bytes() for file in sorted(Path(folder).iterdir())}


def fsdp1(module, form="nested", use_orig_params=True):
    """Return the module wrapped over all ranks in one of the forms that are in use."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, ShardingStrategy
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    options = {"use_orig_params": use_orig_params, "device_id": torch.device("cpu")}
    if form == "kept":
        options["sharding_strategy"] = ShardingStrategy.SHARD_GRAD_OP
    if form == "replicas":
        options["sharding_strategy"] = ShardingStrategy.HYBRID_SHARD
        options["device_mesh"] = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("a", "b"))
    if form == "whole":
        options["sharding_strategy"] = ShardingStrategy.NO_SHARD
    if form != "root":
        options["auto_wrap_policy"] = ModuleWrapPolicy({nn.Sequential, nn.Conv2d})
    if form == "bf16":
        options["mixed_precision"] = MixedPrecision(torch.bfloat16)
    return FullyShardedDataParallel(module, **options)
