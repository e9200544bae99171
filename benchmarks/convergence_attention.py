"""Compare the candidates for the default on an EDM U-Net of diffusers with attention, in a plain loop with `attach`.

    python benchmarks/convergence_attention.py      # adds a line to convergence_compared.jsonl, unless it is there

Each run is a loop that knows nothing of DisBack, with `disback.attach(..., schedule=...)` around it. The schedules, the
data and the distance are the ensemble's. "walk, capped" needs another optimizer and is left out.
"""

from __future__ import annotations

import json
import tempfile
from statistics import median

import convergence_results as results
import torch
from convergence_methods import CANDIDATES, Altered
from convergence_runs import EMA, EVALUATE_EVERY, EVALUATION, RECORDING, SAMPLES, TRAINING, WINDOWS
from convergence_worlds import P_MEAN, P_STD, seeded, world
from diffusers import UNet2DModel
from torch import nn

import disback_plugin as disback

NAME, SIGMA_INIT, BATCH, UPDATES, RATES = "attention teacher", 2.5, 16, 100, (5e-4, 1e-3, 2e-3)
TEACHER_UPDATES, TEACHER_RATE = 500, 4e-3
SEEDS, TUNING = (10, 11), (100,)


class Denoiser(nn.Module):
    """EDM's preconditioning (arXiv 2206.00364, Table 1) around a U-Net with attention at 4 x 4."""

    def __init__(self, sigma_data: float) -> None:
        super().__init__()
        self.sigma_data = sigma_data
        self.body = UNet2DModel(
            sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(8, 16),
            down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
            norm_num_groups=4, attention_head_dim=8,
        )  # fmt: skip

    def forward(self, x_t, sigma):
        d = self.sigma_data
        sigma = sigma.view(-1, 1, 1, 1)
        s = (sigma**2 + d**2).sqrt()
        inner = self.body((x_t / s), 250 * sigma.log().flatten().expand(len(x_t)), return_dict=False)[0]
        return (d / s) ** 2 * x_t + sigma * d / s * inner


class Loop:
    """Diff-Instruct as a trainer has it: three networks, two optimizers, one noise stream a purpose."""

    def __init__(self, teacher_state, rate, seed):
        place = world("digits-conv")
        self.place, self.rate = place, rate
        self.teacher, self.fake, self.generator = (Denoiser(place.sigma_data) for _ in range(3))
        for network in (self.teacher, self.fake, self.generator):
            network.load_state_dict(teacher_state)
        self.teacher.requires_grad_(False)
        self.optimizers = [
            torch.optim.Adam(network.parameters(), lr=rate, betas=(0.0, 0.999))
            for network in (self.generator, self.fake)
        ]
        self.streams = {p: seeded(1_000_003 * p + seed) for p in (TRAINING, RECORDING)}
        self.average = [weight.detach().clone() for weight in self.generator.parameters()]
        self.z = torch.randn(SAMPLES, 1, 8, 8, generator=seeded(1_000_003 * EVALUATION + seed))
        self.lengths, self.curve = [], []
        self.factor = lambda: 1.0  # on the gradient, beside the schedule's

    def draws(self, purpose):
        return [torch.randn(s, generator=self.streams[purpose]) for s in ((BATCH, 1, 8, 8), (BATCH,), (BATCH, 1, 8, 8))]

    def sample(self, z):
        return self.generator(SIGMA_INIT * z, torch.tensor(SIGMA_INIT))

    def fake_step(self, purpose):
        z, log_sigma, eps = self.draws(purpose)
        with torch.no_grad():
            x_0 = self.sample(z)
        self.optimizers[1].zero_grad()
        denoising(self.fake, x_0, log_sigma, eps).backward()
        self.optimizers[1].step()

    def generator_step(self):
        z, log_sigma, eps = self.draws(TRAINING)
        sigma, x = (P_MEAN + P_STD * log_sigma).exp(), self.sample(z)
        with torch.no_grad():
            x_t = x + sigma.view(-1, 1, 1, 1) * eps
            g = self.fake(x_t, sigma) - self.teacher(x_t, sigma)
        self.optimizers[0].zero_grad()
        x.backward(self.factor() * g / g[0].numel())
        before = [weight.detach().clone() for weight in self.generator.parameters()]
        self.optimizers[0].step()
        with torch.no_grad():
            moved = [w - b for w, b in zip(self.generator.parameters(), before, strict=True)]
            square = sum(m.square().sum() for m in moved) / sum(m.numel() for m in moved)
            self.lengths.append(float(square.sqrt()) / self.rate)
            torch._foreach_lerp_(self.average, list(self.generator.parameters()), 1 - EMA)

    def idle_step(self):
        """The round of a recording: its gradients are hidden by `attach`, and so zeros do as well."""
        for weight in self.generator.parameters():
            weight.grad = torch.zeros_like(weight)
        self.optimizers[0].step()

    @torch.no_grad()
    def distance(self, weights):
        named = dict(zip(dict(self.generator.named_parameters()), weights, strict=True))
        scale = torch.tensor(SIGMA_INIT)
        x = torch.func.functional_call(self.generator, named, (SIGMA_INIT * self.z, scale))
        return self.place.distance(x.flatten(1)[None])[0]

    def train(self):
        self.curve.append(self.distance(self.average))
        for update in range(1, UPDATES + 1):
            self.fake_step(TRAINING)
            self.generator_step()
            if update % EVALUATE_EVERY == 0:
                self.curve.append(self.distance(self.average))


def denoising(network, x_0, log_sigma, eps):
    sigma, d = (P_MEAN + P_STD * log_sigma).exp(), network.sigma_data
    weight = (sigma**2 + d**2) / (sigma * d) ** 2
    return (weight * (network(x_0 + sigma.view(-1, 1, 1, 1) * eps, sigma) - x_0).square().mean((1, 2, 3))).mean()


def run(teacher_state, rate, seed, schedule=None, record=0, divided=False):
    """Return a loop after its updates, and the recorded iterations and F, which is 0 without a recording."""
    loop, recorded, fitted = Loop(teacher_state, rate, seed), 0, 0
    roles = {"teacher": loop.teacher, "fake_score": loop.fake}
    roles |= {"generator_optimizer": loop.optimizers[0], "fake_score_optimizer": loop.optimizers[1]}
    if schedule is None:
        loop.train()
        return loop, (0, 0)
    with tempfile.TemporaryDirectory() as folder:
        place = {"path": f"{folder}/path", "every": record} if record else {}
        with disback.attach(**roles, **place, record=record, schedule=schedule, codec="exact") as handle:
            while record and handle.phase == "recording":
                loop.fake_step(RECORDING)
                loop.idle_step()
            if record:
                manifest = disback.DegradationPath.from_pretrained(f"{folder}/path").manifest
                recorded, fitted = manifest.ended, manifest.updates_to_fit
            if divided:
                loop.factor = lambda: 1 / (1 - handle.position)
            loop.train()
    return loop, (recorded, fitted)


def trained_teacher():
    place = world("digits-conv")
    torch.manual_seed(0)
    network, stream = Denoiser(place.sigma_data), seeded(1)
    average = [weight.detach().clone() for weight in network.parameters()]
    optimizer = torch.optim.Adam(network.parameters(), lr=TEACHER_RATE, betas=(0.9, 0.99))
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, TEACHER_UPDATES)
    for _ in range(TEACHER_UPDATES):
        x_0 = place.data[torch.randint(len(place.data), (64,), generator=stream)].view(-1, 1, 8, 8)
        log_sigma, eps = (torch.randn(s, generator=stream) for s in ((64,), (64, 1, 8, 8)))
        optimizer.zero_grad()
        denoising(network, x_0, log_sigma, eps).backward()
        optimizer.step()
        falling.step()
        torch._foreach_lerp_(average, [weight.detach() for weight in network.parameters()], 0.01)
    return dict(zip(dict(network.named_parameters()), average, strict=True))


def compare():
    torch.set_num_threads(1)
    teacher = trained_teacher()
    scores = {rate: median(results.final(run(teacher, rate, seed)[0].curve) for seed in TUNING) for rate in RATES}
    print(scores, flush=True)
    rate = min(scores, key=scores.get)
    found = {}

    def add(name, loop, recorded):
        entry = found.setdefault(
            name, {"updates": [*range(0, UPDATES + 1, EVALUATE_EVERY)], "ema": [], "recorded": [], "steps": []}
        )
        ends = (*WINDOWS, UPDATES)
        entry["steps"].append([sum(loop.lengths[a:b]) / (b - a) for a, b in zip((0, *ends), ends, strict=False)])
        entry["ema"].append(loop.curve)
        entry["recorded"].append(recorded)
        print(name, loop.curve[-1], recorded, flush=True)

    schedules = {method.name: method.schedule for method in CANDIDATES}
    schedules["walk, divided"] = Altered()  # its gradient is divided in the loop: a schedule's factor is at most 1
    for seed in SEEDS:
        add("diff-instruct", *run(teacher, rate, seed))
        add("diff-instruct 1.25", *run(teacher, 1.25 * rate, seed))
        for name, schedule in schedules.items():
            add(name, *run(teacher, rate, seed, schedule, 200, name == "walk, divided"))
        fitted = found["auto"]["recorded"][-1][1]
        ramp = disback.schedules.GradientRamp(3 * fitted, depth=0.9)
        add("ramp 3F", run(teacher, rate, seed, ramp)[0], (0, fitted))
    for entry in found.values():
        entry["ema"] = results.curves(entry["ema"])
    line = {"regime": NAME, "times": 1.0, "seeds": list(SEEDS), "base": rate, "runs": results.rounded(found)}
    with results.COMPARED.open("a") as lines:
        lines.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    if not any(line["regime"] == NAME for line in results.compared()):
        compare()
