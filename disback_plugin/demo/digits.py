"""The data of the demonstration: scikit-learn's 1,797 handwritten digits, 8 x 8, and the features of its distance.

`pfd` is the Frechet distance on the first 20 principal components of the digits, in which the digits have mean zero and
a diagonal covariance. It is quiet: 1,000 samples are enough to see a difference of a few per cent.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from disback_plugin.errors import OptionError

__all__ = ["PrincipalComponents", "load", "principal_components"]


def load() -> Tensor:
    """Return the digits as float32 in [-1, 1], shape (1797, 64), in their stored order.

    Raises:
        OptionError: If scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits  # type: ignore[import-untyped, import-not-found, unused-ignore]
    except ImportError as error:
        raise OptionError(
            "no scikit-learn", expected="the package that holds the digits", cure="pip install 'disback-plugin[demo]'"
        ) from error
    return torch.from_numpy(load_digits().data).float() / 8 - 1


@dataclass(frozen=True)
class PrincipalComponents:
    """An orthonormal basis of the directions in which a data set varies most.

    Args:
        mean: Mean of the data, shape (d,).
        basis: Columns are the components, the widest first, shape (d, k).

    Example:
        >>> components = PrincipalComponents(mean=torch.ones(2), basis=torch.eye(2)[:, :1])
        >>> components(torch.tensor([[3.0, 5.0]])).tolist()
        [[2.0]]
    """

    mean: Tensor
    basis: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """Return the features of x, shape (..., d) -> (..., k); an ensemble axis stays where it is."""
        return (x - self.mean) @ self.basis


def principal_components(x: Tensor, count: int = 20) -> PrincipalComponents:
    """Return the first principal components of samples x, shape (n, d).

    The sign of a component is fixed: its largest entry is positive. So the features are the same on every machine.

    Args:
        x: Samples, shape (n, d).
        count: Number of components k, 1 <= k <= min(n, d).

    Example:
        >>> principal_components(torch.tensor([[0.0, 0.0], [0.0, 2.0]]), count=1).basis.tolist()
        [[0.0], [1.0]]
    """
    mean = x.double().mean(dim=0)
    _, _, directions = torch.linalg.svd(x.double() - mean, full_matrices=False)
    basis = directions[:count].mT
    largest = basis.gather(0, basis.abs().argmax(dim=0, keepdim=True))
    return PrincipalComponents(mean=mean.float(), basis=(basis * largest.sign()).float())
