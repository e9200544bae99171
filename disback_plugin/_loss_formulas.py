r"""The formulas of the losses as pure functions of tensors, and what surrounds a formula: its inputs and its gradients.

Notation: r and f are the outputs of the teacher and of the fake score, t is their common target, all of one kind of
prediction. Sums and means run over the n elements of a sample, B is the batch size. Under guidance of scale s the
teacher's output is u + s (r - u), with u its unconditional output, else None. A target is passed as (t,) or as
(x, eps, a, b) with t = a x + b eps. A factor (s, k, c, weight) is a tensor that broadcasts, or a number that never
changes and becomes a constant of the compiled form.

A formula returns the gradients of the loss, then the loss of each sample, shape (B,), then whether each sample is
finite, shape (B,). Formulas do not branch on values, so that `kernels` can compile them. Arithmetic and gradients are
in float32 or better whatever the dtype of the inputs, because a GradScaler has to scale a gradient before it is cast.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from math import prod
from typing import Any, TypeAlias

import torch
from torch import Tensor

from disback_plugin.errors import MismatchError, OptionError, TrainingError
from disback_plugin.prediction import Prediction, factors, mixture

Number: TypeAlias = Tensor | float
Formula: TypeAlias = Callable[..., tuple[Tensor, ...]]


def run_plain(formula: Formula, *inputs: object) -> tuple[Tensor, ...]:
    """Run a formula without compiling it."""
    return formula(*inputs)


# The function that runs formulas in this context: `run_plain`, or the compiled form inside a loss of `kernels`.
RUNNER: ContextVar[Callable[..., tuple[Tensor, ...]]] = ContextVar("RUNNER", default=run_plain)
# A function that receives, for each loss, which samples were finite: a boolean tensor of shape (B,).
FINITE_LISTENER: ContextVar[Callable[[Tensor], None] | None] = ContextVar("FINITE_LISTENER", default=None)
# The longest sum that inductor keeps in registers on a CPU.
REGISTER_SUM = 4096


# -- formulas --------------------------------------------------------------------------------------------------------


def difference(
    r: Tensor, u: Tensor | None, s: Number, f: Tensor, x: Tensor, k: Number, mask: bool
) -> tuple[Tensor, ...]:
    """With g = k (f - r): the gradient by x is g / B, the loss of a sample is sum(g x)."""
    g = k * (_float(f) - _guided(r, u, s))
    loss = _sum(g * _float(x))
    finite = loss.isfinite()
    by_x = _replace_nonfinite(g, finite, mask) / len(x)
    return by_x, _flat(_replace_nonfinite(loss, finite, mask)), _flat(finite)


def dmd(
    r: Tensor,
    u: Tensor | None,
    s: Number,
    f: Tensor,
    c: Tensor | None,
    share: Tensor | None,
    k: Number,
    mask: bool,
    *target: Tensor,
) -> tuple[Tensor, ...]:
    """With g = k c (f - r) / mean|c (t - r)|: the gradient by x is g / (B n), the loss of a sample is mean(g^2) / 2.

    A share of the mean, whose own mean over the batch is 1, multiplies g and g^2.
    """
    r = _guided(r, u, s)
    d, e = _float(f) - r, _combined(target) - r
    d, e = _times(c, d), _times(c, e)
    # One pass over the sample computes both sums: mean(g^2) = k^2 mean(d^2) / mean|e|^2.
    scale = k / _mean(e.abs())
    loss = 0.5 * scale.square() * _mean(_times(share, d.square()))
    finite = loss.isfinite()
    if mask:
        # One division a sample, not one an element.
        by_x = _replace_nonfinite(_times(share, scale / r.numel() * d), finite, mask)
    else:
        g = _replace_nonfinite(scale * d, finite, mask)
        loss = 0.5 * _mean(_times(share, g.square()))
        by_x = _times(share, g / r.numel())
    return by_x, _flat(_replace_nonfinite(loss, finite, mask)), _flat(finite)


def sid(
    r: Tensor,
    f: Tensor,
    c: Number,
    within: Tensor | None,
    weight: Number,
    a: Number,
    mask: bool,
    target_depends_on_x: bool,
    *target: Tensor,
) -> tuple[Tensor, ...]:
    """With q = w c^2 / max(|c| mean|r - t|, 1e-5): the loss of a sample is q sum((r - f) ((r - t) - a (r - f))).

    What of c varies within a sample multiplies each difference before. The gradients are those by r, by f and, if t
    depends on x, by x, each over B.
    """
    r = _float(r)
    d, e = r - _float(f), r - _combined(target)
    d, e = _times(within, d), _times(within, e)
    size = c.abs() if isinstance(c, Tensor) else abs(c)
    q = weight * (size * (size / (size * _mean(e.abs())).clamp(min=1e-5)))
    loss = q * _sum(d * (e - a * d))
    finite = loss.isfinite()
    q = q / len(r)  # divided once a sample: a division at each element costs registers
    q = _times(within, q)
    gradients = [q * (e + (1 - 2 * a) * d), q * (2 * a * d - e)]
    if target_depends_on_x:
        gradients.append(-q * (target[2] if len(target) == 4 else 1.0) * d)
    gradients = [_replace_nonfinite(gradient, finite, mask) for gradient in gradients]
    return *gradients, _flat(_replace_nonfinite(loss, finite, mask)), _flat(finite)


def denoising(output: Tensor, weight: Number, *target: Tensor) -> tuple[Tensor, ...]:
    """The gradient by the output o is 2 w (o - t) / (B n), the loss of a sample is mean(w (o - t)^2)."""
    error = _float(output) - _combined(target)
    by_output = 2 * weight * error / output.numel()
    loss = _flat(_mean(weight * error.square()))
    return by_output, loss, loss.isfinite()


def _times(factor: Tensor | None, value: Tensor) -> Tensor:
    return value if factor is None else factor * value


def _combined(target: tuple[Tensor, ...]) -> Tensor:
    if len(target) == 1:
        return _float(target[0])
    x, eps, a, b = target
    return a * _float(x) + b * _float(eps)


def _guided(real: Tensor, unconditional: Tensor | None, guidance: Number) -> Tensor:
    """Apply classifier-free guidance: r = u + s (c - u)."""
    if unconditional is None:
        return _float(real)
    u = _float(unconditional)
    return u + guidance * (_float(real) - u)


def _replace_nonfinite(value: Tensor, finite: Tensor, mask: bool) -> Tensor:
    # A product with 0 would keep a NaN, and nan_to_num alone would turn an Inf into a gradient of 3e38.
    return torch.where(finite, value, 0.0) if mask else value.nan_to_num()


def _float(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()


def _sum(tensor: Tensor) -> Tensor:
    """Sum over the elements of each sample, shape (B, 1, ...)."""
    if not _in_stages(tensor):
        return tensor.sum(dim=tuple(range(1, tensor.ndim)), keepdim=True)
    total, axis = tensor, tensor.ndim
    while axis > 1:
        last, axis = axis, axis - 1
        while axis > 1 and prod(tensor.shape[axis - 1 : last]) <= REGISTER_SUM:
            axis -= 1
        total = total.sum(dim=tuple(range(axis, last)), keepdim=True)
    return total


def _mean(tensor: Tensor) -> Tensor:
    if _in_stages(tensor):
        return _sum(tensor) / prod(tensor.shape[1:])
    return tensor.mean(dim=tuple(range(1, tensor.ndim)), keepdim=True)


def _in_stages(tensor: Tensor) -> bool:
    # On a CPU inductor writes partial results of longer sums to memory, at a third of the speed.
    return tensor.is_cpu and torch.compiler.is_compiling()


def _flat(tensor: Tensor) -> Tensor:
    return tensor.reshape(len(tensor))


# -- inputs ----------------------------------------------------------------------------------------------------------


def validate_shapes(**tensors: Tensor) -> None:
    """Raise MismatchError unless all tensors have one shape."""
    shapes = [tensor.shape for tensor in tensors.values()]
    if shapes.count(shapes[0]) < len(shapes):
        found = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
        raise MismatchError(found, expected="one shape", cure="pass outputs computed from this very batch")


def validate_factors(like: Tensor, **factors: Number | None) -> None:
    """Raise MismatchError unless every factor broadcasts against `like` with the batch as its first axis."""
    one_a_sample = (len(like), *[1] * (like.ndim - 1))
    for name, factor in factors.items():
        if not isinstance(factor, Tensor) or not factor.ndim or factor.shape == one_a_sample:
            continue
        shape = like.shape if like.ndim > 1 else (len(like), 1)
        sizes = zip(reversed(factor.shape), reversed(shape), strict=False)
        along_the_last_axis = factor.ndim == 1 and factor.shape != (1,)
        if along_the_last_axis or factor.ndim > len(shape) or any(size not in (1, whole) for size, whole in sizes):
            raise MismatchError(
                f"{name} of shape {tuple(factor.shape)} for a batch {tuple(like.shape)}",
                expected=f"a shape that broadcasts from the left, as {one_a_sample}",
                cure=f"pass {name}=noise.expand({name}, like=x)",
            )


def outputs(x: Tensor, real: Tensor, fake: Tensor, guidance: Number | None, **others: Tensor) -> tuple[Any, ...]:
    """Return r, u, s and f as the formulas take them; all but `real` under guidance must have the shape of x."""
    if guidance is None:
        validate_shapes(x=x, real=real, fake=fake, **others)
        return detached(real), None, 1.0, detached(fake)
    unconditional, conditional = _halves(detached(real), x)
    validate_shapes(x=x, fake=fake, **others)
    return conditional, unconditional, constant_or_tensor(guidance, x), detached(fake)


def guided(output: Tensor, x: Tensor, guidance: Number | None) -> Tensor:
    """Return a network's output under guidance with its graph, from that on the doubled batch; None leaves it alone."""
    if guidance is None:
        return output
    unconditional, conditional = _halves(output, x)
    return _guided(conditional, unconditional, constant_or_tensor(guidance, x))


def _halves(output: Tensor, x: Tensor) -> tuple[Tensor, ...]:
    if output.shape != (2 * len(x), *x.shape[1:]):
        raise MismatchError(
            f"an output {tuple(output.shape)} with guidance for x {tuple(x.shape)}",
            expected="twice the batch, the unconditional half first",
            cure="run the network once on torch.cat([x_t, x_t]) with both conditions",
        )
    return output.chunk(2)


def target_parts(prediction: Prediction, x: Tensor, eps: Tensor, alpha: Number, sigma: Number) -> tuple[Tensor, ...]:
    """Return the target t as the formulas take it: (t,), or (x, eps, a, b) with t = a x + b eps."""
    if prediction == Prediction.X0:
        return (detached(x),)
    if prediction == Prediction.EPS:
        return (detached(eps),)
    return detached(x), detached(eps), *mixture(prediction, *factors(x, alpha, sigma))


def is_mask(nonfinite: str) -> bool:
    """Return whether samples that are not finite are masked; raise OptionError for an unknown mode."""
    if nonfinite not in ("mask", "zero"):
        raise OptionError(f"nonfinite={nonfinite!r}", expected="'mask' or 'zero'", cure="omit it for 'mask'")
    return nonfinite == "mask"


def constant_or_tensor(value: Number, like: Tensor) -> Number:
    """Return a factor as the formulas take it: 1 and -1, which never change, remain numbers."""
    return float(value) if not isinstance(value, Tensor) and value in (1, -1) else factors(like, value)[0]


def one_a_sample(value: Number, like: Tensor) -> Number:
    """Return a factor as the formulas take it; raise MismatchError unless it is one number, or one a sample."""
    if isinstance(value, Tensor) and not is_one_a_sample(value, like):
        raise MismatchError(
            f"a factor of shape {tuple(value.shape)}",
            expected=f"one number a sample, as {(len(like), *[1] * (like.ndim - 1))}",
            cure="multiply element by element outside of this loss, whose normaliser is one number a sample",
        )
    return constant_or_tensor(value, like)


def is_one_a_sample(factor: Number, like: Tensor) -> bool:
    """Return whether a factor is one number, or one number a sample."""
    if not isinstance(factor, Tensor) or factor.numel() == 1:
        return True
    return factor.ndim >= like.ndim and prod(factor.shape[1:]) == 1


def share_of_mean(mask: Tensor, like: Tensor) -> Tensor:
    """Return the factor that makes a mean over the batch one over the elements of a mask; zero if the mask is empty."""
    (share,) = factors(like, mask)
    return share / share.mean().clamp(min=1 / max(mask.numel(), 1))


def detached(tensor: Tensor) -> Tensor:
    """Return the tensor without its graph."""
    return tensor.detach() if tensor.requires_grad else tensor


# -- results ---------------------------------------------------------------------------------------------------------


def evaluate(
    formula: Formula, sources: tuple[Tensor, ...], *inputs: Any, skipped: Tensor | None = None, counted: bool = True
) -> Tensor:
    """Return the mean of a formula's losses as a function of the sources, whose gradients are the formula's.

    The number of samples that were not finite is added to `skipped`, and, if `counted`, which were finite is passed to
    the listener: both without a sync.
    """
    # A sample has at least one axis beside the batch.
    inputs = tuple([e[:, None] if isinstance(e, Tensor) and e.ndim == 1 else e for e in inputs])
    *gradients, loss, finite = RUNNER.get()(formula, *inputs)
    if skipped is not None:
        skipped += (~finite).sum()
    listener = FINITE_LISTENER.get() if counted else None
    if listener is not None:
        listener(finite)
    if loss.ndim:  # a compiled form returns the mean itself
        loss = loss.mean() if len(loss) else loss.sum()
    sources = sources[: len(gradients)]
    by_source = [g if g.shape == x.shape else g.view(x.shape) for g, x in zip(gradients, sources, strict=True)]
    result: Tensor = _WithGradients.apply(loss, tuple([detached(g) for g in by_source]), *sources)
    return result


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
        # Reading one number is free on a CPU; on another device it would be a sync, and in a graph a break.
        if torch.compiler.is_compiling() or not upstream.is_cpu or upstream.item() != 1.0:
            gradients = [gradient * upstream for gradient in gradients]
        # Scaled first and cast after: 65536, where a GradScaler starts, does not exist in float16.
        cast = [gradient.to(dtype) for gradient, dtype in zip(gradients, ctx.dtypes, strict=True)]
        # The value itself may depend on learned factors, such as a weight.
        return (upstream, None, *cast)
