r"""The worlds of the demonstration: their data, the distance of samples from them, and denoisers that learn them.

"digits" are scikit-learn's images of 8 x 8 pixels, "gaussians" are ten of them in the plane. A denoiser has the
preconditioning of EDM (arXiv 2206.00364, Eq. 7 and Table 1), with d = sigma_data and s^2 = sigma^2 + d^2:

    D(x_t, sigma) = d^2 / s^2 x_t + sigma d / s F(x_t / s, ln(sigma) / 4)

One module is E networks: every parameter has shape (E, ...) and every batch shape (E, B, d), d being 64 or 2. So the
seeds of a comparison train side by side in one set of matrix products, and no member sees another (Adam acts on each
element alone).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from disback_plugin.errors import OptionError
from disback_plugin.metrics import frechet_distance, sliced_wasserstein

FREQUENCIES = 16
TEACHERS = Path(__file__).parent / "teachers"


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


DATA: dict[str, Callable[[], Tensor]] = {"digits": digits, "gaussians": mixture}


def distance_to(data: Tensor) -> Callable[[Tensor], float]:
    """Return a function from samples, shape (n, d), to their distance from the data.

    For points in the plane it is the sliced Wasserstein distance, else the Frechet distance in 20 principal components.
    """
    if data.shape[1] == 2:
        return lambda samples: sliced_wasserstein(samples, data[: len(samples)])
    features = principal_components(data)
    real = features(data)
    return lambda samples: frechet_distance(features(samples), real)


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


class Linear(nn.Module):
    """E affine maps, (E, B, inputs) -> (E, B, outputs)."""

    def __init__(self, members: int, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(members, outputs, inputs))
        self.bias = nn.Parameter(torch.zeros(members, 1, outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Return W x + b of each member."""
        return torch.baddbmm(self.bias, x, self.weight.mT)


class MLPBlock(nn.Module):
    """h + W_2 silu(W_1 norm(h) + W_e e), with a layer norm without parameters."""

    def __init__(self, members: int, width: int) -> None:
        super().__init__()
        self.inner = Linear(members, width, width)
        self.embed = Linear(members, 2 * FREQUENCIES, width)
        self.outer = Linear(members, width, width)

    def forward(self, h: Tensor, e: Tensor) -> Tensor:
        """Return h plus its residual under the noise embedding e, shape (E, B, width)."""
        inner = self.inner(F.layer_norm(h, h.shape[-1:])) + self.embed(e)
        return h + self.outer(F.silu(inner))


class ResidualMLP(nn.Module):
    """F of the preconditioning as a residual perceptron, 165,568 parameters a member at its defaults."""

    def __init__(self, members: int, size: int = 64, width: int = 128, depth: int = 4) -> None:
        super().__init__()
        self.first = Linear(members, size, width)
        self.blocks = nn.ModuleList(MLPBlock(members, width) for _ in range(depth))
        self.last = Linear(members, width, size)

    def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
        """Return F(x, c_noise), from (E, B, size) and (E, B) to (E, B, size)."""
        h, e = self.first(x), embed_noise(c_noise)
        for block in self.blocks:
            h = block(h, e)
        return self.last(F.silu(h))


class Denoiser(nn.Module):
    """D of the preconditioning: E x_0-predictors (`Prediction.X0` at alpha_t = 1).

    Args:
        body: F, from (E, B, d) and (E, B) to (E, B, d).
        sigma_data: Standard deviation d of the data.
    """

    def __init__(self, body: nn.Module, sigma_data: float = 0.75) -> None:
        super().__init__()
        self.body, self.sigma_data = body, sigma_data

    def forward(self, x_t: Tensor, sigma: Tensor) -> Tensor:
        """Return the prediction of x_0, shape (E, B, d).

        Args:
            x_t: Noisy samples x_0 + sigma eps, shape (E, B, d).
            sigma: Noise scale > 0 in data units, shape (E, B) or broadcast against it.
        """
        d, sigma = self.sigma_data, sigma.expand(x_t.shape[:2])
        s = (sigma**2 + d**2).sqrt()
        skip = (d / s)[..., None] ** 2 * x_t
        return skip + (sigma * d / s)[..., None] * self.body(x_t / s[..., None], sigma.log() / 4)


def embed_noise(c_noise: Tensor) -> Tensor:
    """Return sines and cosines of c_noise = ln(sigma) / 4 at 16 frequencies from 1/2 to 16, (E, B) -> (E, B, 32)."""
    frequencies = 0.5 * 32 ** torch.linspace(0, 1, FREQUENCIES, device=c_noise.device)
    phase = c_noise[..., None] * frequencies
    return torch.cat([phase.sin(), phase.cos()], dim=-1)


# The coordinates of the Gaussians have a standard deviation of 2.8.
NETWORKS: dict[str, Callable[[int], Denoiser]] = {
    "digits": lambda members: Denoiser(ResidualMLP(members)),
    "gaussians": lambda members: Denoiser(ResidualMLP(members, size=2, width=64, depth=3), sigma_data=2.8),
}


def ensemble(network: str, members: Sequence[Mapping[str, Tensor]]) -> Denoiser:
    """Return one denoiser that holds the given networks.

    Args:
        network: A name in NETWORKS.
        members: The weights of E networks, each of shape (1, ...).
    """
    denoiser = NETWORKS[network](len(members))
    denoiser.load_state_dict({name: torch.cat([member[name] for member in members]) for name in members[0]})
    return denoiser


def random_weights(network: str, generator: torch.Generator) -> dict[str, Tensor]:
    """Return random weights of one network, shape (1, ...): N(0, gain^2 / fan_in), and zero for a bias."""
    weights = NETWORKS[network](1).state_dict()
    for name, weight in weights.items():
        if name.endswith("weight"):
            gain = 0.5 if ".outer." in name else 1.0
            weight.copy_(torch.randn(weight.shape, generator=generator) * (gain / math.sqrt(weight[0, 0].numel())))
    return weights


def load_teacher(world: str, members: int) -> Denoiser:
    """Return the teacher of a world that comes with this package, E times over.

    Args:
        world: "digits" or "gaussians".
        members: E >= 1.

    Example:
        >>> load_teacher("digits", members=2)(torch.zeros(2, 3, 64), torch.ones(2, 3)).shape
        torch.Size([2, 3, 64])
    """
    return ensemble(world, [load_file(TEACHERS / f"{world}.safetensors")] * members)
