"""Teachers and fake scores of one architecture but not of one layout: other precisions, further modules, one buffer."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from ranks import returned
from sharded_runs import Sharded, whole
from torch import nn
from worlds import Run, Score, clone, difference, everything

import disback_plugin as disback
from disback_plugin.errors import MismatchError, RoleError
from disback_plugin.path.degradation_path import DegradationPath
from disback_plugin.weights.network import ScoreNetwork

PLAN = {"record": 4, "every": 2, "schedule": "ramp:4"}


def weights(module):
    return clone(dict(module.state_dict()))


def run_of(dtype, fake_dtype=torch.float32):
    """A run whose teacher is cast; the fake score equals it up to that cast."""
    run = Run()
    run.teacher.to(dtype)
    run.fake_score.to(fake_dtype)
    run.fake_score.eval()
    run.optimizer_f = torch.optim.Adam(run.fake_score.parameters(), lr=1e-2)
    return run


class Mixed(Run):
    """Casts what goes into the networks and what comes out, as autocast does."""

    def __init__(self, dtype, fake_dtype):
        super().__init__()
        for network, own in ((self.teacher, dtype), (self.fake_score, fake_dtype)):
            network.to(own).eval()
            network.register_forward_pre_hook(lambda module, args, own=own: tuple(x.to(own) for x in args))
            network.register_forward_hook(lambda module, args, output: output.float())
        self.optimizer_f = torch.optim.Adam(self.fake_score.parameters(), lr=1e-2)


CASTS = {
    "a bf16 teacher": (torch.bfloat16, torch.float32),
    "an fp16 teacher": (torch.float16, torch.float32),
    "a bf16 fake score": (torch.float32, torch.bfloat16),
}


@pytest.mark.parametrize(("dtype", "fake_dtype"), CASTS.values(), ids=CASTS)
def test_a_fake_score_of_another_precision_is_left_alone_and_nodes_have_its_precision(
    tmp_path, dtype, fake_dtype, caplog
):
    run = Mixed(dtype, fake_dtype)
    teacher, fake_score = weights(run.teacher), weights(run.fake_score)
    with caplog.at_level(logging.WARNING), disback.attach(**run.roles(), path=tmp_path / "path", **PLAN) as handle:
        assert difference(weights(run.fake_score), fake_score) == []
        assert caplog.messages == []
        run.steps(4)
        assert handle.phase == "backtracking"
        last, position = handle.path[2], handle.position
        assert {last[name].dtype for name, p in run.fake_score.named_parameters()} == {fake_dtype}
        mixed = torch.lerp(handle.path[1]["left.weight"].float(), last["left.weight"].float(), position - 1)
        assert torch.equal(run.teacher.left.weight, mixed.to(fake_dtype).to(dtype)), "cast once"
        run.steps(5)
        assert handle.phase == "done"
        assert difference(weights(run.teacher), teacher) == []
    again = Mixed(dtype, fake_dtype)
    caplog.clear()
    with disback.attach(**again.roles(), path=tmp_path / "path", **PLAN):
        assert difference(weights(again.fake_score), clone(last)) == []
        assert not any("holds other weights" in message for message in caplog.messages)
    assert difference(weights(again.teacher), teacher) == []


def test_a_recording_under_a_coarser_teacher_resumes_bit_for_bit(tmp_path):
    def play(path, stops):
        run, state = Mixed(torch.bfloat16, torch.float32), None
        for steps in stops:
            checkpoint = run.checkpoint()
            run = Mixed(torch.bfloat16, torch.float32)
            handle = disback.attach(**run.roles(), path=path, codec="exact", **PLAN)
            run.load(checkpoint)
            if state is not None:
                handle.load_state_dict(state)
            run.steps(steps)
            state = handle.state_dict()
            handle.detach()
        return everything(run)

    assert difference(play(tmp_path / "once", [9]), play(tmp_path / "often", [1, 2, 3, 3])) == []


def test_a_fake_score_that_differs_by_more_than_the_cast_is_set_to_the_teacher_and_reported(tmp_path, caplog):
    run = run_of(torch.bfloat16)
    with torch.no_grad():
        run.fake_score.inner[0].weight[0] += 1
    finer = weights(run.fake_score)
    with disback.attach(**run.roles(), path=tmp_path, **PLAN):
        assert torch.equal(run.fake_score.inner[0].weight[0].bfloat16(), run.teacher.inner[0].weight[0])
        assert torch.equal(run.fake_score.inner[0].weight[1], finer["inner.0.weight"][1])
    assert any("holds other weights" in message for message in caplog.messages)


def sharded_under_bf16(path, form):
    run = Sharded("one")
    run.teacher.to(torch.bfloat16)
    for network in (run.teacher, run.fake_score, run.generator):
        torch.distributed.fsdp.fully_shard(network)
    run.teacher.register_forward_pre_hook(lambda module, args: tuple(x.bfloat16() for x in args))
    run.teacher.register_forward_hook(lambda module, args, output: output.float())
    run.optimizer_g, run.optimizer_f = (
        torch.optim.Adam(n.parameters(), lr=1e-2) for n in (run.generator, run.fake_score)
    )
    before = whole(ScoreNetwork(run.teacher)), whole(ScoreNetwork(run.fake_score))
    with disback.attach(**run.roles(), path=path, **PLAN) as handle:
        assert difference(whole(ScoreNetwork(run.fake_score)), before[1]) == []
        run.steps(9)
        assert handle.phase == "done"
        assert {t.dtype for t in handle.path[2].values()} == {torch.float32}
    assert difference(whole(ScoreNetwork(run.teacher)), before[0]) == []
    return True


@pytest.mark.slow
def test_a_sharded_fake_score_of_finer_precision_is_left_alone(nursery, tmp_path):
    assert returned(nursery.play(sharded_under_bf16, 2, str(tmp_path / "path"), "fsdp2")) == [True, True]


# -- modules that the teacher lacks ------------------------------------------------------------------------------------


class WithHead(Score):
    """A fake score with a discriminator's head and a second embedding of time."""

    def __init__(self):
        super().__init__()
        self.head = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
        self.inner[0].second_time = nn.Linear(1, 1)

    def forward(self, x_t, sigma):
        output = super().forward(x_t, sigma)
        return output + 0 * self.head(output)


def with_head(trains=True):
    run = Run()
    fake_score = WithHead()
    fake_score.load_state_dict(run.teacher.state_dict(), strict=False)
    run.fake_score = fake_score
    own = fake_score.parameters() if trains else [p for n, p in fake_score.named_parameters() if "head" not in n]
    run.optimizer_f = torch.optim.Adam(own, lr=1e-2)
    return run


@pytest.mark.parametrize("codec", ["int8", "exact"])
def test_what_only_the_fake_score_has_is_neither_written_nor_recorded(tmp_path, codec):
    run = with_head(trains=False)
    teacher, names = weights(run.teacher), set(run.teacher.state_dict())
    own = {name: t for name, t in weights(run.fake_score).items() if name not in names and "running" not in name}
    with disback.attach(**run.roles(), path=tmp_path / "path", codec=codec, **PLAN) as handle:
        assert f"{len(set(run.fake_score.state_dict()) - names)} tensors are left alone" in repr(handle)
        run.steps(6)
        state, checkpoint = handle.state_dict(), run.checkpoint()
        run.fake_score.head[2].weight.data += 1  # not in the checksum
        handle.load_state_dict(state)
        run.fake_score.head[2].weight.data -= 1
        run.steps(4)
        assert handle.phase == "done"
        assert all(set(handle.path[i]) == names for i in range(3))
    assert difference(weights(run.teacher), teacher) == []
    kept = weights(run.fake_score)
    assert [name for name in own if "num_batches" not in name and not torch.allclose(kept[name], own[name])] == []
    resumed = with_head(trains=False)
    resumed.load(checkpoint)
    with disback.attach(**resumed.roles(), path=tmp_path / "path", codec=codec, **PLAN, state=state) as handle:
        resumed.steps(4)
        assert handle.phase == "done"


def test_a_head_in_the_fake_scores_optimizer_trains_while_recording(tmp_path):
    run = with_head()
    run.optimizer_f.param_groups[0]["weight_decay"] = 0.1
    before = run.fake_score.head[0].weight.detach().clone()
    with disback.attach(**run.roles(), path=tmp_path, **PLAN) as handle:
        run.steps(3)
        assert handle.phase == "recording"
        assert not torch.equal(run.fake_score.head[0].weight, before)


def test_the_two_stages_by_hand_leave_a_head_alone(tmp_path):
    run = with_head()
    path = disback.record(run.teacher, run.fake_score, run.fake_step, path=tmp_path, iterations=2, codec="exact")
    assert set(path[1]) == set(run.teacher.state_dict())
    run.fake_step()
    scheduler = disback.TrajectoryScheduler(path, run.teacher, run.fake_score, schedule="ramp:3")
    scheduler.start()
    assert torch.equal(run.fake_score.left.weight, path[1]["left.weight"])


def test_what_only_the_teacher_has_is_named(tmp_path):
    run = Run()
    run.teacher.extra = nn.Linear(2, 1)
    with pytest.raises(MismatchError, match=r"^found fake score without 2 keys \['extra.bias', 'extra.weight'\]; ex"):
        disback.attach(**run.roles(), path=tmp_path / "path", **PLAN)
    assert not (tmp_path / "path").exists()


def test_a_shape_that_differs_beside_a_head_is_named(tmp_path):
    run = with_head()
    run.fake_score.left.weight = run.fake_score.right.weight = nn.Parameter(torch.zeros(2, 3))
    with pytest.raises(MismatchError, match=r"left.weight of shape \(2, 3\)"):
        disback.attach(**run.roles(), path=tmp_path / "path", **PLAN)


def test_a_wrapper_that_is_not_known_is_named_by_its_prefix(tmp_path):
    run = Run()
    wrapped = nn.ModuleDict({"engine": run.fake_score})
    with pytest.raises(MismatchError, match=r"ScoreNetwork\(\.\.\., prefix='engine'\)"):
        disback.attach(**run.roles() | {"fake_score": wrapped}, path=tmp_path / "path", **PLAN)
    inside = disback.ScoreNetwork(wrapped, prefix="engine")
    with disback.attach(**run.roles() | {"fake_score": inside}, path=tmp_path / "path", **PLAN):
        run.steps(2)


# -- memory ------------------------------------------------------------------------------------------------------------


def in_one_buffer(*modules, gap=0):
    """Move the parameters of modules into one flat buffer, one after the other."""
    parameters = [p for module in modules for p in module.parameters()]
    buffer, done = torch.empty(sum(p.numel() for p in parameters) + gap * len(parameters)), 0
    for p in parameters:
        p.data = buffer[done : done + p.numel()].view(p.shape).copy_(p.data)
        done += p.numel() + gap
    return buffer


def rebuilt(run):
    run.optimizer_g, run.optimizer_f = (
        torch.optim.Adam(n.parameters(), lr=1e-2) for n in (run.generator, run.fake_score)
    )
    return run.roles()


def _student_of(network, how):
    def share(run):
        source = getattr(run, network)
        run.generator = copy.deepcopy(source).requires_grad_(True)
        if how == "assign":
            run.generator.load_state_dict(source.state_dict(), assign=True)
        elif how == "data":
            run.generator.left.weight.data = source.left.weight.data
        else:  # a row of it
            run.generator.inner[0].bias = nn.Parameter(source.inner[0].weight.data[:, 1])
        return rebuilt(run)

    return share


SHARED = {
    f"{network} {how}": (_student_of(network, how), f"{network.replace('_', ' ')}")
    for network in ("teacher", "fake_score")
    for how in ("assign", "data", "view")
}


@pytest.mark.parametrize(("share", "role"), SHARED.values(), ids=SHARED)
def test_a_student_in_the_memory_of_a_score_network_is_refused(tmp_path, share, role):
    run = Run()
    roles = share(run)
    with pytest.raises(RoleError, match=r"share weights: .* in the same memory") as caught:
        disback.attach(**roles, path=tmp_path / "path", **PLAN)
    assert role in caught.value.found
    assert "generator" in caught.value.found
    assert not (tmp_path / "path").exists()


def test_a_fake_score_that_has_one_weight_by_data_of_the_teacher_is_refused(tmp_path):
    run = Run()
    run.fake_score.inner[3].weight.data = run.teacher.inner[3].weight.data
    with pytest.raises(RoleError, match=r"share weights: inner.3.weight and inner.3.weight are in the same memory"):
        disback.record(run.teacher, run.fake_score, run.fake_step, path=tmp_path / "path")


@pytest.mark.parametrize("layout", ["side by side", "with gaps", "columns of one matrix", "tied inside a role"])
def test_networks_that_lie_side_by_side_in_one_buffer_are_taken(tmp_path, layout):
    run = Run()
    if layout == "columns of one matrix":
        both = torch.cat([run.teacher.inner[0].weight.data, run.fake_score.inner[0].weight.data], dim=1)
        run.teacher.inner[0].weight.data, run.fake_score.inner[0].weight.data = both[:, :3], both[:, 3:]
    elif layout == "tied inside a role":
        run.generator[2].weight.data = run.generator[0].weight.data.t()
    else:
        in_one_buffer(run.teacher, run.generator, run.fake_score, gap=3 * (layout == "with gaps"))
    before = weights(run.teacher)
    rebuilt(run)
    with disback.attach(**run.roles(), path=tmp_path / "path", **PLAN) as handle:
        run.steps(9)
        assert handle.phase == "done"
    assert difference(weights(run.teacher), before) == []
    assert len(DegradationPath(tmp_path / "path")) == 3
