"""Train E one-step generators side by side, by Diff-Instruct, DMD or SiD. This trainer knows no DisBack.

fake score   min_phi  E w(sigma) |D_phi(x + sigma eps, sigma) - x|^2,   x = G(z)         (Eq. 5)
generator    dL/dx  = D_phi(x_t, sigma) - D_theta(x_t, sigma),          G(z) = D_G(sigma_init z, sigma_init)

The second line is Diff-Instruct's; the other generator losses are `losses.dmd` and `losses.sid`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from disback_plugin import losses
from disback_plugin.demo.networks import PIXELS, Denoiser, ensemble, load_teacher, random_weights
from disback_plugin.noise import add_noise, lognormal_sigma
from disback_plugin.prediction import Prediction

LOSSES = ("diff-instruct", "dmd", "sid")
# Learning rate of each network and student, for these losses: the best of several for the loss without DisBack, found
# on seeds 100 to 104 (or 100 to 102), of which no seed diverged (SiD diverges at 2e-3); for "far" with a teacher that
# was trained on negatives.
RATES = {
    ("mlp", "scratch"): (1e-3, 1e-3, 5e-4),
    ("mlp", "teacher"): (5e-4, 5e-4, 5e-4),
    ("mlp", "far"): (2e-3, 2e-3, 1e-3),
    ("conv", "scratch"): (2e-3, 2e-3, 1e-3),
    ("conv", "teacher"): (1e-3, 5e-4, 5e-4),
    ("conv", "far"): (2e-3, 2e-3, 2e-3),
    ("plane", "scratch"): (2e-3, 2e-3, 1e-3),
    ("plane", "teacher"): (5e-4, 5e-4, 5e-4),
    ("plane", "far"): (1e-3, 1e-3, 1e-3),
}


@dataclass(frozen=True)
class Regime:
    """Everything that a run depends on, except its seeds.

    Attributes:
        network: "mlp" or "conv", of digits; or "plane", of ten Gaussians in the plane.
        student: First weights: "scratch" (random), "teacher" (the teacher's) or "far" (a teacher of negatives).
        rate: Learning rate of both Adams.
        rounds: Rounds of training; each is an update of the fake score and one of the generator.
        sigma_init: Noise scale that the generator is fed with, in data units.
        batch: Samples B of an update, a member.
        loss: Of the generator: "diff-instruct", "dmd" or "sid".
    """

    network: str
    student: str
    rate: float
    rounds: int
    sigma_init: float
    batch: int = 64
    loss: str = "diff-instruct"

    @property
    def size(self) -> int:
        """Return d, the numbers of a sample."""
        return 2 if self.network == "plane" else PIXELS


def regime_of(network: str, student: str, loss: str = "diff-instruct") -> Regime:
    """Return the regime of a network, a student and a loss."""
    sigma_init = 10.0 if network == "plane" else 80.0 if student == "scratch" else 2.5
    rate, batch = RATES[network, student][LOSSES.index(loss)], 32 if network == "conv" else 64
    return Regime(network, student, rate, 240, sigma_init, batch, loss)


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
        self.teacher = load_teacher(regime.network, len(seeds)).requires_grad_(False)
        self.fake_score = load_teacher(regime.network, len(seeds))
        self.generator = first_student(regime, seeds)
        self.generator_optimizer = self._adam(self.generator)
        self.fake_score_optimizer = self._adam(self.fake_score)

    def step(self) -> tuple[Tensor, Tensor]:
        """Update the fake score, then the generator; return the losses before these updates."""
        return self.fake_step(), self.generator_step()

    def fake_step(self) -> Tensor:
        """Update s_phi on samples of the generator, by Eq. 5."""
        with torch.no_grad():
            x_0 = self.sample()
        return self._update(self.fake_score_optimizer, denoising_loss(self.fake_score, x_0, *self._noise()))

    def generator_step(self) -> Tensor:
        """Update the generator by Eq. 8 in the weighting of Diff-Instruct's authors, or by another loss."""
        x, loss = self.sample(), self.regime.loss
        sigma, eps = self._noise()
        # The gradient of SiD flows through both networks.
        x_t = add_noise(x if loss == "sid" else x.detach(), eps, alpha=1.0, sigma=sigma)
        with torch.set_grad_enabled(loss == "sid"):
            real, fake = self.teacher(x_t, sigma[..., 0]), self.fake_score(x_t, sigma[..., 0])
        # The loss sees the members as one batch of E * B samples.
        x, real, fake, eps, sigma = (tensor.flatten(0, 1) for tensor in (x, real, fake, eps, sigma))
        # With the weight of Diff-Instruct's authors, and alpha of SiD's.
        own = {"diff-instruct": {"weight": sigma**2}, "dmd": {"eps": eps}, "sid": {"eps": eps, "alpha_sid": 1.2}}[loss]
        compute = getattr(losses, loss.replace("-", "_"))
        value = compute(x, real, fake, alpha=1.0, sigma=sigma, prediction=Prediction.X0, **own)
        return self._update(self.generator_optimizer, value)

    def sample(self) -> Tensor:
        """Return generated samples x = G(z), shape (E, B, d)."""
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
        states = [random_weights(regime.network, torch.Generator().manual_seed(seed)) for seed in seeds]
        return ensemble(regime.network, states)
    student = load_teacher(regime.network, len(seeds))
    if regime.student == "far":  # -D(-x, sigma): the teacher of the data's negatives
        state = student.state_dict()
        for name in ("body.first.weight", "body.last.weight", "body.last.bias"):
            state[name].neg_()
    return student


def generate(generator: torch.nn.Module, z: Tensor, regime: Regime) -> Tensor:
    """Return G(z) = D_G(sigma_init z, sigma_init), shape (E, B, d), for unit Gaussian z of that shape."""
    samples: Tensor = generator(regime.sigma_init * z, torch.tensor(regime.sigma_init))
    return samples
