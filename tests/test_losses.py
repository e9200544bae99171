from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from disback_plugin.errors import MismatchError
from disback_plugin.losses import denoising, diff_instruct, edm_weight
from disback_plugin.noise import add_noise
from disback_plugin.scores import Prediction, convert, target

KINDS = list(Prediction)


@st.composite
def batches(draw):
    """x, x_t, eps, alpha, sigma and two random outputs, all float64."""
    shape = [draw(st.integers(1, 5)), *draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))]
    stream = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    x, eps, real, fake = (torch.randn(shape, generator=stream, dtype=torch.float64) for _ in range(4))
    column = [shape[0], *[1] * (len(shape) - 1)]
    angle = 0.1 + 1.3 * torch.rand(column, generator=stream, dtype=torch.float64)
    alpha, sigma = angle.cos(), angle.sin()
    return x, add_noise(x, eps, alpha=alpha, sigma=sigma), eps, alpha, sigma, real, fake


def _gradient(x, real, fake, **options):
    x = x.detach().requires_grad_()
    diff_instruct(x, real, fake, **options).backward()
    return x.grad


@pytest.mark.parametrize("kind", KINDS)
@given(batch=batches(), weight=st.floats(0.1, 10))
def test_the_gradient_of_diff_instruct_is_the_score_difference_of_equation_8(kind, batch, weight):
    x, x_t, eps, alpha, sigma, real, fake = batch
    scales = {"x_t": x_t, "alpha": alpha, "sigma": sigma}
    s_theta = convert(real, kind, Prediction.SCORE, **scales)
    s_phi = convert(fake, kind, Prediction.SCORE, **scales)
    expected = weight * alpha * (s_phi - s_theta) / len(x)
    found = _gradient(x, real, fake, x_t=x_t, eps=eps, alpha=alpha, sigma=sigma, prediction=kind, weight=weight)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
@given(batch=batches())
def test_networks_that_agree_give_no_gradient_and_swapping_them_turns_it_around(kind, batch):
    x, _, _, alpha, sigma, real, fake = batch
    options = {"alpha": alpha, "sigma": sigma, "prediction": kind}
    assert not _gradient(x, real, real, **options).any()
    torch.testing.assert_close(_gradient(x, real, fake, **options), -_gradient(x, fake, real, **options))


def test_the_published_weighting_is_the_difference_of_the_x0_predictions():
    x, real, fake = (torch.randn(3, 2, dtype=torch.float64) for _ in range(3))
    alpha, sigma = torch.tensor(0.8, dtype=torch.float64), torch.tensor(0.6, dtype=torch.float64)
    found = _gradient(x, real, fake, alpha=alpha, sigma=sigma, prediction=Prediction.X0, weight=sigma**2 / alpha**2)
    torch.testing.assert_close(found, (fake - real) / 3)


def test_no_gradient_reaches_the_networks():
    x = torch.randn(2, 2, requires_grad=True)
    real, fake = torch.randn(2, 2, requires_grad=True), torch.randn(2, 2, requires_grad=True)
    diff_instruct(x, real, fake, alpha=1.0, sigma=0.5, prediction=Prediction.X0).backward()
    assert real.grad is None
    assert fake.grad is None


@pytest.mark.parametrize("kind", KINDS)
@given(batch=batches())
def test_denoising_is_zero_for_the_perfect_output_and_positive_for_any_other(kind, batch):
    x, _, eps, alpha, sigma, real, _ = batch
    scales = {"alpha": alpha, "sigma": sigma, "prediction": kind}
    perfect = target(kind, x, eps, alpha=alpha, sigma=sigma)
    assert denoising(perfect, x, eps, **scales).item() == 0
    assert denoising(perfect + 1 + real.abs(), x, eps, **scales).item() > 1


def test_the_weights_of_edm_make_all_predictions_one_loss():
    # lambda(sigma) |D - x_0|^2 = (sigma^2 + sigma_d^2) / sigma_d^2 |eps_hat - eps|^2 at alpha = 1
    x, eps = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    sigma = torch.rand(4, 1, dtype=torch.float64) + 0.1
    output, x_t = torch.randn_like(x), x + sigma * eps
    weight = edm_weight(sigma, sigma_data=0.5)
    as_x0 = denoising(output, x, eps, alpha=1.0, sigma=sigma, prediction=Prediction.X0, weight=weight)
    as_eps = convert(output, Prediction.X0, Prediction.EPS, x_t=x_t, alpha=1.0, sigma=sigma)
    eps_loss = denoising(as_eps, x, eps, alpha=1.0, sigma=sigma, prediction=Prediction.EPS, weight=weight * sigma**2)
    torch.testing.assert_close(as_x0, eps_loss)


def test_no_gradient_of_the_denoising_loss_reaches_the_generator():
    x_0 = torch.randn(2, 2, requires_grad=True)
    output = torch.randn(2, 2, requires_grad=True)
    denoising(output, x_0, torch.randn(2, 2), alpha=1.0, sigma=0.5, prediction=Prediction.X0).backward()
    assert x_0.grad is None
    assert output.grad is not None


def test_half_precision_outputs_give_a_float32_loss():
    x = torch.randn(2, 2)
    loss = denoising(x.bfloat16(), x, x, alpha=1.0, sigma=0.5, prediction=Prediction.EPS)
    assert loss.dtype == torch.float32


def test_an_empty_batch_gives_zero_not_nan():
    empty = torch.zeros(0, 3)
    assert diff_instruct(empty, empty, empty, alpha=1.0, sigma=1.0, prediction=Prediction.EPS).item() == 0


def test_shapes_that_differ_are_named():
    a, b = torch.zeros(2, 3), torch.zeros(2, 1)
    with pytest.raises(MismatchError, match=r"real \(2, 1\)"):
        diff_instruct(a, b, a, alpha=1.0, sigma=1.0, prediction=Prediction.EPS)
    with pytest.raises(MismatchError, match=r"eps \(2, 1\)"):
        denoising(a, a, b, alpha=1.0, sigma=1.0, prediction=Prediction.EPS)
