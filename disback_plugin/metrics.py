"""How far two sets of samples are apart, and how far a network's scores are from a set's.

| function              | what it says                                            | source                    |
|-----------------------|---------------------------------------------------------|---------------------------|
| `frechet_distance`    | means and covariances of features apart                 | arXiv 1706.08500, Eq. 6   |
| `sliced_wasserstein`  | the samples themselves apart, in random directions      | Bonneel et al. 2015       |
| `coverage`            | share of the data that some sample is near to           | arXiv 2002.09797, Sec. 3  |
| `mode_coverage`       | known modes hit, and how evenly                         | arXiv 1705.07761 (VEEGAN) |
| `stable_target_field` | the score of a set (`target_field`)                     | the paper, Eq. 18         |
| `mismatch_degree`     | a network's scores from those of a set (`target_field`) | the paper, Eq. 9          |
| `features`            | images to vectors, for the first three (`extractors`)   | timm; NOT the FID         |
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from disback_plugin.errors import OptionError
from disback_plugin.measures.extractors import features
from disback_plugin.measures.target_field import Mismatch, mismatch_degree, stable_target_field

__all__ = [
    "Mismatch",
    "ModeCoverage",
    "coverage",
    "features",
    "frechet_distance",
    "mismatch_degree",
    "mode_coverage",
    "sliced_wasserstein",
    "stable_target_field",
]

_CHUNK = 2**22  # numbers of a table of distances, or of float64 copies, at a time


def frechet_distance(features_a: Tensor, features_b: Tensor) -> float:
    """Squared Frechet distance of the Gaussians fitted to two sets of features, in float64 (arXiv 1706.08500, Eq. 6).

        |mu_a - mu_b|^2 + tr(S_a) + tr(S_b) - 2 tr((S_a S_b)^(1/2))

    It is the FID only if the features are those of its Inception network: with `features` of timm it is NOT.

    Args:
        features_a: One feature vector a row, shape (n, d), n >= 2, finite.
        features_b: The same of the other set, shape (m, d), m >= 2, finite.

    Returns:
        The distance, >= 0, in squared feature units.

    Raises:
        OptionError: If the shapes do not fit or a value is not finite.

    Example:
        >>> a = torch.tensor([[0.0], [2.0]])
        >>> round(frechet_distance(a, a + 3.0), 6)
        9.0
    """
    a, b = features_a.detach().double(), features_b.detach().double()
    _check(a, b, at_least=2)
    mu_a, mu_b = a.mean(0), b.mean(0)
    # With S = R^T R, the last trace is the sum of the singular values of R_a R_b^T: no matrix is squared, and no root
    # of a rounding error taken, as of the covariance of fewer samples than features.
    r_a, r_b = (torch.linalg.qr((x - mu) / (len(x) - 1) ** 0.5, mode="r").R for x, mu in ((a, mu_a), (b, mu_b)))
    cross = torch.linalg.svdvals(r_a @ r_b.T).sum()
    distance = (mu_a - mu_b).square().sum() + r_a.square().sum() + r_b.square().sum() - 2 * cross
    return max(float(distance), 0.0)


def sliced_wasserstein(
    a: Tensor, b: Tensor, *, projections: int = 128, generator: torch.Generator | None = None
) -> float:
    """Sliced 2-Wasserstein distance of two sets of samples, in float64 (Bonneel et al., JMIV 2015).

        ( mean over directions u of  integral_0^1 (F_a,u^-1(q) - F_b,u^-1(q))^2 dq )^(1/2)

    with the quantile functions F^-1 of the samples projected on u: exact for sets of different sizes.

    Args:
        a: Samples or features, shape (n, ...), n >= 1, finite.
        b: The same of the other set, shape (m, ...), m >= 1, finite.
        projections: Number of random directions, >= 1.
        generator: Source of the directions; None: a private one with a fixed seed, so that two calls use the same.

    Returns:
        The distance, >= 0, in units of the samples.

    Raises:
        OptionError: If the shapes do not fit, a value is not finite, or projections < 1.

    Example:
        >>> a = torch.tensor([[0.0], [2.0]])
        >>> round(sliced_wasserstein(a, torch.tensor([[3.0], [4.0], [4.0], [5.0]])) ** 2, 6)  # (9 + 16 + 4 + 9) / 4
        9.5
    """
    a, b = (x.detach().flatten(1) if x.ndim > 1 else x for x in (a, b))
    _check(a, b, at_least=1)
    if projections < 1:
        raise OptionError(f"projections={projections}", expected="a count >= 1", cure="pass projections=128")
    stream = torch.Generator().manual_seed(0) if generator is None else generator
    directions = torch.randn(a.shape[1], projections, generator=stream, device=stream.device, dtype=torch.float64)
    directions = (directions / directions.norm(dim=0)).to(a.device)
    quantiles_a, quantiles_b = (_project(x, directions).sort(dim=0).values for x in (a, b.to(a.device)))
    # Both are constant between two neighbours of the grid {i / n} and {j / m}; in units of 1 / (n m) it is whole.
    n, m = len(a), len(b)
    ends = torch.unique(torch.cat([torch.arange(1, n + 1) * m, torch.arange(1, m + 1) * n])).to(a.device)
    widths = torch.diff(ends, prepend=ends.new_zeros(1)).double() / (n * m)
    gaps = quantiles_a[(ends - 1) // m] - quantiles_b[(ends - 1) // n]
    return float((widths @ gaps.square()).mean().sqrt())


def coverage(samples: Tensor, references: Tensor, *, k: int = 5) -> float:
    """Share of the references with a sample closer than their k-th neighbour (Naeem et al., arXiv 2002.09797, Sec. 3).

    A recall that outliers do not inflate: 1 - 2^-k or so for samples of the references' own distribution, as many as
    these; lower if they keep to some of its modes. On features (`features`), not on pixels.

    Args:
        samples: Features of the assessed samples, shape (m, d), m >= 1, finite.
        references: Features of the data, shape (n, d), n > k, finite.
        k: The neighbour whose distance is the radius of a reference's ball, >= 1.

    Returns:
        The share, in [0, 1].

    Raises:
        OptionError: If the shapes do not fit, a value is not finite, or there are no more than k references.

    Example:
        >>> references = torch.arange(20.0)[:, None]
        >>> coverage(references[:10], references, k=2)  # these ten, and 10.0, whose 2nd neighbour is at 1
        0.55
    """
    samples, references = samples.detach(), references.detach().to(samples.device)
    _check(samples, references, at_least=1)
    if not 1 <= k < len(references):
        raise OptionError(
            f"k={k} for {len(references)} references", expected="1 <= k < the number of references", cure="pass k=5"
        )
    samples, references = samples.double(), references.double()
    near = 0
    for rows in torch.split(references, max(1, _CHUNK // max(len(samples), len(references)))):
        radii = torch.cdist(rows, references).kthvalue(k + 1, dim=1).values  # the nearest is the reference itself
        near += int((torch.cdist(rows, samples).amin(1) <= radii).sum())
    return near / len(references)


class ModeCoverage(NamedTuple):
    """What `mode_coverage` returns, each in [0, 1].

    Attributes:
        modes: Share of the modes that a near sample belongs to.
        near: Share of the samples that are near their mode ("high-quality samples").
        distance: Total variation between the modes' shares of the near samples and their weights; 1 if none is near.

    Example:
        >>> found = mode_coverage(torch.zeros(3, 2), torch.tensor([[0.0, 0.0], [9.0, 9.0]]), radius=1.0)
        >>> found.modes, found.near, found.distance
        (0.5, 1.0, 0.5)
    """

    modes: float
    near: float
    distance: float


def mode_coverage(
    samples: Tensor,
    modes: Tensor,
    *,
    radius: Tensor | float,
    weights: Tensor | None = None,
) -> ModeCoverage:
    """Which of a mixture's known modes the samples hit, and how evenly (VEEGAN, arXiv 1705.07761).

    Each sample belongs to the closest mode and is near it within its radius: three standard deviations there. Counting
    hit modes alone takes one stray sample for a mode; `distance` does not.

    Args:
        samples: Shape (n, d), n >= 1, finite.
        modes: Their centres, shape (k, d), k >= 1, finite.
        radius: In units of the samples, > 0, one number or one a mode, shape (k,).
        weights: Of each mode in the mixture, shape (k,), >= 0, of any sum > 0; None: equal.

    Raises:
        OptionError: If the shapes do not fit, or a value is out of its domain.

    Example:
        >>> modes = torch.tensor([[0.0, 0.0], [4.0, 0.0], [0.0, 4.0], [4.0, 4.0]])
        >>> samples = torch.tensor([[0.1, 0.0], [0.0, 0.2], [4.0, 0.1], [2.0, 2.0]])
        >>> mode_coverage(samples, modes, radius=0.3)
        ModeCoverage(modes=0.5, near=0.75, distance=0.5)
    """
    _check(samples, modes, at_least=1)
    samples = samples.detach().double()
    modes = modes.detach().to(samples)
    reach = torch.as_tensor(radius).detach().to(samples)
    shares = torch.ones(len(modes)).to(samples) if weights is None else weights.detach().to(samples)
    shapes_fit = reach.shape in ((), (len(modes),)) and shares.shape == (len(modes),)
    if not (shapes_fit and (reach > 0).all() and (shares >= 0).all() and shares.sum() > 0):
        raise OptionError(
            f"radius={radius}, weights={weights} for {len(modes)} modes",
            expected="one radius > 0, or one a mode, and one weight >= 0 a mode",
            cure="pass radius=3 * std of the modes",
        )
    hits = torch.zeros_like(shares)
    for rows in torch.split(samples, max(1, _CHUNK // len(modes))):
        # Not by the expanded square, which loses everything far from the origin.
        distance, mode = torch.cdist(rows, modes, compute_mode="donot_use_mm_for_euclid_dist").min(1)
        hits += torch.bincount(mode[distance <= reach.expand(len(modes))[mode]], minlength=len(modes))
    near = hits.sum()
    apart = (hits / near - shares / shares.sum()).abs().sum() / 2 if near else torch.ones(())
    return ModeCoverage(float((hits > 0).double().mean()), float(near / len(samples)), float(apart))


def _project(x: Tensor, directions: Tensor) -> Tensor:
    """Return x @ directions in float64, some rows at a time."""
    return torch.cat([rows.double() @ directions for rows in torch.split(x, max(1, _CHUNK // max(x.shape[1], 1)))])


def _check(a: Tensor, b: Tensor, *, at_least: int) -> None:
    if not (a.ndim == b.ndim == 2 and a.shape[1] == b.shape[1] and min(len(a), len(b)) >= at_least):
        raise OptionError(
            f"features of shapes {tuple(a.shape)} and {tuple(b.shape)}",
            expected=f"(n, d) and (m, d) with n, m >= {at_least}",
            cure="pass one row a sample",
        )
    if not (a.isfinite().all() and b.isfinite().all()):
        raise OptionError("features that are not finite", expected="numbers", cure="drop the broken samples and say so")
