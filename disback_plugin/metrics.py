"""Distances between two sets of samples, and between the scores of a network and those of a set.

| function              | measures                                                | source                    |
|-----------------------|---------------------------------------------------------|---------------------------|
| `frechet_distance`    | distance of means and covariances of features           | arXiv 1706.08500, Eq. 6   |
| `sliced_wasserstein`  | distance of the samples along random directions         | Bonneel et al. 2015       |
| `coverage`            | share of the data that has a sample nearby              | arXiv 2002.09797, Sec. 3  |
| `mode_coverage`       | share of known modes hit, and how evenly                | arXiv 1705.07761 (VEEGAN) |
| `stable_target_field` | the score of a set of samples                           | the paper, Eq. 18         |
| `mismatch_degree`     | distance of a network's scores from those of a set      | the paper, Eq. 9          |
| `features`            | vectors of images, for the first three                  | timm; NOT the FID's       |
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from disback_plugin._target_field import Mismatch, mismatch_degree, stable_target_field
from disback_plugin.errors import OptionError

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

_CHUNK = 2**22  # elements of a table of distances, or of float64 copies, at a time


def frechet_distance(features_a: Tensor, features_b: Tensor) -> float:
    """Compute the squared Frechet distance of the Gaussians fitted to two sets of features (arXiv 1706.08500, Eq. 6).

        |mu_a - mu_b|^2 + tr(S_a) + tr(S_b) - 2 tr((S_a S_b)^(1/2))

    The sums are in float64. The distance is the FID only on features of its Inception network, NOT on timm's.

    Args:
        features_a: One feature vector a row, shape (n, d), n >= 2, finite.
        features_b: The features of the other set, shape (m, d), m >= 2, finite.

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
    _validate(a, b, at_least=2)
    mu_a, mu_b = a.mean(0), b.mean(0)
    # With S = R^T R, the last trace is the sum of the singular values of R_a R_b^T. No matrix is squared, so that no
    # root of a rounding error is taken if there are fewer samples than features.
    r_a, r_b = (torch.linalg.qr((x - mu) / (len(x) - 1) ** 0.5, mode="r").R for x, mu in ((a, mu_a), (b, mu_b)))
    cross = torch.linalg.svdvals(r_a @ r_b.T).sum()
    distance = (mu_a - mu_b).square().sum() + r_a.square().sum() + r_b.square().sum() - 2 * cross
    return max(float(distance), 0.0)


def sliced_wasserstein(
    a: Tensor, b: Tensor, *, projections: int = 128, generator: torch.Generator | None = None
) -> float:
    """Compute the sliced 2-Wasserstein distance of two sets of samples in float64 (Bonneel et al., JMIV 2015).

        ( mean over directions u of  integral_0^1 (F_a,u^-1(q) - F_b,u^-1(q))^2 dq )^(1/2)

    with the quantile functions F^-1 of the samples projected on u: exact for sets of different sizes.

    Args:
        a: Samples or features, shape (n, ...), n >= 1, finite.
        b: Samples or features of the other set, shape (m, ...), m >= 1, finite.
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
    _validate(a, b, at_least=1)
    if projections < 1:
        raise OptionError(f"projections={projections}", expected="a count >= 1", cure="pass projections=128")
    stream = torch.Generator().manual_seed(0) if generator is None else generator
    directions = torch.randn(a.shape[1], projections, generator=stream, device=stream.device, dtype=torch.float64)
    directions = (directions / directions.norm(dim=0)).to(a.device)
    quantiles_a, quantiles_b = (_project(x, directions).sort(dim=0).values for x in (a, b.to(a.device)))
    # Both quantile functions are constant between neighbours of the grid {i / n} and {j / m}, here times n m.
    n, m = len(a), len(b)
    ends = torch.unique(torch.cat([torch.arange(1, n + 1) * m, torch.arange(1, m + 1) * n])).to(a.device)
    widths = torch.diff(ends, prepend=ends.new_zeros(1)).double() / (n * m)
    gaps = quantiles_a[(ends - 1) // m] - quantiles_b[(ends - 1) // n]
    return float((widths @ gaps.square()).mean().sqrt())


def coverage(samples: Tensor, references: Tensor, *, k: int = 5) -> float:
    """Return the share of references with a sample closer than their k-th neighbour (arXiv 2002.09797, Sec. 3).

    Coverage is a recall that outliers do not inflate. It is about 1 - 2^-k for as many samples of the references' own
    distribution, and lower if the samples miss modes. Use it on features (`features`), not on pixels.

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
    _validate(samples, references, at_least=1)
    if not 1 <= k < len(references):
        raise OptionError(f"k={k}", expected=f"1 <= k < {len(references)}, the number of references", cure="pass k=5")
    samples, references = samples.double(), references.double()
    near = 0
    for rows in torch.split(references, max(1, _CHUNK // max(len(samples), len(references)))):
        radii = torch.cdist(rows, references).kthvalue(k + 1, dim=1).values  # the nearest is the reference itself
        near += int((torch.cdist(rows, samples).amin(1) <= radii).sum())
    return near / len(references)


class ModeCoverage(NamedTuple):
    """The result of `mode_coverage`, three numbers in [0, 1].

    Attributes:
        modes: Share of the modes that have a near sample.
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
    samples: Tensor, modes: Tensor, *, radius: Tensor | float, weights: Tensor | None = None
) -> ModeCoverage:
    """Measure how many of the known modes of a mixture the samples hit, and how evenly (VEEGAN, arXiv 1705.07761).

    Each sample belongs to the closest mode, and is near it within the mode's radius: three standard deviations there.
    A single stray sample counts as a hit of a mode in `modes`, but hardly changes `distance`.

    Args:
        samples: Shape (n, d), n >= 1, finite.
        modes: Centres of the modes, shape (k, d), k >= 1, finite.
        radius: Radius > 0 in units of the samples, one number or one a mode, shape (k,).
        weights: Weight >= 0 of each mode in the mixture, shape (k,), of any sum > 0; None: equal weights.

    Raises:
        OptionError: If the shapes do not fit, or a value is out of its domain.

    Example:
        >>> modes = torch.tensor([[0.0, 0.0], [4.0, 0.0], [0.0, 4.0], [4.0, 4.0]])
        >>> samples = torch.tensor([[0.1, 0.0], [0.0, 0.2], [4.0, 0.1], [2.0, 2.0]])
        >>> mode_coverage(samples, modes, radius=0.3)
        ModeCoverage(modes=0.5, near=0.75, distance=0.5)
    """
    _validate(samples, modes, at_least=1)
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
        # The expanded square would lose all digits far from the origin.
        distance, mode = torch.cdist(rows, modes, compute_mode="donot_use_mm_for_euclid_dist").min(1)
        hits += torch.bincount(mode[distance <= reach.expand(len(modes))[mode]], minlength=len(modes))
    near = hits.sum()
    apart = (hits / near - shares / shares.sum()).abs().sum() / 2 if near else torch.ones(())
    return ModeCoverage(float((hits > 0).double().mean()), float(near / len(samples)), float(apart))


def features(
    model_or_name: nn.Module | str, *, pretrained: bool = True, device: torch.device | str = "cpu", batch_size: int = 64
) -> Callable[[Tensor], Tensor]:
    """Return a function from images to features, for `frechet_distance(extract(a), extract(b))`. NOT the FID.

    The FID is defined by one Inception network, its weights and its resizing, so that distances on timm's features are
    not comparable with published ones. For the FID install the extra `fid` (torch-fidelity, which downloads that
    network) and compare two folders of images: `fidelity --gpu 0 --fid --input1 samples/ --input2 data/`.

    Args:
        model_or_name: The name of a timm model, which takes images in [-1, 1], of 1 or 3 channels and any size, and
            resizes and normalises them as in its training; or any network in evaluation mode, which takes the images
            unchanged, and whose output of shape (B, ...) is flattened.
        pretrained: Whether a named model has its trained weights, which timm downloads. The random weights, always the
            same, are good for tests, or as a weak control.
        device: Device of a named model.
        batch_size: Images in one pass, >= 1.

    Returns:
        The function: images, shape (n, C, H, W), n >= 1, to features, shape (n, d), float32 or the network's dtype, on
        the CPU. It changes no gradient, flag or random state.

    Raises:
        OptionError: If timm has no such model, or the network is in training mode, where its statistics would change.
            The function raises it if a named model is called on images of integers.

    Example:
        >>> extract = features("resnet10t", pretrained=False)
        >>> extract(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 512])
    """
    if batch_size < 1:
        raise OptionError(f"batch_size={batch_size}", expected="a count >= 1", cure="pass batch_size=64")
    if isinstance(model_or_name, str):
        net, prepare = _timm(model_or_name, pretrained, device)
    else:
        net, prepare = model_or_name, lambda images: images
    if any(module.training for module in net.modules()):
        raise OptionError("a network in training mode", expected="one in evaluation mode", cure="call its eval() first")

    @torch.no_grad()
    def extract(images: Tensor) -> Tensor:
        return torch.cat([net(prepare(batch)).flatten(1).cpu() for batch in torch.split(images, batch_size)])

    return extract


def _timm(name: str, pretrained: bool, device: torch.device | str) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    """Return a timm model, and a function that makes its inputs of images in [-1, 1]."""
    import timm
    from timm.data.config import resolve_model_data_config

    if not timm.is_model(name):
        raise OptionError(f"the model {name!r}", expected="one of timm.list_models()", cure="correct the name")
    # timm draws weights from the global generator even if it overwrites them by trained ones.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        net = timm.create_model(name, pretrained=pretrained, num_classes=0).to(device).eval()
    config = resolve_model_data_config(net)  # type: ignore[no-untyped-call]
    mean, std = (torch.tensor(config[name]).to(device)[:, None, None] for name in ("mean", "std"))

    def prepare(images: Tensor) -> Tensor:
        if not images.is_floating_point():
            raise OptionError(f"images of {images.dtype}", expected="floats in [-1, 1]", cure="pass images / 127.5 - 1")
        images, size = images.to(mean).expand(-1, len(mean), -1, -1), config["input_size"][-2:]
        images = interpolate(images, size, mode="bicubic", antialias=True, align_corners=False).clamp(-1, 1)
        return ((images + 1) / 2 - mean) / std

    return net, prepare


def _project(x: Tensor, directions: Tensor) -> Tensor:
    """Return x @ directions in float64, some rows at a time."""
    return torch.cat([rows.double() @ directions for rows in torch.split(x, max(1, _CHUNK // max(x.shape[1], 1)))])


def _validate(a: Tensor, b: Tensor, *, at_least: int) -> None:
    if not (a.ndim == b.ndim == 2 and a.shape[1] == b.shape[1] and min(len(a), len(b)) >= at_least):
        raise OptionError(
            f"features of shapes {tuple(a.shape)} and {tuple(b.shape)}",
            expected=f"(n, d) and (m, d) with n, m >= {at_least}",
            cure="pass one row a sample",
        )
    if not (a.isfinite().all() and b.isfinite().all()):
        raise OptionError("features that are not finite", expected="numbers", cure="drop broken samples, and say so")
