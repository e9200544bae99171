r"""Generator losses and the denoising loss, in plain torch: the specification of what a fused kernel must compute.

Eq. 5 and 7 (denoising; trains s_phi, and records the degradation path) and Eq. 8 (score distillation; trains the
generator), stated for x_t = alpha x_0 + sigma eps:

    denoising:      min_phi  E w | s_phi(x_t, t) - target |^2
    Diff-Instruct:  dL/dx  = w alpha [ s_phi(x_t, t) - s_theta(x_t, t) ],   x = G(z)
"""

from __future__ import annotations

import torch
from torch import Tensor

from disback_plugin.errors import MismatchError
from disback_plugin.scores import Prediction, coefficients, target

__all__ = ["denoising", "diff_instruct", "edm_weight"]


def denoising(
    output: Tensor,
    x_0: Tensor,
    eps: Tensor,
    *,
    alpha: Tensor | float,
    sigma: Tensor | float,
    prediction: Prediction,
    weight: Tensor | float = 1.0,
) -> Tensor:
    """Denoising score matching, Eq. 5 and 7: mean over all elements of w |output - target|^2.

    Args:
        output: Output of the network on x_t = alpha x_0 + sigma eps, shape (B, ...).
        x_0: Clean samples, shape (B, ...); no gradient flows into them.
        eps: The noise in x_t, shape (B, ...).
        alpha: Signal scale alpha_t > 0, broadcast against x_0.
        sigma: Noise scale sigma_t > 0 in data units, broadcast against x_0.
        prediction: The kind of `output`; the target is of the same kind.
        weight: w(t) >= 0 on the squared error in units of `prediction`, broadcast against x_0; see `edm_weight`.

    Returns:
        The loss, shape (), in float32 or better. The reduction is the mean over all elements (DDPM, DMD2, FastGen);
        EDM and SiD sum over a sample's elements instead, a constant factor.

    Raises:
        MismatchError: If output, x_0 and eps differ in shape.

    Example:
        >>> x_0, eps = torch.zeros(2, 3), torch.ones(2, 3)
        >>> denoising(torch.zeros(2, 3), x_0, eps, alpha=1.0, sigma=0.5, prediction=Prediction.EPS).item()
        1.0
    """
    _same_shape(output=output, x_0=x_0, eps=eps)
    wanted = target(prediction, x_0.detach(), eps, alpha=alpha, sigma=sigma)
    dtype = torch.promote_types(output.dtype, torch.float32)
    return (weight * (output.to(dtype) - wanted.to(dtype)) ** 2).mean()


def diff_instruct(
    x: Tensor,
    real: Tensor,
    fake: Tensor,
    *,
    x_t: Tensor | None = None,
    eps: Tensor | None = None,
    alpha: Tensor | float,
    sigma: Tensor | float,
    prediction: Prediction,
    weight: Tensor | float = 1.0,
) -> Tensor:
    r"""Diff-Instruct (arXiv 2305.18455), Eq. 8: dL/dx = w alpha (s_phi(x_t) - s_theta(x_t)) / B.

    Both outputs are of one kind, so the part of the conversion to a score that holds x_t cancels in the difference:
    s_phi - s_theta = c_o (fake - real), with c_o of `scores.coefficients`. Nothing is subtracted that is not there.

    Args:
        x: Generated samples x = G(z), shape (B, ...); they carry the generator's graph.
        real: The teacher's output on x_t = alpha x + sigma eps, shape (B, ...); no gradient flows into it.
        fake: The fake score's output on the same x_t, shape (B, ...); no gradient flows into it.
        x_t: Not needed; accepted so that every generator loss is called alike.
        eps: Not needed; accepted so that every generator loss is called alike.
        alpha: Signal scale alpha_t > 0, broadcast against x.
        sigma: Noise scale sigma_t > 0 in data units, broadcast against x.
        prediction: The kind of `real` and `fake`.
        weight: w(t) >= 0, broadcast against x. 1 is Eq. 8 itself; sigma^2 / alpha^2 is what the published Diff-Instruct
            code uses, the difference of the two x_0-predictions.

    Returns:
        A value of shape () in float32 or better whose gradient is the one above: the sum over a sample's elements, the
        mean over the B samples (the reduction of Diff-Instruct's authors). The value itself measures no progress.

    Raises:
        MismatchError: If x, real and fake differ in shape.

    Example:
        >>> x = torch.zeros(1, 2, requires_grad=True)
        >>> real, fake = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 0.0]])
        >>> diff_instruct(x, real, fake, alpha=1.0, sigma=2.0, prediction=Prediction.SCORE).backward()
        >>> x.grad.tolist()  # descent moves x along the teacher's score
        [[-1.0, 0.0]]
    """
    _same_shape(x=x, real=real, fake=fake)
    dtype = torch.promote_types(x.dtype, torch.float32)
    alpha = torch.as_tensor(alpha, dtype=dtype, device=x.device)
    sigma = torch.as_tensor(sigma, dtype=dtype, device=x.device)
    _, c_o = coefficients(prediction, Prediction.SCORE, alpha=alpha, sigma=sigma)
    score_difference = c_o * (fake.detach().to(dtype) - real.detach().to(dtype))
    gradient = weight * alpha * score_difference
    return (gradient * x.to(dtype)).sum() / max(len(x), 1)


def edm_weight(sigma: Tensor, *, sigma_data: float = 0.5) -> Tensor:
    """The weight of EDM on the squared error of x_0: (sigma^2 + sigma_data^2) / (sigma sigma_data)^2 (Table 1).

    Args:
        sigma: Noise scale sigma_t > 0 in data units, any shape.
        sigma_data: Standard deviation of the data, > 0.

    Example:
        >>> edm_weight(torch.tensor(0.5), sigma_data=0.5).item()
        8.0
    """
    return (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2


def _same_shape(**tensors: Tensor) -> None:
    if len({tensor.shape for tensor in tensors.values()}) > 1:
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
        raise MismatchError(shapes, expected="one shape", cure="pass outputs computed from this very batch")
