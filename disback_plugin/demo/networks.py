r"""Small denoisers, of 8 x 8 images and of points in the plane, with an ensemble axis: one module is E networks.

Preconditioning of EDM (arXiv 2206.00364, Eq. 7 and Table 1), with d = sigma_data and s^2 = sigma^2 + d^2:

    D(x_t, sigma) = d^2 / s^2 x_t + sigma d / s F(x_t / s, ln(sigma) / 4)

Every parameter has shape (E, ...) and every batch shape (E, B, d), d being 64 or 2: the seeds of a comparison train
side by side in one set of matrix products, and no member sees another (Adam acts on each element alone).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

PIXELS = 64
SIGMA_DATA = 0.75
FREQUENCIES = 16
TEACHERS = Path(__file__).parent / "teachers"


class Linear(nn.Module):
    """E affine maps, (E, B, inputs) -> (E, B, outputs)."""

    def __init__(self, members: int, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(members, outputs, inputs))
        self.bias = nn.Parameter(torch.zeros(members, 1, outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Return W x + b of each member."""
        return torch.baddbmm(self.bias, x, self.weight.mT)


class Conv(nn.Module):
    """E convolutions 3 x 3 as one grouped convolution, (B, E inputs, H, W) -> (B, E outputs, H, W) at stride 1."""

    def __init__(self, members: int, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(members, outputs, inputs, 3, 3))
        self.bias = nn.Parameter(torch.zeros(members, outputs))
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """Return each member's convolution of its own channels."""
        weight, bias = self.weight.flatten(0, 1), self.bias.flatten()
        return F.conv2d(x, weight, bias, stride=self.stride, padding=1, groups=len(self.weight))


class MLPBlock(nn.Module):
    """h + W_2 silu(W_1 norm(h) + W_e e), with a layer norm without parameters."""

    def __init__(self, members: int, width: int) -> None:
        super().__init__()
        self.inner = Linear(members, width, width)
        self.embed = Linear(members, 2 * FREQUENCIES, width)
        self.outer = Linear(members, width, width)

    def forward(self, h: Tensor, e: Tensor) -> Tensor:
        """Return h plus its residual under the noise embedding e, shape (E, B, width)."""
        inner = self.inner(F.layer_norm(h, h.shape[-1:])) + self.embed(e)
        return h + self.outer(F.silu(inner))


class ConvBlock(nn.Module):
    """h + conv(silu(norm(conv(silu(norm(h))) + W_e e))), with group norms without parameters."""

    def __init__(self, members: int, channels: int) -> None:
        super().__init__()
        self.inner = Conv(members, channels, channels)
        self.embed = Linear(members, 2 * FREQUENCIES, channels)
        self.outer = Conv(members, channels, channels)
        self.groups = members * channels // 8

    def forward(self, h: Tensor, e: Tensor) -> Tensor:
        """Return h plus its residual under the noise embedding e, shape (B, E channels, H, W)."""
        shift = self.embed(e).transpose(0, 1).flatten(1)[..., None, None]
        inner = self.inner(F.silu(F.group_norm(h, self.groups))) + shift
        return h + self.outer(F.silu(F.group_norm(inner, self.groups)))


class ResidualMLP(nn.Module):
    """F of the preconditioning as a residual perceptron, 165,568 parameters a member at its defaults."""

    def __init__(self, members: int, size: int = PIXELS, width: int = 128, depth: int = 4) -> None:
        super().__init__()
        self.first = Linear(members, size, width)
        self.blocks = nn.ModuleList(MLPBlock(members, width) for _ in range(depth))
        self.last = Linear(members, width, size)

    def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
        """Return F(x, c_noise), from (E, B, size) and (E, B) to (E, B, size)."""
        h, e = self.first(x), embed_noise(c_noise)
        for block in self.blocks:
            h = block(h, e)
        return self.last(F.silu(h))


class UNet(nn.Module):
    """F of the preconditioning as a U-Net: one residual block at 8 x 8 before and after two, twice as wide, at 4 x 4.

    An image has `planes` numbers at each of its 8 x 8 places, (E, B, planes * 64).
    """

    def __init__(self, members: int, channels: int = 16, planes: int = 1) -> None:
        super().__init__()
        wide = 2 * channels
        self.first = Conv(members, planes, channels)
        self.down = ConvBlock(members, channels)
        self.narrow = Conv(members, channels, wide, stride=2)
        self.middle = nn.ModuleList(ConvBlock(members, wide) for _ in range(2))
        self.widen = Conv(members, wide, channels)
        self.up = ConvBlock(members, channels)
        self.last = Conv(members, channels, planes)

    def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
        """Return F(x, c_noise), from (E, B, planes * 64) and (E, B) to the shape of x."""
        members, batch, numbers = x.shape
        # The members become groups of channels; channels-last makes grouped convolutions fast on a CPU.
        images = x.transpose(0, 1).reshape(batch, -1, 8, 8).contiguous(memory_format=torch.channels_last)
        e = embed_noise(c_noise)
        skip = self.down(self.first(images), e)
        h = self.narrow(skip)
        for block in self.middle:
            h = block(h, e)
        h = self.up(skip + F.interpolate(self.widen(h), scale_factor=2.0), e)
        return self.last(F.silu(h)).reshape(batch, members, numbers).transpose(0, 1)


class Denoiser(nn.Module):
    """D of the preconditioning: E x_0-predictors (`Prediction.X0` at alpha_t = 1).

    Args:
        body: F, from (E, B, d) and (E, B) to (E, B, d).
        sigma_data: Standard deviation d of the data.
    """

    def __init__(self, body: nn.Module, sigma_data: float = SIGMA_DATA) -> None:
        super().__init__()
        self.body, self.sigma_data = body, sigma_data

    def forward(self, x_t: Tensor, sigma: Tensor) -> Tensor:
        """Return the prediction of x_0, shape (E, B, d).

        Args:
            x_t: Noisy samples x_0 + sigma eps, shape (E, B, d).
            sigma: Noise scale > 0 in data units, shape (E, B) or broadcast against it.
        """
        d, sigma = self.sigma_data, sigma.expand(x_t.shape[:2])
        s = (sigma**2 + d**2).sqrt()
        skip = (d / s)[..., None] ** 2 * x_t
        return skip + (sigma * d / s)[..., None] * self.body(x_t / s[..., None], sigma.log() / 4)


# The last is of the ten Gaussians in the plane, whose coordinates have a standard deviation of 2.8.
NETWORKS: dict[str, Callable[[int], Denoiser]] = {
    "mlp": lambda members: Denoiser(ResidualMLP(members)),
    "conv": lambda members: Denoiser(UNet(members)),
    "plane": lambda members: Denoiser(ResidualMLP(members, size=2, width=64, depth=3), sigma_data=2.8),
}


def embed_noise(c_noise: Tensor) -> Tensor:
    """Return sines and cosines of c_noise = ln(sigma) / 4 at 16 frequencies from 1/2 to 16, (E, B) -> (E, B, 32)."""
    frequencies = 0.5 * 32 ** torch.linspace(0, 1, FREQUENCIES, device=c_noise.device)
    phase = c_noise[..., None] * frequencies
    return torch.cat([phase.sin(), phase.cos()], dim=-1)


def ensemble(network: str, members: Sequence[Mapping[str, Tensor]]) -> Denoiser:
    """Return one denoiser that holds the given networks.

    Args:
        network: A name in NETWORKS.
        members: The weights of E networks, each of shape (1, ...).
    """
    denoiser = NETWORKS[network](len(members))
    denoiser.load_state_dict({name: torch.cat([member[name] for member in members]) for name in members[0]})
    return denoiser


def random_weights(network: str, generator: torch.Generator) -> dict[str, Tensor]:
    """Return random weights of one network, shape (1, ...): N(0, gain^2 / fan_in), and zero for a bias."""
    weights = NETWORKS[network](1).state_dict()
    for name, weight in weights.items():
        if name.endswith("weight"):
            gain = 0.5 if ".outer." in name else 1.0
            weight.copy_(torch.randn(weight.shape, generator=generator) * (gain / math.sqrt(weight[0, 0].numel())))
    return weights


def load_teacher(network: str, members: int) -> Denoiser:
    """Return the teacher that comes with this package, E times over.

    Args:
        network: A name in NETWORKS.
        members: E >= 1.

    Example:
        >>> load_teacher("mlp", members=2)(torch.zeros(2, 3, 64), torch.ones(2, 3)).shape
        torch.Size([2, 3, 64])
    """
    return ensemble(network, [load_file(TEACHERS / f"{network}.safetensors")] * members)
