"""The loss of s_phi, its weights, and what trainers add to it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from references import batches

from disback_plugin.losses import (
    denoising,
    dmd_regression,
    edm_weight,
    gan_discriminator,
    gan_generator,
    snr_weight,
)
from disback_plugin.prediction import Prediction, convert, target

KINDS = list(Prediction)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25)
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


@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_means_the_same_loss_in_every_prediction(kind):
    x, eps = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    sigma = torch.rand(4, 1, dtype=torch.float64) + 0.2
    alpha = (1 - sigma**2 / 4).sqrt()
    x_t, d = alpha * x + sigma * eps, torch.randn_like(x)
    output = convert(d, Prediction.X0, kind, x_t=x_t, alpha=alpha, sigma=sigma)
    for weight, in_x0 in (
        (edm_weight(sigma, sigma_data=0.5, alpha=alpha, prediction=kind), edm_weight(sigma, sigma_data=0.5)),
        (snr_weight(sigma, alpha=alpha, clip=5.0, prediction=kind), snr_weight(sigma, alpha=alpha, clip=5.0)),
    ):
        found = denoising(output, x, eps, alpha=alpha, sigma=sigma, prediction=kind, weight=weight)
        torch.testing.assert_close(found, (in_x0 * (d - x) ** 2).mean())


def test_the_gradient_of_denoising_is_that_of_its_value():
    output = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    x, eps = torch.randn(3, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    weight = torch.rand(3, 1, dtype=torch.float64)

    def value(o):
        return denoising(o, x, eps, alpha=0.6, sigma=0.8, prediction=Prediction.V, weight=weight)

    assert torch.autograd.gradcheck(value, output)


def test_a_learned_weight_gets_its_gradient():
    output, x, eps = (torch.randn(3, 4, dtype=torch.float64) for _ in range(3))
    weight = torch.rand(3, 1, dtype=torch.float64, requires_grad=True)
    denoising(output, x, eps, alpha=1.0, sigma=0.5, prediction=Prediction.EPS, weight=weight).backward()
    torch.testing.assert_close(weight.grad, (output - eps).square().sum(1, keepdim=True) / 12)


def test_the_gan_terms_are_the_cross_entropies_of_a_discriminator():
    bce = torch.nn.functional.binary_cross_entropy_with_logits
    real, fake = torch.randn(5), torch.randn(5)
    torch.testing.assert_close(gan_generator(fake), bce(fake, torch.ones(5)))
    torch.testing.assert_close(gan_discriminator(real, fake), bce(real, torch.ones(5)) + bce(fake, torch.zeros(5)))


def test_the_regression_term_pulls_towards_the_teachers_sample():
    x, y = torch.randn(3, 2, requires_grad=True), torch.randn(3, 2, requires_grad=True)
    dmd_regression(x, y).backward()
    torch.testing.assert_close(x.grad, 2 * (x - y).detach() / 6)
    assert y.grad is None
    assert dmd_regression(x, y, distance=lambda a, b: (a - b).abs()).item() == (x - y).abs().mean().item()
