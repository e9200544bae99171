r"""Generator losses, in plain torch: the specification of the fused kernels; and the names of all other losses.

With x_t = alpha x + sigma eps, outputs f (fake score) and r (teacher) of one kind of prediction, and t their common
target (`scores.target`), every score difference is a multiple of f - r, and what denoising takes from x one of t - r:

    D_phi - D_theta = c (f - r),     x - D_theta = c (t - r),     s_phi - s_theta = k (f - r)

with c and k from `scores.ratio`. So no loss here converts an output to x_0 or to a score; nothing large cancels,
and float32 is exact to 1e-7 where the x_0 form needs float64.

| loss            | dL/dx                                               | source                              |
|-----------------|-----------------------------------------------------|-------------------------------------|
| `diff_instruct` | w alpha (s_phi - s_theta) / B                       | arXiv 2305.18455; the paper's Eq. 8 |
| `vsd`           | w (eps_theta - eps_phi) / B                         | arXiv 2305.16213, Eq. 9             |
| `dmd`           | w (D_phi - D_theta) / mean|x - D_theta| / (B n)     | arXiv 2311.18828, Eq. 7 and 8       |
| `sid`           | through both networks                               | arXiv 2404.04057, Eq. 23            |

Gradients are computed in closed form and handed to autograd as they are, without a surrogate graph.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

from torch import Tensor

from disback_plugin.prediction import Prediction, ratio
from disback_plugin.terms import formulas
from disback_plugin.terms.batches import (
    Number,
    count,
    is_mask,
    mean,
    numbers,
    rows,
    run,
    same_shape,
    scale,
    target_parts,
    teacher_halves,
    with_gradients,
)
from disback_plugin.terms.companions import dmd_regression, gan_discriminator, gan_generator
from disback_plugin.terms.denoising import denoising, edm_weight, snr_weight

__all__ = [
    "denoising",
    "diff_instruct",
    "dmd",
    "dmd_regression",
    "edm_weight",
    "gan_discriminator",
    "gan_generator",
    "sid",
    "snr_weight",
    "vsd",
]

NonFinite: TypeAlias = Literal["mask", "zero"]


def diff_instruct(
    x: Tensor,
    real: Tensor,
    fake: Tensor,
    *,
    alpha: Number,
    sigma: Number,
    prediction: Prediction,
    weight: Number = 1.0,
    guidance: Number | None = None,
    nonfinite: NonFinite = "mask",
    skipped: Tensor | None = None,
) -> Tensor:
    r"""Diff-Instruct (arXiv 2305.18455), Eq. 8: dL/dx = w alpha (s_phi(x_t) - s_theta(x_t)) / B.

    Args:
        x: Generated samples x = G(z), shape (B, ...); they carry the generator's graph.
        real: The teacher's output on x_t = alpha x + sigma eps, shape (B, ...); no gradient flows into it. With
            `guidance`, its output on the doubled batch, shape (2 B, ...), the unconditional half first.
        fake: The fake score's output on the same x_t, shape (B, ...); no gradient flows into it.
        alpha: Signal scale alpha_t > 0, broadcast against x.
        sigma: Noise scale sigma_t > 0 in data units, broadcast against x.
        prediction: The kind of `real` and `fake`.
        weight: w(t) >= 0, broadcast against x. 1 is Eq. 8 itself; sigma^2 / alpha^2 is what the published Diff-Instruct
            code uses, the difference of the two x_0-predictions.
        guidance: Scale s of classifier-free guidance: the teacher's output is u + s (c - u). None: no guidance.
        nonfinite: "mask": a sample whose gradient is not finite gets none; "zero": `nan_to_num` element by element, as
            the public trainers do (an Inf becomes 3e38).
        skipped: A counter, shape (), to which the number of samples that were not finite is added, without a sync.

    Returns:
        A value of shape () in float32 or better whose gradient is the one above: the sum over a sample's elements, the
        mean over the B samples (the reduction of Diff-Instruct's authors). The value itself measures no progress.

    Raises:
        MismatchError: If x, real and fake do not fit.

    Example:
        >>> import torch
        >>> x = torch.zeros(1, 2, requires_grad=True)
        >>> real, fake = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 0.0]])
        >>> diff_instruct(x, real, fake, alpha=1.0, sigma=2.0, prediction=Prediction.SCORE).backward()
        >>> x.grad.tolist()  # descent moves x along the teacher's score
        [[-1.0, 0.0]]
    """
    alpha, sigma = numbers(x, alpha, sigma)
    k = ratio(prediction, Prediction.SCORE, alpha=alpha, sigma=sigma)
    return _difference(x, real, fake, weight * alpha * k, guidance, nonfinite, skipped)


def vsd(
    x: Tensor,
    real: Tensor,
    fake: Tensor,
    *,
    alpha: Number,
    sigma: Number,
    prediction: Prediction,
    weight: Number = 1.0,
    guidance: Number | None = None,
    nonfinite: NonFinite = "mask",
    skipped: Tensor | None = None,
) -> Tensor:
    """Variational score distillation (ProlificDreamer, arXiv 2305.16213, Eq. 9): dL/dx = w (eps_theta - eps_phi) / B.

    It is `diff_instruct` with the weight w sigma / alpha; value and errors are the same.

    Args:
        x: Generated sample that carries the graph, shape (B, ...).
        real: Output of the teacher, shape of x.
        fake: Output of s_phi, shape of x.
        alpha: Signal scale alpha_t > 0, broadcast against x.
        sigma: Noise scale sigma_t > 0 in data units, broadcast against x.
        prediction: What both networks predict.
        weight: w_t, broadcast against x; the authors' is sigma^2.
        guidance: CFG scale on the teacher, as in `diff_instruct`.
        nonfinite: What becomes of samples with NaN or infinity, as in `diff_instruct`.
        skipped: Where to count those, as in `diff_instruct`.

    Example:
        >>> import torch
        >>> x = torch.zeros(1, 1, requires_grad=True)
        >>> one, zero = torch.ones(1, 1), torch.zeros(1, 1)
        >>> vsd(x, one, zero, alpha=0.6, sigma=0.8, prediction=Prediction.EPS).backward()
        >>> x.grad.item()
        1.0
    """
    alpha, sigma = numbers(x, alpha, sigma)
    k = ratio(prediction, Prediction.EPS, alpha=alpha, sigma=sigma)
    return _difference(x, real, fake, -weight * k, guidance, nonfinite, skipped)


def dmd(
    x: Tensor,
    real: Tensor,
    fake: Tensor,
    *,
    eps: Tensor,
    alpha: Number,
    sigma: Number,
    prediction: Prediction,
    weight: Number = 1.0,
    guidance: Number | None = None,
    nonfinite: NonFinite = "mask",
    skipped: Tensor | None = None,
) -> Tensor:
    """Distribution matching, DMD and DMD2 (arXiv 2311.18828, Eq. 7 and 8): dL/dx = w g / (B n).

        g = (D_phi - D_theta) / mean|x - D_theta|,   the mean over the n elements of a sample

    Valid as long as x is what was noised and no x_0-prediction is clipped on the way; else convert to X0 yourself, pass
    prediction=X0 and the x that the normaliser shall use.

    Args:
        x: As in `diff_instruct`; so are the arguments not named here.
        real: As in `diff_instruct`.
        fake: As in `diff_instruct`.
        eps: The noise in x_t, shape (B, ...).
        alpha: Signal scale alpha_t > 0, broadcast against x.
        sigma: Noise scale sigma_t > 0 in data units, broadcast against x.
        prediction: The kind of `real` and `fake`.
        weight: w(t) >= 0, broadcast against x; 1 in DMD2.
        guidance: As in `diff_instruct`.
        nonfinite: As in `diff_instruct`; "zero" is DMD2's own. A teacher that denoises x to itself divides by zero.
        skipped: As in `diff_instruct`.

    Returns:
        mean(g^2) / 2 over all elements, shape (): the authors' 0.5 * mse(x, stopgrad(x - g)).

    Raises:
        MismatchError: If x, real, fake and eps do not fit.

    Example:
        >>> import torch
        >>> x, eps = torch.zeros(1, 2, requires_grad=True), torch.zeros(1, 2)
        >>> real, fake = torch.tensor([[2.0, 2.0]]), torch.tensor([[0.0, 4.0]])
        >>> dmd(x, real, fake, eps=eps, alpha=1.0, sigma=1.0, prediction=Prediction.X0).backward()
        >>> x.grad.tolist()
        [[-0.5, 0.5]]
    """
    alpha, sigma = numbers(x, alpha, sigma)
    # Of c in D_phi - D_theta = c (f - r) only the sign is left by the normaliser: more eps, v or flow is less x_0.
    sign = 1.0 if prediction in (Prediction.X0, Prediction.SCORE) else -1.0
    gradient, values, finite = run(
        formulas.dmd,
        *teacher_halves(x, real, fake, guidance, eps=eps),
        rows(fake),
        target_parts(prediction, x, eps, alpha, sigma),
        scale(sign * weight, x, per_sample=True),
        1.0 if guidance is None else scale(guidance, x),
        is_mask(nonfinite),
    )
    count(skipped, finite)
    return with_gradients(mean(values), (x, gradient))


def sid(
    x: Tensor,
    real: Tensor,
    fake: Tensor,
    *,
    eps: Tensor,
    alpha: Number,
    sigma: Number,
    prediction: Prediction,
    weight: Number = 1.0,
    alpha_sid: float = 1.0,
    nonfinite: NonFinite = "mask",
    skipped: Tensor | None = None,
) -> Tensor:
    """Score identity distillation, SiD (arXiv 2404.04057, Eq. 23). Its gradient flows through both networks.

        L = w sum((D_theta - D_phi) ((D_theta - x) - a (D_theta - D_phi))) / mean|x - D_theta|,   batch mean

    Args:
        x: Generated samples x = G(z), shape (B, ...). x_t has to be built from x with its graph: the two direct paths
            from x, over x_t and over the bracket, cancel, and only their remainder is computed.
        real: The teacher's output on x_t, shape (B, ...), with its graph.
        fake: The fake score's output on x_t, shape (B, ...), with its graph.
        eps: The noise in x_t, shape (B, ...).
        alpha: Signal scale alpha_t > 0, broadcast against x.
        sigma: Noise scale sigma_t > 0 in data units, broadcast against x.
        prediction: The kind of `real` and `fake`.
        weight: w(t) >= 0, broadcast against x.
        alpha_sid: a of the paper; 1.0 to 1.2 in its experiments.
        nonfinite: "mask": a sample that is not finite is left out (the authors'); "zero": `nan_to_num`.
        skipped: As in `diff_instruct`.

    Returns:
        The loss, shape (): the sum over a sample's elements, the mean over the batch. The normaliser, at least 1e-5, is
        a constant to the gradient. At a = 1 the value oscillates around zero.

    Raises:
        MismatchError: If x, real, fake and eps differ in shape.

    Example:
        >>> import torch
        >>> x = torch.zeros(1, 1, requires_grad=True)
        >>> loss = sid(x, x + 2.0, x + 1.0, eps=x, alpha=1.0, sigma=1.0, prediction=Prediction.X0)
        >>> loss.item()  # (2 - 1) ((2 - 0) - (2 - 1)) / 2
        0.5
    """
    same_shape(x=x, real=real, fake=fake, eps=eps)
    alpha, sigma = numbers(x, alpha, sigma)
    c = ratio(prediction, Prediction.X0, alpha=alpha, sigma=sigma)
    of_x = prediction not in (Prediction.EPS, Prediction.SCORE)  # whether the target is a function of x
    *gradients, values, finite = run(
        formulas.sid,
        rows(real),
        rows(fake),
        target_parts(prediction, x, eps, alpha, sigma),
        scale(c, x, per_sample=True),
        scale(weight, x, per_sample=True),
        scale(alpha_sid, x),
        is_mask(nonfinite),
        of_x,
    )
    count(skipped, finite)
    sources = (real, fake, x) if of_x else (real, fake)
    return with_gradients(mean(values), *zip(sources, gradients, strict=True))


def _difference(
    x: Tensor, real: Tensor, fake: Tensor, k: Number, guidance: Number | None, nonfinite: str, skipped: Tensor | None
) -> Tensor:
    teacher = teacher_halves(x, real, fake, guidance)
    gradient, values, finite = run(
        formulas.difference,
        *teacher,
        rows(fake),
        rows(x),
        scale(k, x),
        1.0 if guidance is None else scale(guidance, x),
        is_mask(nonfinite),
    )
    count(skipped, finite)
    return with_gradients(mean(values), (x, gradient))
