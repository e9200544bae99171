"""A small U-Net for images of 8 x 8 places, with an ensemble axis as `disback_plugin.demo.worlds` has it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from disback_plugin.demo.worlds import FREQUENCIES, Linear, embed_noise


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
