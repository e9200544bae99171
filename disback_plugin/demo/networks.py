r"""Small denoisers of 8 x 8 images with an ensemble axis: one module holds E independent networks.

Preconditioning of EDM (arXiv 2206.00364, Eq. 7 and Table 1), with d = sigma_data and s^2 = sigma^2 + d^2:

    D(x_t, sigma) = d^2 / s^2 x_t + sigma d / s F(x_t / s, ln(sigma) / 4)

Every parameter has shape (E, ...) and every batch shape (E, B, 64): the seeds of a comparison train side by side in one
set of matrix products, and no member sees another (Adam acts on each element alone).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from disback_plugin.demo.layers import Conv, ConvBlock, Linear, MLPBlock, waves
from disback_plugin.errors import OptionError

__all__ = [
    "NETWORKS",
    "PIXELS",
    "SIGMA_DATA",
    "TEACHERS",
    "Denoiser",
    "ResidualMLP",
    "UNet",
    "build",
    "expand_members",
    "load_teacher",
]

PIXELS = 64
SIGMA_DATA = 0.75
TEACHERS = Path(__file__).parent / "teachers"


class ResidualMLP(nn.Module):
    """F of the preconditioning: a residual multilayer perceptron, 165,568 parameters a member at its defaults."""

    def __init__(self, members: int, generator: torch.Generator, width: int = 128, depth: int = 4) -> None:
        super().__init__()
        self.first = Linear(members, PIXELS, width, generator)
        self.blocks = nn.ModuleList(MLPBlock(members, width, generator) for _ in range(depth))
        self.last = Linear(members, width, PIXELS, generator)

    def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
        """Return F(x, c_noise), from (E, B, 64) and (E, B) to (E, B, 64)."""
        h, e = self.first(x), waves(c_noise)
        for block in self.blocks:
            h = block(h, e)
        output: Tensor = self.last(F.silu(h))
        return output


class UNet(nn.Module):
    """F of the preconditioning: a residual block at 8 x 8 on the way down and one up, two, twice as wide, at 4 x 4.

    An image has `planes` numbers at each of its 8 x 8 places: (E, B, planes * 64).
    """

    def __init__(self, members: int, generator: torch.Generator, channels: int = 16, planes: int = 1) -> None:
        super().__init__()
        wide = 2 * channels
        self.first = Conv(members, planes, channels, generator)
        self.down = ConvBlock(members, channels, generator)
        self.narrow = Conv(members, channels, wide, generator, stride=2)
        self.middle = nn.ModuleList(ConvBlock(members, wide, generator) for _ in range(2))
        self.widen = Conv(members, wide, channels, generator)
        self.up = ConvBlock(members, channels, generator)
        self.last = Conv(members, channels, planes, generator)

    def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
        """Return F(x, c_noise), of x's shape (E, B, planes * 64); c_noise is (E, B)."""
        members, batch, numbers = x.shape
        # The members become groups of channels; channels-last is what makes grouped convolutions fast on a CPU.
        images = x.transpose(0, 1).reshape(batch, -1, 8, 8).contiguous(memory_format=torch.channels_last)
        e = waves(c_noise)
        skip = self.down(self.first(images), e)
        h = self.narrow(skip)
        for block in self.middle:
            h = block(h, e)
        h = self.up(skip + F.interpolate(self.widen(h), scale_factor=2.0), e)
        output: Tensor = self.last(F.silu(h))
        return output.reshape(batch, members, numbers).transpose(0, 1)


NETWORKS = {"mlp": ResidualMLP, "conv": UNet}


class Denoiser(nn.Module):
    """D of the preconditioning: E x_0-predictors (`Prediction.X0` at alpha_t = 1).

    Args:
        body: F, from (E, B, 64) and (E, B) to (E, B, 64).
    """

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x_t: Tensor, sigma: Tensor) -> Tensor:
        """Return the prediction of x_0, shape (E, B, 64).

        Args:
            x_t: Noisy images x_0 + sigma eps, shape (E, B, 64).
            sigma: Noise scale > 0 in data units, shape (E, B) or broadcast against it.
        """
        sigma = sigma.expand(x_t.shape[:2])
        s = (sigma**2 + SIGMA_DATA**2).sqrt()
        output: Tensor = self.body(x_t / s[..., None], sigma.log() / 4)
        return (SIGMA_DATA / s)[..., None] ** 2 * x_t + (sigma * SIGMA_DATA / s)[..., None] * output


def build(network: str, members: int, generator: torch.Generator) -> Denoiser:
    """Return E independent, randomly initialised denoisers in one module.

    Args:
        network: "mlp" or "conv".
        members: E >= 1.
        generator: Source of randomness.

    Raises:
        OptionError: If there is no such network.

    Example:
        >>> denoiser = build("mlp", members=2, generator=torch.Generator().manual_seed(0))
        >>> denoiser(torch.zeros(2, 3, 64), torch.ones(2, 3)).shape
        torch.Size([2, 3, 64])
    """
    if network not in NETWORKS:
        raise OptionError(f"network={network!r}", expected=f"one of {', '.join(NETWORKS)}", cure="pass --network mlp")
    return Denoiser(NETWORKS[network](members, generator))


def expand_members(state: Mapping[str, Tensor], members: int) -> dict[str, Tensor]:
    """Copy the weights of one network (E = 1) to E members: every (1, ...) becomes (E, ...), in memory of its own.

    Example:
        >>> expand_members({"weight": torch.ones(1, 3)}, members=2)["weight"].shape
        torch.Size([2, 3])
    """
    return {name: weight.expand(members, *weight.shape[1:]).clone() for name, weight in state.items()}


def load_teacher(network: str, members: int) -> Denoiser:
    """Return the teacher that comes with this package, E times over; `train_teachers` made it.

    Args:
        network: "mlp" or "conv".
        members: E >= 1.

    Raises:
        OptionError: If there is no such network.

    Example:
        >>> load_teacher("mlp", members=2)(torch.zeros(2, 3, 64), torch.ones(2, 3)).shape
        torch.Size([2, 3, 64])
    """
    from safetensors.torch import load_file

    denoiser = build(network, members, torch.Generator())
    denoiser.load_state_dict(expand_members(load_file(TEACHERS / f"{network}.safetensors"), members))
    return denoiser
