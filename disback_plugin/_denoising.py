"""The loss of the fake score (Eq. 5 and 7) with its weights, and the terms that trainers add to a generator's loss.

These functions are public through `losses`.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn.functional import mse_loss, softplus

from disback_plugin import _loss_formulas as formulas
from disback_plugin._loss_formulas import Number, row_factor, rows
from disback_plugin.prediction import Prediction, factors, ratio


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
        weight: w(t) >= 0 on the squared error in units of `prediction`, broadcast against x_0; see `edm_weight` and
            `snr_weight`.

    Returns:
        The loss, shape (), in float32 or better. The reduction is the mean over all elements (DDPM, DMD2, FastGen);
        EDM and SiD sum over a sample's elements instead, a constant factor.

    Raises:
        MismatchError: If output, x_0, eps and the factors do not fit.
        OptionError: If `prediction` is unknown.

    Example:
        >>> import torch
        >>> x_0, eps = torch.zeros(2, 3), torch.ones(2, 3)
        >>> denoising(torch.zeros(2, 3), x_0, eps, alpha=1.0, sigma=0.5, prediction=Prediction.EPS).item()
        1.0
    """
    formulas.validate_shapes(output=output, x_0=x_0, eps=eps)
    formulas.validate_factors(x_0, alpha=alpha, sigma=sigma, weight=weight)
    target = formulas.target_parts(prediction, x_0, eps, alpha, sigma)
    gradient, values, _ = formulas.RUNNER.get()(formulas.denoising, rows(output), target, row_factor(weight, output))
    return formulas.with_gradients(formulas.mean_loss(values), (output, gradient))


def edm_weight(
    sigma: Tensor, *, sigma_data: float = 0.5, alpha: Number = 1.0, prediction: Prediction = Prediction.X0
) -> Tensor:
    """Return the weight of EDM (Table 1): (sigma^2 + sigma_data^2) / (sigma sigma_data)^2 on the squared error of x_0.

    Args:
        sigma: Noise scale sigma_t > 0 in data units, any shape.
        sigma_data: Standard deviation of the data, > 0.
        alpha: Signal scale alpha_t > 0, for other predictions than X0.
        prediction: The kind whose squared error is weighted; the loss is the same for each.

    Example:
        >>> import torch
        >>> edm_weight(torch.tensor(0.5), sigma_data=0.5).item()
        8.0
    """
    weight = (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2
    return weight * _x_0_units(sigma, alpha, prediction)


def snr_weight(
    sigma: Tensor, *, alpha: Number, clip: float = float("inf"), prediction: Prediction = Prediction.X0
) -> Tensor:
    """Return the signal-to-noise ratio alpha^2 / sigma^2: on the error of x_0 it equals weight 1 on that of eps.

    Args:
        sigma: Noise scale sigma_t > 0 in data units, any shape.
        alpha: Signal scale alpha_t > 0.
        clip: Largest ratio; 5 in min-SNR weighting (arXiv 2303.09556).
        prediction: The kind whose squared error is weighted; the loss is the same for each.

    Example:
        >>> import torch
        >>> snr_weight(torch.tensor(0.5), alpha=1.0).item()
        4.0
        >>> snr_weight(torch.tensor(0.5), alpha=1.0, prediction=Prediction.EPS).item()
        1.0
    """
    return (alpha / sigma).square().clamp(max=clip) * _x_0_units(sigma, alpha, prediction)


def _x_0_units(sigma: Tensor, alpha: Number, prediction: Prediction) -> Number:
    """Return c^2, the squared error of x_0 that a squared error of 1 in `prediction` amounts to."""
    (alpha,) = factors(sigma, alpha)
    c = ratio(prediction, Prediction.X0, alpha=alpha, sigma=sigma)
    return c * c


def gan_generator(fake_logits: Tensor) -> Tensor:
    """Compute DMD2's adversarial term of the generator (arXiv 2405.14867, Sec. 4.3): mean softplus(-d(fake)), shape ().

    Args:
        fake_logits: The discriminator's logits of generated samples, any shape, with the generator's graph.

    Example:
        >>> import torch
        >>> round(gan_generator(torch.zeros(2)).item(), 4)
        0.6931
    """
    return softplus(-fake_logits).mean()


def gan_discriminator(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Compute DMD2's adversarial term of the discriminator: mean softplus(d(fake)) + mean softplus(-d(real)), shape ().

    Args:
        real_logits: The discriminator's logits of data, any shape.
        fake_logits: The discriminator's logits of generated samples, any shape, without the generator's graph.

    Example:
        >>> import torch
        >>> round(gan_discriminator(torch.zeros(2), torch.zeros(2)).item(), 4)
        1.3863
    """
    return softplus(fake_logits).mean() + softplus(-real_logits).mean()


def dmd_regression(
    x: Tensor, teacher_sample: Tensor, *, distance: Callable[[Tensor, Tensor], Tensor] = mse_loss
) -> Tensor:
    """Compute DMD's regression term (arXiv 2311.18828, Eq. 9): the distance of G(z) to the teacher's ODE sample of z.

    Args:
        x: Generated samples G(z), shape (B, ...).
        teacher_sample: The teacher's many-step samples from the same z, shape (B, ...); no gradient flows into them.
        distance: A function of two batches, whose mean is taken; LPIPS in DMD.

    Raises:
        MismatchError: If the shapes differ.

    Example:
        >>> import torch
        >>> dmd_regression(torch.zeros(2), torch.full((2,), 3.0)).item()
        9.0
    """
    formulas.validate_shapes(x=x, teacher_sample=teacher_sample)
    return distance(x, teacher_sample.detach()).mean()
