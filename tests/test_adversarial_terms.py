"""The terms of a discriminator, against computations of their own, and the weight of f-distill against its authors'."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from disback_plugin import losses, noise
from disback_plugin.errors import OptionError
from disback_plugin.prediction import Prediction

LOGITS = st.lists(st.floats(-8, 8), min_size=2, max_size=6)


def _log_sigmoid(value):
    return -math.log1p(math.exp(-value))


@given(pairs=st.lists(st.tuples(st.floats(-8, 8), st.floats(-8, 8)), min_size=1, max_size=6))
def test_each_term_is_the_mean_of_its_formula(pairs):
    real, fake = (torch.tensor(each, dtype=torch.float64) for each in zip(*pairs, strict=True))
    n = len(pairs)
    expected = {
        "generator": -sum(_log_sigmoid(f) for _, f in pairs) / n,
        "discriminator": -sum(_log_sigmoid(r) + _log_sigmoid(-f) for r, f in pairs) / n,
        "relativistic, generator": -sum(_log_sigmoid(f - r) for r, f in pairs) / n,
        "relativistic, discriminator": -sum(_log_sigmoid(r - f) for r, f in pairs) / n,
        "hinge": sum(max(0.0, 1 - r) + max(0.0, 1 + f) for r, f in pairs) / n,
        "approximate R1": sum((r - f) ** 2 for r, f in pairs) / n / 0.01**2,
    }
    found = {
        "generator": losses.gan_generator(fake),
        "discriminator": losses.gan_discriminator(real, fake),
        "relativistic, generator": losses.gan_relativistic(fake, real),
        "relativistic, discriminator": losses.gan_relativistic(real, fake),
        "hinge": losses.gan_hinge(real, fake),
        "approximate R1": losses.approximate_r1(real, fake, sigma=0.01),
    }
    assert {name: value.item() for name, value in found.items()} == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_the_approximate_penalty_estimates_the_squared_gradient_that_r1_is():
    stream = torch.Generator().manual_seed(0)
    x = torch.randn(20_000, 3, generator=stream, dtype=torch.float64).requires_grad_()
    logits = x.sin().sum(1)
    (by_x,) = torch.autograd.grad(logits.sum(), x)
    perturbed = (x + 0.01 * torch.randn(x.shape, generator=stream, dtype=torch.float64)).sin().sum(1)
    r1 = by_x.square().sum(1).mean()
    assert losses.approximate_r1(logits, perturbed, sigma=0.01).item() == pytest.approx(r1.item(), rel=0.03)


def fastgen_weight(logits, divergence, low, high, bins):
    """The weight of FastGen (34f30e8, methods/distribution_matching/f_distill.py:65-117) without an average over time,
    sample by sample."""
    ratios = [min(max(math.exp(min(max(sum(row) / len(row), -10), 10)), low), high) for row in logits]
    if bins is not None:
        of_bin = {b: [r for r, own in zip(ratios, bins, strict=True) if own == b] for b in bins}
        ratios = [r / (sum(of_bin[b]) / (len(of_bin[b]) + 1e-6) + 1e-6) for r, b in zip(ratios, bins, strict=True)]
    h = [
        {
            "rkl": 1.0,
            "kl": r,
            "js": 1 - 1 / (1 + r),
            "sf": 1 / (1 + r),
            "neyman": 1 / max(r, 1e-8),
            "sh": r**0.5,
            "jf": 1 + r,
        }[divergence]
        for r in ratios
    ]
    return [each / (sum(h) / len(h) + 1e-6) for each in h]


@pytest.mark.parametrize("divergence", ["rkl", "kl", "js", "sf", "neyman", "sh", "jf"])
@given(
    rows=st.lists(st.tuples(*[st.floats(-15, 15)] * 3, st.integers(0, 2)), min_size=1, max_size=8), binned=st.booleans()
)
def test_the_weight_of_f_distill_is_fastgens_in_every_divergence(divergence, rows, binned):
    logits, bins = [row[:3] for row in rows], [row[3] for row in rows] if binned else None
    given_bins = torch.tensor(bins) if binned else None
    found = losses.f_divergence_weight(torch.tensor(logits, dtype=torch.float64), divergence, bins=given_bins)
    assert found.tolist() == pytest.approx(fastgen_weight(logits, divergence, 0.1, 20.0, bins), rel=2e-6)


def test_dmd_takes_the_weight_and_reverse_kl_is_dmd_itself():
    x, real, fake, eps, logits = (torch.randn(4, 3, 2) for _ in range(5))
    options = {"eps": eps, "alpha": 0.6, "sigma": 0.8, "prediction": Prediction.EPS}
    gradients = []
    for weight in (1.0, *(losses.f_divergence_weight(logits, name) for name in ("rkl", "js"))):
        leaf = x.clone().requires_grad_()
        weight = weight if isinstance(weight, float) else noise.expand(weight, like=x)
        losses.dmd(leaf, real, fake, weight=weight, **options).backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-5, atol=0)
    assert not torch.allclose(gradients[0], gradients[2])


def test_an_unknown_divergence_is_refused_by_name():
    with pytest.raises(OptionError, match="divergence='tv'"):
        losses.f_divergence_weight(torch.zeros(2), "tv")
