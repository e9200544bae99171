"""What the losses do with a batch before a formula runs, and with its gradients after."""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import Tensor

from disback_plugin import formulas
from disback_plugin.errors import MismatchError, OptionError, TrainingError
from disback_plugin.scores import Prediction, mixture

__all__ = [
    "Number",
    "count",
    "is_mask",
    "mean",
    "numbers",
    "rows",
    "run",
    "same_shape",
    "scale",
    "target_parts",
    "teacher_halves",
    "with_gradients",
]

Number: TypeAlias = Tensor | float


def run(formula: formulas.Formula, *inputs: object) -> tuple[Tensor, ...]:
    """Run a formula: plainly, or compiled inside a fused twin."""
    return formulas.RUN.get()(formula, *inputs)


class _WithGradients(torch.autograd.Function):
    """A value whose gradients are known, in float32 or better."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, *pairs: Tensor) -> Tensor:
        ctx.dtypes = [source.dtype for source in pairs[::2]]
        ctx.save_for_backward(*pairs[1::2])
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise TrainingError(
                "backward(create_graph=True) through a loss with closed-form gradients",
                expected="first derivatives only",
                cure="compute the term whose second derivative you need without disback_plugin.losses",
            )
        # Scaled first and cast then: 65536, where a GradScaler starts, does not exist in float16.
        scaled = [(g * upstream).to(dtype) for g, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)]
        # The value itself is a function of factors that are learned, as a weight may be.
        return (upstream, *(entry for gradient in scaled for entry in (gradient, None)))


def with_gradients(value: Tensor, *pairs: tuple[Tensor, Tensor]) -> Tensor:
    """Return the value as a function of the first of each pair, of which the second is its gradient."""
    flat = [t for source, gradient in pairs for t in (source, gradient.detach().reshape(source.shape))]
    result: Tensor = _WithGradients.apply(value, *flat)
    return result


def teacher_halves(x: Tensor, real: Tensor, fake: Tensor, guidance: Number | None) -> tuple[Tensor, Tensor | None]:
    """Return the teacher's conditional and, under guidance, unconditional output."""
    if guidance is None:
        same_shape(x=x, real=real, fake=fake)
        return rows(real.detach()), None
    if real.shape != (2 * len(x), *x.shape[1:]):
        raise MismatchError(
            f"real {tuple(real.shape)} with guidance for x {tuple(x.shape)}",
            expected="twice the batch, the unconditional half first",
            cure="run the teacher once on torch.cat([x_t, x_t]) with both conditions",
        )
    same_shape(x=x, fake=fake)
    unconditional, conditional = rows(real.detach()).chunk(2)
    return conditional, unconditional


def target_parts(prediction: Prediction, x: Tensor, eps: Tensor, alpha: Number, sigma: Number) -> tuple[Tensor, ...]:
    """Return the target of a kind as the formulas take it: (t,), or (x, eps, a, b) with t = a x + b eps."""
    x, eps = rows(x.detach()), rows(eps.detach())
    if prediction in (Prediction.EPS, Prediction.X0):
        return (eps,) if prediction == Prediction.EPS else (x,)
    a, b = mixture(prediction, *numbers(x, alpha, sigma))
    return x, eps, scale(a, x), scale(b, x)


def is_mask(nonfinite: str) -> bool:
    """Return whether samples that are not finite are masked; raise OptionError for an unknown mode."""
    if nonfinite not in ("mask", "zero"):
        raise OptionError(f"nonfinite={nonfinite!r}", expected="'mask' or 'zero'", cure="leave it away for 'mask'")
    return nonfinite == "mask"


def numbers(like: Tensor, *values: Number) -> list[Tensor]:
    """Return numbers and factors as tensors on the device of `like`, in float32 or better.

    Raises:
        MismatchError: If a factor has one axis and `like` more: it would be broadcast along the last, not the batch.
    """
    for value in values:
        if isinstance(value, Tensor) and value.ndim == 1 and like.ndim > 1 and len(value) > 1:
            raise MismatchError(
                f"a factor of shape {tuple(value.shape)} for a batch {tuple(like.shape)}",
                expected=f"one that broadcasts from the left, as {(len(like), *[1] * (like.ndim - 1))}",
                cure="pass noise.expand(factor, like=x)",
            )
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return [torch.as_tensor(value, dtype=dtype, device=like.device) for value in values]


def rows(tensor: Tensor) -> Tensor:
    """Return the tensor with at least one axis beside the batch."""
    return tensor if tensor.ndim > 1 else tensor[:, None]


def scale(value: Number, like: Tensor, *, per_sample: bool = False) -> Tensor:
    """Return a factor that broadcasts against `rows(like)`.

    Raises:
        MismatchError: If it shall be one number a sample and is not.
    """
    (factor,) = numbers(like, value)
    factor = factor[:, None] if like.ndim == 1 and factor.ndim == 1 else factor
    if per_sample and factor.numel() > len(like) and factor.numel() > 1:
        raise MismatchError(
            f"a factor of shape {tuple(factor.shape)}",
            expected=f"one number a sample, as {(len(like), *[1] * (max(like.ndim, 2) - 1))}",
            cure="multiply element by element outside of this loss, whose normaliser is one number a sample",
        )
    return factor


def mean(values: Tensor) -> Tensor:
    """Return the mean over the samples; 0 for an empty batch."""
    return values.mean() if len(values) else values.sum()


def count(skipped: Tensor | None, finite: Tensor) -> None:
    """Add the number of samples that were not finite to a counter, without a sync."""
    if skipped is not None:
        skipped += (~finite).sum()


def same_shape(**tensors: Tensor) -> None:
    """Raise MismatchError unless all tensors have one shape."""
    first, *others = tensors.values()
    if any(tensor.shape != first.shape for tensor in others):
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
        raise MismatchError(shapes, expected="one shape", cure="pass outputs computed from this very batch")
