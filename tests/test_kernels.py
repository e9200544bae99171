"""The fused twins equal their specification. Compiles real code: every graph here takes one to two seconds."""

from __future__ import annotations

import inspect
import warnings

import pytest
import references
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from disback_plugin import kernels, losses
from disback_plugin.errors import OptionError
from disback_plugin.prediction import Prediction
from disback_plugin.terms import formulas
from disback_plugin.terms.artefacts import Artefact

NAMES = ["diff_instruct", "vsd", "dmd", "sid", "denoising"]
GENERATOR_LOSSES = ["diff_instruct", "dmd", "sid"]


def test_the_twins_have_the_names_and_signatures_of_the_losses():
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
@pytest.mark.parametrize("kind", [Prediction.EPS, Prediction.V])
@settings(max_examples=12)
@given(batch=st.integers(0, 9), seed=st.integers(0, 2**31), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_fused_equals_plain_for_every_batch(name, kind, batch, seed, dtype):
    fused, plain = (
        run(loss, name, kind, batch, dtype=dtype, seed=seed)
        for loss in (kernels.fuse(getattr(losses, name), compile=True), getattr(losses, name))
    )
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    for mine, wanted in zip(fused, plain, strict=True):
        assert mine.dtype == wanted.dtype
        torch.testing.assert_close(mine, wanted, rtol=tolerance, atol=tolerance * max(wanted.abs().max().item(), 1e-9)
                                   if wanted.numel() else 0)  # fmt: skip


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


def test_one_graph_serves_every_batch_of_two_or_more_and_every_node(monkeypatch):
    torch._dynamo.reset()
    kernels._compiled.cache_clear()
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    def compiler(formula, **options):
        return compile_(formula, fullgraph=True, backend=backend)

    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", compiler)
    for name in GENERATOR_LOSSES:
        graphs.clear()
        fused = kernels.fuse(getattr(losses, name), compile=True)
        for batch in (2, 3, 4, 8, 16, 33, 64, 2):
            run(fused, name, Prediction.EPS, batch, seed=batch)
        assert len(graphs) == 1, name
    kernels._compiled.cache_clear()


@pytest.mark.parametrize("name", NAMES)
def test_batches_of_2_to_64_and_new_nodes_compile_nothing_anew_and_stay_right(name, monkeypatch):
    kernels._compiled.cache_clear()
    artefacts = []

    class Counting(Artefact):
        def __init__(self):
            super().__init__()
            artefacts.append(self)

    monkeypatch.setattr(kernels, "Artefact", Counting)
    fused, plain = kernels.fuse(getattr(losses, name), compile=True), getattr(losses, name)
    for batch in range(2, 65):
        # The seed stands for the node that is in the teacher: other outputs from the same storage.
        for mine, wanted in zip(
            *(run(loss, name, Prediction.V, batch, seed=batch, shape=(2, 4, 4)) for loss in (fused, plain)), strict=True
        ):
            torch.testing.assert_close(mine, wanted, rtol=1e-5, atol=1e-6)
    assert [artefact.graphs for artefact in artefacts] == [1]
    kernels._compiled.cache_clear()


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
        known.append(kernels._compiled.cache_info().misses)
    assert known[1:] == known[:1] * 2


def test_what_is_called_directly_is_what_dynamo_calls_and_has_no_condition_on_the_batch():
    artefact = Artefact()

    def formula(x, y, mask):
        return formulas.dmd(x, None, y, (x + y,), 1.0, 1.0, mask)

    compiled = torch.compile(formula, fullgraph=True, backend=artefact)
    inputs = [torch.randn(4, 3, 8, 8) for _ in range(2)]
    for tensor in inputs:
        torch._dynamo.mark_dynamic(tensor, 0)
    direct = artefact.direct((*inputs, True), compiled(*inputs, True))
    assert direct is not None
    for batch in range(2, 65):
        inputs = [torch.randn(batch, 3, 8, 8) for _ in range(2)]
        for mine, dynamos in zip(direct(*inputs, True), compiled(*inputs, True), strict=True):
            assert torch.equal(mine, dynamos)
    assert artefact.graphs == 1


def test_what_has_a_condition_on_the_batch_or_an_input_of_its_own_is_not_called_directly():
    def summed(x):  # inductor compiles another sum for more than 4,096 numbers
        return (x.sum(0),)

    hidden = torch.ones(3)

    def closed_over(x):
        return (x + hidden,)

    for function in (summed, closed_over):
        artefact, x = Artefact(), torch.ones(5, 3)
        torch._dynamo.mark_dynamic(x, 0)
        assert artefact.direct((x,), torch.compile(function, backend=artefact)(x)) is None


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("form", ["plain", "fused"])
def test_a_caller_may_compile_the_loss_into_a_graph_of_his_own(name, form):
    torch._dynamo.reset()  # or it would count all ten as recompilations of one lambda
    loss = getattr(losses if form == "plain" else kernels, name)
    whole = torch.compile(lambda *args, **options: 2 * loss(*args, **options), fullgraph=True, backend="aot_eager")
    found, wanted = run(whole, name, Prediction.EPS, 3), run(getattr(losses, name), name, Prediction.EPS, 3)
    for mine, once in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, 2 * once)


def test_a_stride_that_equals_the_first_batch_is_not_taken_for_it():
    fused = kernels.fuse(losses.dmd, compile=True)
    options = {"alpha": 0.6, "sigma": 0.8, "prediction": Prediction.FLOW}
    for batch in (2, 3, 4):
        x, real, fake, eps = (torch.randn(batch, 3, 22)[..., ::2] for _ in range(4))
        found, wanted = (loss(x, real, fake, eps=eps, **options) for loss in (fused, losses.dmd))
        torch.testing.assert_close(found, wanted)


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
    monkeypatch.setattr(kernels, "_compiled", lambda *a: pytest.fail("compiled"))
    run(kernels.dmd, "dmd", Prediction.EPS, 4)


def test_auto_falls_back_once_with_one_warning_where_no_compiler_works(monkeypatch):
    calls = []

    def broken(*_):
        def formula(*_):
            calls.append(None)
            raise RuntimeError("no C++ compiler")

        return formula

    monkeypatch.setattr(kernels, "_compiled", broken)
    monkeypatch.setattr(kernels, "_FAILED", set())
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


def test_an_error_of_the_caller_is_not_taken_for_one_of_the_compiler():
    x = torch.zeros(4, 3, 160, 160)
    with pytest.raises(ValueError, match="one shape"):
        kernels.dmd(x, x, x[:2], eps=x, alpha=1.0, sigma=1.0, prediction=Prediction.EPS)
    assert formulas.RUN.get() is formulas.plainly
    assert not kernels._FAILED


def test_the_plain_form_stays_plain_beside_a_fused_call():
    fused = kernels.fuse(losses.dmd, compile=True)
    run(fused, "dmd", Prediction.EPS, 4)
    assert formulas.RUN.get() is formulas.plainly


def test_a_mode_that_is_none_is_refused():
    with pytest.raises(OptionError, match="compile='always'"):
        kernels.fuse(losses.dmd, compile="always")


def test_compiling_draws_nothing_from_the_global_generators():
    x = torch.randn(5, 2, 9, 9)
    before = torch.get_rng_state()
    kernels.fuse(losses.vsd, compile=True)(x, x, x, alpha=0.6, sigma=0.8, prediction=Prediction.EPS)
    assert torch.equal(torch.get_rng_state(), before)


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


def test_inputs_that_are_one_tensor_now_and_two_later_are_told_apart():
    fused = kernels.fuse(losses.sid, compile=True)
    one, x = torch.tensor(1.0), torch.randn(4, 3, 7, 7)
    real, fake = torch.randn(4, 3, 7, 7), torch.randn(4, 3, 7, 7)
    options = {"eps": x, "alpha": 1.0, "sigma": 1.0, "prediction": Prediction.X0}
    for weight, alpha_sid, second in ((one, one, real), (one, torch.tensor(1.3), real), (one, one, fake)):
        arguments = {**options, "weight": weight, "alpha_sid": alpha_sid}
        torch.testing.assert_close(fused(x, real, second, **arguments), losses.sid(x, real, second, **arguments))


def test_the_callers_tensors_are_not_marked():
    x, alpha = torch.randn(6, 3, 5, 5), torch.rand(6, 1, 1, 1) * 0.5 + 0.2
    fused = kernels.fuse(losses.sid, compile=True)
    fused(x, x, x, eps=x, alpha=alpha, sigma=alpha, weight=alpha, prediction=Prediction.V)
    assert not any(hasattr(tensor, "_dynamo_dynamic_indices") for tensor in (x, alpha))
