"""What every loss does alike: with shapes, broken samples, guidance, dtypes, and as a node of a graph."""

from __future__ import annotations

import pytest
import torch
from references import noise_of, relative_error

from disback_plugin import losses
from disback_plugin.errors import DisbackError, MismatchError
from disback_plugin.losses import denoising, diff_instruct, dmd, sid
from disback_plugin.prediction import Prediction


@pytest.mark.parametrize("name", ["diff_instruct", "vsd", "dmd", "sid", "denoising"])
@pytest.mark.parametrize("shape", [(0, 3), (1, 1), (4,), (2, 3, 5, 7)], ids=str)
def test_every_shape_of_batch_is_taken(name, shape):
    x, a, b, eps = (torch.randn(shape, requires_grad=True) for _ in range(4))
    options = {"alpha": 0.6, "sigma": 0.8, "prediction": Prediction.V}
    if name == "denoising":
        value = denoising(x, a.detach(), eps.detach(), **options)
    else:
        value = getattr(losses, name)(x, a, b, **noise_of(name, eps.detach()), **options)
    value.backward()
    assert value.shape == ()
    assert value.isfinite()
    assert x.grad.shape == shape
    assert x.grad.isfinite().all()


def test_an_empty_batch_gives_zero_not_nan():
    empty = torch.zeros(0, 3)
    assert diff_instruct(empty, empty, empty, alpha=1.0, sigma=1.0, prediction=Prediction.EPS).item() == 0


def test_shapes_that_differ_are_named():
    a, b = torch.zeros(2, 3), torch.zeros(2, 1)
    with pytest.raises(MismatchError, match=r"real \(2, 1\)"):
        diff_instruct(a, b, a, alpha=1.0, sigma=1.0, prediction=Prediction.EPS)
    with pytest.raises(MismatchError, match=r"eps \(2, 1\)"):
        denoising(a, a, b, alpha=1.0, sigma=1.0, prediction=Prediction.EPS)


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
        out = loss(*parts, **noise_of(name, eps), **options, skipped=skipped)
        out.backward()
        assert out.isfinite()
        gradients.append(parts[0].grad)
    assert skipped.item() == 1
    assert not gradients[1][1].any()
    assert torch.equal(gradients[0][[0, 2]], gradients[1][[0, 2]])


@pytest.mark.parametrize("name", ["diff_instruct", "vsd", "dmd"])
def test_guidance_on_one_batch_equals_guidance_by_hand(name):
    loss = getattr(losses, name)
    u, c, fake, eps = (torch.randn(3, 4, dtype=torch.float64) for _ in range(4))
    options = {"alpha": 0.6, "sigma": 0.8, "prediction": Prediction.EPS} | noise_of(name, eps)
    gradients = []
    for real, guidance in ((torch.cat([u, c]), 7.5), (u + 7.5 * (c - u), None)):
        x = torch.ones(3, 4, dtype=torch.float64, requires_grad=True)
        loss(x, real, fake, guidance=guidance, **options).backward()
        gradients.append(x.grad)
    torch.testing.assert_close(*gradients)
    with pytest.raises(MismatchError, match="twice the batch"):
        loss(torch.ones(3, 4), c, fake, guidance=7.5, **options)


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
        options = {"alpha": one, "sigma": one, "weight": one, "prediction": Prediction.V} | noise_of(name, eps)
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
        getattr(losses, name)(x, x, x, **noise_of(name, x), **options)


@pytest.mark.parametrize("name", ["diff_instruct", "vsd", "dmd", "sid", "denoising"])
@pytest.mark.parametrize("kind", list(Prediction))
@pytest.mark.parametrize("factor", ["alpha", "sigma", "weight"])
def test_a_malformed_factor_is_refused_alike_by_every_loss_and_kind(name, kind, factor):
    x = torch.randn(4, 2, 3)
    for wrong in (torch.ones(4), torch.ones(3, 1, 1), torch.ones(4, 1, 1, 1), torch.ones(4, 2, 2)):
        options = {"alpha": 0.6, "sigma": 0.8, "prediction": kind} | {factor: wrong}
        with pytest.raises(MismatchError, match=f"{factor} of shape .* for a batch"):
            getattr(losses, name)(x, x, x, **noise_of(name, x), **options)


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


def test_the_gradients_memory_goes_with_the_graph():
    x = torch.randn(2, 3, requires_grad=True)
    value = diff_instruct(x, x.detach(), x.detach() + 1, alpha=1.0, sigma=0.5, prediction=Prediction.X0)
    value.backward()
    with pytest.raises(RuntimeError, match="second time"):
        value.backward()
