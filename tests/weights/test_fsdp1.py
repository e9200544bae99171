"""Roles under FSDP1, in real processes: each rank reads and writes what falls into its stretch of a flat unit."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from ranks import returned
from sharded_runs import Counted, Simple, content, distance, fsdp1, moved, net, write_path
from torch import nn
from worlds import OPTIMIZERS, Run, difference

import disback_plugin as disback
from disback_plugin.errors import RoleError
from disback_plugin.path.degradation_path import DegradationPath
from disback_plugin.path.manifest import Recording
from disback_plugin.weights.network import ScoreNetwork


def gathered(root, prefix=""):
    """Return the whole state below a prefix on every rank, by torch's own means."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    with FullyShardedDataParallel.summon_full_params(root, writeback=False):
        named = {**dict(root.named_parameters(remove_duplicate=False)), **dict(root.named_buffers())}
        state = {n.replace("_fsdp_wrapped_module.", ""): t.detach().clone() for n, t in named.items()}
    return {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix) and "scratch" not in n}


def written(folder, forms):
    for number, form in enumerate(forms):
        seen = written_form(folder, form, forward_first=bool(number % 2))
    return seen


def written_form(folder, form, forward_first):
    module = fsdp1(net(), form)
    role, path, x = ScoreNetwork(module), DegradationPath(folder), torch.ones(2, 3)
    path.verify()
    parts = role.parts()
    expected = None if parts is None else path.part_checksums(parts)
    objects = [(id(t), t.dtype, t.requires_grad) for _, t in role.named_tensors()]
    module.eval()
    if forward_first:
        with torch.no_grad():
            module(x)  # the root's weights stay gathered after it
    for position in (3, 0.5, 0):
        versions = [t._version for _, t in role.named_tensors()]
        with Counted() as counted:
            found = role.write(path.source(position))
        assert counted.calls == [], counted.calls
        assert all(new._version > old for (_, new), old in zip(role.named_tensors(), versions, strict=True))
        plain = ScoreNetwork(net())
        digest = plain.write(path.source(position))
        assert role.checksum() == digest == plain.checksum()
        if expected is not None and position == int(position):
            assert found == expected[int(position)]
        with torch.no_grad():
            error = (module(x) - plain.modules()[""].eval()(x)).abs().max()
        assert error < (0.2 if form == "bf16" else 1e-5), f"{form}: a forward at {position} saw other weights: {error}"
        odd = difference(gathered(module), plain.state_dict())
        assert odd == [], f"{odd} at {position}"
    role.load_state_dict(path[2])
    role.load_state_dict(role.state_dict())
    assert difference(gathered(module), path[2]) == []
    role.load_state_dict(path[0])
    assert [(id(t), t.dtype, t.requires_grad) for _, t in role.named_tensors()] == objects
    assert role.fingerprint() == path.manifest.teacher.fingerprint
    sharded = [role.full_state().sharded]
    return {"empty": sum(part.elements == 0 for part in (parts or {}).values()), "sharded": any(sharded)}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    folder = tmp_path_factory.mktemp("path") / "int8"
    write_path(folder, "int8")
    return str(folder)


@pytest.mark.parametrize(
    ("ranks", "forms"),
    [
        pytest.param(2, ["nested", "root", "bf16", "kept", "root"], marks=pytest.mark.slow),
        (3, ["root"]),
        (4, ["replicas"]),
    ],
    ids=["forms", "three", "replicas"],
)
def test_a_move_writes_each_ranks_part_of_a_unit_without_communication(nursery, path, ranks, forms):
    seen = returned(nursery.play(written, ranks, path, forms))
    assert any(result["empty"] for result in seen), "no rank held nothing of a weight"


def test_units_that_are_not_sharded_are_written_as_a_whole(nursery, path):
    for ranks in (1, 2):
        assert not any(result["sharded"] for result in returned(nursery.play(written, ranks, path, ["whole"])))


def recorded(form, folder):
    module = fsdp1(net(), form)
    role, state = ScoreNetwork(module), moved(ScoreNetwork(net()).state_dict(), 0)
    path = DegradationPath.create(folder, role.full_state(), Recording(3, 1, "int8"))
    for iteration in (1, 2, 3):
        role.load_state_dict(state)
        path.append(role.full_state(), iteration=iteration)
        state = moved(state, iteration)
    path.finish()


@pytest.mark.slow
def test_the_files_are_those_of_one_process_bit_for_bit(nursery, tmp_path):
    for ranks, form in ((1, "whole"), (2, "root"), (4, "replicas")):
        returned(nursery.play(recorded, ranks, form, str(tmp_path / form)))
    known = content(tmp_path / "whole")
    for form in ("root", "replicas"):
        odd = [name for name, data in content(tmp_path / form).items() if known[name] != data]
        assert odd == [], form


# -- a whole run, as DMD2's: teacher and fake score inside one root ----------------------------------------------------


class Guidance(nn.Module):
    def __init__(self, teacher, fake_score):
        super().__init__()
        self.real_unet, self.fake_unet = teacher, fake_score

    def forward(self, role, x_t, sigma):
        return getattr(self, role)(x_t, sigma)


class Flat(Run):
    """The run of `worlds` with one root around both scores, and another around the generator."""

    BATCH, dtype = 24, torch.float32

    def __init__(self, form, optimizer="adam"):
        super().__init__(optimizer=optimizer)
        torch.manual_seed(1)
        teacher, fake_score = Simple(), Simple()
        generator = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, 2))
        fake_score.load_state_dict(teacher.state_dict())
        teacher.eval().requires_grad_(False)
        self.guidance, self.generator = Guidance(teacher, fake_score), generator
        if form != "one":
            self.guidance, self.generator = fsdp1(self.guidance, form), fsdp1(generator, form)
        self.teacher = lambda *given: self.guidance("real_unet", *given)
        self.fake_score = lambda *given: self.guidance("fake_unet", *given)
        self.optimizer_g = OPTIMIZERS[optimizer](self.generator.parameters())
        self.optimizer_f = OPTIMIZERS[optimizer]([p for p in self.guidance.parameters() if p.requires_grad])

    def roles(self):
        teacher, fake_score = (ScoreNetwork(self.guidance, prefix=name) for name in ("real_unet", "fake_unet"))
        return super().roles() | {"teacher": teacher, "fake_score": fake_score}

    def randn(self, *shape):
        everything = torch.randn(self.BATCH, *shape[1:], generator=self.stream)
        return everything.chunk(dist.get_world_size())[dist.get_rank()]


def trained(form, path, steps, optimizer="adam", schedule="fixed:2"):
    run = Flat(form, optimizer)
    state = (lambda module: module.state_dict()) if form == "one" else gathered
    listed = lambda module: {name: tensor.tolist() for name, tensor in state(module).items()}  # noqa: E731
    start, roles = listed(run.generator), run.roles()
    original = roles["teacher"].fingerprint()
    handle = disback.attach(**roles, path=path, record=4, every=2, codec="exact", schedule=schedule)
    seen = []
    for _ in range(steps):
        run.step()
        seen.append([handle.phase, handle.position, handle.generator_updates])
        if handle.phase == "recording":
            assert listed(run.generator) == start, "the generator moved while recording"
            assert not run.optimizer_g.state, "its optimizer has a state"
    saved = handle.state_dict()
    assert all(type(value) in (int, float, str, bool) for value in saved.values())
    handle.load_state_dict(saved)
    about = repr(handle)
    handle.detach()
    assert roles["teacher"].fingerprint() == original
    return {
        "seen": seen,
        "generator": listed(run.generator),
        "fake_score": {n: v for n, v in listed(run.guidance).items() if n.startswith("fake")},
        "about": about,
    }


@pytest.mark.parametrize("form", ["nested", "root"])
@pytest.mark.slow
def test_a_run_inside_one_root_ends_where_one_process_does(nursery, tmp_path, form):
    """In form "root" rank 0 holds nothing of the fake score, and rank 1 nothing of the teacher."""
    for optimizer, schedule in (("adam", "fixed:2"), ("adamw", "ramp:3")):
        arguments = [9, optimizer, schedule]
        (one,) = returned(nursery.play(trained, 1, "one", str(tmp_path / f"one-{optimizer}"), *arguments))
        first, second = returned(nursery.play(trained, 2, form, str(tmp_path / optimizer), *arguments))
        assert first == second
        assert first["seen"] == one["seen"]
        assert first["seen"][-1][:2] == ["done", 0.0]
        assert distance(one, first) < 2e-4
        DegradationPath(tmp_path / optimizer).verify()


# -- refused -----------------------------------------------------------------------------------------------------------


def refused():
    from torch.distributed.fsdp import FullyShardedDataParallel

    said = []
    for attempt in (
        lambda: ScoreNetwork(fsdp1(nn.Sequential(nn.Linear(2, 2)), "root", use_orig_params=False)),
        lambda: ScoreNetwork(fsdp1(nn.Linear(2, 2), "root", use_orig_params=False).module),
        lambda: ScoreNetwork(fsdp1(nn.Conv2d(4, 4, 3).to(memory_format=torch.channels_last), "root")),
    ):
        with pytest.raises(RoleError) as caught:
            attempt()
        said.append(str(caught.value))
    module = fsdp1(nn.Linear(2, 2), "root")
    role = ScoreNetwork(module)
    with FullyShardedDataParallel.summon_full_params(module), pytest.raises(RoleError, match="summon_full_params"):
        role.state_dict()
    return said


def test_fsdp1_units_without_names_are_refused_with_the_cure(nursery):
    first, second = returned(nursery.play(refused, 2))
    assert first == second
    assert all("use_orig_params=True" in message for message in first[:2])
    assert "contiguous" in first[2]
