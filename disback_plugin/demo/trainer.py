"""Train E one-step generators side by side by Diff-Instruct. This trainer knows no DisBack.

fake score   min_phi  E w(sigma) |D_phi(x + sigma eps, sigma) - x|^2,   x = G(z)         (Eq. 5)
generator    dL/dx  = D_phi(x_t, sigma) - D_theta(x_t, sigma),          G(z) = D_G(sigma_init z, sigma_init)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from disback_plugin import losses
from disback_plugin.demo.worlds import Denoiser, ensemble, load_teacher, random_weights
from disback_plugin.noise import add_noise, lognormal_sigma
from disback_plugin.prediction import Prediction

# Learning rate of each world and student: the best of several without DisBack, found on seeds 100 to 104, of which no
# seed diverged; for "far" with a teacher that was trained on negatives.
RATES = {
    "digits": {"scratch": 1e-3, "teacher": 5e-4, "far": 2e-3},
    "gaussians": {"scratch": 2e-3, "teacher": 5e-4, "far": 1e-3},
}


@dataclass(frozen=True)
class Regime:
    """Everything that a run depends on, except its seeds.

    Attributes:
        world: "digits" or "gaussians".
        student: First weights: "scratch" (random), "teacher" (the teacher's) or "far" (a teacher of negatives).
        rate: Learning rate of both Adams.
        rounds: Rounds of training; each is an update of the fake score and one of the generator.
        sigma_init: Noise scale that the generator is fed with, in data units.
        batch: Samples B of an update, a member.
    """

    world: str
    student: str
    rate: float
    rounds: int
    sigma_init: float
    batch: int = 64

    @property
    def size(self) -> int:
        """Return d, the numbers of a sample."""
        return 2 if self.world == "gaussians" else 64


def regime_of(world: str, student: str) -> Regime:
    """Return the regime of a world and a student."""
    sigma_init = 10.0 if world == "gaussians" else 80.0 if student == "scratch" else 2.5
    return Regime(world, student, RATES[world][student], 240, sigma_init)


class Streams:
    """Random numbers from one generator a seed, so that the numbers of a seed do not depend on the other seeds.

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
    """Hold teacher, fake score and generator of E seeds with their optimizers.

    Args:
        regime: What to run.
        seeds: One seed a member; it decides the student's first weights and all noise.
    """

    def __init__(self, regime: Regime, seeds: Sequence[int]) -> None:
        self.regime = regime
        self.members = len(seeds)
        self.streams = Streams(seeds, purpose=1)
        self.teacher = load_teacher(regime.world, len(seeds)).requires_grad_(False)
        self.fake_score = load_teacher(regime.world, len(seeds))
        self.generator = first_student(regime, seeds)
        self.generator_optimizer = self._adam(self.generator)
        self.fake_score_optimizer = self._adam(self.fake_score)

    def step(self) -> tuple[Tensor, Tensor]:
        """Update the fake score by Eq. 5 on samples of the generator, then the generator by Eq. 8 in the weighting of
        Diff-Instruct's authors; return the losses before these updates.
        """
        with torch.no_grad():
            x_0 = self._sample()
        fake_loss = self._update(self.fake_score_optimizer, denoising_loss(self.fake_score, x_0, *self._noise()))
        x, (sigma, eps) = self._sample(), self._noise()
        x_t = add_noise(x.detach(), eps, alpha=1.0, sigma=sigma)
        with torch.no_grad():
            real, fake = self.teacher(x_t, sigma[..., 0]), self.fake_score(x_t, sigma[..., 0])
        # The loss sees the members as one batch of E * B samples.
        x, real, fake, sigma = (tensor.flatten(0, 1) for tensor in (x, real, fake, sigma))
        loss = losses.diff_instruct(x, real, fake, alpha=1.0, sigma=sigma, prediction=Prediction.X0, weight=sigma**2)
        return fake_loss, self._update(self.generator_optimizer, loss)

    def _sample(self) -> Tensor:
        return generate(self.generator, self.streams.randn(self.regime.batch, self.regime.size), self.regime)

    def _noise(self) -> tuple[Tensor, Tensor]:
        return self.streams.sigma(self.regime.batch), self.streams.randn(self.regime.batch, self.regime.size)

    def _update(self, optimizer: torch.optim.Optimizer, loss: Tensor) -> Tensor:
        optimizer.zero_grad()
        # The loss is a mean over all members, and each member needs the gradient that it would have alone.
        torch.autograd.backward(self.members * loss)
        optimizer.step()
        return loss.detach()

    def _adam(self, network: Denoiser) -> torch.optim.Optimizer:
        return torch.optim.Adam(network.parameters(), lr=self.regime.rate, betas=(0.0, 0.999), fused=True)


def denoising_loss(denoiser: Denoiser, x_0: Tensor, sigma: Tensor, eps: Tensor) -> Tensor:
    """Return Eq. 5 with the weight of EDM, shape ().

    Args:
        denoiser: E denoisers.
        x_0: Clean samples, shape (E, B, d).
        sigma: Noise scales, shape (E, B, 1).
        eps: Unit Gaussian noise, shape (E, B, d).
    """
    output = denoiser(add_noise(x_0, eps, alpha=1.0, sigma=sigma), sigma[..., 0])
    whole = getattr(denoiser, "module", denoiser)  # in DDP
    weight = losses.edm_weight(sigma, sigma_data=whole.sigma_data)
    return losses.denoising(output, x_0, eps, alpha=1.0, sigma=sigma, prediction=Prediction.X0, weight=weight)


def first_student(regime: Regime, seeds: Sequence[int]) -> Denoiser:
    """Return the generators before training: random ones, each from its own seed, or copies of one network."""
    if regime.student == "scratch":
        states = [random_weights(regime.world, torch.Generator().manual_seed(seed)) for seed in seeds]
        return ensemble(regime.world, states)
    student = load_teacher(regime.world, len(seeds))
    if regime.student == "far":  # -D(-x, sigma): the teacher of the data's negatives
        state = student.state_dict()
        for name in ("body.first.weight", "body.last.weight", "body.last.bias"):
            state[name].neg_()
    return student


def generate(generator: torch.nn.Module, z: Tensor, regime: Regime) -> Tensor:
    """Return G(z) = D_G(sigma_init z, sigma_init), shape (E, B, d), for unit Gaussian z of that shape."""
    samples: Tensor = generator(regime.sigma_init * z, torch.tensor(regime.sigma_init))
    return samples
