"""How far two sets of samples are apart."""

from __future__ import annotations

import torch
from torch import Tensor

from disback_plugin.errors import OptionError

__all__ = ["frechet_distance"]


def frechet_distance(features_a: Tensor, features_b: Tensor) -> float:
    """Squared Frechet distance of the Gaussians fitted to two sets of features, in float64 (arXiv 1706.08500, Eq. 6).

        |mu_a - mu_b|^2 + tr(S_a) + tr(S_b) - 2 tr((S_a S_b)^(1/2))

    It is the FID only if the features are those of its Inception network.

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
    a, b = features_a.double(), features_b.double()
    if not (a.ndim == b.ndim == 2 and a.shape[1] == b.shape[1] and min(len(a), len(b)) >= 2):
        raise OptionError(
            f"features of shapes {tuple(a.shape)} and {tuple(b.shape)}",
            expected="(n, d) and (m, d) with n, m >= 2",
            cure="pass one row a sample",
        )
    if not (a.isfinite().all() and b.isfinite().all()):
        raise OptionError("features that are not finite", expected="numbers", cure="drop the broken samples and say so")
    s_a, s_b = torch.cov(a.T).reshape(a.shape[1], -1), torch.cov(b.T).reshape(b.shape[1], -1)
    root_a = _sqrt(s_a)
    # S_a S_b has the eigenvalues of the symmetric S_a^(1/2) S_b S_a^(1/2).
    cross = torch.linalg.eigvalsh(root_a @ s_b @ root_a).clamp(min=0).sqrt().sum()
    distance = (a.mean(0) - b.mean(0)).square().sum() + s_a.trace() + s_b.trace() - 2 * cross
    return max(float(distance), 0.0)


def _sqrt(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    root: Tensor = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    return root
