"""Denoising score matching, the loss of s_phi (Eq. 5 and 7), and its weights; public through `losses`."""

from __future__ import annotations

from torch import Tensor

from disback_plugin.prediction import Prediction, ratio
from disback_plugin.terms import formulas
from disback_plugin.terms.batches import (
    Number,
    mean,
    numbers,
    rows,
    run,
    same_shape,
    scale,
    target_parts,
    with_gradients,
)

__all__ = ["denoising", "edm_weight", "snr_weight"]


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
    """Denoising score matching, Eq. 5 and 7: mean over all elements of w |output - target|^2.

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
        MismatchError: If output, x_0 and eps differ in shape.

    Example:
        >>> import torch
        >>> x_0, eps = torch.zeros(2, 3), torch.ones(2, 3)
        >>> denoising(torch.zeros(2, 3), x_0, eps, alpha=1.0, sigma=0.5, prediction=Prediction.EPS).item()
        1.0
    """
    same_shape(output=output, x_0=x_0, eps=eps)
    wanted = target_parts(prediction, x_0, eps, alpha, sigma)
    gradient, values, _ = run(formulas.denoising, rows(output), wanted, scale(weight, output))
    return with_gradients(mean(values), (output, gradient))


def edm_weight(
    sigma: Tensor, *, sigma_data: float = 0.5, alpha: Number = 1.0, prediction: Prediction = Prediction.X0
) -> Tensor:
    """The weight of EDM (Table 1): (sigma^2 + sigma_data^2) / (sigma sigma_data)^2 on the squared error of x_0.

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
    """The signal-to-noise ratio alpha^2 / sigma^2 on the squared error of x_0, which is the weight 1 on that of eps.

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
    """Return c^2, the squared error of x_0 that a squared error of 1 in `prediction` is."""
    (alpha,) = numbers(sigma, alpha)
    c = ratio(prediction, Prediction.X0, alpha=alpha, sigma=sigma)
    return c * c
