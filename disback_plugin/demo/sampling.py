"""Multi-step sampling from a denoiser: the deterministic sampler of EDM (arXiv 2206.00364, Algorithm 1)."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from disback_plugin.noise import Karras

__all__ = ["heun"]


@torch.no_grad()
def heun(
    denoiser: Callable[[Tensor, Tensor], Tensor],
    noise: Tensor,
    *,
    steps: int = 18,
    sigma_min: float = 0.01,
    sigma_max: float = 80.0,
) -> Tensor:
    """Integrate dx/dsigma = (x - D(x, sigma)) / sigma from sigma_max to 0 with Heun's method, shape (E, B, 64).

    Args:
        denoiser: D, from x_t, shape (E, B, 64), and sigma, shape (), to a prediction of x_0.
        noise: Unit Gaussian noise, shape (E, B, 64).
        steps: Number of steps, >= 2; the denoiser is called 2 steps - 1 times.
        sigma_min: Noise scale of the last step, in data units, > 0.
        sigma_max: Noise scale of the first, > sigma_min.

    Example:
        >>> heun(lambda x_t, sigma: torch.ones_like(x_t), torch.zeros(1, 1, 2)).round(decimals=4).tolist()
        [[[1.0, 1.0]]]
    """
    _, sigmas = Karras(sigma_min, sigma_max)(torch.linspace(1, 0, steps, device=noise.device))
    x = sigmas[0] * noise
    for sigma, following in pairwise(sigmas):
        slope = (x - denoiser(x, sigma)) / sigma
        euler = x + (following - sigma) * slope
        x = x + (following - sigma) * (slope + (euler - denoiser(euler, following)) / following) / 2
    return denoiser(x, sigmas[-1])
