r"""The inner formulas of the losses: pure functions of tensors, without branches on values; what `kernels` compiles.

Notation: r and f are the outputs of teacher and fake score, t their common target, all of one kind of prediction; sums
and means run over the n elements of a sample, B is the batch. A factor (k, c, weight) is a tensor that broadcasts, or a
number where it never changes: that becomes part of a compiled form. Whatever the inputs' dtype, arithmetic and
gradients are in float32 or better: a GradScaler must scale a gradient before it is cast. A target comes as (t,) or as
(x, eps, a, b) with t = a x + b eps.

Each returns the loss's gradients, then the loss of each sample, shape (B,), then which samples were finite, shape (B,).
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from math import prod
from typing import TypeAlias

import torch
from torch import Tensor

__all__ = ["RUN", "Factor", "Formula", "denoising", "difference", "dmd", "plainly", "sid"]

Formula: TypeAlias = Callable[..., tuple[Tensor, ...]]
Factor: TypeAlias = Tensor | float


def plainly(formula: Formula, *inputs: object) -> tuple[Tensor, ...]:
    """Run a formula as it stands."""
    return formula(*inputs)


# What inductor adds up in registers on a CPU.
ONE_STAGE = 4096

# Who runs the formulas in this context: `plainly`, or the compiled form inside a fused twin.
RUN: ContextVar[Callable[..., tuple[Tensor, ...]]] = ContextVar("RUN", default=plainly)


def difference(
    real: Tensor, unconditional: Tensor | None, fake: Tensor, x: Tensor, k: Factor, guidance: Factor, mask: bool
) -> tuple[Tensor, ...]:
    """With g = k (f - r): the gradient by x is g / B, the loss of a sample sum(g x)."""
    r, f = _guided(real, unconditional, guidance), _up(fake)
    g = k * (f - r)
    loss = _sum(g * _up(x))
    finite = loss.isfinite()
    by_x = _settle(g, finite, mask) / len(x)
    return by_x, _of_samples(_settle(loss, finite, mask)), _of_samples(finite)


def dmd(
    real: Tensor,
    unconditional: Tensor | None,
    fake: Tensor,
    wanted: tuple[Tensor, ...],
    k: Factor,
    guidance: Factor,
    mask: bool,
) -> tuple[Tensor, ...]:
    """With g = k (f - r) / mean|t - r|: the gradient by x is g / (B n), the loss of a sample mean(g^2) / 2."""
    r, f, t = _guided(real, unconditional, guidance), _up(fake), _target(wanted)
    d = f - r
    # Both sums in one pass over the sample: mean(g^2) = k^2 mean(d^2) / mean|t - r|^2.
    scale = k / _mean((t - r).abs())
    loss = 0.5 * scale.square() * _mean(d.square())
    finite = loss.isfinite()
    if mask:
        by_x = _settle(scale / real.numel() * d, finite, mask)  # a division a sample, not one an element
    else:
        g = _settle(scale * d, finite, mask)
        loss = 0.5 * _mean(g.square())
        by_x = g / real.numel()
    return by_x, _of_samples(_settle(loss, finite, mask)), _of_samples(finite)


def sid(
    real: Tensor,
    fake: Tensor,
    wanted: tuple[Tensor, ...],
    c: Factor,
    weight: Factor,
    alpha_sid: Factor,
    mask: bool,
    of_x: bool,
) -> tuple[Tensor, ...]:
    """With q = w c^2 / max(|c| mean|r - t|, 1e-5): the loss of a sample is q sum((r - f) ((r - t) - a (r - f))).

    The gradients are those by r, f and, if t is a function of x, x, over B.
    """
    r, f, t = _up(real), _up(fake), _target(wanted)
    d, e = r - f, r - t
    size = c.abs() if isinstance(c, Tensor) else abs(c)
    q = weight * (size * (size / (size * _mean(e.abs())).clamp(min=1e-5)))
    loss = q * _sum(d * (e - alpha_sid * d))
    finite = loss.isfinite()
    q = q / len(real)  # once a sample; a division at each element costs registers
    by_r = _settle(q * (e + (1 - 2 * alpha_sid) * d), finite, mask)
    by_f = _settle(q * (2 * alpha_sid * d - e), finite, mask)
    dt_dx: Factor = wanted[2] if len(wanted) == 4 else 1.0
    by_x = [_settle(-q * dt_dx * d, finite, mask)] if of_x else []
    return by_r, by_f, *by_x, _of_samples(_settle(loss, finite, mask)), _of_samples(finite)


def denoising(output: Tensor, wanted: tuple[Tensor, ...], weight: Factor) -> tuple[Tensor, ...]:
    """The gradient by o is 2 w (o - t) / (B n), the loss of a sample mean(w (o - t)^2)."""
    error = _up(output) - _target(wanted)
    by_output = 2 * weight * error / output.numel()
    loss = _of_samples(_mean(weight * error.square()))
    return by_output, loss, loss.isfinite()


def _target(wanted: tuple[Tensor, ...]) -> Tensor:
    if len(wanted) == 1:
        return _up(wanted[0])
    x, eps, a, b = wanted
    return a * _up(x) + b * _up(eps)


def _guided(real: Tensor, unconditional: Tensor | None, guidance: Factor) -> Tensor:
    """Classifier-free guidance: r = u + s (c - u)."""
    if unconditional is None:
        return _up(real)
    u = _up(unconditional)
    return u + guidance * (_up(real) - u)


def _settle(value: Tensor, finite: Tensor, mask: bool) -> Tensor:
    # A product with 0 would leave NaN where it was; nan_to_num alone would make a gradient of 3e38 of an Inf.
    return torch.where(finite, value, 0.0) if mask else value.nan_to_num()


def _up(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def _sum(tensor: Tensor) -> Tensor:
    """Sum over the elements of each sample, shape (B, 1, ...)."""
    if not _in_stages(tensor):
        return tensor.sum(dim=tuple(range(1, tensor.ndim)), keepdim=True)
    total, axis = tensor, tensor.ndim
    while axis > 1:
        last, axis = axis, axis - 1
        while axis > 1 and prod(tensor.shape[axis - 1 : last]) <= ONE_STAGE:
            axis -= 1
        total = total.sum(dim=tuple(range(axis, last)), keepdim=True)
    return total


def _mean(tensor: Tensor) -> Tensor:
    if _in_stages(tensor):
        return _sum(tensor) / prod(tensor.shape[1:])
    return tensor.mean(dim=tuple(range(1, tensor.ndim)), keepdim=True)


def _in_stages(tensor: Tensor) -> bool:
    # On a CPU inductor adds up more than a stage by way of memory, at a third of the speed.
    return tensor.is_cpu and torch.compiler.is_compiling()


def _of_samples(tensor: Tensor) -> Tensor:
    return tensor.reshape(len(tensor))
