from __future__ import annotations

from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from disback_plugin import losses, prediction
from disback_plugin.errors import OptionError
from disback_plugin.noise import add_noise
from disback_plugin.prediction import Prediction, coefficients, convert, target

PAIRS = list(permutations(Prediction, 2))


@st.composite
def samples(draw, limit=8.0):
    """x_0, eps, alpha, sigma in float64 with log(alpha / sigma) within the limit; VE, VP and flow scales."""
    log_snr = draw(st.floats(-limit, limit))
    shape = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    stream = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    x_0, eps = (torch.randn(shape, generator=stream, dtype=torch.float64) for _ in range(2))
    ratio = torch.tensor(log_snr, dtype=torch.float64).exp()  # alpha / sigma
    family = draw(st.sampled_from(["ve", "vp", "flow"]))
    sigma = {"ve": 1 / ratio, "vp": (1 + ratio**2) ** -0.5, "flow": 1 / (1 + ratio)}[family]
    return x_0, eps, ratio * sigma, sigma


@pytest.mark.parametrize(("source", "to"), PAIRS)
@settings(max_examples=25)
@given(world=samples())
def test_every_conversion_there_and_back_returns_the_output(source, to, world):
    x_0, eps, alpha, sigma = world
    x_t = add_noise(x_0, eps, alpha=alpha, sigma=sigma)
    output = target(source, x_0, eps, alpha=alpha, sigma=sigma)
    there = convert(output, source, to, x_t=x_t, alpha=alpha, sigma=sigma)
    back = convert(there, to, source, x_t=x_t, alpha=alpha, sigma=sigma)
    torch.testing.assert_close(back, output, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("source", "to"), PAIRS)
@settings(max_examples=25)
@given(world=samples(limit=4.0))
def test_a_perfect_output_converts_to_the_perfect_output_of_the_other_kind(source, to, world):
    x_0, eps, alpha, sigma = world
    x_t = add_noise(x_0, eps, alpha=alpha, sigma=sigma)
    converted = convert(
        target(source, x_0, eps, alpha=alpha, sigma=sigma), source, to, x_t=x_t, alpha=alpha, sigma=sigma
    )
    torch.testing.assert_close(converted, target(to, x_0, eps, alpha=alpha, sigma=sigma), rtol=1e-9, atol=1e-9)


@given(world=samples(limit=4.0), via=st.permutations(list(Prediction)))
def test_a_detour_over_a_third_kind_changes_nothing(world, via):
    x_0, eps, alpha, sigma = world
    scales = {"x_t": add_noise(x_0, eps, alpha=alpha, sigma=sigma), "alpha": alpha, "sigma": sigma}
    a, b, c = via[:3]
    output = torch.randn(x_0.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    detour = convert(convert(output, a, b, **scales), b, c, **scales)
    torch.testing.assert_close(detour, convert(output, a, c, **scales), rtol=1e-9, atol=1e-9)


@given(world=samples(limit=4.0))
def test_the_score_is_the_gradient_of_the_log_density(world):
    x_0, eps, alpha, sigma = world
    x_t = add_noise(x_0, eps, alpha=alpha, sigma=sigma).requires_grad_()
    torch.distributions.Normal(alpha * x_0, sigma).log_prob(x_t).sum().backward()
    score = target(Prediction.SCORE, x_0, eps, alpha=alpha, sigma=sigma)
    torch.testing.assert_close(score, x_t.grad, rtol=1e-8, atol=1e-8)


def test_half_precision_is_converted_in_float32():
    x_t, output = torch.randn(2, 3).bfloat16(), torch.randn(2, 3).bfloat16()
    half = convert(output, Prediction.EPS, Prediction.X0, x_t=x_t, alpha=0.1, sigma=0.99)
    exact = (x_t.double() - 0.99 * output.double()) / 0.1
    assert half.dtype == torch.float32
    torch.testing.assert_close(half.double(), exact, rtol=1e-5, atol=1e-5)


def test_diffusers_means_the_same_by_v_prediction():
    from diffusers import DDPMScheduler

    scheduler, t = DDPMScheduler(prediction_type="v_prediction"), torch.tensor([10, 700])
    x_0, eps = torch.randn(2, 3), torch.randn(2, 3)
    alpha = scheduler.alphas_cumprod[t].sqrt()[:, None]
    v = target(Prediction.V, x_0, eps, alpha=alpha, sigma=(1 - alpha**2).sqrt())
    torch.testing.assert_close(v, scheduler.get_velocity(x_0, eps, t))


def test_the_same_kind_is_returned_untouched():
    output = torch.randn(2, 2).half()
    assert convert(output, Prediction.V, Prediction.V, x_t=output, alpha=0.0, sigma=0.0) is output


def test_the_difference_of_two_outputs_does_not_see_x_t():
    # Why a score difference needs no conversion: c_x belongs to x_t alone.
    alpha, sigma = torch.tensor(0.6, dtype=torch.float64), torch.tensor(0.8, dtype=torch.float64)
    x_t, a, b = (torch.randn(4, dtype=torch.float64) for _ in range(3))
    for kind in Prediction:
        _, c_o = coefficients(kind, Prediction.SCORE, alpha=alpha, sigma=sigma)
        scores = [convert(o, kind, Prediction.SCORE, x_t=x_t, alpha=alpha, sigma=sigma) for o in (a, b)]
        torch.testing.assert_close(scores[0] - scores[1], c_o * (a - b))


@pytest.mark.parametrize(("source", "to"), [*PAIRS, *((kind, kind) for kind in Prediction)])
@settings(max_examples=25)
@given(world=samples())
def test_the_ratio_is_the_second_coefficient_alone(source, to, world):
    _, _, alpha, sigma = world
    _, c_o = coefficients(source, to, alpha=alpha, sigma=sigma)
    found = prediction.ratio(source.value, to.value, alpha=alpha, sigma=sigma)  # the kinds' names do as well
    torch.testing.assert_close(torch.as_tensor(found, dtype=torch.float64), c_o, rtol=1e-9, atol=0)
    assert found == 1.0 or source is not to


def test_an_unknown_kind_is_refused_with_the_known_ones():
    x = torch.zeros(2, 3)
    with pytest.raises(OptionError, match="prediction='x_0'; expected one of eps, x0, v, flow, score"):
        convert(x, "x_0", Prediction.EPS, x_t=x, alpha=1.0, sigma=1.0)
    for name in ("diff_instruct", "vsd", "dmd", "sid", "denoising"):
        eps = {"eps": x} if name in ("dmd", "sid") else {}
        with pytest.raises(OptionError, match="prediction='x_0'"):
            getattr(losses, name)(x, x, x, **eps, alpha=1.0, sigma=1.0, prediction="x_0")
