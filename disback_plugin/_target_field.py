r"""Eq. 18 and 9 of the paper: the score of a distribution from its samples, and the distance of a network from it.

The stable target field (Xu et al., arXiv 2302.00670) is the exact score of the noised empirical distribution of
references x_i, and so an estimate of the score of the distribution that they were drawn from:

    s(x_t) = (alpha_t sum_i w_i x_i - x_t) / sigma_t^2,    w = softmax_i(-|x_t - alpha_t x_i|^2 / (2 sigma_t^2))

Eq. 18 is the case alpha_t = 1; the paper's p_t is the denominator of the softmax. Public through `metrics`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypedDict

import torch
from torch import Tensor

from disback_plugin.errors import OptionError
from disback_plugin.noise import add_noise
from disback_plugin.prediction import Prediction, convert

_CHUNK_BYTES = 16 * 2**20  # of float64 copies at a time, whatever the number of references


class Mismatch(TypedDict):
    """The result of `mismatch_degree`.

    Attributes:
        total: The weighted mean of `per_sigma`.
        per_sigma: d(sigma) at each noise scale, per data unit.

    Example:
        >>> Mismatch(total=1.5, per_sigma=[2.0, 1.0])["total"]
        1.5
    """

    total: float
    per_sigma: list[float]


def stable_target_field(
    x_t: Tensor, references: Tensor, sigma: Tensor | float, alpha: Tensor | float = 1.0, *, source: Tensor | None = None
) -> Tensor:
    """Estimate the score of noised samples from references of their distribution (Eq. 18).

    The sums are in float64 over pieces of the references: 50,000 images of 3x64x64 need some 100 MB beside themselves,
    and may stay on the CPU, or in a mapped file, while x_t is on a GPU.

    The estimate is good if sigma_t is not small against the gaps between the references. On Gaussian data with 4,096
    references the error is 4 % at d = 1, 5 to 7 % at d = 2 and 35 % at d = 8 for sigma = 0.5, and below 1 % for
    sigma = 5; four times as many references halve the error at d = 2. With `source` the estimate does not diverge at
    small sigma, but approaches the denoising target, (alpha x_0 - x_t) / sigma^2.

    Args:
        x_t: Noisy samples, shape (B, ...), floating, finite.
        references: Clean samples x_i of the distribution, shape (R, ...), R >= 1, floating, finite, on any device.
        sigma: Noise scale sigma_t > 0 in data units, one number or one a sample, shape (B,) or (B, 1, ..., 1).
        alpha: Signal scale alpha_t >= 0, likewise.
        source: The x_0 that each x_t was made from, shape (B, ...), which joins the references of its own row.

    Returns:
        The score, shape (B, ...), per data unit, in float32 or better.

    Raises:
        OptionError: If shapes do not fit, a scale is out of its domain, or the score is not finite: because an input is
            not finite, or because sigma^-2 overflows in the dtype of x_t.

    Example:
        >>> references = torch.tensor([[-1.0], [1.0]])
        >>> stable_target_field(torch.tensor([[0.0], [0.5]]), references, sigma=0.1).round().tolist()
        [[0.0], [50.0]]
    """
    _validate_shapes(x_t, references, source)
    sigmas, alphas = _one_a_row(x_t, sigma=sigma, alpha=alpha)
    if not (sigmas > 0).all():
        raise OptionError(f"sigma={sigma}", expected="sigma > 0", cure="omit times without noise")
    dtype = torch.promote_types(x_t.dtype, torch.float32)
    score = _field(x_t, references, sigmas, alphas, source).to(dtype)
    if not score.isfinite().all():
        raise OptionError(
            f"a score that is not finite in {dtype}",
            expected="finite x_t and references, and sigma^-2 within that dtype",
            cure="drop broken samples, or pass x_t in float64",
        )
    return score


def mismatch_degree(
    score_fn: Callable[[Tensor, Tensor], Tensor],
    samples: Tensor,
    references: Tensor,
    sigmas: Sequence[float] | Tensor,
    include_source: bool = True,
    generator: torch.Generator | None = None,
    *,
    prediction: Prediction = Prediction.SCORE,
    alphas: Sequence[float] | Tensor | float = 1.0,
    weights: Sequence[float] | Tensor | None = None,
    batch_size: int = 64,
) -> Mismatch:
    """Compute the distance of a network's scores from the scores of the distribution of some samples (Eq. 9).

        d(sigma) = E |s(x_t, sigma) - stable_target_field(x_t)|_2,    x_t = alpha x_0 + sigma eps,  x_0 of `samples`

    The norm is the Euclidean one, not squared, over all elements of a sample. On a student's samples the value is the
    distance of the teacher, or of a node, from the student; on training data it is a lower bound for any student.

    Compare values of one setting only: they depend on the noise scales, the number of references and `include_source`.
    At small sigma, and on images at nearly every sigma, the value measures mostly the noise of the target: read it per
    sigma. The paper's minimum of 0.037 (Sec. 5.3) uses a weighting that the paper does not state.

    Args:
        score_fn: The network in evaluation mode, (x_t, sigma) -> its output, with sigma of shape (B, 1, ..., 1). Wrap
            a network with other arguments: `lambda x_t, sigma: net(x_t, sigma.flatten(), labels)`.
        samples: x_0 of the assessed distribution, shape (n, ...), n >= 1, on the network's device.
        references: Other samples of the same distribution, shape (R, ...), preferably thousands. Split one set in two.
        sigmas: Noise scales > 0 in data units, one or more.
        include_source: Whether x_0 is among the references of its own x_t, as in the STF paper. With it the target is
            always usable but too close to x_0 at small sigma; without it the target is unbiased for many references.
        generator: Source of eps; None: a private one with a fixed seed, so that two calls see the same noise.
        prediction: The kind of output of `score_fn`, which is converted by `prediction.convert`.
        alphas: Signal scale > 0, one number or one for each sigma.
        weights: Weight >= 0 of each sigma in the total. None: 1, as in Eq. 9, where small sigmas dominate because a
            score grows like 1 / sigma. `weights=sigmas` gives the mismatch of the noise prediction.
        batch_size: Samples in one call of `score_fn`, >= 1.

    Returns:
        "per_sigma": d(sigma) of each, unweighted, per data unit; "total": the mean of weight * d(sigma).

    Raises:
        OptionError: If an argument is out of its domain, or `score_fn` returns another shape or values that are not
            finite.

    Example:
        >>> x = torch.randn(2_000, 1, generator=torch.Generator().manual_seed(0))
        >>> def score(x_t, sigma, mean):
        ...     return (mean - x_t) / (1 + sigma**2)
        >>> near, far = (
        ...     mismatch_degree(lambda *at: score(*at, mean), x[:1000], x[1000:], [1.0])["total"] for mean in (0, 3)
        ... )
        >>> near < 0.1, 1.4 < far < 1.6  # exactly 3 / (1 + 1)
        (True, True)
    """
    _validate_shapes(samples, references, None)
    scales = torch.as_tensor(sigmas, dtype=torch.float64, device="cpu").flatten()
    columns = _one_a_row(scales, sigma=scales, alpha=alphas, weight=1.0 if weights is None else weights)
    if not (len(scales) and (columns[0] > 0).all() and (columns[1] > 0).all()):
        raise OptionError(
            f"sigmas={sigmas}, alphas={alphas}", expected="one or more, each > 0", cure="omit times without noise"
        )
    if not len(samples) or batch_size < 1:
        raise OptionError(f"{len(samples)} samples, batch_size={batch_size}", expected="1 or more", cure="pass more")
    stream = torch.Generator().manual_seed(0) if generator is None else generator
    per_sigma = []
    for sigma, alpha, _ in torch.cat(columns, 1).tolist():
        distance, noise = 0.0, torch.randn(samples.shape, generator=stream, device=stream.device)
        for x_0, eps in zip(torch.split(samples, batch_size), torch.split(noise, batch_size), strict=True):
            x_t = add_noise(x_0, eps.to(x_0), alpha=alpha, sigma=sigma)
            rows = x_t.new_full((len(x_t), *[1] * (x_t.ndim - 1)), sigma)
            with torch.no_grad():
                output = score_fn(x_t, rows)
            if output.shape != x_t.shape or not output.isfinite().all():
                raise OptionError(
                    f"an output of score_fn of shape {tuple(output.shape)} at sigma={sigma:g}, or values not finite",
                    expected=f"finite outputs of shape {tuple(x_t.shape)}",
                    cure="wrap the network so that score_fn(x_t, sigma) is its prediction",
                )
            score = convert(output.to(x_t.device), prediction, Prediction.SCORE, x_t=x_t, alpha=alpha, sigma=sigma)
            target = stable_target_field(
                x_t.double(), references, sigma, alpha, source=x_0.double() if include_source else None
            )
            distance += float((score.double() - target).flatten(1).norm(dim=1).sum())
        per_sigma.append(distance / len(samples))
    total = sum(weight * d for weight, d in zip(columns[2].flatten().tolist(), per_sigma, strict=True)) / len(scales)
    return {"total": total, "per_sigma": per_sigma}


def _field(x_t: Tensor, references: Tensor, sigma: Tensor, alpha: Tensor, source: Tensor | None) -> Tensor:
    """Return the field in float64, some rows at a time; sigma and alpha have shape (B, 1)."""
    flat = x_t.detach().flatten(1)
    own = flat[:, :0] if source is None else source.detach().flatten(1)
    rows, pieces = max(1, _CHUNK_BYTES // (8 * max(flat.shape[1], 1))), []
    for x, x_0, s, a in zip(*(torch.split(tensor, rows) for tensor in (flat, own, sigma, alpha)), strict=True):
        x = x.double()
        mean = _posterior_mean(x, references, s, a, None if source is None else x_0.to(x))
        pieces.append((a * mean - x) / s**2)
    return torch.cat(pieces).reshape(x_t.shape)


def _posterior_mean(x: Tensor, references: Tensor, sigma: Tensor, alpha: Tensor, source: Tensor | None) -> Tensor:
    """Return sum_i w_i x_i, shape (B, d): a softmax that is rescaled whenever a piece brings a larger logit."""
    peak, mass, mean = x.new_full((len(x), 1), -torch.inf), x.new_zeros(len(x), 1), torch.zeros_like(x)
    if source is not None:
        # |x|^2 is left out of every logit: it is the same for all references of a row.
        peak = (alpha * (x * source).sum(1, True) - alpha**2 * source.square().sum(1, True) / 2) / sigma**2
        mass, mean = torch.ones_like(mass), source
    for piece in torch.split(references, max(1, _CHUNK_BYTES // (8 * max(x.shape[1], len(x), 1)))):
        x_i = piece.detach().to(x.device, torch.float64).flatten(1)
        logits = (alpha * (x @ x_i.T) - alpha**2 * torch.linalg.vector_norm(x_i, dim=1) ** 2 / 2) / sigma**2
        highest = torch.maximum(peak, logits.amax(1, keepdim=True))
        kept, weights = (peak - highest).exp(), (logits - highest).exp()
        mass, mean = mass * kept + weights.sum(1, True), mean * kept + weights @ x_i
        peak = highest
    return mean / mass


def _validate_shapes(x_t: Tensor, references: Tensor, source: Tensor | None) -> None:
    given = {"x_t or samples": x_t, "references": references} | ({} if source is None else {"source": source})
    fits = x_t.ndim >= 2 and x_t.shape[1:] == references.shape[1:] and len(references) >= 1
    if not (
        fits
        and all(tensor.is_floating_point() for tensor in given.values())
        and given.get("source", x_t).shape == x_t.shape
    ):
        raise OptionError(
            ", ".join(f"{name} {tuple(tensor.shape)} of {tensor.dtype}" for name, tensor in given.items()),
            expected="(B, ...) and (R, ...) of one sample's shape with R >= 1, both floating, and a source like x_t",
            cure="pass one sample a row, in the units that the network sees",
        )


def _one_a_row(like: Tensor, **values: Tensor | Sequence[float] | float) -> list[Tensor]:
    """Return for each argument one value >= 0 a row of `like`, shape (B, 1), in float64."""
    found = []
    for name, value in values.items():
        rows = torch.as_tensor(value, dtype=torch.float64, device=like.device).detach()
        if not (rows.numel() == 1 or rows.numel() == len(like) == len(rows)) or not (rows >= 0).all():
            raise OptionError(
                f"{name}={value}", expected=f"a number >= 0, or one for each of {len(like)}", cure=f"correct {name}"
            )
        found.append(rows.flatten().expand(len(like))[:, None])
    return found
