"""Layers with an ensemble axis: every parameter has shape (E, ...), and no member sees another."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["WAVES", "Conv", "ConvBlock", "Linear", "MLPBlock", "waves"]

WAVES = 16


def _weight(generator: torch.Generator, *shape: int, gain: float = 1.0) -> nn.Parameter:
    """Draw weights (E, out, in, ...) ~ N(0, gain^2 / fan_in), each member its own."""
    fan_in = math.prod(shape[2:])
    return nn.Parameter(torch.randn(shape, generator=generator) * (gain / math.sqrt(fan_in)))


def _bias(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.zeros(shape))


def waves(c_noise: Tensor) -> Tensor:
    """Embed a noise scale: return sines and cosines of c_noise = ln(sigma) / 4 at 16 frequencies from 1/2 to 16.

    Args:
        c_noise: Shape (E, B).

    Returns:
        The embedding, shape (E, B, 32).
    """
    frequencies = 0.5 * 32 ** torch.linspace(0, 1, WAVES, device=c_noise.device)
    phase = c_noise[..., None] * frequencies
    return torch.cat([phase.sin(), phase.cos()], dim=-1)


class Linear(nn.Module):
    """E affine maps: (E, B, inputs) -> (E, B, outputs)."""

    def __init__(self, members: int, inputs: int, outputs: int, generator: torch.Generator, gain: float = 1.0) -> None:
        super().__init__()
        self.weight = _weight(generator, members, outputs, inputs, gain=gain)
        self.bias = _bias(members, 1, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Return W x + b of each member, from (E, B, in) to (E, B, out)."""
        return torch.baddbmm(self.bias, x, self.weight.mT)


class Conv(nn.Module):
    """E convolutions 3 x 3 as one grouped convolution: (B, E inputs, H, W) -> (B, E outputs, H, W) at stride 1."""

    def __init__(
        self, members: int, inputs: int, outputs: int, generator: torch.Generator, gain: float = 1.0, stride: int = 1
    ) -> None:
        super().__init__()
        self.weight = _weight(generator, members, outputs, inputs, 3, 3, gain=gain)
        self.bias = _bias(members, outputs)
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """Return each member's convolution, from (B, E in, H, W) to (B, E out, H, W)."""
        weight, bias = self.weight.flatten(0, 1), self.bias.flatten()
        return F.conv2d(x, weight, bias, stride=self.stride, padding=1, groups=len(self.weight))


class MLPBlock(nn.Module):
    """h + W_2 silu(W_1 norm(h) + W_e e), with a norm that has no parameters."""

    def __init__(self, members: int, width: int, generator: torch.Generator) -> None:
        super().__init__()
        self.inner = Linear(members, width, width, generator)
        self.embed = Linear(members, 2 * WAVES, width, generator)
        self.outer = Linear(members, width, width, generator, gain=0.5)

    def forward(self, h: Tensor, e: Tensor) -> Tensor:
        """Return h plus its residual, shape (E, B, width), under the noise embedding e."""
        normed = F.layer_norm(h, h.shape[-1:])
        residual: Tensor = self.outer(F.silu(self.inner(normed) + self.embed(e)))
        return h + residual


class ConvBlock(nn.Module):
    """h + conv(silu(norm(conv(silu(norm(h))) + W_e e))), with group norms that have no parameters."""

    def __init__(self, members: int, channels: int, generator: torch.Generator) -> None:
        super().__init__()
        self.inner = Conv(members, channels, channels, generator)
        self.embed = Linear(members, 2 * WAVES, channels, generator)
        self.outer = Conv(members, channels, channels, generator, gain=0.5)
        self.groups = members * channels // 8

    def forward(self, h: Tensor, e: Tensor) -> Tensor:
        """Return h plus its residual, shape (B, E channels, H, W), under the noise embedding e."""
        shift = self.embed(e).transpose(0, 1).flatten(1)[..., None, None]
        inner = self.inner(F.silu(F.group_norm(h, self.groups))) + shift
        residual: Tensor = self.outer(F.silu(F.group_norm(inner, self.groups)))
        return h + residual
