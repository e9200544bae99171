"""A world in which every score is known: Gaussian data, Gaussian student. The whole method has to arrive, exactly."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from worlds import clone

import disback_plugin as disback
from disback_plugin.noise import add_noise, lognormal_sigma
from disback_plugin.prediction import Prediction, convert

TARGET_MEAN, TARGET_STD = (2.0, -1.0), (0.5, 1.5)


class GaussianScore(nn.Module):
    """The exact eps-prediction of N(mean, diag(std^2)) under x_t = x_0 + sigma eps; its parameters are the Gaussian."""

    def __init__(self, mean, std):
        super().__init__()
        self.mean = nn.Parameter(torch.tensor(mean, dtype=torch.float64))
        self.log_std = nn.Parameter(torch.tensor(std, dtype=torch.float64).log())

    def forward(self, x_t, sigma):
        variance = (2 * self.log_std).exp() + sigma**2
        return sigma * (x_t - self.mean) / variance


class GaussianGenerator(nn.Module):
    """x = mean + std z."""

    def __init__(self, mean, std):
        super().__init__()
        self.mean = nn.Parameter(torch.tensor(mean, dtype=torch.float64))
        self.log_std = nn.Parameter(torch.tensor(std, dtype=torch.float64).log())

    def forward(self, z):
        return self.mean + self.log_std.exp() * z


class World:
    def __init__(self):
        self.stream = torch.Generator().manual_seed(0)
        self.teacher = GaussianScore(TARGET_MEAN, TARGET_STD).requires_grad_(False)
        self.fake_score = GaussianScore(TARGET_MEAN, TARGET_STD)
        self.generator = GaussianGenerator((-3.0, 3.0), (2.0, 0.3))
        self.optimizer_f = torch.optim.Adam(self.fake_score.parameters(), lr=0.05)
        self.optimizer_g = torch.optim.Adam(self.generator.parameters(), lr=0.01)

    def noisy(self):
        z, eps = (torch.randn(256, 2, generator=self.stream, dtype=torch.float64) for _ in range(2))
        sigma = lognormal_sigma(256, mean=0.0, std=1.0, generator=self.stream).double()[:, None]
        x = self.generator(z)
        return x, add_noise(x.detach(), eps, alpha=1.0, sigma=sigma), eps, sigma

    def fake_step(self):
        x, x_t, eps, sigma = self.noisy()
        loss = disback.losses.denoising(
            self.fake_score(x_t, sigma), x, eps, alpha=1.0, sigma=sigma, prediction=Prediction.EPS
        )
        self.optimizer_f.zero_grad()
        loss.backward()
        self.optimizer_f.step()

    def step(self):
        self.fake_step()
        x, x_t, _, sigma = self.noisy()
        loss = disback.losses.diff_instruct(
            x,
            self.teacher(x_t, sigma),
            self.fake_score(x_t, sigma),
            alpha=1.0,
            sigma=sigma,
            prediction=Prediction.EPS,
            weight=sigma**2,
        )
        self.optimizer_g.zero_grad()
        loss.backward()
        self.optimizer_g.step()


def test_the_known_score_is_the_gradient_of_the_log_density():
    score = GaussianScore(TARGET_MEAN, TARGET_STD)
    sigma = torch.tensor(0.7, dtype=torch.float64)
    x_t = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    density = torch.distributions.Normal(score.mean, (score.log_std.mul(2).exp() + sigma**2).sqrt())
    density.log_prob(x_t).sum().backward()
    found = convert(score(x_t, sigma), Prediction.EPS, Prediction.SCORE, x_t=x_t, alpha=1.0, sigma=sigma)
    torch.testing.assert_close(found, x_t.grad)


def test_recording_ends_at_the_students_own_gaussian(tmp_path):
    world = World()
    path = disback.record(world.teacher, world.fake_score, world.fake_step, path=tmp_path, iterations=1500, every=500)
    torch.testing.assert_close(path[-1]["mean"], world.generator.mean.detach(), atol=0.15, rtol=0)
    torch.testing.assert_close(path[-1]["log_std"], world.generator.log_std.detach(), atol=0.15, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "schedule",
    ["ramp:200", "warm", "plain-ramp:200", "fixed:60,60", "grad-ramp:100"],
)
def test_the_student_reaches_the_target_under_every_schedule(tmp_path, schedule):
    world = World()
    record = 0 if schedule.startswith("grad") else 300
    with disback.attach(
        teacher=world.teacher,
        fake_score=world.fake_score,
        generator_optimizer=world.optimizer_g,
        fake_score_optimizer=world.optimizer_f,
        path=tmp_path / "path",
        record=record,
        every=100,
        schedule=schedule,
    ) as handle:
        for _ in range(record + 1200):
            world.step()
        assert handle.phase == "done"
        # The student circles the target at the size of its steps; its average, as an EMA takes it, stands still.
        average = clone(dict(world.generator.state_dict()))
        for count in range(2, 802):
            world.step()
            for name, value in world.generator.state_dict().items():
                average[name] += (value - average[name]) / count
    torch.testing.assert_close(average["mean"], world.teacher.mean.data, atol=0.1, rtol=0)
    torch.testing.assert_close(average["log_std"], world.teacher.log_std.data, atol=0.1, rtol=0)
