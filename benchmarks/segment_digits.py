"""Digits of seven segments, drawn by code: grey, one channel, of any size in pixels."""

from __future__ import annotations

import torch

__all__ = ["draw"]

# Upper left, upper right, lower left and lower right corner as 0, 1, 4, 5, the middle 2, 3; which segments a digit has.
POINTS = torch.tensor([[-1.0, -2], [1, -2], [-1, 0], [1, 0], [-1, 2], [1, 2]])
SEGMENTS = torch.tensor([[0, 1], [0, 2], [1, 3], [2, 3], [2, 4], [3, 5], [4, 5]])
DIGITS = ("1110111", "0010010", "1011101", "1011011", "0111010", "1101011", "1101111", "1010010", "1111111", "1111011")


def draw(count, pixels, seed=0, device="cpu"):
    """Return images in [-1, 1], shape (count, 1, pixels, pixels): bright strokes on a dark ground, a digit each.

    Size, slant, place, thickness and brightness differ.

    Args:
        count: Number of images, >= 1.
        pixels: Height and width, >= 1.
        seed: Of the digits and their shapes; the same on each device, up to rounding.
        device: Where to draw, and where the images are.
    """
    stream = torch.Generator().manual_seed(seed)
    shown = torch.tensor([[float(s) for s in digit] for digit in DIGITS])[torch.randint(10, (count,), generator=stream)]
    size, slant, x, y, width, light = torch.rand(6, count, 1, generator=stream)
    points = POINTS * (0.22 + 0.1 * size[..., None])
    across = points[..., 0] + (slant - 0.5) * 0.5 * points[..., 1] + (x - 0.5) * 0.3
    down = points[..., 1] + (y - 0.5) * 0.3
    ends = torch.stack([across, down], -1)[:, SEGMENTS]  # (count, 7, 2, 2)
    axis = (torch.arange(pixels, device=device) + 0.5) * 2 / pixels - 1
    place = torch.cartesian_prod(axis, axis).flip(1)
    images = []
    for part in torch.arange(count).split(500):
        edges, drawn, wide, bright = (values[part].to(device) for values in (ends, shown, width, light))
        a, b = edges[..., None, :].unbind(2)
        t = (((b - a) * (place - a)).sum(-1) / (b - a).square().sum(-1)).clamp(0, 1)[..., None]
        far = (place - a - t * (b - a)).norm(dim=-1).masked_fill(drawn[..., None] == 0, 9.0).amin(1)
        images.append(2 * torch.sigmoid(25 * (0.06 + 0.08 * wide - far)) * (0.6 + 0.4 * bright) - 1)
    return torch.cat(images).view(count, 1, pixels, pixels)
