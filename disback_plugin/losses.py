r"""The losses in plain torch, which specify the fused ones of `kernels`: of the generator, and of the fake score.

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

from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from disback_plugin import _loss_formulas as formulas
from disback_plugin._adversarial_terms import (
    approximate_r1,
    f_divergence_weight,
    gan_discriminator,
    gan_generator,
    gan_hinge,
    gan_relativistic,
)
from disback_plugin._loss_formulas import Number
from disback_plugin.prediction import Prediction, edm_weight, factors, ratio, snr_weight

__all__ = [
    "approximate_r1",
    "denoising",
    "diff_instruct",
    "dmd",
    "dmd_regression",
    "edm_weight",
    "f_divergence_weight",
    "gan_discriminator",
    "gan_generator",
    "gan_hinge",
    "gan_relativistic",
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
        >>> x = torch.zeros(1, 2, requires_grad=True)
        >>> real, fake = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 0.0]])
        >>> diff_instruct(x, real, fake, alpha=1.0, sigma=2.0, prediction=Prediction.SCORE).backward()
        >>> x.grad.tolist()  # descent moves x along the teacher's score
        [[-1.0, 0.0]]
    """
    formulas.validate_factors(x, alpha=alpha, sigma=sigma, weight=weight, guidance=guidance)
    alpha, sigma = factors(x, alpha, sigma)
    k = weight * alpha * ratio(prediction, Prediction.SCORE, alpha=alpha, sigma=sigma)
    return _difference(x, k, nonfinite, skipped, *formulas.outputs(x, real, fake, guidance))


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
        >>> x = torch.zeros(1, 1, requires_grad=True)
        >>> one, zero = torch.ones(1, 1), torch.zeros(1, 1)
        >>> vsd(x, one, zero, alpha=0.6, sigma=0.8, prediction=Prediction.EPS).backward()
        >>> x.grad.item()
        1.0
    """
    formulas.validate_factors(x, alpha=alpha, sigma=sigma, weight=weight, guidance=guidance)
    alpha, sigma = factors(x, alpha, sigma)
    k = -weight * ratio(prediction, Prediction.EPS, alpha=alpha, sigma=sigma)
    return _difference(x, k, nonfinite, skipped, *formulas.outputs(x, real, fake, guidance))


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
    gradient_mask: Tensor | None = None,
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
        gradient_mask: Where the loss is computed: booleans, broadcast against x, as those of the frames after the first
            in Self-Forcing. Its mean is over these elements of the batch, the normaliser's over all of a sample.
        nonfinite: As in `diff_instruct`; DMD2 uses "zero". A teacher that returns x itself divides by zero.
        skipped: A counter, as in `diff_instruct`.

    Returns:
        mean(g^2) / 2 over all elements, or those of the mask, shape (): the authors' 0.5 * mse(x, stopgrad(x - g)).

    Raises:
        MismatchError: If x, real, fake, eps and the factors do not fit.
        OptionError: If `prediction` or `nonfinite` is unknown.

    Example:
        >>> x, eps = torch.zeros(1, 2, requires_grad=True), torch.zeros(1, 2)
        >>> real, fake = torch.tensor([[2.0, 2.0]]), torch.tensor([[0.0, 4.0]])
        >>> dmd(x, real, fake, eps=eps, alpha=1.0, sigma=1.0, prediction=Prediction.X0).backward()
        >>> x.grad.tolist()
        [[-0.5, 0.5]]
    """
    prediction = Prediction(prediction)
    options = {"alpha": alpha, "sigma": sigma, "weight": weight, "guidance": guidance, "gradient_mask": gradient_mask}
    formulas.validate_factors(x, **options)
    # The normaliser cancels c in D_phi - D_theta = c (f - r) but for its sign, unless c varies within a sample.
    sign, c = 1.0 if prediction in (Prediction.X0, Prediction.SCORE) else -1.0, None
    if not (formulas.is_one_a_sample(alpha, x) and formulas.is_one_a_sample(sigma, x)):
        a, b = factors(x, alpha, sigma)
        sign, c = 1.0, ratio(prediction, Prediction.X0, alpha=a, sigma=b)
    share = None if gradient_mask is None else formulas.share_of_mean(gradient_mask, x)
    outputs = formulas.outputs(x, real, fake, guidance, eps=eps)
    k, mask = formulas.one_a_sample(sign * weight, x), formulas.is_mask(nonfinite)
    target = formulas.target_parts(prediction, x, eps, alpha, sigma)
    return formulas.evaluate(formulas.dmd, (x,), *outputs, c, share, k, mask, *target, skipped=skipped)


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
    guidance: Number | None = None,
    fake_guidance: Number | None = None,
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
        alpha: Signal scale alpha_t > 0, broadcast against x; one number an element, as one a frame, is allowed.
        sigma: Noise scale sigma_t > 0 in data units, likewise.
        prediction: The kind of `real` and `fake`.
        weight: w(t) >= 0, one number or one a sample.
        alpha_sid: a of the paper; 1.0 to 1.2 in its experiments.
        guidance: Scale of classifier-free guidance of the teacher: `real` is then its output on the doubled batch, as
            in `diff_instruct`; kappa_4 of SiD-LSG (arXiv 2406.01561).
        fake_guidance: The same of the fake score and `fake`: kappa_2 = kappa_3 of SiD-LSG.
        nonfinite: "mask": a sample that is not finite is left out, as in the authors' code; "zero": `nan_to_num`.
        skipped: A counter, as in `diff_instruct`.

    Returns:
        The loss, shape (): the sum over a sample's elements, the mean over the batch. The normaliser, at least 1e-5, is
        a constant to the gradient. At a = 1 the value oscillates around zero.

    Raises:
        MismatchError: If x, real, fake, eps and the factors do not fit.
        OptionError: If `prediction` or `nonfinite` is unknown.

    Example:
        >>> x = torch.zeros(1, 1, requires_grad=True)
        >>> loss = sid(x, x + 2.0, x + 1.0, eps=x, alpha=1.0, sigma=1.0, prediction=Prediction.X0)
        >>> loss.item()  # (2 - 1) ((2 - 0) - (2 - 1)) / 2
        0.5
    """
    formulas.validate_factors(x, alpha=alpha, sigma=sigma, weight=weight, guidance=guidance)
    formulas.validate_factors(x, fake_guidance=fake_guidance)
    real, fake = formulas.guided(real, x, guidance), formulas.guided(fake, x, fake_guidance)
    r, _, _, f = formulas.outputs(x, real, fake, None, eps=eps)
    c = ratio(prediction, Prediction.X0, **dict(zip(("alpha", "sigma"), factors(x, alpha, sigma), strict=True)))
    c, within = (c, None) if formulas.is_one_a_sample(c, x) else (1.0, c)
    c, w = formulas.one_a_sample(c, x), formulas.one_a_sample(weight, x)
    a, mask = formulas.constant_or_tensor(alpha_sid, x), formulas.is_mask(nonfinite)
    options = c, within, w, a, mask, prediction not in (Prediction.EPS, Prediction.SCORE)
    target = formulas.target_parts(prediction, x, eps, alpha, sigma)
    return formulas.evaluate(formulas.sid, (real, fake, x), r, f, *options, *target, skipped=skipped)


def _difference(x: Tensor, k: Number, nonfinite: str, skipped: Tensor | None, *outputs: Any) -> Tensor:
    k, mask = formulas.constant_or_tensor(k, x), formulas.is_mask(nonfinite)
    return formulas.evaluate(formulas.difference, (x,), *outputs, formulas.detached(x), k, mask, skipped=skipped)


def denoising(
    output: Tensor,
    x_0: Tensor,
    eps: Tensor,
    *,
    alpha: Number,
    sigma: Number,
    prediction: Prediction,
    weight: Number = 1.0,
) -> Tensor:
    """Compute denoising score matching, Eq. 5 and 7: the mean over all elements of w |output - target|^2.

    Args:
        output: Output of the network on x_t = alpha x_0 + sigma eps, shape (B, ...).
        x_0: Clean samples, shape (B, ...); no gradient flows into them.
        eps: The noise in x_t, shape (B, ...).
        alpha: Signal scale alpha_t > 0, broadcast against x_0.
        sigma: Noise scale sigma_t > 0 in data units, broadcast against x_0.
        prediction: The kind of `output`; the target is of the same kind.
        weight: w(t) >= 0 on the squared error of `prediction`, broadcast against x_0: `edm_weight` or `snr_weight`.

    Returns:
        The loss, shape (), in float32 or better. The reduction is the mean over all elements (DDPM, DMD2, FastGen);
        EDM and SiD sum over a sample's elements instead, a constant factor.

    Raises:
        MismatchError: If output, x_0, eps and the factors do not fit.
        OptionError: If `prediction` is unknown.

    Example:
        >>> x_0, eps = torch.zeros(2, 3), torch.ones(2, 3)
        >>> denoising(torch.zeros(2, 3), x_0, eps, alpha=1.0, sigma=0.5, prediction=Prediction.EPS).item()
        1.0
    """
    formulas.validate_shapes(output=output, x_0=x_0, eps=eps)
    formulas.validate_factors(x_0, alpha=alpha, sigma=sigma, weight=weight)
    o, w = formulas.detached(output), formulas.constant_or_tensor(weight, output)
    target = formulas.target_parts(prediction, x_0, eps, alpha, sigma)
    return formulas.evaluate(formulas.denoising, (output,), o, w, *target, counted=False)


def dmd_regression(
    x: Tensor, teacher_sample: Tensor, *, distance: Callable[[Tensor, Tensor], Tensor] = torch.nn.functional.mse_loss
) -> Tensor:
    """Compute DMD's regression term (arXiv 2311.18828, Eq. 9): the distance of G(z) to the teacher's ODE sample of z.

    Args:
        x: Generated samples G(z), shape (B, ...).
        teacher_sample: The teacher's many-step samples from the same z, shape (B, ...); no gradient flows into them.
        distance: A function of two batches, whose mean is taken; LPIPS in DMD.

    Raises:
        MismatchError: If the shapes differ.

    Example:
        >>> dmd_regression(torch.zeros(2), torch.full((2,), 3.0)).item()
        9.0
    """
    formulas.validate_shapes(x=x, teacher_sample=teacher_sample)
    return distance(x, teacher_sample.detach()).mean()
