"""Runs of adapters on one base: the base never moves, and a run is what it is with whole networks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lora_worlds import SIGMA, X_T, LoraRun, Under, adapted
from ranks import returned
from sharded_runs import fsdp1
from worlds import clone, difference

import disback_plugin as disback
from disback_plugin import lora
from disback_plugin.errors import MismatchError, PathError, RoleError
from disback_plugin.weights.network import ScoreNetwork

# -- both stages ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_the_base_is_bit_equal_throughout_and_the_teacher_comes_back(tmp_path, wrapped, shared):
    run = LoraRun(wrapped=wrapped, shared=shared)
    base, bare = lora.base_checksum(run.model), Under(run.model, None)(X_T, SIGMA)
    node_0, moved = clone(run.adapter("teacher").state_dict()), []
    with disback.attach(**run.roles(), path=tmp_path, record=6, every=2, schedule="fixed:1,2") as handle:
        for _ in range(12):
            run.step()
            assert lora.base_checksum(run.model) == base
            assert torch.equal(Under(run.model, None)(X_T, SIGMA), bare)
            moved.append((handle.phase, handle.position, torch.equal(run.teacher(X_T, SIGMA), bare)))
        assert "LoRA 'teacher' on" in repr(handle)
    assert [position for phase, position, _ in moved if phase != "recording"] == [2.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0]
    assert all(is_bare is (position == 0) for _, position, is_bare in moved)
    assert difference(run.adapter("teacher").state_dict(), node_0) == []
    path = disback.DegradationPath(tmp_path)
    assert all(node.weight_error < 0.05 for node in path.nodes)
    path.verify()


def test_nodes_are_the_fake_scores_adapters_and_a_teacher_on_one_scores_as_it_did(tmp_path):
    run, outputs = LoraRun(), []
    run.adapter("fake").load_state_dict(run.adapter("teacher").state_dict())

    def step():
        run.fake_step()
        outputs.append(run.fake_score(X_T, SIGMA).detach())

    teacher, fake = run.adapter("teacher"), run.adapter("fake")
    path = disback.record(teacher, fake, step, path=tmp_path, iterations=6, every=2, codec="exact")
    for index, wanted in ((1, outputs[1]), (2, outputs[3]), (3, outputs[5])):
        teacher.write(path.source(index))
        assert torch.equal(run.teacher(X_T, SIGMA), wanted), index


@given(t=st.floats(0.01, 0.99), node=st.integers(0, 1))
def test_between_two_nodes_the_weights_are_off_a_straight_line_by_the_product_of_the_steps(recorded, t, node):
    run, path = recorded
    a, b = path[node], path[node + 1]
    teacher = run.adapter("teacher")
    teacher.write(path.source(node + t))
    now = teacher.state_dict()
    for name in (n for n in a if n.endswith("lora_A.weight")):
        up = name.replace("lora_A", "lora_B")
        straight = torch.lerp(a[up] @ a[name], b[up] @ b[name], t)
        off = t * (1 - t) * (b[up] - a[up]) @ (b[name] - a[name])
        torch.testing.assert_close(now[up] @ now[name], straight - off, rtol=1e-4, atol=1e-6)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    run = LoraRun()
    folder = tmp_path_factory.mktemp("path")
    path = disback.record(
        run.adapter("teacher"), run.adapter("fake"), run.fake_step, path=folder, iterations=20, every=10
    )
    return run, path


def test_a_run_resumes_bit_for_bit_in_another_process_with_other_seeds_for_its_adapters(tmp_path):
    options = {"record": 4, "every": 2, "schedule": "fixed:4"}
    for stop in (3, 6, 9):
        whole = LoraRun()
        with disback.attach(**whole.roles(), path=tmp_path / f"a{stop}", **options) as handle:
            whole.steps(stop)
            state, checkpoint = handle.state_dict(), whole.checkpoint()
            whole.steps(12 - stop)
            end = whole.checkpoint()
        again = LoraRun(adapter_seed=5)
        with disback.attach(**again.roles(), path=tmp_path / f"a{stop}", **options) as handle:
            again.load(checkpoint)
            handle.load_state_dict(state)
            again.steps(12 - stop)
            assert difference(again.checkpoint(), end) == [], stop


def test_a_path_fits_every_run_on_its_base_and_no_other(tmp_path):
    options = {"path": tmp_path, "record": 4, "every": 2, "schedule": "fixed:4"}
    first = LoraRun()
    with disback.attach(**first.roles(), **options):
        first.steps(5)
    other_seed = LoraRun(adapter_seed=3, wrapped=True)
    with disback.attach(**other_seed.roles(), **options) as handle:
        assert (handle.phase, handle.position) == ("backtracking", 1.0)
    with pytest.raises(PathError, match="another teacher"):
        disback.attach(**LoraRun(base_seed=1).roles(), **options)
    with pytest.raises(MismatchError, match="on base"):
        LoraRun(base_seed=1).adapter("teacher").load_state_dict(disback.DegradationPath(tmp_path)[1])


def test_record_0_changes_nothing_bit_for_bit():
    plain, attached = LoraRun(shared=True), LoraRun(shared=True)
    plain.steps(6)
    with disback.attach(**attached.roles(), path=None, record=0):
        attached.steps(6)
    assert difference(attached.checkpoint(), plain.checkpoint()) == []


def test_a_rank_stabilised_adapter_with_bias_and_dropout_works(tmp_path):
    run = LoraRun()
    run.model = adapted("fake", "student", use_rslora=True, lora_bias=True, lora_dropout=0.3)
    run.teacher, run.fake_score = Under(run.model, "teacher"), Under(run.model, "fake")
    run.optimizer_f = torch.optim.Adam(run.parameters("fake"), lr=1e-2)
    with disback.attach(**run.roles(), path=tmp_path, record=4, every=2, schedule="ramp:3") as handle:
        run.steps(9)
        assert handle.phase == "done"
    assert torch.equal(run.teacher(X_T, SIGMA), Under(run.model, None)(X_T, SIGMA))


# -- on two ranks -----------------------------------------------------------------------------------------------------


def on_a_rank(folder):
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    run = LoraRun()
    model = DistributedDataParallel(run.model)
    roles = {
        name: ScoreNetwork(model, lora_adapter=key) for name, key in (("teacher", "teacher"), ("fake_score", "fake"))
    }
    with disback.attach(**run.roles() | roles, path=folder, record=4, every=2, schedule="ramp:3") as handle:
        run.steps(8)
    said = [handle.phase, run.adapter("teacher").fingerprint(), run.adapter("fake").fingerprint()]
    for cut in (lambda net: net, fully_shard, fsdp1):
        torch.manual_seed(0)
        said.append(ScoreNetwork(cut(adapted("fake")), lora_adapter="fake").named_tensors()[-1][0])
    return said


@pytest.mark.slow
def test_ranks_with_one_base_each_move_together_and_a_base_sharded_by_fsdp_is_the_same_base(nursery, tmp_path):
    first, second = returned(nursery.play(on_a_rank, 2, str(tmp_path)))
    assert first == second
    assert (first[0], len(set(first[3:]))) == ("done", 1)


# -- adapters that are merged while attached ---------------------------------------------------------------------------


def layers(run):
    return [module for module in run.model.modules() if hasattr(module, "merged_adapters")]


@pytest.mark.parametrize("name", ["student", "fake", "teacher"])
def test_a_move_while_an_adapter_is_merged_is_refused_with_its_own_cause(tmp_path, name):
    run = LoraRun(shared=name == "student")
    with disback.attach(**run.roles(), path=tmp_path, record=4, every=2, schedule="ramp:4") as handle:
        run.steps(4)
        assert handle.phase == "backtracking"
        teacher = run.adapter("teacher")
        before = clone(teacher.state_dict())
        for layer in layers(run):
            layer.merge(adapter_names=[name])
        with pytest.raises(RoleError, match=r"merged into the base .*unmerge_adapter\(\)"):
            run.optimizer_g.step()
        assert difference(clone(teacher.state_dict()), before) == []
        for layer in layers(run):
            layer.unmerge()


def test_an_adapter_may_be_merged_and_unmerged_between_two_updates(tmp_path):
    run = LoraRun(shared=True)
    teacher = run.adapter("teacher")  # unmerging rounds the base, which another role would notice
    node_0 = clone(teacher.state_dict())
    with disback.attach(**run.roles(), path=tmp_path, record=4, every=2, schedule="ramp:4") as handle:
        for _ in range(9):
            run.step()
            for layer in layers(run):
                layer.merge(adapter_names=["student"])
            handle.state_dict()  # a checkpoint of the merged student
            for layer in layers(run):
                layer.unmerge()
        assert handle.phase == "done"
    assert difference(clone(teacher.state_dict()), node_0) == []
