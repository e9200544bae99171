"""The fused losses equal the plain ones. Every test here that compiles takes seconds: one a loss is not `slow`."""

from __future__ import annotations

import inspect
import warnings

import pytest
import references
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from disback_plugin import _loss_formulas as formulas
from disback_plugin import kernels, losses
from disback_plugin.errors import OptionError
from disback_plugin.prediction import Prediction

NAMES = ["diff_instruct", "vsd", "dmd", "sid", "denoising"]
GENERATOR_LOSSES = ["diff_instruct", "dmd", "sid"]


def test_the_fused_losses_have_the_names_and_signatures_of_the_plain_ones():
    assert set(kernels.__all__) == {*NAMES, "fuse"}
    for name in NAMES:
        plain, fused = getattr(losses, name), getattr(kernels, name)
        assert fused.__wrapped__ is plain
        assert fused.__doc__ == plain.__doc__
        assert inspect.signature(fused) == inspect.signature(plain)


def run(loss, name, kind, batch, shape=(3, 8, 8), dtype=torch.float32, seed=0, **options):
    """Value and gradients of one call."""
    stream = torch.Generator().manual_seed(seed)
    x, real, fake, eps = (torch.randn(batch, *shape, generator=stream).to(dtype).requires_grad_() for _ in range(4))
    sigma = torch.rand(batch, 1, 1, 1, generator=stream) * 0.8 + 0.1
    options |= {"alpha": (1 - sigma**2).sqrt(), "sigma": sigma, "prediction": kind}
    if name == "denoising":
        value = loss(real, x, eps.detach(), **options)
    else:
        value = loss(x, real, fake, **references.noise_of(name, eps.detach()), **options)
    value.backward()
    return [value.detach(), *(t.grad for t in (x, real, fake) if t.grad is not None)]


@pytest.mark.parametrize("name", NAMES)
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
        run(loss, name, kind, batch, dtype=dtype, seed=seed)
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


def graphs():
    """The number of graphs that dynamo has compiled in this process."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_one_graph_serves_batches_of_2_to_64_and_every_node(name):
    kernels._COMPILED.clear()
    fused, plain, before = kernels.fuse(getattr(losses, name), compile=True), getattr(losses, name), graphs()
    for batch in range(2, 65):
        # The seed stands for the node that is in the teacher: other outputs from the same storage.
        for mine, wanted in zip(
            *(run(loss, name, Prediction.V, batch, seed=batch, shape=(2, 4, 4)) for loss in (fused, plain)), strict=True
        ):
            torch.testing.assert_close(mine, wanted, rtol=1e-5, atol=1e-6)
    assert graphs() == before + 1


@pytest.mark.slow
def test_a_teacher_written_in_place_between_two_calls_is_seen_and_compiles_nothing_anew():
    teacher, x = torch.nn.Conv2d(2, 2, 1), torch.randn(4, 2, 6, 6)
    fused, options = kernels.fuse(losses.dmd, compile=True), {"alpha": 0.6, "sigma": 0.8, "prediction": Prediction.X0}
    fake, known = torch.randn(4, 2, 6, 6), []
    for node in range(3):
        with torch.no_grad():
            teacher.weight.copy_(torch.full_like(teacher.weight, float(node)))
            real = teacher(x)
        found, wanted = (loss(x, real, fake, eps=x, **options) for loss in (fused, losses.dmd))
        torch.testing.assert_close(found, wanted)
        known.append(len(kernels._COMPILED))
    assert known[1:] == known[:1] * 2


BATCH = (4, 3, 6, 6)


def changed(x, real, fake, eps, options):
    """What dynamo would guard, one change each, after a call with the unchanged inputs has compiled its form."""
    yield "dtype of the outputs", (x, real.bfloat16(), fake.bfloat16(), eps), options
    yield "dtype of the sample", (x.double(), real, fake, eps), options
    yield "size of a sample", (x[..., :4].contiguous(), *(t[..., :4].contiguous() for t in (real, fake, eps))), options
    yield "axes of a sample", (x.flatten(2), *(t.flatten(2) for t in (real, fake, eps))), options
    yield "strides", (x, real.transpose(2, 3), fake, eps), options
    yield "a sample expanded", (x, real[:, :1].expand_as(real), fake, eps), options
    yield "a scale a sample", (x, real, fake, eps), options | {"sigma": torch.rand(4, 1, 1, 1) + 0.1}
    yield "a scale an element", (x, real, fake, eps), options | {"sigma": torch.rand(BATCH) + 0.1}
    yield "a scale in float64", (x, real, fake, eps), options | {"sigma": torch.tensor(0.7, dtype=torch.float64)}
    yield "kind of the outputs", (x, real, fake, eps), options | {"prediction": Prediction.X0}
    yield "a weight", (x, real, fake, eps), options | {"weight": 3.0}
    yield "the treatment of NaN", (x, real, fake, eps), options | {"nonfinite": "zero"}
    yield "guidance", (x, torch.cat([real, fake]), fake, eps), options | {"guidance": 2.0}
    yield "a batch of one", (x[:1], real[:1], fake[:1], eps[:1]), options
    yield "an empty batch", (x[:0], real[:0], fake[:0], eps[:0]), options
    yield "another batch", (x.repeat(2, 1, 1, 1), *(t.repeat(2, 1, 1, 1) for t in (real, fake, eps))), options
    yield "one tensor twice", (x, real, real, eps), options
    yield "a negated view", (x, torch.complex(fake, real).conj().imag, fake, eps), options
    yield "a parameter", (torch.nn.Parameter(x), torch.nn.Parameter(real), fake, eps), options


@pytest.mark.slow
def test_the_fused_form_of_other_inputs_is_never_taken():
    stream = torch.Generator().manual_seed(0)
    given = [torch.randn(BATCH, generator=stream) for _ in range(4)]
    options = {"alpha": 0.6, "sigma": 0.8, "prediction": Prediction.V}
    fused = kernels.fuse(losses.dmd, compile=True)
    for what, (x, real, fake, eps), others in [("nothing", given, options), *changed(*given, options)]:
        torch.testing.assert_close(
            fused(x, real, fake, eps=eps, **others),
            losses.dmd(x, real, fake, eps=eps, **others),
            rtol=1e-5, atol=1e-6, msg=lambda text, what=what: f"{what}: {text}",
        )  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    "mode",
    [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)],
    ids=["no_grad", "inference_mode", "autocast"],
)
def test_a_mode_of_the_process_that_a_guard_would_check_changes_no_result(mode):
    fused, x = kernels.fuse(losses.vsd, compile=True), torch.randn(4, 2, 5, 5)
    options = {"alpha": 0.6, "sigma": 0.8, "prediction": Prediction.EPS}
    wanted = losses.vsd(x, 2 * x, 3 * x, **options)
    torch.testing.assert_close(fused(x, 2 * x, 3 * x, **options), wanted)
    with mode():
        real, fake = 2 * x, 3 * x
        torch.testing.assert_close(fused(x, real, fake, **options), wanted)
    torch.testing.assert_close(fused(x, real, fake, **options), wanted)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("form", ["plain", "fused"])
def test_a_caller_may_compile_the_loss_into_a_graph_of_their_own(name, form):
    torch._dynamo.reset()  # or it would count all ten as recompilations of one lambda
    loss = getattr(losses if form == "plain" else kernels, name)
    whole = torch.compile(lambda *args, **options: 2 * loss(*args, **options), fullgraph=True, backend="aot_eager")
    found, wanted = run(whole, name, Prediction.EPS, 3), run(getattr(losses, name), name, Prediction.EPS, 3)
    for mine, once in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, 2 * once)


@pytest.mark.slow
def test_a_stride_that_equals_the_first_batch_size_stays_a_stride():
    fused = kernels.fuse(losses.dmd, compile=True)
    options = {"alpha": 0.6, "sigma": 0.8, "prediction": Prediction.FLOW}
    for batch in (2, 3, 4):
        x, real, fake, eps = (torch.randn(batch, 3, 22)[..., ::2] for _ in range(4))
        found, wanted = (loss(x, real, fake, eps=eps, **options) for loss in (fused, losses.dmd))
        torch.testing.assert_close(found, wanted)


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
@pytest.mark.parametrize("layout", ["channels_last", "expanded", "strided"])
def test_memory_layouts_do_not_matter(layout):
    def lay(t):
        if layout == "channels_last":
            return t.contiguous(memory_format=torch.channels_last)
        if layout == "expanded":
            return t[:, :1].expand_as(t)
        return torch.cat([t, t], dim=3)[..., ::2]

    stream = torch.Generator().manual_seed(0)
    x, real, fake, eps = (lay(torch.randn(4, 3, 8, 8, generator=stream)) for _ in range(4))
    options = {"eps": eps, "alpha": 0.6, "sigma": 0.8, "prediction": Prediction.EPS}
    gradients = []
    for loss in (kernels.fuse(losses.dmd, compile=True), losses.dmd):
        leaf = x.detach().requires_grad_()
        loss(leaf, real, fake, **options).backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients)


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
    run(kernels.dmd, "dmd", Prediction.EPS, 4)


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
    plain = run(losses.dmd, "dmd", Prediction.EPS, 4)
    with pytest.warns(RuntimeWarning, match="dmd does not compile here .*no C\\+\\+ compiler.*plain form"):
        first = run(kernels.dmd, "dmd", Prediction.EPS, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second = run(kernels.dmd, "dmd", Prediction.EPS, 4)
    assert len(calls) == 1
    for value in (*zip(first, plain, strict=True), *zip(second, plain, strict=True)):
        assert torch.equal(*value)
    with pytest.raises(RuntimeError, match="no C"):
        run(kernels.fuse(losses.dmd, compile=True), "dmd", Prediction.EPS, 4)


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


@pytest.mark.slow
def test_a_batch_cut_out_of_a_larger_one_is_another_kind_of_input():
    fused = kernels.fuse(losses.dmd, compile=True)
    options = {"alpha": 0.6, "sigma": 0.8, "prediction": Prediction.EPS}
    stream = torch.Generator().manual_seed(0)
    whole = [torch.randn(8, 3, 6, 6, generator=stream) for _ in range(4)]
    for cut in (slice(None), slice(None, None, 2), slice(2, 5)):
        x, real, fake, eps = (tensor[cut] for tensor in whole)
        gradients = []
        for loss in (fused, losses.dmd):
            leaf = x.detach().requires_grad_()
            loss(leaf, real, fake, eps=eps, **options).backward()
            gradients.append(leaf.grad)
        torch.testing.assert_close(*gradients)


@pytest.mark.slow
def test_one_tensor_passed_twice_and_two_tensors_give_their_own_results():
    fused = kernels.fuse(losses.sid, compile=True)
    one, x = torch.tensor(1.0), torch.randn(4, 3, 7, 7)
    real, fake = torch.randn(4, 3, 7, 7), torch.randn(4, 3, 7, 7)
    options = {"eps": x, "alpha": 1.0, "sigma": 1.0, "prediction": Prediction.X0}
    for weight, alpha_sid, second in ((one, one, real), (one, torch.tensor(1.3), real), (one, one, fake)):
        arguments = {**options, "weight": weight, "alpha_sid": alpha_sid}
        torch.testing.assert_close(fused(x, real, second, **arguments), losses.sid(x, real, second, **arguments))


@pytest.mark.slow
def test_the_callers_tensors_are_not_marked():
    x, alpha = torch.randn(6, 3, 5, 5), torch.rand(6, 1, 1, 1) * 0.5 + 0.2
    fused = kernels.fuse(losses.sid, compile=True)
    fused(x, x, x, eps=x, alpha=alpha, sigma=alpha, weight=alpha, prediction=Prediction.V)
    assert not any(hasattr(tensor, "_dynamo_dynamic_indices") for tensor in (x, alpha))
