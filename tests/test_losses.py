from __future__ import annotations

import pytest
import references
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from disback_plugin import kernels, losses
from disback_plugin.errors import DisbackError, MismatchError, OptionError
from disback_plugin.losses import (
    denoising,
    diff_instruct,
    dmd,
    dmd_regression,
    edm_weight,
    gan_discriminator,
    gan_generator,
    sid,
    snr_weight,
    vsd,
)
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


FORMS = {"plain": lambda loss: loss, "fused": lambda loss: kernels.fuse(loss, compile=True)}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["diff_instruct", "vsd", "dmd"])
@pytest.mark.parametrize("kind", [Prediction.EPS, Prediction.FLOW])
@settings(max_examples=15)
@given(batch=st.integers(0, 4), seed=st.integers(0, 2**31), factor=st.sampled_from([0.25, 2.0, 8.0]))
def test_every_difference_is_zero_where_networks_agree_odd_linear_and_points_from_teacher_to_fake(
    form, name, kind, batch, seed, factor
):
    loss, stream = FORMS[form](getattr(losses, name)), torch.Generator().manual_seed(seed)
    # Every other column of a larger batch: nothing is contiguous.
    x, eps, real, fake = (torch.randn(batch, 3, 8, generator=stream)[..., ::2] for _ in range(4))
    options = {"eps": eps, "alpha": 0.6, "sigma": 0.8, "prediction": kind}

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


# -- distribution matching --------------------------------------------------------------------------------------------


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


def relative_error(found, expected):
    return ((found.double() - expected).norm() / expected.norm()).item()


def test_scaling_all_images_scales_nothing():
    # g is a ratio of two residuals: DMD's gradient has no unit.
    x, eps, real, fake = (torch.randn(2, 5, dtype=torch.float64) for _ in range(4))
    for c in (1e-3, 1.0, 1e3):
        found = _dmd_gradient(c * x, c * real, c * fake, eps=eps, alpha=1.0, sigma=c, prediction=Prediction.X0)
        reference = _dmd_gradient(x, real, fake, eps=eps, alpha=1.0, sigma=1.0, prediction=Prediction.X0)
        torch.testing.assert_close(found, reference)


# -- guidance, weights, what is not finite ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["diff_instruct", "vsd", "dmd"])
def test_guidance_on_one_batch_equals_guidance_by_hand(name):
    loss = getattr(losses, name)
    u, c, fake, eps = (torch.randn(3, 4, dtype=torch.float64) for _ in range(4))
    options = {"eps": eps, "alpha": 0.6, "sigma": 0.8, "prediction": Prediction.EPS}
    gradients = []
    for real, guidance in ((torch.cat([u, c]), 7.5), (u + 7.5 * (c - u), None)):
        x = torch.ones(3, 4, dtype=torch.float64, requires_grad=True)
        loss(x, real, fake, guidance=guidance, **options).backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients)
    with pytest.raises(MismatchError, match="twice the batch"):
        loss(torch.ones(3, 4), c, fake, guidance=7.5, **options)


def test_vsd_is_the_weighted_difference_of_the_noises():
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    real, fake = (torch.randn(2, 3, dtype=torch.float64) for _ in range(2))
    vsd(x, real, fake, alpha=0.6, sigma=0.8, prediction=Prediction.EPS, weight=0.64).backward()
    torch.testing.assert_close(x.grad, 0.64 * (real - fake) / 2)


@pytest.mark.parametrize("name", ["diff_instruct", "dmd", "sid"])
@pytest.mark.parametrize("broken", [float("nan"), float("inf"), -float("inf")])
def test_a_broken_sample_is_left_out_and_counted(name, broken):
    loss, skipped = getattr(losses, name), torch.zeros((), dtype=torch.int64)
    x, eps, fake = (torch.randn(3, 4) for _ in range(3))
    real = torch.randn(3, 4)
    options = {"alpha": 0.6, "sigma": 0.8, "prediction": Prediction.X0}
    gradients = []
    for value in (0.5, broken):
        real[1, 2] = value
        parts = [t.clone().requires_grad_() for t in (x, real, fake)]
        out = loss(*parts, eps=eps, **options, skipped=skipped)
        out.backward()
        assert out.isfinite()
        gradients.append(parts[0].grad)
    assert skipped.item() == 1
    assert not gradients[1][1].any()
    assert torch.equal(gradients[0][[0, 2]], gradients[1][[0, 2]])


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


# -- SiD --------------------------------------------------------------------------------------------------------------


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


# -- companions -------------------------------------------------------------------------------------------------------


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


@pytest.mark.parametrize("name", ["diff_instruct", "vsd", "dmd", "sid", "denoising"])
@pytest.mark.parametrize("shape", [(0, 3), (1, 1), (4,), (2, 3, 5, 7)], ids=str)
def test_every_shape_of_batch_is_taken(name, shape):
    x, a, b, eps = (torch.randn(shape, requires_grad=True) for _ in range(4))
    options = {"alpha": 0.6, "sigma": 0.8, "prediction": Prediction.V}
    if name == "denoising":
        value = denoising(x, a.detach(), eps.detach(), **options)
    else:
        value = getattr(losses, name)(x, a, b, eps=eps.detach(), **options)
    value.backward()
    assert value.shape == ()
    assert value.isfinite()
    assert x.grad.shape == shape
    assert x.grad.isfinite().all()


def test_the_value_scales_its_gradient_as_any_loss_does():
    x, real, fake = torch.randn(2, 3, requires_grad=True), torch.randn(2, 3), torch.randn(2, 3)
    options = {"alpha": 1.0, "sigma": 1.0, "prediction": Prediction.X0}
    (once,) = torch.autograd.grad(diff_instruct(x, real, fake, **options), x)
    (thrice,) = torch.autograd.grad(3 * diff_instruct(x, real, fake, **options), x)
    torch.testing.assert_close(thrice, 3 * once)


def test_two_backward_passes_add_up_and_share_no_memory():
    x, real, fake = torch.randn(2, 3, requires_grad=True), torch.randn(2, 3), torch.randn(2, 3)
    value = diff_instruct(x, real, fake, alpha=1.0, sigma=1.0, prediction=Prediction.X0)
    value.backward(retain_graph=True)
    once = x.grad.clone()
    x.grad.mul_(5.0)  # as a clipping of gradients does
    value.backward()
    torch.testing.assert_close(x.grad, 6 * once)


@pytest.mark.parametrize("name", ["diff_instruct", "dmd", "sid"])
def test_a_coefficient_that_is_the_same_number_everywhere_is_the_tensor_of_it(name):
    x, real, fake, eps = (torch.randn(3, 4, dtype=torch.float64) for _ in range(4))
    found = []
    for one in (1.0, torch.ones(3, 1, dtype=torch.float64)):
        leaf = x.clone().requires_grad_()
        options = {"eps": eps, "alpha": one, "sigma": one, "weight": one, "prediction": Prediction.V}
        value = getattr(losses, name)(leaf, real, fake, **options)
        value.backward()
        found.append((value.detach(), leaf.grad))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("name", ["dmd", "denoising"])
def test_gradients_in_float16_are_scaled_before_they_are_cast(name):
    # 65536, where a GradScaler starts, is no number in float16, and 1 / (B n) is hardly one.
    x, real, fake, eps = (torch.randn(8, 3, 64, 64).half() for _ in range(4))
    options = {"alpha": 0.6, "sigma": 0.8, "prediction": Prediction.EPS}
    found = []
    for dtype in (torch.float16, torch.float64):
        leaf, out = x.clone().to(dtype).requires_grad_(), real.to(dtype)
        if name == "dmd":
            value = dmd(leaf, out, fake.to(dtype), eps=eps.to(dtype), **options)
        else:
            value = denoising(leaf, out, eps.to(dtype), **options)
        (value * 65536).backward()
        found.append(leaf.grad.double())
    assert found[0].isfinite().all()
    assert relative_error(*found) < 1e-3


@pytest.mark.parametrize("name", ["diff_instruct", "dmd", "sid", "denoising"])
def test_a_factor_that_would_be_broadcast_along_the_wrong_axis_is_refused(name):
    x, alpha = torch.randn(4, 1, 4, 4), torch.linspace(0.5, 0.9, 4)
    options = {"alpha": alpha, "sigma": 0.5, "weight": alpha, "prediction": Prediction.V}
    with pytest.raises(MismatchError, match=r"noise\.expand"):
        getattr(losses, name)(x, x, x, eps=x, **options) if name != "denoising" else denoising(x, x, x, **options)


@pytest.mark.parametrize("name", ["dmd", "sid"])
def test_a_weight_for_each_element_is_refused_where_the_normaliser_is_one_a_sample(name):
    x = torch.randn(4, 1, 5, 5)
    with pytest.raises(MismatchError, match="one number a sample"):
        getattr(losses, name)(
            x, x, x, eps=x, alpha=1.0, sigma=0.5, prediction=Prediction.X0, weight=torch.ones(4, 1, 5, 5)
        )


def test_second_derivatives_are_refused_not_wrong():
    x = torch.randn(2, 3, requires_grad=True)
    value = sid(x, x.sin(), x.cos(), eps=x.detach(), alpha=1.0, sigma=0.5, prediction=Prediction.X0)
    with pytest.raises(DisbackError, match="first derivatives only"):
        torch.autograd.grad(value, x, create_graph=True)


def test_a_learned_weight_gets_its_gradient():
    output, x, eps = (torch.randn(3, 4, dtype=torch.float64) for _ in range(3))
    weight = torch.rand(3, 1, dtype=torch.float64, requires_grad=True)
    denoising(output, x, eps, alpha=1.0, sigma=0.5, prediction=Prediction.EPS, weight=weight).backward()
    torch.testing.assert_close(weight.grad, (output - eps).square().sum(1, keepdim=True) / 12)


def test_the_gradients_memory_goes_with_the_graph():
    x = torch.randn(2, 3, requires_grad=True)
    value = diff_instruct(x, x.detach(), x.detach() + 1, alpha=1.0, sigma=0.5, prediction=Prediction.X0)
    value.backward()
    with pytest.raises(RuntimeError, match="second time"):
        value.backward()
