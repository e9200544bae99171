"""A plain trainer of E one-step generators side by side, by Diff-Instruct, DMD or SiD. It knows nothing of DisBack.

fake score   min_phi  E w(sigma) |D_phi(x + sigma eps, sigma) - x|^2,   x = G(z)         (Eq. 5)
generator    dL/dx  = D_phi(x_t, sigma) - D_theta(x_t, sigma),          G(z) = D_G(sigma_init z, sigma_init)

This is Diff-Instruct's generator; the others are `losses.dmd` and `losses.sid`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from disback_plugin import kernels, losses
from disback_plugin.demo.digits import load
from disback_plugin.demo.networks import PIXELS, SIGMA_DATA, Denoiser, build, expand_members, load_teacher
from disback_plugin.noise import add_noise, lognormal_sigma
from disback_plugin.prediction import Prediction

__all__ = ["Settings", "Streams", "Trainer"]

# Updates that make a far student of the teacher.
FAR = 600


@dataclass(frozen=True)
class Settings:
    """Everything that a run depends on, except its seeds and what is attached to it.

    Attributes:
        network: "mlp" or "conv".
        student: "scratch" (random weights), "teacher" (the teacher's weights) or "far" (`first_student`).
        rate: Learning rate of both Adams, the best of several for the loss without DisBack.
        updates: Generator updates.
        sigma_init: Noise scale that the generator is fed with, in data units.
        batch: Samples B of an update, a member.
        loss: Of the generator: "diff-instruct", "dmd" or "sid".
    """

    network: str
    student: str
    rate: float
    updates: int
    sigma_init: float
    batch: int = 64
    loss: str = "diff-instruct"


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
        """One update of the generator: Eq. 8 in the weighting of Diff-Instruct's authors, or another loss."""
        x, through = self.sample(), self.settings.loss == "sid"  # SiD's gradient flows through both networks
        x_t, eps, sigma = self._noisy(x if through else x.detach())
        with torch.set_grad_enabled(through):
            real, fake = self.teacher(x_t, sigma[..., 0]), self.fake_score(x_t, sigma[..., 0])
        # The members are one batch of E * B samples to the loss.
        x, real, fake, eps, sigma = (tensor.flatten(0, 1) for tensor in (x, real, fake, eps, sigma))
        arguments: dict[str, Any] = {"alpha": 1.0, "sigma": sigma, "prediction": Prediction.X0}
        if self.settings.loss == "diff-instruct":
            loss = kernels.diff_instruct(x, real, fake, weight=sigma**2, **arguments)
        elif self.settings.loss == "dmd":
            loss = kernels.dmd(x, real, fake, eps=eps, **arguments)
        else:
            loss = kernels.sid(x, real, fake, eps=eps, alpha_sid=1.2, **arguments)  # a = 1.2, as its authors use
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
    """Return the generators before training: random ones, each from its own seed, or copies of one network, the teacher
    or, far from it, the teacher after 600 updates on the digits' negatives.
    """
    if settings.student == "teacher":
        return load_teacher(settings.network, len(seeds))
    if settings.student == "far":
        state = expand_members(_negatives(settings.network), len(seeds))
        together = load_teacher(settings.network, len(seeds))
        together.load_state_dict(state)
        return together
    alone = [build(settings.network, 1, torch.Generator().manual_seed(seed)).state_dict() for seed in seeds]
    together = build(settings.network, len(seeds), torch.Generator())
    together.load_state_dict({name: torch.cat([state[name] for state in alone]) for name in alone[0]})
    return together


@cache
def _negatives(network: str) -> Mapping[str, Tensor]:
    """Return the weights of the teacher after it was trained on for 600 updates, on white digits for black ones."""
    data, noise = -load(), torch.Generator().manual_seed(0)
    student = load_teacher(network, 1)
    optimizer = torch.optim.Adam(student.parameters(), lr=2e-3, betas=(0.9, 0.99))
    falling = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=FAR)
    for _ in tqdm(range(FAR), desc="far student", unit="update", leave=False, disable=None):
        x_0 = data[torch.randint(len(data), (128,), generator=noise)][None]
        sigma, eps = lognormal_sigma(128, generator=noise)[None, :, None], torch.randn(x_0.shape, generator=noise)
        output = student(add_noise(x_0, eps, alpha=1.0, sigma=sigma), sigma[..., 0])
        weight = losses.edm_weight(sigma, sigma_data=SIGMA_DATA)
        loss = losses.denoising(output, x_0, eps, alpha=1.0, sigma=sigma, prediction=Prediction.X0, weight=weight)
        optimizer.zero_grad()
        torch.autograd.backward(loss)
        optimizer.step()
        falling.step()
    return {name: weight.detach() for name, weight in student.state_dict().items()}


def generate(generator: torch.nn.Module, z: Tensor, settings: Settings) -> Tensor:
    """Return G(z) = D_G(sigma_init z, sigma_init), shape (E, B, 64), for unit Gaussian z of that shape."""
    samples: Tensor = generator(settings.sigma_init * z, torch.tensor(settings.sigma_init))
    return samples
