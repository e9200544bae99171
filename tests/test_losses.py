from __future__ import annotations

import pytest
import references
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from references import batches, relative_error

from disback_plugin import losses
from disback_plugin.errors import OptionError
from disback_plugin.losses import diff_instruct, dmd, sid, vsd
from disback_plugin.prediction import Prediction, convert, target

KINDS = list(Prediction)


def _gradient(x, real, fake, **options):
    x = x.detach().requires_grad_()
    diff_instruct(x, real, fake, **options).backward()
    return x.grad


@pytest.mark.parametrize("kind", KINDS)
@given(batch=batches(), weight=st.floats(0.1, 10))
def test_the_gradient_of_diff_instruct_is_the_score_difference_of_equation_8(kind, batch, weight):
    x, x_t, _, alpha, sigma, real, fake = batch
    scales = {"x_t": x_t, "alpha": alpha, "sigma": sigma}
    s_theta = convert(real, kind, Prediction.SCORE, **scales)
    s_phi = convert(fake, kind, Prediction.SCORE, **scales)
    expected = weight * alpha * (s_phi - s_theta) / len(x)
    found = _gradient(x, real, fake, alpha=alpha, sigma=sigma, prediction=kind, weight=weight)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
@given(batch=batches())
def test_networks_that_agree_give_no_gradient_and_swapping_them_negates_the_gradient(kind, batch):
    x, _, _, alpha, sigma, real, fake = batch
    options = {"alpha": alpha, "sigma": sigma, "prediction": kind}
    assert not _gradient(x, real, real, **options).any()
    torch.testing.assert_close(_gradient(x, real, fake, **options), -_gradient(x, fake, real, **options))


@pytest.mark.parametrize("name", ["diff_instruct", "vsd", "dmd"])
@pytest.mark.parametrize("kind", [Prediction.EPS, Prediction.FLOW])
@settings(max_examples=15)
@given(batch=st.integers(0, 4), seed=st.integers(0, 2**31), factor=st.sampled_from([0.25, 2.0, 8.0]))
def test_every_difference_is_zero_where_networks_agree_odd_linear_and_points_from_teacher_to_fake(
    name, kind, batch, seed, factor
):
    loss, stream = getattr(losses, name), torch.Generator().manual_seed(seed)
    # Every other column of a larger batch: nothing is contiguous.
    x, eps, real, fake = (torch.randn(batch, 3, 8, generator=stream)[..., ::2] for _ in range(4))
    options = {"alpha": 0.6, "sigma": 0.8, "prediction": kind} | references.noise_of(name, eps)

    def gradient(real, fake):
        leaf = x.clone().requires_grad_()
        loss(leaf, real, fake, **options).backward()
        return leaf.grad

    g = gradient(real, fake)
    assert g.shape == x.shape
    assert not gradient(real, real).any()
    torch.testing.assert_close(gradient(real, real + factor * (fake - real)), factor * g, rtol=1e-4, atol=1e-6)
    swapped = gradient(fake, real)
    assert torch.equal(swapped.sign(), -g.sign())  # of dmd only the sign: its normaliser is the teacher's
    if name != "dmd":
        torch.testing.assert_close(swapped, -g)
    # D_phi - D_theta has the sign of -(f - r) for eps and flow: descent moves x from D_phi to D_theta.
    assert torch.equal(g.sign(), (real - fake).sign())


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


def _dmd_gradient(x, real, fake, **options):
    x = x.detach().requires_grad_()
    dmd(x, real, fake, **options).backward()
    return x.grad


@pytest.mark.parametrize("kind", KINDS)
@given(batch=batches())
def test_the_gradient_of_dmd_is_the_authors_in_every_prediction(kind, batch):
    x, _, eps, alpha, sigma, real, fake = batch
    found = _dmd_gradient(x, real, fake, eps=eps, alpha=alpha, sigma=sigma, prediction=kind)
    expected = references.dmd_gradient(kind, x, eps, real, fake, alpha, sigma)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@given(batch=batches())
def test_the_value_of_dmd_is_the_authors_mean_squared_error(batch):
    x, _, eps, alpha, sigma, real, fake = batch
    value = dmd(x, real, fake, eps=eps, alpha=alpha, sigma=sigma, prediction=Prediction.V)
    g = references.dmd_gradient(Prediction.V, x, eps, real, fake, alpha, sigma) * x.numel()
    torch.testing.assert_close(value, 0.5 * torch.nn.functional.mse_loss(x, x - g))


@pytest.mark.parametrize("t", [20, 200, 500, 800, 980])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", [Prediction.EPS, Prediction.V, Prediction.X0, Prediction.FLOW])
def test_float32_is_exact_to_1e_6_where_the_x0_form_is_not(kind, dtype, t):
    alpha, sigma = stable_diffusion(t) if kind is not Prediction.FLOW else (1 - t / 1000, t / 1000)
    x, eps, real, fake = trained_outputs(kind, alpha, sigma, dtype)
    found = _dmd_gradient(x.float(), real, fake, eps=eps, alpha=alpha, sigma=sigma, prediction=kind)
    expected = references.dmd_gradient(kind, x, eps, real, fake, alpha, sigma)
    assert relative_error(found, expected) <= 1e-6


def stable_diffusion(t):
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alpha_bar = (1 - betas).cumprod(0)[t].item()
    return alpha_bar**0.5, (1 - alpha_bar) ** 0.5


def trained_outputs(kind, alpha, sigma, dtype, shape=(3, 4, 16, 16)):
    """x, eps and the outputs of two networks that are nearly right, as trained ones are."""
    stream = torch.Generator().manual_seed(0)
    x, eps, a, b = (torch.randn(shape, generator=stream) for _ in range(4))
    wanted = target(kind, x, eps, alpha=alpha, sigma=sigma)
    return (t.to(dtype) for t in (x, eps, wanted + 0.1 * a, wanted + 0.1 * b))


@pytest.mark.parametrize("kind", KINDS)
def test_dmd_with_a_noise_level_a_frame_has_the_gradient_of_the_x0_form(kind):
    stream = torch.Generator().manual_seed(0)
    x, eps, real, fake = (torch.randn(4, 3, 2, 5, generator=stream, dtype=torch.float64) for _ in range(4))
    angle = 0.1 + 1.3 * torch.rand(4, 3, 1, 1, generator=stream, dtype=torch.float64)
    options = {"eps": eps, "alpha": angle.cos(), "sigma": angle.sin()}
    expected = references.dmd_gradient(kind, x=x, real=real, fake=fake, **options)
    torch.testing.assert_close(_dmd_gradient(x, real, fake, prediction=kind, **options), expected)


def test_scaling_all_images_scales_nothing():
    # g is a ratio of two residuals: DMD's gradient has no unit.
    x, eps, real, fake = (torch.randn(2, 5, dtype=torch.float64) for _ in range(4))
    for c in (1e-3, 1.0, 1e3):
        found = _dmd_gradient(c * x, c * real, c * fake, eps=eps, alpha=1.0, sigma=c, prediction=Prediction.X0)
        reference = _dmd_gradient(x, real, fake, eps=eps, alpha=1.0, sigma=1.0, prediction=Prediction.X0)
        torch.testing.assert_close(found, reference)


def test_vsd_is_the_weighted_difference_of_the_noises():
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    real, fake = (torch.randn(2, 3, dtype=torch.float64) for _ in range(2))
    vsd(x, real, fake, alpha=0.6, sigma=0.8, prediction=Prediction.EPS, weight=0.64).backward()
    torch.testing.assert_close(x.grad, 0.64 * (real - fake) / 2)


def test_the_zero_mode_is_nan_to_num_as_dmd2_has_it():
    x, eps, real, fake = (torch.randn(2, 4) for _ in range(4))
    fake[0, 0], fake[1, 1] = float("nan"), float("inf")
    found = _dmd_gradient(x, real, fake, eps=eps, alpha=1.0, sigma=1.0, prediction=Prediction.X0, nonfinite="zero")
    expected = ((fake - real) / references.per_sample((x - real).abs())).nan_to_num() / x.numel()
    torch.testing.assert_close(found, expected)
    with pytest.raises(OptionError, match="'mask' or 'zero'"):
        _dmd_gradient(x, real, fake, eps=eps, alpha=1.0, sigma=1.0, prediction=Prediction.X0, nonfinite="drop")


def test_a_teacher_that_returns_the_sample_itself_divides_by_zero_and_is_masked():
    x, fake = torch.randn(2, 4), torch.randn(2, 4)
    assert not _dmd_gradient(x, x, fake, eps=fake, alpha=1.0, sigma=1.0, prediction=Prediction.X0).any()


@pytest.mark.parametrize("kind", KINDS)
@given(batch=batches(), alpha_sid=st.floats(0.5, 1.5))
def test_sid_is_the_authors_with_all_its_gradients(kind, batch, alpha_sid):
    x, _, eps, alpha, sigma, left, right = batch

    def networks(scales):
        return [lambda x_t, s=s, w=w: torch.tanh(s * x_t) + w for s, w in zip(scales, (left, right), strict=True)]

    found, expected = [], []
    for gradients, mine in ((found, True), (expected, False)):
        leaf = x.clone().requires_grad_()
        scales = [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (0.7, 1.3)]
        if mine:
            x_t = alpha * leaf + sigma * eps
            real, fake = (net(x_t) for net in networks(scales))
            out = sid(leaf, real, fake, eps=eps, alpha=alpha, sigma=sigma, prediction=kind, alpha_sid=alpha_sid)
        else:
            out = references.sid_loss(kind, leaf, eps, networks(scales), alpha, sigma, alpha_sid)
        out.backward()
        gradients += [out.detach(), leaf.grad, *(s.grad for s in scales)]
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-7, atol=1e-9)
