"""Whole steps on a small U-Net, networks and optimizers included: what each saving of `rounds.play` is worth.

Goals: one pass of s_phi shared by both updates >= 1.08 over a shared sample alone (the order of DMD2, whose updates
share the sample anyway). A shared sample saves one of nine units of work (a backward pass is two) in the order of
Diff-Instruct and SiD. What a teacher in bfloat16 is worth is the processor's affair, and has no goal.

Measured on one core with AVX-512 BF16: 1.13 for the sample, 1.12 for the forward on top of it, 1.26 for both, 1.02 for
the teacher in bfloat16 on top of both.
"""

from __future__ import annotations

import statistics
import time

import pytest
import torch

from disback_plugin import kernels
from disback_plugin.noise import Discrete, expand
from disback_plugin.prediction import Prediction
from disback_plugin.rounds import Draw, play

SCHEDULE = Discrete((1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2).cumprod(0))
SHAPE = (4, 3, 32, 32)
SAVINGS = {
    "none": {},
    "sample": {"share_sample": True},
    "sample and forward": {"share_forward": True},
    "sample, forward, bf16 teacher": {"share_forward": True, "teacher_dtype": torch.bfloat16},
}


def unet():
    from diffusers import UNet2DModel

    return UNet2DModel(
        sample_size=32, block_out_channels=(32, 64, 64), layers_per_block=1, norm_num_groups=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip


class Loop:
    """A one-step generator, a teacher, a fake score and their optimizers. `still`: the same draws, and no step."""

    def __init__(self, still=False):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.generator, self.teacher, self.fake = (unet() for _ in range(3))
        self.teacher.requires_grad_(False)
        self.still, self.stream = still, torch.Generator().manual_seed(0)
        self.optimizers = {net: torch.optim.AdamW(net.parameters(), lr=1e-5) for net in (self.generator, self.fake)}

    def generate(self):
        if self.still:
            self.stream.manual_seed(1)
        z = torch.randn(SHAPE, generator=self.stream)
        return z - self.generator(z, 999).sample

    def draw(self, x):
        if self.still:
            self.stream.manual_seed(2)
        t = torch.randint(20, 980, SHAPE[:1], generator=self.stream)
        alpha, sigma = (expand(value, like=x) for value in SCHEDULE(t))
        return Draw(t, torch.randn(SHAPE, generator=self.stream), alpha, sigma)

    def update(self, net):
        def update(loss):
            self.optimizers[net].zero_grad()
            loss.backward()
            if not self.still:
                self.optimizers[net].step()

        return update

    def round(self, **savings):
        return play(
            self.generate,
            lambda x_t, t: self.teacher(x_t, t).sample,
            lambda x_t, t: self.fake(x_t, t).sample,
            self.draw,
            prediction=Prediction.EPS,
            update_fake_score=self.update(self.fake),
            update_generator=self.update(self.generator),
            loss=kernels.dmd,
            denoising=kernels.denoising,
            **savings,
        )

    def gradients(self):
        return torch.cat([p.grad.flatten() for net in self.optimizers for p in net.parameters()])


def assert_same_gradients(savings):
    """On the same z, t and eps, what is shared is what would have been computed twice."""
    found = []
    for options in ({}, savings):
        loop = Loop(still=True)
        loop.round(**options)
        found.append(loop.gradients())
    loose = 0.1 if "teacher_dtype" in savings else 1e-5
    assert (found[0] - found[1]).norm() <= loose * found[0].norm(), savings


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def bench_savings_of_a_step(benchmark):
    benchmark.group = "steps"
    for savings in SAVINGS.values():
        assert_same_gradients(savings)
    loops = {name: Loop() for name in SAVINGS}
    seconds = {name: [] for name in SAVINGS}

    def interleaved():
        for name, loop in loops.items():
            start = time.perf_counter()
            loop.round(**SAVINGS[name])
            seconds[name].append(time.perf_counter() - start)

    benchmark.pedantic(interleaved, rounds=15, warmup_rounds=2)
    medians = {name: statistics.median(values[2:]) for name, values in seconds.items()}
    ratios = {
        "sample over none": medians["none"] / medians["sample"],
        "forward over sample": medians["sample"] / medians["sample and forward"],
        "sample and forward over none": medians["none"] / medians["sample and forward"],
        "bf16 teacher over sample and forward": medians["sample and forward"]
        / medians["sample, forward, bf16 teacher"],
    }
    benchmark.extra_info |= {name: round(ratio, 3) for name, ratio in ratios.items()}
    print(f"step of {medians['none']:.3f} s:", *(f"{k} {v:.2f};" for k, v in ratios.items()))
    assert ratios["forward over sample"] >= 1.08
    assert ratios["sample over none"] >= 1.05
