from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from disback_plugin.errors import OptionError
from disback_plugin.noise import Discrete, Karras, RectifiedFlow, add_noise, lognormal_sigma

BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
STABLE_DIFFUSION = (1 - BETAS).cumprod(0)


@given(rho=st.floats(1, 9), low=st.floats(1e-3, 1), ratio=st.floats(1.5, 1e4))
def test_karras_rises_from_sigma_min_to_sigma_max(rho, low, ratio):
    alpha, sigma = Karras(low, low * ratio, rho)(torch.linspace(0, 1, 50, dtype=torch.float64))
    assert (alpha == 1).all()
    assert (sigma.diff() > 0).all()
    torch.testing.assert_close(sigma[[0, -1]], torch.tensor([low, low * ratio], dtype=torch.float64))


def test_discrete_preserves_the_variance_at_every_step():
    alpha, sigma = Discrete(STABLE_DIFFUSION)(torch.arange(1000))
    torch.testing.assert_close(alpha**2 + sigma**2, torch.ones(1000))
    assert sigma[0].item() == pytest.approx(0.00085**0.5, rel=1e-6), "1 - alpha^2 must not cancel at t = 0"


def test_rectified_flow_goes_straight_from_data_to_noise():
    x_0, eps, t = torch.tensor([2.0]), torch.tensor([4.0]), torch.tensor([0.25])
    alpha, sigma = RectifiedFlow()(t)
    assert add_noise(x_0, eps, alpha=alpha, sigma=sigma).item() == 2.5


@pytest.mark.parametrize("alphas", [[], [0.5, 0.6], [1.0], [0.5, -0.1]], ids=str)
def test_discrete_refuses_values_outside_its_domain(alphas):
    with pytest.raises(OptionError, match="never increase"):
        Discrete(alphas)


@pytest.mark.parametrize("arguments", [(0, 80), (1, 1), (0.1, 1, -1)])
def test_karras_refuses_a_range_that_is_none(arguments):
    with pytest.raises(OptionError, match="sigma_min < sigma_max"):
        Karras(*arguments)


def test_lognormal_sigma_has_the_moments_it_is_asked_for(global_random_state):
    log_sigma = lognormal_sigma(100_000, mean=-1.2, std=1.2, generator=torch.Generator().manual_seed(0)).log()
    assert log_sigma.mean().item() == pytest.approx(-1.2, abs=0.02)
    assert log_sigma.std().item() == pytest.approx(1.2, abs=0.02)


@pytest.mark.parametrize(
    ("schedule", "t"),
    [
        (RectifiedFlow(), 500.0),
        (RectifiedFlow(), torch.tensor([0.5, 1.1])),
        (RectifiedFlow(), torch.tensor([0.5, torch.nan])),
        (Karras(), torch.tensor([-0.1])),
        (Discrete(STABLE_DIFFUSION), torch.tensor([3, -1])),
        (Discrete(STABLE_DIFFUSION), torch.tensor([1000])),
        (Discrete(STABLE_DIFFUSION), torch.tensor([0.5])),
        (Discrete(STABLE_DIFFUSION), torch.tensor([True])),
    ],
    ids=str,
)
def test_a_time_outside_the_domain_is_refused(schedule, t):
    with pytest.raises(OptionError, match=f"for {type(schedule).__name__}; expected .*; to mend it, "):
        schedule(t)


@pytest.mark.parametrize("schedule", [RectifiedFlow(), Karras()], ids=str)
def test_a_time_that_rounding_moved_past_the_end_and_an_empty_batch_are_accepted(schedule):
    schedule(torch.tensor([1.0000001, -1e-7]))
    assert [len(scale) for scale in schedule(torch.zeros(0))] == [0, 0]


@pytest.mark.parametrize(
    "schedule", [RectifiedFlow(), Karras(), Discrete(STABLE_DIFFUSION)], ids=lambda s: type(s).__name__
)
def test_a_time_on_another_device_is_not_read(schedule):
    t = torch.zeros(3, device="meta", dtype=torch.int64 if isinstance(schedule, Discrete) else torch.float32)
    assert [scale.shape for scale in schedule(t)] == [(3,), (3,)]  # a meta tensor raises when its values are read


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_schedule_of_edm_is_not_computed_in_half_precision(dtype):
    t = torch.linspace(0, 1, 9).to(dtype)
    alpha, sigma = Karras()(t)
    wanted = Karras()(t.double())[1]
    assert alpha.dtype == sigma.dtype == torch.float32
    torch.testing.assert_close(sigma.double(), wanted, rtol=1e-5, atol=0)
