"""A plain Diff-Instruct trainer of E one-step generators side by side. It knows nothing of DisBack.

fake score   min_phi  E w(sigma) |D_phi(x + sigma eps, sigma) - x|^2,   x = G(z)         (Eq. 5)
generator    dL/dx  = D_phi(x_t, sigma) - D_theta(x_t, sigma),          G(z) = D_G(sigma_init z, sigma_init)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from disback_plugin import kernels, losses
from disback_plugin.demo.networks import PIXELS, SIGMA_DATA, Denoiser, build, load_teacher
from disback_plugin.noise import add_noise, lognormal_sigma
from disback_plugin.scores import Prediction

__all__ = ["Settings", "Streams", "Trainer"]


@dataclass(frozen=True)
class Settings:
    """Everything that a run depends on, except its seeds and what is attached to it.

    Attributes:
        network: "mlp" or "conv".
        student: "scratch" (random weights) or "teacher" (the teacher's weights).
        rate: Learning rate of both Adams, the best of Diff-Instruct's.
        updates: Generator updates.
        sigma_init: Noise scale that the generator is fed with, in data units.
        batch: Samples B of an update, a member.
    """

    network: str
    student: str
    rate: float
    updates: int
    sigma_init: float
    batch: int = 64


class Streams:
    """One random stream a seed, so that a seed's numbers do not depend on the company that it keeps.

    Args:
        seeds: One seed a member.
        purpose: Streams of different purposes are independent.
    """

    def __init__(self, seeds: Sequence[int], purpose: int) -> None:
        self._members = [torch.Generator().manual_seed(1_000_003 * purpose + seed) for seed in seeds]

    def randn(self, *shape: int) -> Tensor:
        """Return unit Gaussian numbers, shape (E, *shape)."""
        return torch.stack([torch.randn(shape, generator=member) for member in self._members])

    def sigma(self, batch: int) -> Tensor:
        """Return noise scales of EDM's distribution, shape (E, B, 1)."""
        return torch.stack([lognormal_sigma(batch, generator=member)[:, None] for member in self._members])


class Trainer:
    """Teacher, fake score and generator of E seeds, their optimizers, and one round of the loop.

    Args:
        settings: What to run.
        seeds: One seed a member; it decides the student's first weights and all noise.
    """

    def __init__(self, settings: Settings, seeds: Sequence[int]) -> None:
        self.settings = settings
        self.members = len(seeds)
        self.streams = Streams(seeds, purpose=1)
        self.teacher = load_teacher(settings.network, len(seeds)).requires_grad_(False)
        self.fake_score = load_teacher(settings.network, len(seeds))
        self.generator = first_student(settings, seeds)
        self.generator_optimizer = self._adam(self.generator)
        self.fake_score_optimizer = self._adam(self.fake_score)

    def step(self) -> tuple[Tensor, Tensor]:
        """One update of the fake score, then one of the generator; returns the losses before them."""
        return self.fake_step(), self.generator_step()

    def fake_step(self) -> Tensor:
        """One update of s_phi on samples of the generator, Eq. 5 with the weight of EDM."""
        with torch.no_grad():
            x_0 = self.sample()
        x_t, eps, sigma = self._noisy(x_0)
        output = self.fake_score(x_t, sigma[..., 0])
        weight = losses.edm_weight(sigma, sigma_data=SIGMA_DATA)
        loss = kernels.denoising(output, x_0, eps, alpha=1.0, sigma=sigma, prediction=Prediction.X0, weight=weight)
        return self._update(self.fake_score_optimizer, loss)

    def generator_step(self) -> Tensor:
        """One update of the generator, Eq. 8 in the weighting of Diff-Instruct's authors."""
        x = self.sample()
        x_t, eps, sigma = self._noisy(x.detach())
        with torch.no_grad():
            real, fake = self.teacher(x_t, sigma[..., 0]), self.fake_score(x_t, sigma[..., 0])
        # The members are one batch of E * B samples to the loss.
        flat = [tensor.flatten(0, 1) for tensor in (x, real, fake, x_t, eps, sigma)]
        x, real, fake, x_t, eps, sigma = flat
        loss = kernels.diff_instruct(
            x, real, fake, x_t=x_t, eps=eps, alpha=1.0, sigma=sigma, prediction=Prediction.X0, weight=sigma**2
        )
        return self._update(self.generator_optimizer, loss)

    def sample(self) -> Tensor:
        """Return generated samples x = G(z), shape (E, B, 64)."""
        return generate(self.generator, self.streams.randn(self.settings.batch, PIXELS), self.settings)

    def _noisy(self, x_0: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        sigma = self.streams.sigma(x_0.shape[1])
        eps = self.streams.randn(*x_0.shape[1:])
        return add_noise(x_0, eps, alpha=1.0, sigma=sigma), eps, sigma

    def _update(self, optimizer: torch.optim.Optimizer, loss: Tensor) -> Tensor:
        optimizer.zero_grad()
        # The losses are means over all members; each member shall have the gradient it would have alone.
        torch.autograd.backward(self.members * loss)
        optimizer.step()
        return loss.detach()

    def _adam(self, network: Denoiser) -> torch.optim.Optimizer:
        return torch.optim.Adam(network.parameters(), lr=self.settings.rate, betas=(0.0, 0.999))


def first_student(settings: Settings, seeds: Sequence[int]) -> Denoiser:
    """Return the generators before training: random ones, each from its own seed, or copies of the teacher."""
    if settings.student == "teacher":
        return load_teacher(settings.network, len(seeds))
    alone = [build(settings.network, 1, torch.Generator().manual_seed(seed)).state_dict() for seed in seeds]
    together = build(settings.network, len(seeds), torch.Generator())
    together.load_state_dict({name: torch.cat([state[name] for state in alone]) for name in alone[0]})
    return together


def generate(generator: torch.nn.Module, z: Tensor, settings: Settings) -> Tensor:
    """Return G(z) = D_G(sigma_init z, sigma_init), shape (E, B, 64), for unit Gaussian z of that shape."""
    samples: Tensor = generator(settings.sigma_init * z, torch.tensor(settings.sigma_init))
    return samples
