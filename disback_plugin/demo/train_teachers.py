"""`python -m disback_plugin.demo.train_teachers`: make the two teachers that come with this package again.

Eq. 5 with the noise levels and the weight of EDM (arXiv 2206.00364, Table 1), on all of the digits; an average of the
weights over the last part of the training is what is kept.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from disback_plugin import losses
from disback_plugin.demo import digits
from disback_plugin.demo.networks import SIGMA_DATA, TEACHERS, Denoiser, build
from disback_plugin.noise import add_noise, lognormal_sigma
from disback_plugin.prediction import Prediction

__all__ = ["RECIPES", "Recipe", "train"]


@dataclass(frozen=True)
class Recipe:
    """How to train a teacher.

    Args:
        steps: Optimizer updates.
        batch: Images an update.
        rate: Learning rate of Adam at its peak; it rises over the first 100 updates and falls as a cosine to zero.
        average: Decay of the exponential moving average of the weights, an update.
        seed: Seed of the weights, the batches and the noise.
    """

    steps: int
    batch: int
    rate: float
    average: float = 0.999
    seed: int = 0


RECIPES = {"mlp": Recipe(steps=8_000, batch=256, rate=2e-3), "conv": Recipe(steps=6_000, batch=128, rate=4e-3)}


def train(network: str, data: Tensor, recipe: Recipe) -> Denoiser:
    """Train one denoiser (E = 1) and return it with its averaged weights.

    Args:
        network: "mlp" or "conv".
        data: Images, shape (n, 64).
        recipe: How.
    """
    generator = torch.Generator().manual_seed(recipe.seed)
    teacher = build(network, 1, generator)
    average = [parameter.detach().clone() for parameter in teacher.parameters()]
    optimizer = torch.optim.Adam(teacher.parameters(), lr=recipe.rate, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda k: min(1.0, k / 100) * (1 + math.cos(math.pi * k / recipe.steps)) / 2
    )
    for _ in range(recipe.steps):
        x_0 = data[torch.randint(len(data), (1, recipe.batch), generator=generator)]
        optimizer.zero_grad()
        torch.autograd.backward(denoising_loss(teacher, x_0, generator))
        optimizer.step()
        schedule.step()
        torch._foreach_lerp_(average, list(teacher.parameters()), 1 - recipe.average)
    with torch.no_grad():
        torch._foreach_copy_(list(teacher.parameters()), average)
    return teacher


def denoising_loss(denoiser: Denoiser, x_0: Tensor, generator: torch.Generator) -> Tensor:
    """Return Eq. 5 with the weight of EDM at sigma of EDM, shape ().

    Args:
        denoiser: E denoisers.
        x_0: Clean images, shape (E, B, 64).
        generator: Source of the noise and its scale.
    """
    sigma = lognormal_sigma(x_0.shape[0] * x_0.shape[1], generator=generator).reshape(*x_0.shape[:2], 1)
    eps = torch.randn(x_0.shape, generator=generator)
    output = denoiser(add_noise(x_0, eps, alpha=1.0, sigma=sigma), sigma[..., 0])
    weight = losses.edm_weight(sigma, sigma_data=SIGMA_DATA)
    return losses.denoising(output, x_0, eps, alpha=1.0, sigma=sigma, prediction=Prediction.X0, weight=weight)


def main(arguments: Sequence[str] | None = None) -> int:
    """Train the teachers on one thread and write them into a folder."""
    from safetensors.torch import save_file

    parser = argparse.ArgumentParser(prog="python -m disback_plugin.demo.train_teachers")
    parser.add_argument("--network", choices=sorted(RECIPES), action="append", help="only this one")
    parser.add_argument("--out", type=Path, default=TEACHERS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    data = digits.load()
    for network in options.network or sorted(RECIPES):
        recipe = RECIPES[network]
        teacher = train(network, data, recipe)
        save_file(teacher.state_dict(), options.out / f"{network}.safetensors", {"recipe": repr(recipe)})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
