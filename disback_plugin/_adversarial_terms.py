"""Terms beside a score difference: of a discriminator, and the weight that f-distill takes from its logits.

d is the discriminator, whose logit is ln(q(x_t) / p(x_t)) at its optimum, of the data's over the student's density.

| term                    | of the generator            | of the discriminator                                |
|-------------------------|-----------------------------|-----------------------------------------------------|
| non-saturating          | `gan_generator(fake)`       | `gan_discriminator(real, fake)`                     |
| relativistic            | `gan_relativistic(fake, real)` | `gan_relativistic(real, fake)`                   |
| hinge                   | `-fake.mean()`              | `gan_hinge(real, fake)`                             |
| with any of them        |                             | `approximate_r1(real, perturbed)`                   |
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import relu, softplus

from disback_plugin.errors import OptionError

# h(r) of Table 1 in arXiv 2502.15681, with r the density of the data over that of the student.
F_DIVERGENCES: dict[str, Callable[[Tensor], Tensor]] = {
    "rkl": torch.ones_like,
    "kl": lambda r: r,
    "js": lambda r: r / (1 + r),
    "sf": lambda r: 1 / (1 + r),
    "neyman": lambda r: 1 / r,
    "sh": torch.sqrt,
    "jf": lambda r: 1 + r,
}


def gan_generator(fake_logits: Tensor) -> Tensor:
    """Compute DMD2's adversarial term of the generator (arXiv 2405.14867, Sec. 4.3): mean softplus(-d(fake)), shape ().

    Args:
        fake_logits: The discriminator's logits of generated samples, any shape, with the generator's graph.

    Example:
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
        >>> round(gan_discriminator(torch.zeros(2), torch.zeros(2)).item(), 4)
        1.3863
    """
    return softplus(fake_logits).mean() + softplus(-real_logits).mean()


def gan_relativistic(logits: Tensor, others: Tensor) -> Tensor:
    """Compute the relativistic pairing term (arXiv 1807.00734; Self-Forcing): mean softplus(others - logits).

    Args:
        logits: The logits that are to rise, any shape: of the generator's samples in the generator's term, of data in
            the discriminator's.
        others: The logits that they are compared with, pair by pair, same shape: the other ones of the two.

    Example:
        >>> gan_relativistic(torch.tensor([30.0]), torch.tensor([0.0])).item() < 1e-12
        True
    """
    return softplus(others - logits).mean()


def gan_hinge(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Compute the hinge term of the discriminator (arXiv 1705.02894): mean max(0, 1 - d(real)) + mean max(0, 1 +
    d(fake)). The generator's term beside it is -fake_logits.mean().

    Args:
        real_logits: The discriminator's logits of data, any shape.
        fake_logits: The discriminator's logits of generated samples, any shape, without the generator's graph.

    Example:
        >>> gan_hinge(torch.tensor([2.0, 0.5]), torch.tensor([-3.0])).item()
        0.25
    """
    return relu(1 - real_logits).mean() + relu(1 + fake_logits).mean()


def approximate_r1(real_logits: Tensor, perturbed_logits: Tensor, *, sigma: float = 1.0) -> Tensor:
    """Compute the approximate R1 penalty (APT, arXiv 2501.08316): mean ((d(x) - d(x + sigma eps)) / sigma)^2.

    Args:
        real_logits: The discriminator's logits of data x, any shape.
        perturbed_logits: Its logits of x + sigma eps with small unit Gaussian noise eps, same shape.
        sigma: Scale > 0 that divides the difference. 1, as in APT and FastGen, leaves that to the term's weight; the
            sigma of the perturbation, as in Self-Forcing, makes the term an estimate of R1 itself, |grad d|^2.

    Example:
        >>> approximate_r1(torch.tensor([1.0]), torch.tensor([1.5]), sigma=0.5).item()
        1.0
    """
    return ((real_logits - perturbed_logits) / sigma).square().mean()


def f_divergence_weight(
    fake_logits: Tensor, divergence: str = "js", *, low: float = 0.1, high: float = 20.0, bins: Tensor | None = None
) -> Tensor:
    """Return the weight of f-distill (arXiv 2502.15681): h(r) over its mean, with r = exp(d(x_t)).

    `dmd(..., weight=noise.expand(w, like=x))` then minimises another f-divergence than the reverse KL.

    Args:
        fake_logits: The discriminator's logits of x_t, shape (B, ...), of which a sample's mean is taken. Over several
            processes, FastGen's means are over all samples: gather the logits, and take this process's part.
        divergence: "rkl" (all weights equal: DMD), "kl", "js", "sf", "neyman", "sh" or "jf", as in FastGen.
        low: Least r, > 0.
        high: Greatest r, > low.
        bins: Bin of each sample's noise level, integers of shape (B,): r is divided by its mean in the bin, as FastGen
            does with ten bins of equal width in t. None: it is not.

    Returns:
        One weight a sample, shape (B,), in float32 or better, without graph.

    Raises:
        OptionError: If the divergence is unknown.

    Example:
        >>> weight = f_divergence_weight(torch.tensor([0.0, 1.0]).log1p(), "kl")  # r = 1 and 2
        >>> [round(w, 4) for w in weight.tolist()]
        [0.6667, 1.3333]
    """
    if divergence not in F_DIVERGENCES:
        known = ", ".join(F_DIVERGENCES)
        raise OptionError(f"divergence={divergence!r}", expected=f"one of {known}", cure="correct the name")
    logits = fake_logits.detach().to(torch.promote_types(fake_logits.dtype, torch.float32))
    r = logits.reshape(len(logits), -1).mean(1).clamp(-10.0, 10.0).exp().clamp(low, high)
    if bins is not None:
        together = (bins[:, None] == bins).to(r)
        r = r / ((together @ r) / together.sum(1) + 1e-6)
    h = F_DIVERGENCES[divergence](r)
    return h / (h.mean() + 1e-6)
