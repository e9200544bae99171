"""What a round shares changes what it says, and nothing else."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from disback_plugin import kernels, losses
from disback_plugin.prediction import Prediction
from disback_plugin.rounds import Draw, play


class World:
    """Linear networks whose passes are counted; `fixed` draws the same z, t and eps each time."""

    def __init__(self, fixed=False, dtype=torch.float64):
        torch.manual_seed(0)
        self.generator, self.teacher, self.fake = (nn.Linear(4, 4, dtype=dtype) for _ in range(3))
        self.passes = {"generator": [], "teacher": [], "fake": []}
        self.fixed, self.stream, self.dtype = fixed, torch.Generator().manual_seed(0), dtype
        self.draws = []

    def randn(self):
        if self.fixed:
            self.stream.manual_seed(0)
        return torch.randn(5, 4, generator=self.stream, dtype=self.dtype)

    def through(self, name, x):
        self.passes[name].append(torch.is_grad_enabled())
        return getattr(self, name)(x)

    def draw(self, x):
        assert not x.requires_grad
        self.draws.append(Draw(t=torch.ones(5), eps=self.randn(), alpha=0.6, sigma=0.8))
        return self.draws[-1]

    def play(self, step=False, **options):
        def update(net):
            def backward(loss):
                net.zero_grad()
                loss.backward()
                if step:
                    with torch.no_grad():
                        for p in net.parameters():
                            p -= 0.1 * p.grad

            return backward

        return play(
            lambda: self.through("generator", self.randn()),
            lambda x_t, t: self.through("teacher", x_t),
            lambda x_t, t: self.through("fake", x_t),
            self.draw,
            prediction=Prediction.EPS,
            update_fake_score=update(self.fake),
            update_generator=update(self.generator),
            **options,
        )

    def gradients(self):
        return [p.grad for net in (self.generator, self.fake) for p in net.parameters()]


SAVINGS = [{"share_sample": True}, {"share_forward": True}, {"share_sample": True, "share_forward": True}]


@pytest.mark.parametrize("saving", SAVINGS, ids=str)
@pytest.mark.parametrize("loss", [losses.dmd, losses.diff_instruct, kernels.vsd])
def test_on_the_same_z_t_and_eps_a_saving_changes_no_gradient(saving, loss):
    plain, shared = World(fixed=True), World(fixed=True)
    values = [plain.play(loss=loss), shared.play(loss=loss, **saving)]
    torch.testing.assert_close(*values)
    for a, b in zip(plain.gradients(), shared.gradients(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("saving", "generator", "fake", "draws"),
    [
        ({}, [False, True], [True, False], 2),
        ({"share_sample": True}, [True], [True, False], 2),
        ({"share_forward": True}, [True], [True], 1),
    ],
)
def test_a_saving_saves_the_passes_that_it_names(saving, generator, fake, draws):
    world = World()
    world.play(**saving)
    assert world.passes == {"generator": generator, "fake": fake, "teacher": [False]}
    assert len(world.draws) == draws


def test_the_generator_sees_the_fake_score_after_its_update_unless_the_forward_is_shared():
    found = []
    for options in ({"step": True}, {"step": True, "share_forward": True}, {"share_forward": True}):
        world = World(fixed=True)
        world.play(**options)
        found.append(world.generator.weight.grad)
    assert not torch.equal(found[0], found[1])
    assert torch.equal(found[1], found[2])


def test_a_shared_sample_is_noised_anew():
    world = World()
    world.play(share_sample=True)
    assert not torch.equal(world.draws[0].eps, world.draws[1].eps)


def test_nothing_flows_into_the_teacher():
    world = World()
    world.play(share_forward=True)
    assert all(p.grad is None for p in world.teacher.parameters())


def test_a_teacher_in_bfloat16_keeps_its_weights_and_rounds_its_outputs():
    exact, rounded = World(fixed=True, dtype=torch.float32), World(fixed=True, dtype=torch.float32)
    exact.play()
    rounded.play(teacher_dtype=torch.bfloat16)
    assert rounded.teacher.weight.dtype == torch.float32
    assert not torch.equal(exact.generator.weight.grad, rounded.generator.weight.grad)
    torch.testing.assert_close(exact.generator.weight.grad, rounded.generator.weight.grad, rtol=0.1, atol=0.01)
    assert torch.equal(exact.fake.weight.grad, rounded.fake.weight.grad)
