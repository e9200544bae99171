"""Provide the data of the demonstration, and the distance of samples from them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from disback_plugin.errors import OptionError
from disback_plugin.metrics import frechet_distance, sliced_wasserstein


def data_of(network: str) -> Tensor:
    """Return the data that a network of `networks.NETWORKS` learns: points in the plane, or digits."""
    return mixture() if network == "plane" else digits()


def distance_to(data: Tensor) -> Callable[[Tensor], float]:
    """Return a function from samples, shape (n, d), to their distance from the data.

    For points in the plane it is the sliced Wasserstein distance, else the Frechet distance in 20 principal components.
    """
    if data.shape[1] == 2:
        return lambda samples: sliced_wasserstein(samples, data[: len(samples)])
    features = principal_components(data)
    real = features(data)
    return lambda samples: frechet_distance(features(samples), real)


def digits() -> Tensor:
    """Return scikit-learn's handwritten digits as float32 in [-1, 1], shape (1797, 64), in their stored order.

    Raises:
        OptionError: If scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits  # type: ignore[import-untyped, import-not-found, unused-ignore]
    except ImportError as error:
        cure = "pip install 'disback-plugin[demo]'"
        raise OptionError("no scikit-learn", expected="the package that holds the digits", cure=cure) from error
    return torch.from_numpy(load_digits().data).float() / 8 - 1


def mixture(centres: Tensor | None = None) -> Tensor:
    """Return 4,000 points of a mixture of Gaussians with standard deviation 0.3, shape (4000, 2).

    Args:
        centres: Means, shape (k, 2); None draws ten in [-5, 5]^2, as the paper's E.1 does.

    Example:
        >>> mixture(torch.tensor([[4.0, 1.0]])).mean(dim=0).round(decimals=1)
        tensor([4., 1.])
    """
    stream = torch.Generator().manual_seed(0)
    centres = torch.rand(10, 2, generator=stream) * 10 - 5 if centres is None else centres
    members = torch.randint(len(centres), (4_000,), generator=stream)
    return centres[members] + 0.3 * torch.randn(4_000, 2, generator=stream)


def principal_components(data: Tensor, count: int = 20) -> Callable[[Tensor], Tensor]:
    """Return a function from samples, shape (..., d), to their first principal components, shape (..., count).

    The Frechet distance on 20 components is quiet: 1,000 samples are enough to see a difference of a few per cent.

    Args:
        data: Samples that define the components, shape (n, d).
        count: Number of components, 1 <= count <= min(n, d).

    Example:
        >>> principal_components(torch.tensor([[0.0, 0.0], [0.0, 2.0]]), count=1)(torch.tensor([[5.0, 3.0]])).abs()
        tensor([[2.]])
    """
    mean = data.double().mean(dim=0)
    directions = torch.linalg.svd(data.double() - mean, full_matrices=False).Vh[:count].mT.float()
    return lambda x: (x - mean.float()) @ directions
