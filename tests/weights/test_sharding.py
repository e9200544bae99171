"""Sharded roles, in real processes: each rank reads and writes its own shards, and sends nothing."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from ranks import returned
from sharded_runs import Counted, content, distance, moved, net, trained, whole, write_path
from worlds import difference

import disback_plugin as disback
from disback_plugin.path.degradation_path import DegradationPath
from disback_plugin.path.manifest import Recording
from disback_plugin.weights.network import ScoreNetwork
from disback_plugin.weights.tensors import GRAIN, PIECE, Part

CODECS = ["exact", "int8"]


# -- without processes ------------------------------------------------------------------------------------------------


@given(
    shape=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    ranks=st.integers(1, 7),
    dim=st.integers(0, 2),
)
def test_the_parts_of_all_ranks_are_the_tensor(shape, ranks, dim):
    dim, whole = dim % len(shape), torch.arange(torch.Size(shape).numel()).view(shape)
    found = []
    for rank in range(ranks):
        part = Part.chunk(whole.shape, rank, ranks, dim)
        local = torch.full((part.elements,), -1)
        for cell in part.cells():
            assert cell.start % GRAIN == 0
            assert cell.stop % GRAIN == 0 or cell.stop == whole.numel()
            local[cell.at] = whole.view(-1)[cell.start : cell.stop][slice(None) if cell.keep is None else cell.keep]
        found.append(local.view(part.local_shape))
    assert torch.equal(torch.cat(found, dim), whole)


def test_a_part_of_a_large_tensor_is_read_within_pieces_with_little_besides():
    part = Part(torch.Size([3 * PIECE + 5]), 0, PIECE - 7, 2 * PIECE + 9)
    cells = list(part.cells())
    assert [(c.start // PIECE, (c.stop - 1) // PIECE) for c in cells] == [(0, 0), (1, 1), (2, 2)]
    assert sum(c.stop - c.start for c in cells) <= part.elements + 2 * GRAIN


# -- with them --------------------------------------------------------------------------------------------------------


def shard(module, form="nested"):
    """Return the module sharded over all ranks in one of the forms that are in use."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
    from torch.distributed.tensor import Shard

    options = {}
    if form == "replicas":
        options["mesh"] = init_device_mesh("cpu", (2, dist.get_world_size() // 2), mesh_dim_names=("copies", "shards"))
    if form == "columns":  # along another dimension, where it divides
        options["shard_placement_fn"] = lambda p: Shard(1) if p.ndim > 1 and p.shape[1] % 2 == 0 else Shard(0)
    if form == "wrapped":
        module.inner[0] = checkpoint_wrapper(module.inner[0])
    if form != "root":
        fully_shard(module.inner, **options)
        mixed = {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16)} if form == "bf16" else {}
        fully_shard(module.conv, **options, **mixed)
    if form == "kept":
        options["reshard_after_forward"] = False
    fully_shard(module, **options)
    assert CPUOffloadPolicy  # needs an accelerator
    return torch.compile(module, backend="eager") if form == "wrapped" else module


def written_shards(folder, forms, codecs):
    for form, codec in itertools.product(forms, codecs):
        seen = written_form(f"{folder}/{codec}", form)
    return seen


def written_form(folder, form):
    module = shard(net(), form)
    role, path = ScoreNetwork(module), DegradationPath(folder)
    path.verify()
    expected = path.part_checksums(role.parts())
    x = torch.ones(2, 3)
    objects = [(id(t), t.dtype, t.requires_grad) for _, t in role.named_tensors()]
    seen = []
    with torch.no_grad():
        before = module.eval()(x)  # the root's weights stay gathered after it
    for position in (3, 1, 0.5, 2, 0):
        versions = [t._version for _, t in role.named_tensors()]
        with Counted() as counted:
            found = role.write(path.source(position))
        assert counted.calls == [], counted.calls
        assert all(new._version > old for (_, new), old in zip(role.named_tensors(), versions, strict=True))
        plain = ScoreNetwork(net())
        digest = plain.write(path.source(position))
        odd = difference(whole(role), plain.state_dict())
        assert odd == [], f"{odd} at {position}"
        assert role.checksum() == digest == plain.checksum()
        if position == int(position):
            assert found == expected[int(position)]
        with torch.no_grad():
            after = module(x)
            error = (after - plain.modules()[""].eval()(x)).abs().max()
        assert error < (1e-2 if form == "bf16" else 1e-5), f"a forward at {position} saw other weights"
        seen.append(not torch.equal(after, before))
    assert seen == [True, True, True, True, False]
    assert [(id(t), t.dtype, t.requires_grad) for _, t in role.named_tensors()] == objects
    assert role.fingerprint() == path.manifest.teacher.fingerprint
    empty = sum(part.elements == 0 for part in role.parts().values())
    return {"empty": empty, "elements": sum(part.elements for part in role.parts().values())}


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    folder = tmp_path_factory.mktemp("paths")
    for codec in CODECS:
        write_path(folder / codec, codec)
    return str(folder)


FORMS = ["nested", "root", "kept", "bf16", "wrapped", "columns"]


@pytest.mark.parametrize(
    ("ranks", "forms", "codecs"),
    [
        pytest.param(2, FORMS, ["int8"], marks=pytest.mark.slow),
        (2, ["nested"], CODECS),
        pytest.param(3, ["nested"], CODECS, marks=pytest.mark.slow),
        (4, ["replicas"], ["int8"]),
    ],
    ids=["forms", "codecs", "three", "replicas"],
)
def test_a_move_writes_each_ranks_shards_without_communication(nursery, paths, ranks, forms, codecs):
    seen = returned(nursery.play(written_shards, ranks, paths, forms, codecs))
    assert any(result["empty"] for result in seen), "no rank had an empty shard"


# -- a whole run ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["ddp", "fsdp2"])
def test_two_processes_end_where_one_with_the_same_batch_does(nursery, tmp_path, form):
    (one,) = returned(nursery.play(trained, 1, "one", str(tmp_path / "one"), 9))
    first, second = returned(nursery.play(trained, 2, form, str(tmp_path / form), 9))
    assert first == second
    assert first["seen"] == one["seen"]
    assert [position for _, position, _ in first["seen"]] == [0, 0, 0, 1, 1, 0, 0, 0, 0]
    assert distance(one, first) < 2e-4
    path = DegradationPath(tmp_path / form)
    path.verify()
    assert path.manifest.generator == DegradationPath(tmp_path / "one").manifest.generator


def recorded(form, folder, codec):
    """Record node after node of the same weights, sharded or not."""
    module = net() if form == "one" else shard(net(), form)
    role, state = ScoreNetwork(module), moved(ScoreNetwork(net()).state_dict(), 0)
    path = DegradationPath.create(folder, role.full_state(), Recording(3, 1, codec))
    for iteration in (1, 2, 3):
        role.load_state_dict(state)
        path.append(role.full_state(), iteration=iteration)
        state = moved(state, iteration)
    path.finish()
    return len(path)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.slow
def test_the_files_are_the_same_bit_for_bit_however_many_processes_recorded_them(nursery, tmp_path, codec):
    recorded("one", tmp_path / "one", codec)
    known = content(tmp_path / "one")
    for ranks, form in [(2, "nested"), (2, "columns"), (4, "replicas")] if codec == "int8" else [(2, "nested")]:
        folder = tmp_path / f"{form}"
        returned(nursery.play(recorded, ranks, form, str(folder), codec))
        odd = [name for name, data in content(folder).items() if known[name] != data]
        assert odd == [], f"{form} on {ranks}"


@pytest.mark.slow
def test_a_path_of_one_number_of_processes_is_used_on_another(nursery, tmp_path):
    ends = {}
    for recorders in (4, 1):
        path = str(tmp_path / f"{recorders}")
        form = "one" if recorders == 1 else "fsdp2"
        returned(nursery.play(trained, recorders, form, path, 4))
        for ranks in (1, 2, 3) if recorders == 4 else (3,):
            first, *_ = returned(nursery.play(trained, ranks, "one" if ranks == 1 else "fsdp2", path, 5))
            assert first["seen"][0][:2] == ["backtracking", 1.0]
            assert first["seen"][-1][:2] == ["done", 0.0]
            ends[recorders, ranks] = first
    assert max(distance(ends[4, 1], ends[4, ranks]) for ranks in (2, 3)) < 2e-4


@pytest.mark.slow
def test_every_optimizer_is_held_while_recording_and_takes_the_scaled_gradient_after(nursery, tmp_path):
    for optimizer in ("adamw", "adam-foreach", "sgd-momentum"):
        options = {"record": 2, "codec": "int8", "optimizer": optimizer, "schedule": "ramp:4"}
        (one,) = returned(nursery.play(trained, 1, "one", str(tmp_path / f"one-{optimizer}"), 7, *options.values()))
        first, _ = returned(nursery.play(trained, 2, "fsdp2", str(tmp_path / optimizer), 7, *options.values()))
        assert first["seen"] == one["seen"]
        assert distance(one, first) < 5e-4, optimizer


# -- the demonstration's networks -------------------------------------------------------------------------------------


class Share:
    """This rank's share of the numbers that one process would draw for the whole batch."""

    def __init__(self, streams):
        self.streams = streams

    def randn(self, *shape):
        return self._own(self.streams.randn(self._ranks() * shape[0], *shape[1:]))

    def sigma(self, batch):
        return self._own(self.streams.sigma(self._ranks() * batch))

    def _own(self, whole_batch):
        return whole_batch.chunk(self._ranks(), dim=1)[dist.get_rank()]

    def _ranks(self):
        return dist.get_world_size()


def digits(form, path, steps):
    """Distil digits as the demonstration does, with a global batch of 32."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard
    from torch.nn.parallel import DistributedDataParallel

    from disback_plugin.demo.trainer import Regime, Trainer
    from disback_plugin.demo.worlds import load_teacher

    ranks = dist.get_world_size()
    trainer = Trainer(Regime("digits", "scratch", 1e-3, steps, sigma_init=2.5, batch=32 // ranks), [0])
    trainer.streams = Share(trainer.streams)
    if form == "fsdp2":  # the first dimension is that of the seeds, one here: rank 1 would hold next to nothing
        for net in (trainer.teacher, trainer.fake_score, trainer.generator):
            fully_shard(net, shard_placement_fn=lambda p: Shard(1) if p.ndim > 1 and p.shape[1] % ranks == 0 else None)
    if form == "ddp":
        trainer.fake_score = DistributedDataParallel(trainer.fake_score)
        trainer.generator = DistributedDataParallel(trainer.generator)
    trainer.generator_optimizer = trainer._adam(trainer.generator)
    trainer.fake_score_optimizer = trainer._adam(trainer.fake_score)
    with disback.attach(
        teacher=trainer.teacher, fake_score=trainer.fake_score, generator_optimizer=trainer.generator_optimizer,
        fake_score_optimizer=trainer.fake_score_optimizer, path=path, record=6, every=3, codec="exact",
        schedule="ramp:6",
    ) as handle:  # fmt: skip
        for _ in range(steps):
            trainer.step()
        phase = handle.phase
    original = ScoreNetwork(load_teacher("digits", 1)).fingerprint()
    same = ScoreNetwork(trainer.teacher).fingerprint() == original
    torch.save({r: whole(ScoreNetwork(getattr(trainer, r))) for r in ("generator", "fake_score")}, f"{path}-end.pt")
    return {"phase": phase, "teacher is itself": same}


@pytest.mark.slow
def test_digits_end_where_one_process_with_the_same_batch_ends(nursery, tmp_path):
    for ranks, form in ((1, "one"), (2, "ddp"), (2, "fsdp2")):
        seen = returned(nursery.play(digits, ranks, form, str(tmp_path / form), 16))
        assert seen == [{"phase": "done", "teacher is itself": True}] * ranks
    ends = {form: torch.load(tmp_path / f"{form}-end.pt", weights_only=True) for form in ("one", "ddp", "fsdp2")}
    for form in ("ddp", "fsdp2"):
        for role, weights in ends["one"].items():
            far = max((ends[form][role][name] - value).abs().max().item() for name, value in weights.items())
            # Sixteen steps of Adam at 1e-3, without momentum: rounding decides the sign where a gradient is nothing.
            square = sum((ends[form][role][name] - value).square().sum() for name, value in weights.items())
            size = sum(value.square().sum() for value in weights.values())
            assert square.sqrt() <= 1e-5 * size.sqrt(), f"{role} of {form}: {far}"
