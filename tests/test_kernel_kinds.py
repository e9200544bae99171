"""A fused loss has one graph for each kind of inputs, and no other inputs get its results."""

from __future__ import annotations

import pytest
import torch
from references import LOSSES, value_and_gradients

from disback_plugin import kernels, losses
from disback_plugin.prediction import Prediction

pytestmark = pytest.mark.slow


def graphs():
    """The number of graphs that dynamo has compiled in this process."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("name", LOSSES)
def test_one_graph_serves_batches_of_2_to_64_and_every_node(name):
    kernels._COMPILED.clear()
    fused, plain, before = kernels.fuse(getattr(losses, name), compile=True), getattr(losses, name), graphs()
    for batch in range(2, 65):
        # The seed stands for the node that is in the teacher: other outputs from the same storage.
        options = {"seed": batch, "shape": (2, 4, 4)}
        found, wanted = (value_and_gradients(loss, name, Prediction.V, batch, **options) for loss in (fused, plain))
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    assert graphs() == before + 1


@pytest.mark.parametrize("guards_are_filtered", [True, False])
def test_without_the_filter_of_guards_the_result_is_the_same(guards_are_filtered, monkeypatch):
    monkeypatch.setattr(kernels, "_COMPILED", {})
    if not guards_are_filtered:
        monkeypatch.delattr(torch.compiler, "skip_all_guards_unsafe", raising=False)  # as in torch 2.6
    for batch in (2, 5):
        fused, plain = (
            value_and_gradients(loss, "dmd", Prediction.EPS, batch)
            for loss in (kernels.fuse(losses.dmd, compile=True), losses.dmd)
        )
        torch.testing.assert_close(fused, plain, rtol=1e-5, atol=1e-6)


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


def test_skipping_guards_never_gives_the_result_of_other_inputs():
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


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("form", ["plain", "fused"])
def test_a_caller_may_compile_the_loss_into_a_graph_of_their_own(name, form):
    torch._dynamo.reset()  # or it would count all ten as recompilations of one lambda
    loss = getattr(losses if form == "plain" else kernels, name)
    whole = torch.compile(lambda *args, **options: 2 * loss(*args, **options), fullgraph=True, backend="aot_eager")
    found, wanted = (
        value_and_gradients(whole, name, Prediction.EPS, 3),
        value_and_gradients(getattr(losses, name), name, Prediction.EPS, 3),
    )
    for mine, once in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, 2 * once)


def test_a_stride_that_equals_the_first_batch_size_stays_a_stride():
    fused = kernels.fuse(losses.dmd, compile=True)
    options = {"alpha": 0.6, "sigma": 0.8, "prediction": Prediction.FLOW}
    for batch in (2, 3, 4):
        x, real, fake, eps = (torch.randn(batch, 3, 22)[..., ::2] for _ in range(4))
        found, wanted = (loss(x, real, fake, eps=eps, **options) for loss in (fused, losses.dmd))
        torch.testing.assert_close(found, wanted)


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


def test_one_tensor_passed_twice_and_two_tensors_give_their_own_results():
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
