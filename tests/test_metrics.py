from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from disback_plugin.errors import OptionError
from disback_plugin.metrics import coverage, frechet_distance, mode_coverage, sliced_wasserstein


def _features(seed, rows, columns):
    stream = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=stream, dtype=torch.float64)
    return torch.randn(rows, columns, generator=stream, dtype=torch.float64) @ mixing


@given(seed=st.integers(0, 2**31), columns=st.integers(1, 8))
def test_it_is_symmetric_zero_on_itself_and_blind_to_rotation(seed, columns):
    a, b = _features(seed, 50, columns), _features(seed + 1, 60, columns)
    rotation = torch.linalg.qr(_features(seed + 2, columns, columns))[0]
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-6)
    assert frechet_distance(a @ rotation, b @ rotation) == pytest.approx(frechet_distance(a, b), rel=1e-6)


def test_it_equals_its_closed_form_on_diagonal_gaussians():
    def exact(mean, std):
        # Four points with this very mean and covariance diag(std^2).
        corners = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]], dtype=torch.float64)
        return torch.tensor(mean) + corners * torch.tensor(std, dtype=torch.float64) * (3 / 4) ** 0.5

    found = frechet_distance(exact([0.0, 1.0], [1.0, 2.0]), exact([3.0, 1.0], [0.5, 5.0]))
    assert found == pytest.approx(9 + 0.5**2 + 3**2, rel=1e-6)


def _with_moments(seed, mean, covariance):
    """Samples with this very mean and covariance."""
    d = len(mean)
    points = torch.linalg.qr(_centred(_features(seed, 4 * d + 4, d)))[0]
    return mean + (len(points) - 1) ** 0.5 * points @ torch.linalg.cholesky(covariance).T


def _centred(x):
    return x - x.mean(0)


@given(seed=st.integers(0, 2**31), d=st.integers(1, 8))
def test_it_equals_its_closed_form_on_any_gaussians(seed, d):
    from scipy import linalg

    means = _features(seed, 2, d)
    covariances = [torch.cov(_features(seed + i, 3 * d + 2, d).T).reshape(d, d) for i in (1, 2)]
    root = torch.tensor(linalg.sqrtm((covariances[0] @ covariances[1]).numpy()).real)
    exact = (means[0] - means[1]).square().sum() + sum(covariances).trace() - 2 * root.trace()
    a, b = (_with_moments(seed, *moments) for moments in zip(means, covariances, strict=True))
    assert frechet_distance(a, b) == pytest.approx(float(exact), rel=1e-6, abs=1e-6)


def test_fewer_samples_than_features_cost_no_digits():
    a, b = _features(0, 20, 300), _features(1, 30, 300)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-8)
    wider = torch.nn.functional.pad(a, (0, 50)), torch.nn.functional.pad(b, (0, 50))
    assert frechet_distance(*wider) == pytest.approx(frechet_distance(a, b), rel=1e-12)


@pytest.mark.parametrize("shapes", [((5, 2), (5, 3)), ((1, 2), (5, 2)), ((5,), (5,))], ids=str)
def test_shapes_that_do_not_fit_are_named(shapes):
    with pytest.raises(OptionError, match="features of shapes"):
        frechet_distance(torch.zeros(shapes[0]), torch.zeros(shapes[1]))


def test_broken_features_are_refused():
    with pytest.raises(OptionError, match="not finite"):
        frechet_distance(torch.tensor([[0.0], [float("nan")]]), torch.zeros(2, 1))


# -- the sliced Wasserstein distance ----------------------------------------------------------------------------------


@given(seed=st.integers(0, 2**31), rows=st.integers(1, 40), columns=st.integers(1, 6))
def test_sliced_wasserstein_is_symmetric_zero_on_itself_and_scales_with_the_samples(seed, rows, columns):
    a, b = _features(seed, rows, columns), _features(seed + 1, 17, columns)
    apart = sliced_wasserstein(a, b)
    assert sliced_wasserstein(b, a) == pytest.approx(apart, rel=1e-9)
    assert sliced_wasserstein(a, a.flip(0)) == pytest.approx(0, abs=1e-12)
    assert sliced_wasserstein(3 * a, 3 * b) == pytest.approx(3 * apart, rel=1e-9)
    assert sliced_wasserstein(a.repeat(2, 1), b) == pytest.approx(apart, rel=1e-9), "each sample twice: the same set"


def test_sliced_wasserstein_of_a_shift_is_its_length_over_the_root_of_the_dimensions():
    a = _features(0, 50, 4)
    shift = torch.tensor([3.0, 0.0, 0.0, 4.0], dtype=torch.float64)
    assert sliced_wasserstein(a, a + shift, projections=20_000) == pytest.approx(5 / 4**0.5, rel=0.01)


def test_in_one_dimension_it_is_the_best_assignment_of_equal_shares():
    a, b = _features(0, 30, 1), _features(1, 12, 1)
    shares_a, shares_b = a.repeat_interleave(2, 0).sort(0).values, b.repeat_interleave(5, 0).sort(0).values
    exact = float((shares_a - shares_b).square().mean().sqrt())
    assert sliced_wasserstein(a, b) == pytest.approx(exact, rel=1e-9)


def test_its_directions_are_private_and_the_same_each_time(global_random_state):
    a, b = _features(0, 20, 3), _features(1, 20, 3)
    fixed = sliced_wasserstein(a, b)
    assert sliced_wasserstein(a, b) == fixed
    assert sliced_wasserstein(a, b, generator=torch.Generator().manual_seed(5)) != fixed


# -- coverage ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("k", "share"), [(1, 1.0), (5, 1.0), (5, 0.3), (3, 3.0)])
def test_coverage_has_the_value_that_its_authors_derive_for_one_distribution(k, share):
    # arXiv 2002.09797, its expectation: 1 - (n - 1) ... (n - k) / ((m + n - 1) ... (m + n - k)).
    n = 3_000
    m = int(share * n)
    stream = torch.Generator().manual_seed(0)
    references, samples = torch.randn(n, 3, generator=stream), torch.randn(m, 3, generator=stream)
    missed = 1.0
    for i in range(1, k + 1):
        missed *= (n - i) / (m + n - i)
    assert coverage(samples, references, k=k) == pytest.approx(1 - missed, abs=0.03)


@given(seed=st.integers(0, 2**31), k=st.integers(1, 5))
def test_coverage_is_whole_for_the_references_themselves_and_ignores_outliers_and_order(seed, k):
    references, samples = _features(seed, 30, 3), _features(seed + 1, 25, 3)
    assert coverage(references.flip(0), references, k=k) == 1
    found = coverage(samples, references, k=k)
    assert coverage(torch.cat([samples, torch.full((5, 3), 1e6)]), references, k=k) == found
    assert coverage(samples[::2], references, k=k) <= found


def test_half_of_the_modes_is_half_of_the_coverage(monkeypatch):
    stream = torch.Generator().manual_seed(0)
    where = torch.tensor([[0.0, 0.0], [100.0, 0.0]])
    references = torch.randn(400, 2, generator=stream) + where.repeat(200, 1)
    samples = torch.randn(5_000, 2, generator=stream)
    whole = coverage(samples, references)
    assert whole == pytest.approx(0.5, abs=0.01)
    monkeypatch.setattr("disback_plugin.metrics._CHUNK", 10_000)
    assert coverage(samples, references) == whole


RING = torch.tensor([[math.cos(i * math.pi / 4), math.sin(i * math.pi / 4)] for i in range(8)])


def test_samples_of_a_mixture_hit_all_its_modes_as_its_weights_say():
    stream = torch.Generator().manual_seed(0)
    weights = torch.tensor([1.0, 1, 1, 1, 2, 2, 4, 4])
    mode = torch.multinomial(weights, 8_000, replacement=True, generator=stream)
    samples = RING[mode] + 0.05 * torch.randn(8_000, 2, generator=stream)
    found = mode_coverage(samples, RING, radius=0.15, weights=weights)
    assert found.modes == 1
    assert found.near == pytest.approx(1 - math.exp(-4.5), abs=0.005)  # of two dimensions, within three deviations
    assert found.distance < 0.03
    assert mode_coverage(samples, RING, radius=0.15).distance == pytest.approx(0.25, abs=0.03)


def test_a_collapsed_student_is_seen():
    samples = RING[:1].repeat(10, 1)
    assert mode_coverage(samples, RING, radius=0.15) == (1 / 8, 1.0, 7 / 8)
    assert mode_coverage(samples + 9, RING, radius=0.15) == (0.0, 0.0, 1.0)
    assert mode_coverage(samples + 0.2, RING, radius=torch.tensor([1.0, *[0.1] * 7])) == (1 / 8, 1.0, 7 / 8)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda a: sliced_wasserstein(a, a, projections=0),
        lambda a: sliced_wasserstein(a, a[:, :1]),
        lambda a: sliced_wasserstein(a[:, 0], a[:, 0]),
        lambda a: sliced_wasserstein(a, a[:0]),
        lambda a: coverage(a, a, k=0),
        lambda a: coverage(a, a, k=4),
        lambda a: coverage(a / 0, a, k=2),
        lambda a: mode_coverage(a, a, radius=0.0),
        lambda a: mode_coverage(a, a, radius=torch.ones(3)),
        lambda a: mode_coverage(a, a, radius=1.0, weights=torch.zeros(4)),
        lambda a: mode_coverage(a, a, radius=1.0, weights=torch.ones(3)),
    ],
)
def test_arguments_that_do_not_fit_are_refused(wrong):
    with pytest.raises(OptionError):
        wrong(torch.ones(4, 2))


def test_samples_far_from_the_origin_find_their_modes():
    modes = 1e6 + torch.rand(40, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = mode_coverage(modes + 1e-4, modes, radius=1e-3)
    assert (found.modes, found.near) == (1.0, 1.0)
