"""The stable target field and the mismatch degree, on distributions whose score is known."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from disback_plugin.errors import OptionError
from disback_plugin.metrics import mismatch_degree, stable_target_field
from disback_plugin.prediction import Prediction, convert

MEAN, STD = 0.3, 0.7


def gaussian(seed, rows, d, mean=MEAN, std=STD):
    return mean + std * torch.randn(rows, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gaussian_score(x_t, sigma, alpha=1.0, mean=MEAN, std=STD):
    return (alpha * mean - x_t) / (alpha**2 * std**2 + sigma**2)


def quantiles(count, mean=MEAN, std=STD):
    """A normal distribution as evenly as `count` points can have it, shape (count, 1)."""
    levels = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    return torch.distributions.Normal(*torch.tensor([mean, std], dtype=torch.float64)).icdf(levels)[:, None]


def log_density(x_t, references, sigma, alpha):
    """log p_t of the noised references, up to a constant: written anew, for autograd to derive the score from."""
    distance = (x_t[:, None] - alpha * references[None]).flatten(2).square().sum(2)
    return torch.logsumexp(-distance / (2 * sigma**2), dim=1)


def relative(found, exact):
    return float((found - exact).norm() / exact.norm())


# -- the stable target field ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sigma", [0.5, 1.0, 5.0])
@pytest.mark.parametrize(("d", "count"), [(1, 4_096), (2, 16_384)])
def test_it_is_the_analytic_score_of_a_gaussian_to_6_per_cent(d, count, sigma):
    # In two dimensions 4,096 references are 4.6 to 7.5 % off at sigma = 0.5, from seed to seed.
    x_t = gaussian(1, 512, d) + sigma * gaussian(2, 512, d, 0.0, 1.0)
    found = stable_target_field(x_t, gaussian(3, count, d), sigma)
    assert relative(found, gaussian_score(x_t, sigma)) < 0.06


@settings(max_examples=30)
@given(seed=st.integers(0, 2**31), d=st.integers(1, 2), sigma=st.floats(0.5, 20), alpha=st.floats(0.3, 1))
def test_it_nears_the_analytic_score_whatever_the_scales(seed, d, sigma, alpha):
    x_t = alpha * gaussian(seed, 64, d) + sigma * gaussian(seed + 1, 64, d, 0.0, 1.0)
    found = stable_target_field(x_t, gaussian(seed + 2, 65_536, d), sigma, alpha)
    assert relative(found, gaussian_score(x_t, sigma, alpha)) < 0.06


@given(
    seed=st.integers(0, 2**31),
    shape=st.sampled_from([(1,), (3,), (2, 3, 3)]),
    count=st.integers(1, 40),
    sigma=st.floats(0.05, 50),
    alpha=st.floats(0, 1),
)
def test_it_is_the_gradient_of_the_log_density_of_the_noised_references(seed, shape, count, sigma, alpha):
    stream = torch.Generator().manual_seed(seed)
    x_t, references = (torch.randn(n, *shape, generator=stream, dtype=torch.float64) for n in (5, count))
    x_t.requires_grad_(True)
    (score,) = torch.autograd.grad(log_density(x_t, references, sigma, alpha).sum(), x_t)
    found = stable_target_field(x_t, references, sigma, alpha)
    torch.testing.assert_close(found, score, rtol=1e-8, atol=1e-9 / sigma**2)
    assert not found.requires_grad


@given(seed=st.integers(0, 2**31), log_sigma=st.floats(-15, 3))
def test_the_weights_sum_to_one_do_not_depend_on_the_order_and_are_finite_for_small_sigma(seed, log_sigma):
    stream = torch.Generator().manual_seed(seed)
    x_t, references = (torch.randn(n, 2, generator=stream, dtype=torch.float64) for n in (6, 50))
    sigma = 10**log_sigma
    mean = _posterior_mean(x_t, references, sigma)
    assert mean.isfinite().all()
    # They sum to one: references that all move by c move their weighted mean by c, under the x_t that moves along.
    torch.testing.assert_close(_posterior_mean(x_t + 1, references + 1, sigma), mean + 1, rtol=1e-4, atol=1e-4)
    shuffled = references[torch.randperm(50, generator=stream)]
    torch.testing.assert_close(_posterior_mean(x_t, shuffled, sigma), mean, rtol=1e-9, atol=1e-9)
    assert (mean >= references.amin(0) - 1e-6).all()
    assert (mean <= references.amax(0) + 1e-6).all()


def _posterior_mean(x_t, references, sigma):
    # sigma^2 s + x_t loses the mean's digits where sigma is large only; where it is small the score is huge.
    score = stable_target_field(x_t, references, sigma)
    return convert(score, Prediction.SCORE, Prediction.X0, x_t=x_t, alpha=1.0, sigma=torch.tensor(sigma).double())


def test_in_the_limit_of_small_noise_it_points_at_the_nearest_reference():
    references = torch.tensor([[0.0], [1.0]])
    found = stable_target_field(torch.tensor([[0.4], [0.7]]), references, 1e-6)
    assert found.flatten().tolist() == pytest.approx([-0.4e12, 0.3e12])


@pytest.mark.parametrize(("d", "sigma"), [(1, 1e-8), (2, 1e-5), (64, 0.1), (768, 0.5)])
def test_with_the_source_it_goes_to_the_denoising_target(d, sigma):
    x_0, references, eps = gaussian(0, 32, d), gaussian(1, 4096, d), gaussian(2, 32, d, 0.0, 1.0)
    x_t, target = 0.9 * x_0 + sigma * eps, -eps / sigma
    assert relative(stable_target_field(x_t, references, sigma, 0.9, source=x_0), target) < 1e-3
    assert relative(stable_target_field(x_t, references, sigma, 0.9), target) > 0.1


def test_the_source_counts_like_one_more_reference_of_its_own_row():
    x_t, references, source = gaussian(0, 3, 2), gaussian(1, 20, 2), gaussian(2, 3, 2)
    found = stable_target_field(x_t, references, 0.8, source=source)
    for row in range(3):
        both = torch.cat([references, source[row : row + 1]])
        torch.testing.assert_close(found[row : row + 1], stable_target_field(x_t[row : row + 1], both, 0.8))


def test_each_sample_may_have_its_own_scales():
    x_t, references = gaussian(0, 3, 4).reshape(3, 1, 2, 2), gaussian(1, 20, 4).reshape(20, 1, 2, 2)
    sigma, alpha = torch.tensor([0.1, 1.0, 7.0]), torch.tensor([1.0, 0.5, 0.2])
    alone = [stable_target_field(x_t[i : i + 1], references, sigma[i], alpha[i]) for i in range(3)]
    for shape in ((3,), (3, 1, 1, 1)):
        found = stable_target_field(x_t, references, sigma.reshape(shape), alpha.reshape(shape))
        torch.testing.assert_close(found, torch.cat(alone))


def test_pieces_of_rows_and_references_add_up(monkeypatch):
    x_t, references, source = gaussian(0, 9, 4), gaussian(1, 50, 4), gaussian(2, 9, 4)
    whole = stable_target_field(x_t, references, 0.3, source=source)
    for size in (1, 64, 640):
        monkeypatch.setattr("disback_plugin._target_field._CHUNK_BYTES", size)
        torch.testing.assert_close(stable_target_field(x_t, references, 0.3, source=source), whole)


PEAK = """
import resource, sys, torch
from disback_plugin.metrics import stable_target_field
torch.set_num_threads(1)
windows = torch.randn(12_288 + 50_000, generator=torch.Generator().manual_seed(0))  # 50,000 images that overlap
references = windows.as_strided((50_000, 3, 64, 64), (1, 4_096, 64, 1))
x_t = references[:8].contiguous()
stable_target_field(x_t, references[:10], 1.0)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
score = stable_target_field(x_t, references, 1.0)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024, float(score.abs().max()))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in other units elsewhere")
def test_50000_images_take_100_megabytes_beside_themselves():
    run = subprocess.run([sys.executable, "-c", PEAK], check=True, capture_output=True, text=True)
    megabytes, largest = map(float, run.stdout.split())
    assert megabytes < 100
    assert largest < 1e-6, "each is its own nearest reference, and in 12,288 dimensions no other counts"


@pytest.mark.parametrize(
    "wrong",
    [
        {"references": torch.zeros(4, 3)},
        {"references": torch.zeros(0, 2)},
        {"references": torch.zeros(4, 2, dtype=torch.uint8)},
        {"source": torch.zeros(1, 2)},
        {"sigma": 0.0},
        {"sigma": torch.ones(2)},
        {"sigma": torch.ones(1, 3)},
        {"alpha": -1.0},
        {"references": torch.full((4, 2), math.nan)},
        {"x_t": torch.full((3, 2), math.inf)},
        {"sigma": 1e-30},
    ],
    ids=str,
)
def test_arguments_that_do_not_fit_are_named(wrong):
    arguments = {"x_t": torch.ones(3, 2), "references": torch.zeros(4, 2), "sigma": 1.0, **wrong}
    with pytest.raises(OptionError):
        stable_target_field(**arguments)


# -- the mismatch degree ----------------------------------------------------------------------------------------------

SIGMAS = [0.5, 1.0, 4.0]


def test_it_is_zero_for_the_true_score_of_the_references():
    # The noised references are a distribution whose score is known exactly.
    references = gaussian(0, 50, 2)

    def score(x_t, sigma):
        with torch.enable_grad():
            x_t = x_t.clone().requires_grad_(True)
            return torch.autograd.grad(log_density(x_t, references, sigma[0, 0], 0.8).sum(), x_t)[0]

    found = mismatch_degree(score, gaussian(1, 64, 2), references, [0.05, *SIGMAS], False, alphas=0.8)
    assert found["per_sigma"] == pytest.approx([0.0] * 4, abs=1e-9)
    assert mismatch_degree(score, gaussian(1, 64, 2), references + 0.1, SIGMAS, False, alphas=0.8)["total"] > 0.01


def test_for_the_true_score_of_a_gaussian_it_is_small_and_vanishes_with_more_references():
    true = [
        mismatch_degree(gaussian_score, gaussian(0, 512, 2), gaussian(1, count, 2), [1.0], False)["total"]
        for count in (256, 4_096, 65_536)
    ]
    assert true[0] > 2 * true[1] > 4 * true[2]
    assert true[2] < 0.005


@pytest.mark.parametrize("include_source", [True, False])
def test_for_two_gaussians_that_differ_in_the_mean_it_equals_its_closed_form(include_source):
    # The scores differ by (mu' - mu) / (std^2 + sigma^2) everywhere.
    def score(x_t, sigma):
        return gaussian_score(x_t, sigma, mean=MEAN + 2.0)

    found = mismatch_degree(score, quantiles(256), quantiles(4096), SIGMAS, include_source)
    assert found["per_sigma"] == pytest.approx([2.0 / (STD**2 + sigma**2) for sigma in SIGMAS], rel=2e-3)
    assert found["total"] == pytest.approx(sum(found["per_sigma"]) / 3)


def test_for_two_gaussians_that_differ_in_the_width_too_it_equals_its_closed_form():
    mean, std, sigma = -0.5, 1.3, 0.9

    def score(x_t, sigma):
        return gaussian_score(x_t, sigma, mean=mean, std=std)

    found = mismatch_degree(score, quantiles(2048), quantiles(4096), [sigma])["total"]
    # a x_t + b with x_t ~ N(MEAN, STD^2 + sigma^2) is normal, and its |.| has the mean of a folded one.
    a = 1 / (STD**2 + sigma**2) - 1 / (std**2 + sigma**2)
    centre = a * MEAN - MEAN / (STD**2 + sigma**2) + mean / (std**2 + sigma**2)
    spread = abs(a) * (STD**2 + sigma**2) ** 0.5
    folded = spread * math.sqrt(2 / math.pi) * math.exp(-(centre**2) / (2 * spread**2)) + centre * math.erf(
        centre / (spread * math.sqrt(2))
    )
    assert found == pytest.approx(folded, rel=0.01)


@given(seed=st.integers(0, 2**31), d=st.integers(1, 2), sigma=st.floats(0.5, 10), gap=st.floats(0.5, 5))
def test_it_is_never_negative_and_grows_with_the_distance_of_the_means(seed, d, sigma, gap):
    samples, references = gaussian(seed, 32, d), gaussian(seed + 1, 2048, d)
    degrees = [
        mismatch_degree(lambda *at, far=far: gaussian_score(*at, mean=MEAN + far), samples, references, [sigma])
        for far in (0, gap, 2 * gap)
    ]
    totals = [degree["total"] for degree in degrees]
    assert 0 <= totals[0] < totals[1] < totals[2]
    assert totals == [degree["per_sigma"][0] for degree in degrees]


@pytest.mark.parametrize("kind", Prediction)
def test_networks_of_every_kind_are_converted(kind):
    alphas = torch.tensor([0.9, 0.6, 0.3])

    def output(x_t, sigma):
        alpha = alphas[SIGMAS.index(sigma.flatten()[0].item())].double()
        score = gaussian_score(x_t, sigma, alpha, mean=1.0)
        return convert(score, Prediction.SCORE, kind, x_t=x_t, alpha=alpha, sigma=sigma)

    found = mismatch_degree(output, quantiles(128), quantiles(4096), SIGMAS, prediction=kind, alphas=alphas)
    pairs = zip(alphas.tolist(), SIGMAS, strict=True)
    exact = [alpha * (1.0 - MEAN) / (alpha**2 * STD**2 + sigma**2) for alpha, sigma in pairs]
    assert found["per_sigma"] == pytest.approx(exact, rel=2e-3)


def test_weights_change_the_total_only():
    arguments = (lambda x_t, sigma: 0 * x_t, gaussian(0, 16, 2), gaussian(1, 64, 2), SIGMAS)
    plain, weighted = mismatch_degree(*arguments), mismatch_degree(*arguments, weights=SIGMAS)
    assert weighted["per_sigma"] == plain["per_sigma"]
    exact = sum(s * d for s, d in zip(SIGMAS, plain["per_sigma"], strict=True)) / 3
    assert weighted["total"] == pytest.approx(exact)


def test_two_calls_see_the_same_noise_and_none_of_it_is_the_global_generators(global_random_state):
    arguments = (lambda x_t, sigma: 0 * x_t, gaussian(0, 16, 2), gaussian(1, 64, 2), SIGMAS)
    first = mismatch_degree(*arguments)
    assert mismatch_degree(*arguments) == first
    other = mismatch_degree(*arguments, generator=torch.Generator().manual_seed(1))
    assert other["total"] not in (0, first["total"])


@pytest.mark.parametrize("batch_size", [1, 7, 100])
def test_the_mismatch_does_not_depend_on_the_batch_size(batch_size):
    arguments = (lambda x_t, sigma: -x_t / (1 + sigma**2), gaussian(1, 16, 2), gaussian(0, 64, 2), SIGMAS)
    whole, parts = mismatch_degree(*arguments), mismatch_degree(*arguments, batch_size=batch_size)
    assert parts["per_sigma"] == pytest.approx(whole["per_sigma"], rel=1e-6)


def test_a_network_sees_its_batches_in_its_own_dtype_and_without_a_graph():
    net, seen = torch.nn.Conv2d(1, 1, 1), []

    def score(x_t, sigma):
        seen.append((tuple(x_t.shape), tuple(sigma.shape), x_t.dtype, sigma.dtype, torch.is_grad_enabled()))
        return net(x_t) / sigma

    samples = torch.rand(5, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    mismatch_degree(score, samples, samples.flip(0), [1.0], batch_size=3)
    float32 = (torch.float32, torch.float32, False)
    assert seen == [((3, 1, 2, 2), (3, 1, 1, 1), *float32), ((2, 1, 2, 2), (2, 1, 1, 1), *float32)]


@pytest.mark.parametrize(
    "wrong",
    [
        {"sigmas": []},
        {"sigmas": [0.0]},
        {"alphas": [1.0]},
        {"alphas": 0.0},
        {"weights": [1.0, -1.0, 1.0]},
        {"weights": [1.0, 1.0]},
        {"batch_size": 0},
        {"samples": torch.zeros(0, 2)},
        {"references": torch.zeros(4, 3)},
        {"score_fn": lambda x_t, sigma: x_t[:, :1]},
        {"score_fn": lambda x_t, sigma: x_t / 0},
    ],
    ids=lambda wrong: ", ".join(wrong),
)
def test_arguments_of_the_mismatch_that_do_not_fit_are_named(wrong):
    arguments = {"samples": torch.ones(3, 2), "references": torch.zeros(4, 2), "sigmas": SIGMAS}
    if "alphas" in wrong and isinstance(wrong["alphas"], list):
        wrong = {"alphas": [1.0, 1.0]}
    with pytest.raises(OptionError):
        mismatch_degree(**{"score_fn": lambda x_t, sigma: x_t, **arguments, **wrong})
