"""What trainers add to a generator's loss: DMD2's adversarial terms and DMD's regression; public through `losses`."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn.functional import mse_loss, softplus

from disback_plugin.terms.batches import same_shape

__all__ = ["dmd_regression", "gan_discriminator", "gan_generator"]


def gan_generator(fake_logits: Tensor) -> Tensor:
    """DMD2's adversarial term of the generator (arXiv 2405.14867, Sec. 4.3): mean softplus(-d(fake)), shape ().

    Args:
        fake_logits: The discriminator's logits of generated samples, any shape, with the generator's graph.

    Example:
        >>> import torch
        >>> round(gan_generator(torch.zeros(2)).item(), 4)
        0.6931
    """
    return softplus(-fake_logits).mean()


def gan_discriminator(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """DMD2's adversarial term of the discriminator: mean softplus(d(fake)) + mean softplus(-d(real)), shape ().

    Args:
        real_logits: Logits of data, any shape.
        fake_logits: Logits of generated samples, any shape, without the generator's graph.

    Example:
        >>> import torch
        >>> round(gan_discriminator(torch.zeros(2), torch.zeros(2)).item(), 4)
        1.3863
    """
    return softplus(fake_logits).mean() + softplus(-real_logits).mean()


def dmd_regression(
    x: Tensor, teacher_sample: Tensor, *, distance: Callable[[Tensor, Tensor], Tensor] = mse_loss
) -> Tensor:
    """DMD's regression term (arXiv 2311.18828, Eq. 9): distance between G(z) and the teacher's ODE sample from that z.

    Args:
        x: G(z), shape (B, ...).
        teacher_sample: The teacher's many-step sample from the same z, shape (B, ...); no gradient flows into it.
        distance: LPIPS in DMD; from two batches to a tensor, whose mean is taken.

    Raises:
        MismatchError: If the shapes differ.

    Example:
        >>> import torch
        >>> dmd_regression(torch.zeros(2), torch.full((2,), 3.0)).item()
        9.0
    """
    same_shape(x=x, teacher_sample=teacher_sample)
    return distance(x, teacher_sample.detach()).mean()
