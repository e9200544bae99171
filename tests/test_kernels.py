"""The fused losses equal the plain ones. Every test here that compiles takes seconds: one a loss is not `slow`."""

from __future__ import annotations

import inspect
import warnings

import pytest
import references
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from references import LOSSES, value_and_gradients

from disback_plugin import _loss_formulas as formulas
from disback_plugin import kernels, losses
from disback_plugin.errors import OptionError
from disback_plugin.prediction import Prediction

GENERATOR_LOSSES = ["diff_instruct", "dmd", "sid"]


def test_the_fused_losses_have_the_names_and_signatures_of_the_plain_ones():
    assert set(kernels.__all__) == {*LOSSES, "fuse"}
    for name in LOSSES:
        plain, fused = getattr(losses, name), getattr(kernels, name)
        assert fused.__wrapped__ is plain
        assert fused.__doc__ == plain.__doc__
        assert inspect.signature(fused) == inspect.signature(plain)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        (Prediction.EPS, torch.float32),
        pytest.param(Prediction.EPS, torch.bfloat16, marks=pytest.mark.slow),
        pytest.param(Prediction.V, torch.float32, marks=pytest.mark.slow),
        pytest.param(Prediction.V, torch.bfloat16, marks=pytest.mark.slow),
    ],
    ids=str,
)
@settings(max_examples=12)
@given(batch=st.integers(0, 9), seed=st.integers(0, 2**31))
def test_fused_equals_plain_for_every_batch(name, kind, dtype, batch, seed):
    fused, plain = (
        value_and_gradients(loss, name, kind, batch, dtype=dtype, seed=seed)
        for loss in (kernels.fuse(getattr(losses, name), compile=True), getattr(losses, name))
    )
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    for mine, wanted in zip(fused, plain, strict=True):
        assert mine.dtype == wanted.dtype
        torch.testing.assert_close(mine, wanted, rtol=tolerance, atol=tolerance * max(wanted.abs().max().item(), 1e-9)
                                   if wanted.numel() else 0)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", [Prediction.EPS, Prediction.V, Prediction.X0, Prediction.FLOW])
def test_fused_float32_is_exact_to_1e_6(kind, dtype):
    fused = kernels.fuse(losses.dmd, compile=True)
    stream = torch.Generator().manual_seed(0)
    for t in (20, 500, 980):
        sigma = t / 1000
        alpha = 1 - sigma if kind is Prediction.FLOW else (1 - sigma**2) ** 0.5
        x, real, fake, eps = (torch.randn(3, 4, 16, 16, generator=stream).to(dtype) for _ in range(4))
        leaf = x.float().requires_grad_()
        fused(leaf, real, fake, eps=eps, alpha=alpha, sigma=sigma, prediction=kind).backward()
        expected = references.dmd_gradient(kind, x, eps, real, fake, alpha, sigma)
        error = (leaf.grad.double() - expected).norm() / expected.norm()
        assert error <= 1e-6, f"t = {t}: {error}"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dmd", "sid"])
def test_fused_equals_plain_with_a_noise_level_a_frame_under_a_mask_or_guidance(name):
    stream = torch.Generator().manual_seed(0)
    x, real, fake, eps = (torch.randn(n, 2, 3, 4, 4, generator=stream) for n in (3, 6, 3 if name == "dmd" else 6, 3))
    t = torch.rand(3, 2, 1, 1, 1, generator=stream) * 0.8 + 0.1
    options = {"eps": eps, "alpha": 1 - t, "sigma": t, "prediction": Prediction.FLOW, "guidance": 4.0}
    options |= {"gradient_mask": t > 0.3} if name == "dmd" else {"fake_guidance": 1.5}
    found = []
    for loss in (kernels.fuse(getattr(losses, name), compile=True), getattr(losses, name)):
        leaves = [each.clone().requires_grad_() for each in (x, real, fake)]
        value = loss(*leaves, **options)
        value.backward()
        found.append([value.detach(), *(each.grad for each in leaves if each.grad is not None)])
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_a_learned_weight_gets_its_gradient_from_the_fused_form_too():
    fused = kernels.fuse(losses.denoising, compile=True)
    output, x, eps = (torch.randn(3, 4, 2, 2) for _ in range(3))
    found = []
    for loss in (fused, losses.denoising):
        for learned in (False, True):
            weight = torch.full((3, 1, 1, 1), 2.0, requires_grad=learned)
            leaf = output.clone().requires_grad_()
            loss(leaf, x, eps, alpha=1.0, sigma=0.5, prediction=Prediction.EPS, weight=weight).backward()
            found.append((leaf.grad, weight.grad))
    torch.testing.assert_close(found[:2], found[2:])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["diff_instruct", "vsd", "dmd"])
def test_guidance_on_one_batch_is_the_same_in_the_fused_form(name):
    x, fake, eps = (torch.randn(3, 4, 5, 5) for _ in range(3))
    real = torch.randn(6, 4, 5, 5)
    options = {"alpha": 0.6, "sigma": 0.8, "prediction": Prediction.V} | references.noise_of(name, eps)
    loss, gradients = getattr(losses, name), []
    for form, guidance in ((loss, 7.5), (kernels.fuse(loss, compile=True), 7.5), (kernels.fuse(loss, compile=True), 2)):
        leaf = x.clone().requires_grad_()
        form(leaf, real, fake, guidance=guidance, **options).backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(gradients[1], gradients[2])


@pytest.mark.slow
@pytest.mark.parametrize("name", GENERATOR_LOSSES)
def test_the_zero_mode_is_nan_to_num_in_the_fused_form_too(name):
    x, eps, fake, real = (torch.randn(4, 3, 8, 8) for _ in range(4))
    fake[0, 0, 1, 1], fake[1, 1, 2, 2], fake[2, 0, 0, 0] = torch.nan, torch.inf, -torch.inf
    options = {"alpha": 0.6, "sigma": 0.8, "prediction": Prediction.X0, "nonfinite": "zero"}
    options |= references.noise_of(name, eps)
    found = []
    for loss in (kernels.fuse(getattr(losses, name), compile=True), getattr(losses, name)):
        leaf = x.clone().requires_grad_()
        loss(leaf, real, fake, **options).backward()
        found.append(leaf.grad)
    torch.testing.assert_close(*found)
    assert found[0].isfinite().all()
    assert found[0][3].any()


@pytest.mark.slow
@pytest.mark.parametrize("name", GENERATOR_LOSSES)
def test_broken_samples_are_masked_and_counted_in_the_fused_form_too(name):
    x, eps, fake, real = (torch.randn(4, 3, 8, 8) for _ in range(4))
    real[2, 0, 1, 1] = torch.nan
    found = []
    for loss in (kernels.fuse(getattr(losses, name), compile=True), getattr(losses, name)):
        skipped, leaf = torch.zeros((), dtype=torch.int64), x.clone().requires_grad_()
        options = {"alpha": 0.6, "sigma": 0.8, "prediction": Prediction.X0, "skipped": skipped}
        loss(leaf, real, fake, **references.noise_of(name, eps), **options).backward()
        assert skipped.item() == 1
        assert not leaf.grad[2].any()
        found.append(leaf.grad)
    torch.testing.assert_close(*found)


def test_auto_runs_the_plain_form_where_fused_does_not_win(monkeypatch):
    monkeypatch.setattr(kernels, "_compile", lambda *a: pytest.fail("compiled"))
    value_and_gradients(kernels.dmd, "dmd", Prediction.EPS, 4)


def test_auto_falls_back_once_with_one_warning_where_no_compiler_works(monkeypatch):
    calls = []

    def broken(*_):
        def formula(*_):
            calls.append(None)
            raise RuntimeError("no C++ compiler")

        return formula

    monkeypatch.setattr(kernels, "_compile", broken)
    monkeypatch.setattr(kernels, "_FAILED", set())
    monkeypatch.setattr(kernels, "_COMPILED", {})
    monkeypatch.setattr(kernels, "WINS_ON_CPU", 0)
    plain = value_and_gradients(losses.dmd, "dmd", Prediction.EPS, 4)
    with pytest.warns(RuntimeWarning, match="dmd does not compile here .*no C\\+\\+ compiler.*plain form"):
        first = value_and_gradients(kernels.dmd, "dmd", Prediction.EPS, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second = value_and_gradients(kernels.dmd, "dmd", Prediction.EPS, 4)
    assert len(calls) == 1
    for value in (*zip(first, plain, strict=True), *zip(second, plain, strict=True)):
        assert torch.equal(*value)
    with pytest.raises(RuntimeError, match="no C"):
        value_and_gradients(kernels.fuse(losses.dmd, compile=True), "dmd", Prediction.EPS, 4)


def test_an_error_of_the_caller_is_raised_and_does_not_end_the_fused_form():
    x = torch.zeros(4, 3, 160, 160)
    with pytest.raises(ValueError, match="one shape"):
        kernels.dmd(x, x, x[:2], eps=x, alpha=1.0, sigma=1.0, prediction=Prediction.EPS)
    assert formulas.RUNNER.get() is formulas.run_plain
    assert not kernels._FAILED


def test_a_mode_that_is_none_is_refused():
    with pytest.raises(OptionError, match="compile='always'"):
        kernels.fuse(losses.dmd, compile="always")


@pytest.mark.slow
def test_compiling_draws_nothing_from_the_global_generators():
    x = torch.randn(5, 2, 9, 9)
    before = torch.get_rng_state()
    kernels.fuse(losses.vsd, compile=True)(x, x, x, alpha=0.6, sigma=0.8, prediction=Prediction.EPS)
    assert torch.equal(torch.get_rng_state(), before)
