"""Coloured shapes made by code: discs, squares and triangles of six colours, 16 x 16 pixels, three channels."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["draw", "images"]

COUNT = 4_000
KINDS = ("disc", "square", "triangle")
PIXELS, DARK = 16, -0.8
COLOURS = torch.tensor([[1, -1, -1], [-1, 1, -1], [-1, -1, 1], [1, 1, -1], [1, -1, 1], [-1, 1, 1]], dtype=torch.float32)


def draw(kind: Tensor, colour: Tensor, centre: Tensor, radius: Tensor) -> Tensor:
    """Return images in [-1, 1], shape (n, 3, 16, 16): a shape with soft edges on a dark ground.

    Args:
        kind: Indices into `KINDS`, shape (n,).
        colour: Red, green and blue in [-1, 1], shape (n, 3).
        centre: Row and column in pixels, shape (n, 2).
        radius: From the centre to an edge's middle, in pixels, shape (n,).
    """
    rows, columns = torch.meshgrid(torch.arange(PIXELS) + 0.5, torch.arange(PIXELS) + 0.5, indexing="ij")
    y, x = (axis - c[:, None, None] for axis, c in zip((rows, columns), centre.T, strict=True))
    x = x.abs()
    # Each shape is where its gauge, a norm of the place, is below the radius.
    disc, square = (x**2 + y**2).sqrt(), torch.maximum(x, y.abs())
    triangle = torch.maximum(y, (math.sqrt(3) * x - y) / 2)
    gauge = torch.stack([disc, square, triangle])[kind, torch.arange(len(kind))]
    inside = torch.sigmoid(3 * (radius[:, None, None] - gauge))[:, None]
    return DARK + inside * (colour[:, :, None, None] - DARK)


def images() -> Tensor:
    """Return 4,000 images as patches of 2 x 2 pixels, shape (4000, 12 * 8 * 8)."""
    stream = torch.Generator().manual_seed(0)
    kind = torch.randint(len(KINDS), (COUNT,), generator=stream)
    colour = COLOURS[torch.randint(len(COLOURS), (COUNT,), generator=stream)]
    centre = 5 + 6 * torch.rand(COUNT, 2, generator=stream)
    radius = 2.5 + 2 * torch.rand(COUNT, generator=stream)
    return F.pixel_unshuffle(draw(kind, colour, centre, radius), 2).flatten(1)
