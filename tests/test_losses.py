from __future__ import annotations

import pytest
import references
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from references import batches, frames, relative_error

from disback_plugin import losses
from disback_plugin.errors import MismatchError, OptionError
from disback_plugin.losses import diff_instruct, dmd, sid, vsd
from disback_plugin.prediction import Prediction, convert, target

KINDS = list(Prediction)


def _gradient(x, real, fake, **options):
    x = x.detach().requires_grad_()
    diff_instruct(x, real, fake, **options).backward()
    return x.grad


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25)
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
@settings(max_examples=25)
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
@settings(max_examples=25)
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
@settings(max_examples=25)
@given(batch=frames())
def test_dmd_with_a_noise_level_a_frame_has_the_value_and_the_gradient_of_the_x0_form(kind, batch):
    _compare_dmd(kind, *batch, tolerance=1e-9)


@pytest.mark.parametrize("kind", [Prediction.EPS, Prediction.V, Prediction.X0, Prediction.FLOW])
def test_float32_is_exact_to_1e_6_with_a_noise_level_a_frame_too(kind):
    t = torch.tensor([[20, 300, 980], [500, 700, 40]])[..., None, None, None] / 1000
    alpha, sigma = (1 - t, t) if kind is Prediction.FLOW else ((1 - t**2).sqrt(), t)
    x, eps, real, fake = trained_outputs(kind, alpha, sigma, torch.float32, shape=(2, 3, 4, 16, 16))
    _compare_dmd(kind, x, eps, alpha, sigma, real, fake, tolerance=1e-6)


def _compare_dmd(kind, x, eps, alpha, sigma, real, fake, *, tolerance):
    leaf = x.clone().requires_grad_()
    value = dmd(leaf, real, fake, eps=eps, alpha=alpha, sigma=sigma, prediction=kind)
    value.backward()
    expected = references.dmd_gradient(kind, x, eps, real, fake, alpha, sigma)
    loss = 0.5 * (expected * x.numel()).square().mean().item()
    assert abs(value.item() - loss) <= tolerance * loss
    assert relative_error(leaf.grad, expected) <= tolerance


def self_forcing_loss(x, g, mask):
    """The loss of Self-Forcing (33593df, model/dmd.py:188-191), from DMD's g."""
    return 0.5 * torch.nn.functional.mse_loss(x[mask], (x - g).detach()[mask], reduction="mean")


@pytest.mark.parametrize("nonfinite", ["mask", "zero"])
@pytest.mark.parametrize("kind", [Prediction.EPS, Prediction.FLOW, Prediction.V, Prediction.X0])
@settings(max_examples=25)
@given(batch=frames(), seed=st.integers(0, 2**31))
def test_a_gradient_mask_takes_the_mean_over_its_elements_as_self_forcing_does(kind, nonfinite, batch, seed):
    x, eps, alpha, sigma, real, fake = batch
    stream = torch.Generator().manual_seed(seed)
    g = references.dmd_gradient(kind, x, eps, real, fake, alpha, sigma) * x.numel()
    frame = torch.rand(alpha.shape, generator=stream) < 0.5
    for mask in (torch.rand(x.shape, generator=stream) < 0.5, frame, torch.ones_like(frame)):
        if not mask.any():
            continue
        mine, theirs = (x.clone().requires_grad_() for _ in range(2))
        options = {"alpha": alpha, "sigma": sigma, "prediction": kind, "nonfinite": nonfinite}
        value = dmd(mine, real, fake, eps=eps, gradient_mask=mask, **options)
        expected = self_forcing_loss(theirs, g, mask.expand_as(x))
        torch.testing.assert_close(value, expected)
        value.backward()
        expected.backward()
        torch.testing.assert_close(mine.grad, theirs.grad)


def test_an_empty_gradient_mask_gives_no_loss_and_one_of_another_shape_is_refused():
    x, real, fake, eps = (torch.randn(2, 3, 4) for _ in range(4))
    options = {"eps": eps, "alpha": 0.6, "sigma": 0.8, "prediction": Prediction.EPS}
    leaf = x.clone().requires_grad_()
    value = dmd(leaf, real, fake, gradient_mask=torch.zeros(2, 3, 1, dtype=torch.bool), **options)
    value.backward()
    assert value.item() == 0
    assert not leaf.grad.any()
    with pytest.raises(MismatchError, match="gradient_mask of shape"):
        dmd(x, real, fake, gradient_mask=torch.ones(2, 4, 1, dtype=torch.bool), **options)


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


def _compare_sid(kind, x, eps, alpha, sigma, alpha_sid, shifts, guidance=(None, None)):
    """Compare the value and all gradients of `sid` with the authors'."""
    found, expected = [], []
    for gradients, mine in ((found, True), (expected, False)):
        leaf = x.clone().requires_grad_()
        scales = [torch.tensor(v, dtype=torch.float64, requires_grad=True) for v in (0.7, 1.3)]
        networks = [lambda x_t, s=s, w=w: torch.tanh(s * x_t) + w for s, w in zip(scales, shifts, strict=True)]
        if mine:
            x_t = alpha * leaf + sigma * eps
            inputs = [x_t if scale is None else torch.cat([x_t, x_t]) for scale in guidance]
            real, fake = (net(x) for net, x in zip(networks, inputs, strict=True))
            options = dict(zip(("guidance", "fake_guidance"), guidance, strict=True)) | {"alpha_sid": alpha_sid}
            out = sid(leaf, real, fake, eps=eps, alpha=alpha, sigma=sigma, prediction=kind, **options)
        else:
            networks = [references.guided(*each) for each in zip(networks, guidance, strict=True)]
            out = references.sid_loss(kind, leaf, eps, networks, alpha, sigma, alpha_sid)
        out.backward()
        gradients += [out.detach(), leaf.grad, *(s.grad for s in scales)]
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25)
@given(batch=batches(), alpha_sid=st.floats(0.5, 1.5))
def test_sid_is_the_authors_with_all_its_gradients(kind, batch, alpha_sid):
    x, _, eps, alpha, sigma, left, right = batch
    _compare_sid(kind, x, eps, alpha, sigma, alpha_sid, (left, right))


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25)
@given(batch=frames(), alpha_sid=st.floats(0.5, 1.5))
def test_sid_takes_factors_a_frame_alike_in_all_frames_or_not(kind, batch, alpha_sid):
    x, eps, alpha, sigma, left, right = batch
    _compare_sid(kind, x, eps, alpha, sigma, alpha_sid, (left, right))
    alpha, sigma = (factor[:, :1].expand_as(factor) for factor in (alpha, sigma))
    _compare_sid(kind, x, eps, alpha, sigma, alpha_sid, (left, right))


@pytest.mark.parametrize("guidance", [(1.5, 1.5), (4.5, None), (None, 2.0), (1.0, 3.0)], ids=str)
@settings(max_examples=25)
@given(batch=batches(), kind=st.sampled_from(KINDS), alpha_sid=st.floats(0.5, 1.5))
def test_sid_under_guidance_is_that_of_sid_lsg_on_either_network(guidance, batch, kind, alpha_sid):
    x, _, eps, alpha, sigma, left, right = batch
    # The unconditional halves have other shifts.
    shifts = [w if scale is None else torch.cat([-w, w]) for w, scale in zip((left, right), guidance, strict=True)]
    _compare_sid(kind, x, eps, alpha, sigma, alpha_sid, shifts, guidance)
    if None not in guidance:
        with pytest.raises(MismatchError, match="twice the batch"):
            sid(x, left, right, eps=eps, alpha=1.0, sigma=1.0, prediction=kind, guidance=guidance[0])
