"""A teacher of another size than the fake score: a LoRA beside it is fitted in turns of the loop, and moves back."""

from __future__ import annotations

import pytest
import torch
from ranks import returned
from sharded_runs import fsdp1
from torch import nn
from torch.utils.checkpoint import checkpoint
from worlds import Run, Score, clone, difference

import disback_plugin as disback
from disback_plugin import losses
from disback_plugin.errors import MismatchError, OptionError
from disback_plugin.noise import add_noise
from disback_plugin.prediction import Prediction

PLAN = {"record": 6, "every": 2, "schedule": "ramp:4"}
X_T, SIGMA = torch.linspace(-2, 2, 10).view(5, 2), torch.ones(5, 1)


class TwoSizes(Run):
    """`Run` whose teacher is three times as wide as the fake score."""

    def __init__(self, seed=0):
        super().__init__(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            self.teacher = Score(width=24).eval().requires_grad_(False)
        self.turns = 0

    def sample(self):
        self.turns += 1
        with torch.no_grad():
            return self.generator(torch.randn(16, 2))

    def loss(self, network, x_0):
        eps, sigma = torch.randn_like(x_0), torch.rand(len(x_0), 1) + 0.5
        output = network(add_noise(x_0, eps, alpha=1.0, sigma=sigma), sigma)
        return losses.denoising(output, x_0, eps, alpha=1.0, sigma=sigma, prediction=Prediction.EPS)

    def attach(self, path, **options):
        return disback.attach(**self.roles(), sample=self.sample, loss=self.loss, path=path, **PLAN | options)

    @property
    def outputs(self):
        return self.teacher(X_T, SIGMA).numpy().tobytes()


def trace(network):
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in network.modules())
    return (
        hooks,
        [*network.state_dict()],
        [(id(p), p.requires_grad, p.grad) for p in network.parameters()],
        network.training,
    )


def test_the_teacher_is_fitted_beside_the_loop_moves_back_and_leaves_no_trace(tmp_path, global_random_state):
    run, plain = TwoSizes(), TwoSizes()
    original, before, left = run.outputs, clone(dict(run.teacher.state_dict())), trace(run.teacher)
    generator, fake = clone(run.generator.state_dict()), clone(dict(run.fake_score.state_dict()))
    torch.set_rng_state(global_random_state)
    with run.attach(tmp_path) as handle:
        for _ in range(6):
            assert (handle.phase, run.outputs) == ("recording", original)
            run.step()
            plain.fake_step()  # the fake score is warmed up by its own steps, bit for bit
            plain.generator_loss()
            assert difference(clone(run.generator.state_dict()), generator) == [] or handle.phase != "recording"
        assert run.turns == 6
        assert torch.equal(torch.get_rng_state(), global_random_state)
        assert difference(clone(dict(run.fake_score.state_dict())), clone(dict(plain.fake_score.state_dict()))) == []
        assert difference(clone(dict(run.fake_score.state_dict())), fake) != []
        seen = []
        for _ in range(5):
            seen.append((handle.position, run.outputs == original))
            run.step()
        assert "LoRA 'teacher' on Score" in repr(handle)
    assert [p for p, _ in seen] == pytest.approx([2.7, 2.025, 1.35, 0.675, 0.0])
    assert [same for _, same in seen] == [False] * 4 + [True]
    assert (run.outputs, difference(clone(dict(run.teacher.state_dict())), before)) == (original, [])
    assert trace(run.teacher) == left


def test_the_lora_fits_the_students_samples_better_than_the_teacher_does(tmp_path):
    run = TwoSizes()
    with run.attach(tmp_path, record=150, every=50, schedule="fixed:50,50") as handle:
        run.steps(150)
        assert handle.position == 2.0
        torch.manual_seed(0)
        with torch.no_grad():
            moved = sum(run.loss(run.teacher, run.sample()) for _ in range(50))
            torch.manual_seed(0)
            with handle.original_teacher():
                assert moved < sum(run.loss(run.teacher, run.sample()) for _ in range(50))


@pytest.mark.parametrize("stop", [1, 3, 4, 8])
def test_a_run_resumes_in_both_stages_on_an_unfinished_path(tmp_path, stop):
    whole = TwoSizes()
    handle = whole.attach(tmp_path)
    whole.steps(stop)
    state, checkpoint = handle.state_dict(), whole.checkpoint()
    handle.detach()
    again = TwoSizes()
    with again.attach(tmp_path) as handle:
        again.load(checkpoint)
        handle.load_state_dict(state)
        again.steps(15 - stop)
        assert (handle.phase, handle.position) == ("done", 0.0)
        # Updates of the LoRA after the last node are lost with the process, and done again.
        assert handle.path.manifest.complete
        nodes = [node.checksum for node in handle.path.nodes]
    uninterrupted = TwoSizes()
    with uninterrupted.attach(tmp_path / "other") as handle:
        uninterrupted.steps(15)
        assert [node.checksum for node in handle.path.nodes] == nodes
        if stop in (4, 8):  # else the fake score has as many updates more
            assert difference(again.checkpoint(), uninterrupted.checkpoint()) == []


def test_after_the_path_is_finished_only_the_fake_score_is_warmed_up(tmp_path):
    first = TwoSizes()
    with first.attach(tmp_path):
        first.steps(7)
    second = TwoSizes(seed=1)
    before = clone(second.generator.state_dict())
    with disback.attach(**second.roles(), path=tmp_path, **PLAN) as handle:  # without sample and loss
        second.steps(5)
        assert (handle.phase, difference(clone(second.generator.state_dict()), before)) == ("recording", [])
        state, checkpoint = handle.state_dict(), second.checkpoint()
        second.steps(1)
        assert (handle.phase, handle.position) == ("backtracking", 2.7)
    third = TwoSizes(seed=1)
    third.load(checkpoint)
    with disback.attach(**third.roles(), path=tmp_path, state=state, **PLAN) as handle:
        third.steps(1)
        assert (handle.phase, handle.position) == ("backtracking", 2.7)
    assert second.turns == 0


def test_a_path_of_a_copy_moves_the_teachers_own_weights(tmp_path):
    run = TwoSizes()
    path = disback.record(run.teacher, sample=run.sample, loss=run.loss, path=tmp_path, iterations=4, every=2)
    before = clone(dict(run.teacher.state_dict()))
    with disback.attach(**run.roles(), path=tmp_path, record=4, every=2, schedule="fixed:2") as handle:
        run.steps(4)
        assert (handle.phase, handle.position) == ("backtracking", 1.0)
        assert difference(clone(dict(run.teacher.state_dict())), path[1]) == []
        run.steps(3)
    assert difference(clone(dict(run.teacher.state_dict())), before) == []


def test_without_samples_and_without_a_finished_path_the_pair_is_refused_with_the_cure(tmp_path):
    run = TwoSizes()
    with pytest.raises(MismatchError, match=r"pass sample= and loss= too"):
        disback.attach(**run.roles(), path=tmp_path, **PLAN)
    assert not list(tmp_path.iterdir())
    with run.attach(tmp_path):
        run.steps(3)
    with pytest.raises(MismatchError, match=r"pass sample= and loss= too"):
        disback.attach(**run.roles(), path=tmp_path, **PLAN)
    with pytest.raises(OptionError, match="sample= and loss="):
        disback.attach(**run.roles(), sample=run.sample, path=tmp_path, **PLAN)


class WithSamples:
    """An adapter of a trainer that knows how to sample its student."""

    @disback.hookimpl
    def disback_adapter(self, trainer):
        return disback.Adapter(**trainer.roles(), sample=trainer.sample, loss=trainer.loss)


def test_a_teacher_with_gradient_checkpointing_gets_the_same_nodes(tmp_path):
    nodes = []
    for checkpointed in (False, True):
        run = TwoSizes()
        if checkpointed:
            inner = run.teacher.inner.forward
            run.teacher.inner.forward = lambda x, inner=inner: checkpoint(inner, x, use_reentrant=False)
        with run.attach(tmp_path / str(checkpointed)) as handle:
            run.steps(7)
            nodes.append([node.recorded for node in handle.path.nodes])
    assert nodes[0] == nodes[1]


@pytest.mark.parametrize("keep_teacher", [True, False])
def test_an_adapter_brings_samples_and_the_default_schedule_ends_the_recording(tmp_path, keep_teacher):
    run = TwoSizes()
    original = run.outputs
    options = {"path": tmp_path, "record": 60, "every": 20, "keep_teacher": keep_teacher, "plugins": [WithSamples()]}
    with disback.attach(run, **options) as handle:
        run.steps(60)
        iterations = handle.path.manifest.iterations
        assert (run.turns, handle.phase == "recording") == (iterations, False)
        run.steps(60)
        assert all(p.grad is None for layer in run.teacher.modules() for p in layer.parameters())
    assert run.outputs == original


def test_a_teacher_without_such_layers_is_refused(tmp_path):
    run = TwoSizes()
    run.teacher = nn.LayerNorm(2)
    with pytest.raises(disback.DisbackError, match="layers that a LoRA can be added to"):
        run.attach(tmp_path)


def on_a_rank(folder):
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    said = []
    for name, shard in (("fsdp2", fully_shard), ("fsdp1", fsdp1)):
        run = TwoSizes(seed=dist.get_rank())
        run.teacher = shard(run.teacher)
        outputs = run.teacher(X_T, SIGMA)
        with run.attach(f"{folder}/{name}") as handle:
            run.steps(6)
            moved = run.teacher(X_T, SIGMA)
            run.steps(6)
        same = torch.equal(run.teacher(X_T, SIGMA), outputs)
        said.append((handle.phase, same, torch.equal(moved, outputs), moved.tolist()))
        said[-1] += tuple(node.checksum for node in handle.path.nodes)
    return said


def test_ranks_fit_one_lora_beside_a_sharded_teacher(nursery, tmp_path):
    first, second = returned(nursery.play(on_a_rank, 2, str(tmp_path)))
    assert first == second
    assert [kind[:3] for kind in first] == [["done", True, False]] * 2
