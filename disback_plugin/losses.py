r"""Generator losses in plain torch, which specify the fused ones of `kernels`; and the names of all other losses.

With x_t = alpha x + sigma eps, outputs f (fake score) and r (teacher) of one kind of prediction, and their common
target t (`prediction.target`), every score difference is a multiple of f - r, and x - D_theta is a multiple of t - r:

    D_phi - D_theta = c (f - r),     x - D_theta = c (t - r),     s_phi - s_theta = k (f - r)

with c and k from `prediction.ratio`. So no loss converts an output to x_0 or to a score; nothing large cancels, and
float32 is exact to 1e-7 where the x_0 form needs float64.

| loss            | dL/dx                                               | source                              |
|-----------------|-----------------------------------------------------|-------------------------------------|
| `diff_instruct` | w alpha (s_phi - s_theta) / B                       | arXiv 2305.18455; the paper's Eq. 8 |
| `vsd`           | w (eps_theta - eps_phi) / B                         | arXiv 2305.16213, Eq. 9             |
| `dmd`           | w (D_phi - D_theta) / mean|x - D_theta| / (B n)     | arXiv 2311.18828, Eq. 7 and 8       |
| `sid`           | through both networks                               | arXiv 2404.04057, Eq. 23            |

Gradients are computed in closed form and passed to autograd as they are, without a surrogate graph.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

from torch import Tensor

from disback_plugin import _loss_formulas as formulas
from disback_plugin._denoising import (
    denoising,
    dmd_regression,
    edm_weight,
    gan_discriminator,
    gan_generator,
    snr_weight,
)
from disback_plugin._loss_formulas import Number, row_factor, rows
from disback_plugin.prediction import Prediction, factors, ratio

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
    r"""Compute the loss of Diff-Instruct (arXiv 2305.18455), Eq. 8: dL/dx = w alpha (s_phi(x_t) - s_theta(x_t)) / B.

    Args:
        x: Generated samples x = G(z), shape (B, ...), which carry the generator's graph.
        real: The teacher's output on x_t = alpha x + sigma eps, shape (B, ...); no gradient flows into it. With
            `guidance`, its output on the doubled batch, shape (2 B, ...), the unconditional half first.
        fake: The fake score's output on the same x_t, shape (B, ...); no gradient flows into it.
        alpha: Signal scale alpha_t > 0, broadcast against x.
        sigma: Noise scale sigma_t > 0 in data units, broadcast against x.
        prediction: The kind of `real` and `fake`.
        weight: w(t) >= 0, broadcast against x. 1 is Eq. 8 itself; sigma^2 / alpha^2, as in the published code of
            Diff-Instruct, makes the gradient the difference of the two x_0-predictions.
        guidance: Scale s of classifier-free guidance: the teacher's output is u + s (c - u). None: no guidance.
        nonfinite: "mask": a sample whose gradient is not finite has a gradient of zero; "zero": `nan_to_num` element
            by element, as in the public trainers (an Inf becomes 3e38).
        skipped: A counter, shape (), to which the number of samples that were not finite is added, without a sync.

    Returns:
        A value of shape () in float32 or better whose gradient is the one above: the sum over a sample's elements, the
        mean over the B samples (the reduction of Diff-Instruct's authors). The value itself measures no progress.

    Raises:
        MismatchError: If x, real, fake and the factors do not fit.
        OptionError: If `prediction` or `nonfinite` is unknown.

    Example:
        >>> import torch
        >>> x = torch.zeros(1, 2, requires_grad=True)
        >>> real, fake = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 0.0]])
        >>> diff_instruct(x, real, fake, alpha=1.0, sigma=2.0, prediction=Prediction.SCORE).backward()
        >>> x.grad.tolist()  # descent moves x along the teacher's score
        [[-1.0, 0.0]]
    """
    formulas.validate_factors(x, alpha=alpha, sigma=sigma, weight=weight, guidance=guidance)
    alpha, sigma = factors(x, alpha, sigma)
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
    """Compute variational score distillation (arXiv 2305.16213, Eq. 9): dL/dx = w (eps_theta - eps_phi) / B.

    It is `diff_instruct` with the weight w sigma / alpha; value and errors are the same.

    Args:
        x: Generated samples, as in `diff_instruct`.
        real: The teacher's output, as in `diff_instruct`.
        fake: The fake score's output, as in `diff_instruct`.
        alpha: Signal scale alpha_t > 0, broadcast against x.
        sigma: Noise scale sigma_t > 0 in data units, broadcast against x.
        prediction: The kind of `real` and `fake`.
        weight: w(t) >= 0, broadcast against x; sigma^2 in ProlificDreamer.
        guidance: Scale of classifier-free guidance, as in `diff_instruct`.
        nonfinite: "mask" or "zero", as in `diff_instruct`.
        skipped: A counter, as in `diff_instruct`.

    Example:
        >>> import torch
        >>> x = torch.zeros(1, 1, requires_grad=True)
        >>> one, zero = torch.ones(1, 1), torch.zeros(1, 1)
        >>> vsd(x, one, zero, alpha=0.6, sigma=0.8, prediction=Prediction.EPS).backward()
        >>> x.grad.item()
        1.0
    """
    formulas.validate_factors(x, alpha=alpha, sigma=sigma, weight=weight, guidance=guidance)
    alpha, sigma = factors(x, alpha, sigma)
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
    """Compute the distribution matching loss of DMD and DMD2 (arXiv 2311.18828, Eq. 7 and 8): dL/dx = w g / (B n).

        g = (D_phi - D_theta) / mean|x - D_theta|,   the mean over the n elements of a sample

    The loss is valid if x is the sample that was noised and no x_0-prediction is clipped. Otherwise convert the outputs
    to X0, and pass prediction=X0 and the x that the normaliser should use.

    Args:
        x: Generated samples, as in `diff_instruct`.
        real: The teacher's output, as in `diff_instruct`.
        fake: The fake score's output, as in `diff_instruct`.
        eps: The noise in x_t, shape (B, ...).
        alpha: Signal scale alpha_t > 0, broadcast against x; one number an element, as one a frame, is allowed.
        sigma: Noise scale sigma_t > 0 in data units, likewise.
        prediction: The kind of `real` and `fake`.
        weight: w(t) >= 0, one number or one a sample; 1 in DMD2.
        guidance: Scale of classifier-free guidance, as in `diff_instruct`.
        nonfinite: As in `diff_instruct`; DMD2 uses "zero". A teacher that returns x itself divides by zero.
        skipped: A counter, as in `diff_instruct`.

    Returns:
        mean(g^2) / 2 over all elements, shape (): the authors' 0.5 * mse(x, stopgrad(x - g)).

    Raises:
        MismatchError: If x, real, fake, eps and the factors do not fit.
        OptionError: If `prediction` or `nonfinite` is unknown.

    Example:
        >>> import torch
        >>> x, eps = torch.zeros(1, 2, requires_grad=True), torch.zeros(1, 2)
        >>> real, fake = torch.tensor([[2.0, 2.0]]), torch.tensor([[0.0, 4.0]])
        >>> dmd(x, real, fake, eps=eps, alpha=1.0, sigma=1.0, prediction=Prediction.X0).backward()
        >>> x.grad.tolist()
        [[-0.5, 0.5]]
    """
    prediction = Prediction(prediction)
    formulas.validate_factors(x, alpha=alpha, sigma=sigma, weight=weight, guidance=guidance)
    # The normaliser cancels c in D_phi - D_theta = c (f - r) but for its sign, unless c varies within a sample.
    sign, c = 1.0 if prediction in (Prediction.X0, Prediction.SCORE) else -1.0, None
    if not (formulas.is_per_sample(alpha, x) and formulas.is_per_sample(sigma, x)):
        a, b = factors(x, alpha, sigma)
        sign, c = 1.0, row_factor(ratio(prediction, Prediction.X0, alpha=a, sigma=b), x)
    gradient, values, finite = formulas.RUNNER.get()(
        formulas.dmd,
        *formulas.teacher_outputs(x, real, fake, guidance, eps=eps),
        rows(fake),
        formulas.target_parts(prediction, x, eps, alpha, sigma),
        c,
        row_factor(sign * weight, x, per_sample=True),
        1.0 if guidance is None else row_factor(guidance, x),
        formulas.is_mask(nonfinite),
    )
    formulas.count_nonfinite(skipped, finite)
    return formulas.with_gradients(formulas.mean_loss(values), (x, gradient))


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
    """Compute score identity distillation, SiD (arXiv 2404.04057, Eq. 23). Its gradient flows through both networks.

        L = w sum((D_theta - D_phi) ((D_theta - x) - a (D_theta - D_phi))) / mean|x - D_theta|,   batch mean

    Args:
        x: Generated samples x = G(z), shape (B, ...). x_t has to be built from x with its graph: the two direct paths
            from x, through x_t and through the bracket, cancel, and only their remainder is computed.
        real: The teacher's output on x_t, shape (B, ...), with its graph.
        fake: The fake score's output on x_t, shape (B, ...), with its graph.
        eps: The noise in x_t, shape (B, ...).
        alpha: Signal scale alpha_t > 0, one number or one a sample.
        sigma: Noise scale sigma_t > 0 in data units, likewise.
        prediction: The kind of `real` and `fake`.
        weight: w(t) >= 0, one number or one a sample.
        alpha_sid: a of the paper; 1.0 to 1.2 in its experiments.
        nonfinite: "mask": a sample that is not finite is left out, as in the authors' code; "zero": `nan_to_num`.
        skipped: A counter, as in `diff_instruct`.

    Returns:
        The loss, shape (): the sum over a sample's elements, the mean over the batch. The normaliser, at least 1e-5, is
        a constant to the gradient. At a = 1 the value oscillates around zero.

    Raises:
        MismatchError: If x, real, fake, eps and the factors do not fit.
        OptionError: If `prediction` or `nonfinite` is unknown.

    Example:
        >>> import torch
        >>> x = torch.zeros(1, 1, requires_grad=True)
        >>> loss = sid(x, x + 2.0, x + 1.0, eps=x, alpha=1.0, sigma=1.0, prediction=Prediction.X0)
        >>> loss.item()  # (2 - 1) ((2 - 0) - (2 - 1)) / 2
        0.5
    """
    formulas.validate_shapes(x=x, real=real, fake=fake, eps=eps)
    formulas.validate_factors(x, alpha=alpha, sigma=sigma, weight=weight)
    alpha, sigma = factors(x, alpha, sigma)
    c = ratio(prediction, Prediction.X0, alpha=alpha, sigma=sigma)
    target_depends_on_x = prediction not in (Prediction.EPS, Prediction.SCORE)
    *gradients, values, finite = formulas.RUNNER.get()(
        formulas.sid,
        rows(real),
        rows(fake),
        formulas.target_parts(prediction, x, eps, alpha, sigma),
        row_factor(c, x, per_sample=True),
        row_factor(weight, x, per_sample=True),
        row_factor(alpha_sid, x),
        formulas.is_mask(nonfinite),
        target_depends_on_x,
    )
    formulas.count_nonfinite(skipped, finite)
    sources = (real, fake, x) if target_depends_on_x else (real, fake)
    return formulas.with_gradients(formulas.mean_loss(values), *zip(sources, gradients, strict=True))


def _difference(
    x: Tensor, real: Tensor, fake: Tensor, k: Number, guidance: Number | None, nonfinite: str, skipped: Tensor | None
) -> Tensor:
    gradient, values, finite = formulas.RUNNER.get()(
        formulas.difference,
        *formulas.teacher_outputs(x, real, fake, guidance),
        rows(fake),
        rows(x),
        row_factor(k, x),
        1.0 if guidance is None else row_factor(guidance, x),
        formulas.is_mask(nonfinite),
    )
    formulas.count_nonfinite(skipped, finite)
    return formulas.with_gradients(formulas.mean_loss(values), (x, gradient))
