"""What the losses do with a batch before a formula runs, and with its gradients after."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, TypeAlias

import torch
from torch import Tensor

from disback_plugin.errors import MismatchError, OptionError, TrainingError
from disback_plugin.prediction import Prediction, mixture
from disback_plugin.terms import formulas

__all__ = [
    "LISTENER",
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
    def forward(ctx: Any, value: Tensor, gradients: tuple[Tensor, ...], *sources: Tensor) -> Tensor:
        ctx.dtypes = [source.dtype for source in sources]
        ctx.save_for_backward(*gradients)
        return value

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise TrainingError(
                "backward(create_graph=True) through a loss with closed-form gradients",
                expected="first derivatives only",
                cure="compute the term whose second derivative you need without disback_plugin.losses",
            )
        gradients = ctx.saved_tensors
        # A look at a number costs nothing on a CPU; elsewhere it would be a sync, and in a graph a break.
        if torch.compiler.is_compiling() or not upstream.is_cpu or upstream.item() != 1.0:
            gradients = [gradient * upstream for gradient in gradients]
        # Scaled first and cast then: 65536, where a GradScaler starts, does not exist in float16.
        cast = [gradient.to(dtype) for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)]
        # The value itself is a function of factors that are learned, as a weight may be.
        return (upstream, None, *cast)


def with_gradients(value: Tensor, *pairs: tuple[Tensor, Tensor]) -> Tensor:
    """Return the value as a function of the first of each pair, of which the second is its gradient."""
    gradients = tuple([_like(gradient, source) for source, gradient in pairs])
    result: Tensor = _WithGradients.apply(value, gradients, *[source for source, _ in pairs])
    return result


def _like(gradient: Tensor, source: Tensor) -> Tensor:
    gradient = gradient.detach() if gradient.requires_grad else gradient
    return gradient if gradient.shape == source.shape else gradient.view(source.shape)


def teacher_halves(
    x: Tensor, real: Tensor, fake: Tensor, guidance: Number | None, **others: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Return the teacher's conditional and, under guidance, unconditional output; all else has the shape of x."""
    if guidance is None:
        same_shape(x=x, real=real, fake=fake, **others)
        return rows(real), None
    if real.shape != (2 * len(x), *x.shape[1:]):
        raise MismatchError(
            f"real {tuple(real.shape)} with guidance for x {tuple(x.shape)}",
            expected="twice the batch, the unconditional half first",
            cure="run the teacher once on torch.cat([x_t, x_t]) with both conditions",
        )
    same_shape(x=x, fake=fake, **others)
    unconditional, conditional = rows(real).chunk(2)
    return conditional, unconditional


def target_parts(prediction: Prediction, x: Tensor, eps: Tensor, alpha: Number, sigma: Number) -> tuple[Tensor, ...]:
    """Return the target of a kind as the formulas take it: (t,), or (x, eps, a, b) with t = a x + b eps."""
    if prediction == Prediction.X0:
        return (rows(x),)
    if prediction == Prediction.EPS:
        return (rows(eps),)
    a, b = mixture(prediction, *numbers(x, alpha, sigma))
    return rows(x), rows(eps), _over_rows(a, x), _over_rows(b, x)


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
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return [_as_tensor(value, like, dtype) for value in values]


def _as_tensor(value: Number, like: Tensor, dtype: torch.dtype) -> Tensor:
    if not isinstance(value, Tensor):
        # A fill is enqueued; as_tensor would copy from the host, and wait for it.
        return torch.full((), value, dtype=dtype, device=like.device)
    if value.ndim == 1 and like.ndim > 1 and len(value) > 1:
        raise MismatchError(
            f"a factor of shape {tuple(value.shape)} for a batch {tuple(like.shape)}",
            expected=f"one that broadcasts from the left, as {(len(like), *[1] * (like.ndim - 1))}",
            cure="pass noise.expand(factor, like=x)",
        )
    return value.to(like.device, dtype)


def rows(tensor: Tensor) -> Tensor:
    """Return the tensor without its graph and with at least one axis beside the batch."""
    tensor = tensor.detach() if tensor.requires_grad else tensor
    return tensor if tensor.ndim > 1 else tensor[:, None]


def scale(value: Number, like: Tensor, *, per_sample: bool = False) -> Number:
    """Return a factor that broadcasts against `rows(like)`; 1 and -1, which never change, stay numbers.

    Raises:
        MismatchError: If it shall be one number a sample and is not.
    """
    if not isinstance(value, Tensor) and value in (1, -1):
        return float(value)
    (factor,) = numbers(like, value)
    factor = _over_rows(factor, like)
    if per_sample and factor.numel() > len(like) and factor.numel() > 1:
        raise MismatchError(
            f"a factor of shape {tuple(factor.shape)}",
            expected=f"one number a sample, as {(len(like), *[1] * (max(like.ndim, 2) - 1))}",
            cure="multiply element by element outside of this loss, whose normaliser is one number a sample",
        )
    return factor


def _over_rows(factor: Tensor, like: Tensor) -> Tensor:
    return factor[:, None] if like.ndim == 1 and factor.ndim == 1 else factor


def mean(values: Tensor) -> Tensor:
    """Return the mean over the samples, shape (B,); 0 for an empty batch. One number is a mean already."""
    if not values.ndim:
        return values
    return values.mean() if len(values) else values.sum()


# Who is told, in this context, which samples of a batch were finite: tensors of shape (B,).
LISTENER: ContextVar[Callable[[Tensor], None] | None] = ContextVar("LISTENER", default=None)


def count(skipped: Tensor | None, finite: Tensor) -> None:
    """Add the number of samples that were not finite to a counter, and tell who listens, without a sync."""
    if skipped is not None:
        skipped += (~finite).sum()
    listener = LISTENER.get()
    if listener is not None:
        listener(finite)


def same_shape(**tensors: Tensor) -> None:
    """Raise MismatchError unless all tensors have one shape."""
    shapes = [tensor.shape for tensor in tensors.values()]
    if shapes.count(shapes[0]) < len(shapes):
        found = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
        raise MismatchError(found, expected="one shape", cure="pass outputs computed from this very batch")
