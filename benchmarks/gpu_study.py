"""Compare DisBack with Diff-Instruct and its controls on one GPU, in minutes, without a download.

    python benchmarks/gpu_study.py --out DIR                   # nine minutes, whatever the GPU
    python benchmarks/gpu_study.py --out DIR --tiny            # the same study, small: one minute of a CPU

The data are digits of seven segments, drawn by code. A part of the budget trains a U-Net of diffusers with EDM's
preconditioning as the teacher. Then each learning rate has a process of its own, in which the methods take turns, round
by round, so that they have made as many rounds whenever the time is over. A round is an update of s_phi and one of the
generator; a recording costs a whole round for each of its updates, as in any loop that nobody edits.

| method          | what it is                                                                              |
|-----------------|-----------------------------------------------------------------------------------------|
| diff-instruct   | the loop, without DisBack                                                               |
| rate x 1.25     | the same at 1.25 times the learning rate of both networks                               |
| gradient ramp   | the same with the gradient ramped up over 3F updates, without a path; F is disback's    |
| warm start      | s_phi from a recording of disback's length, the teacher does not move                   |
| disback         | `attach` with its defaults                                                              |

DIR gets teacher.pt, rate-R.json while the study runs, and study.json, study.txt and study.png at the end.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import gpu_study_report as report
import torch
from segment_digits import draw
from torch import nn
from torch.nn.functional import conv2d, relu

import disback_plugin as disback
from disback_plugin.losses import denoising, diff_instruct
from disback_plugin.metrics import frechet_distance
from disback_plugin.noise import Karras, add_noise, expand, lognormal_sigma
from disback_plugin.prediction import Prediction, edm_weight

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SIGMA_DATA, SIGMA_INIT = 0.5, 2.5  # EDM's, and the published code's noise scale of the generator's input
X0 = {"alpha": 1.0, "prediction": Prediction.X0}
METHODS = ("diff-instruct", "rate x 1.25", "gradient ramp", "warm start", "disback")
GPU = {
    "pixels": 28, "images": 50_000, "channels": (64, 128, 192), "batch": 64, "samples": 4_000, "every": 50,
    "rates": (1e-5, 3e-5, 1e-4), "teacher_rate": 5e-4, "teacher_updates": 20_000, "updates": 10_000, "budget": 530.0,
    "record": {},
}  # fmt: skip
TINY = {
    "pixels": 8, "images": 1_000, "channels": (8, 8), "batch": 8, "samples": 200, "every": 10,
    "rates": (1e-3,), "teacher_rate": 4e-3, "teacher_updates": 120, "updates": 30, "budget": 600.0,
    "record": {"record": 24, "every": 12},
}  # fmt: skip


class Denoiser(nn.Module):
    """A U-Net of diffusers with attention that predicts x_0 at noise scale sigma (EDM, arXiv 2206.00364, Table 1)."""

    def __init__(self, pixels, channels):
        super().__init__()
        from diffusers import UNet2DModel

        self.unet = UNet2DModel(
            sample_size=pixels, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=channels,
            down_block_types=("DownBlock2D", *["AttnDownBlock2D"] * (len(channels) - 1)),
            up_block_types=(*["AttnUpBlock2D"] * (len(channels) - 1), "UpBlock2D"),
            norm_num_groups=8, attention_head_dim=8 if channels[0] < 64 else 32,
        )  # fmt: skip

    def forward(self, x, sigma):
        s = expand(sigma, like=x)
        total = (s**2 + SIGMA_DATA**2).sqrt()
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=DEVICE.type == "cuda"):
            output = self.unet(x / total, 100 * sigma.log()).sample
        return SIGMA_DATA**2 / total**2 * x + s * SIGMA_DATA / total * output.float()


def noised(x, stream):
    """Return x_t, eps and sigma, the latter from EDM's distribution."""
    eps = torch.randn(x.shape, generator=stream, device=DEVICE)
    sigma = lognormal_sigma(len(x), generator=stream, device=DEVICE)
    return add_noise(x, eps, alpha=1.0, sigma=expand(sigma, like=x)), eps, sigma


def fake_loss(network, x, stream):
    """Return the denoising loss of a network on samples x, with EDM's weight."""
    x_t, eps, sigma = noised(x, stream)
    s = expand(sigma, like=x)
    return denoising(network(x_t, sigma), x, eps, sigma=s, weight=edm_weight(s), **X0)


class Features:
    """The distance of samples to the data: Frechet on 64 features of two fixed random convolutions."""

    def __init__(self, data):
        stream = torch.Generator().manual_seed(7)
        shapes = ((32, 1, 5, 5), (32, 32, 3, 3))
        self.kernels = [torch.randn(s, generator=stream).div(math.prod(s[1:]) ** 0.5).to(DEVICE) for s in shapes]
        self.data = self(data)

    def __call__(self, x):
        x = relu(conv2d(x, self.kernels[0], stride=2))
        x = relu(conv2d(x, self.kernels[1], padding=1))
        return torch.cat([x.mean((2, 3)), x.square().mean((2, 3)).sqrt()], 1).cpu()

    def distance(self, x):
        return frechet_distance(self(x), self.data)


def train_teacher(plan, data, until, seed=0):
    """Return a network trained on the data until a moment, and its losses, a mean of each tenth."""
    torch.manual_seed(seed)
    teacher, stream = Denoiser(plan["pixels"], plan["channels"]).to(DEVICE), torch.Generator(DEVICE).manual_seed(seed)
    adam = torch.optim.Adam(teacher.parameters(), lr=plan["teacher_rate"])
    average, losses = torch.optim.swa_utils.AveragedModel(teacher, multi_avg_fn=ema(0.995)), []
    while len(losses) < plan["teacher_updates"] and time.time() < until:
        x = data[torch.randint(len(data), (plan["batch"],), generator=stream, device=DEVICE)]
        update(adam, loss := fake_loss(teacher, x, stream))
        average.update_parameters(teacher)
        losses.append(loss.detach())
        if len(losses) % 100 == 0 and DEVICE.type == "cuda":
            torch.cuda.synchronize()  # so that the clock is that of the device
    parts = torch.stack(losses).tensor_split(min(10, len(losses)))
    return average.module.requires_grad_(False), [part.mean().item() for part in parts]


@torch.no_grad()
def sampled(network, plan, steps=18):
    """Return samples of a network by EDM's second-order sampler (arXiv 2206.00364, Algorithm 1, deterministic)."""
    stream, parts = torch.Generator(DEVICE).manual_seed(3), []
    sigmas = [*Karras()(torch.linspace(1, 0, steps))[1].tolist(), 0.0]
    for count in [min(500, plan["samples"])] * -(-plan["samples"] // 500):
        ones = torch.ones(count, device=DEVICE)
        x = sigmas[0] * torch.randn(count, 1, plan["pixels"], plan["pixels"], generator=stream, device=DEVICE)
        for now, then in pairwise(sigmas):
            slope = (x - network(x, now * ones)) / now
            ahead = x + (then - now) * slope
            if then:
                slope = (slope + (ahead - network(ahead, then * ones)) / then) / 2
            x = x + (then - now) * slope
        parts.append(x)
    return torch.cat(parts)


def ema(decay):
    return torch.optim.swa_utils.get_ema_multi_avg_fn(decay)


def update(optimizer, loss):
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


class Run:
    """One method at one learning rate: three networks, two optimizers, and `attach` if `options` are its arguments."""

    def __init__(self, teacher, plan, rate, features, options=None):
        self.plan, self.rate, self.features, self.recorded, self.rounds = plan, rate, features, 0, 0
        self.teacher, self.fake, self.generator = (copy.deepcopy(teacher) for _ in range(3))
        self.fake.requires_grad_(True), self.generator.requires_grad_(True)
        self.adam_f, self.adam_g = (
            torch.optim.Adam(net.parameters(), lr=rate, betas=(0.0, 0.999)) for net in (self.fake, self.generator)
        )
        self.average = torch.optim.swa_utils.AveragedModel(self.generator, multi_avg_fn=ema(0.99))
        self.stream = torch.Generator(DEVICE).manual_seed(1)
        self.curve, self.steps = [], []
        roles = {"teacher": self.teacher, "fake_score": self.fake, "generator_optimizer": self.adam_g}
        self.handle = options and disback.attach(**roles, fake_score_optimizer=self.adam_f, **options)

    @property
    def updates(self):
        return self.rounds - self.recorded

    def sample(self, count, network=None, stream=None):
        shape = (count, 1, self.plan["pixels"], self.plan["pixels"])
        z = SIGMA_INIT * torch.randn(shape, generator=stream or self.stream, device=DEVICE)
        return (network or self.generator)(z, torch.full((count,), SIGMA_INIT, device=DEVICE))

    def round(self):
        """Update s_phi on samples, then the generator by Eq. 8 with Diff-Instruct's weight, sigma^2."""
        if self.rounds == 0:
            self.evaluate()
        recording = bool(self.handle) and self.handle.phase == "recording"
        batch = self.plan["batch"]
        with torch.no_grad():
            x = self.sample(batch)
        update(self.adam_f, fake_loss(self.fake, x, self.stream))
        x = self.sample(batch)
        with torch.no_grad():
            x_t, _, sigma = noised(x, self.stream)
            real, fake = self.teacher(x_t, sigma), self.fake(x_t, sigma)
        s = expand(sigma, like=x)
        measured = not recording and self.updates % (self.plan["every"] // 5) == 0
        before = [p.detach().clone() for p in self.generator.parameters()] if measured else []
        update(self.adam_g, diff_instruct(x, real, fake, sigma=s, weight=s**2, **X0))
        self.rounds, self.recorded = self.rounds + 1, self.recorded + recording
        if measured:
            pairs = zip(self.generator.parameters(), before, strict=True)
            moved = torch.cat([(after.detach() - then).flatten() for after, then in pairs])
            self.steps.append((self.updates, moved.square().mean().sqrt() / self.rate))
        if not recording:
            self.average.update_parameters(self.generator)
            if self.updates % self.plan["every"] == 0:
                self.evaluate()

    @torch.no_grad()
    def evaluate(self):
        fixed = torch.Generator(DEVICE).manual_seed(2)
        count = self.plan["samples"]
        parts = [self.sample(min(500, count), self.average, fixed) for _ in range(-(-count // 500))]
        self.curve.append((self.updates, self.features.distance(torch.cat(parts))))

    def result(self):
        fitted = self.handle.path.manifest.updates_to_fit if self.handle and self.handle.path is not None else None
        return {
            "rate": self.rate, "recorded": self.recorded, "rounds": self.rounds, "fitted": fitted, "curve": self.curve,
            "steps": [(at, float(step)) for at, step in self.steps],
        }  # fmt: skip


def study(plan, rate, teacher, features, folder, until):
    """Let the methods take turns until a moment, and write what they found at every evaluation."""
    runs, file = {}, folder / f"rate-{rate:g}.json"
    path = folder / f"path-{rate:g}"
    build = lambda scale=1.0, **options: Run(teacher, plan, scale * rate, features, options or None)  # noqa: E731
    runs["disback"] = build(path=path, **plan["record"])
    while runs["disback"].handle.phase == "recording" and time.time() < until:
        runs["disback"].round()
    recorded = runs["disback"].recorded
    fitted = runs["disback"].result()["fitted"] or recorded
    runs["diff-instruct"], runs["rate x 1.25"] = build(), build(1.25)
    runs["gradient ramp"] = build(record=0, schedule=f"grad-ramp:{3 * fitted}")
    runs["warm start"] = build(path=f"{path}-warm", record=recorded, every=recorded, schedule="warm")
    while time.time() < until and any(run.updates < plan["updates"] for run in runs.values()):
        run = min(runs.values(), key=lambda run: run.updates)  # a recording is behind, and catches up
        count = len(run.curve)
        run.round()
        if len(run.curve) > count and run is runs["warm start"]:
            report.write(file, {name: runs[name].result() for name in METHODS})
    report.write(file, {name: runs[name].result() for name in METHODS})
    for run in runs.values():
        if run.handle:
            run.handle.detach()


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tiny", action="store_true", help="small networks and images, few updates")
    parser.add_argument("--budget", type=float, help="seconds for everything, until the last file is written")
    parser.add_argument("--rates", type=float, nargs="+")
    # A process of the study itself trains one rate from the teacher that is there, until a moment.
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    plan = dict(TINY if options.tiny else GPU)
    budget, rates = options.budget or plan["budget"], options.rates or plan["rates"]
    began = time.time()
    torch.set_float32_matmul_precision("high")  # TF32
    options.out.mkdir(parents=True, exist_ok=True)
    data = draw(plan["images"], plan["pixels"], device=DEVICE)
    features = Features(data)
    if options.until:
        teacher = Denoiser(plan["pixels"], plan["channels"]).to(DEVICE).requires_grad_(False)
        teacher.load_state_dict(torch.load(options.out / "teacher.pt", weights_only=True))
        study(plan, rates[0], teacher, features, options.out, options.until)
        return
    teacher, losses = train_teacher(plan, data, began + 0.25 * budget)
    torch.save(teacher.state_dict(), options.out / "teacher.pt")
    about = {
        "device": torch.cuda.get_device_name() if DEVICE.type == "cuda" else "CPU", "torch": torch.__version__,
        "weights": sum(p.numel() for p in teacher.parameters()), "plan": plan, "teacher losses": losses,
        "teacher": features.distance(sampled(teacher, plan)),
        "other data": features.distance(draw(plan["samples"], plan["pixels"], seed=1, device=DEVICE)),
    }  # fmt: skip
    until = began + 0.94 * budget
    script = [sys.executable, __file__, "--out", options.out, "--until", until, *["--tiny"] * options.tiny, "--rates"]
    others = [subprocess.Popen([*map(str, script), str(rate)]) for rate in rates[1:]]
    study(plan, rates[0], teacher, features, options.out, until)
    failed = [process.wait() for process in others]
    files = {f"{rate:g}": options.out / f"rate-{rate:g}.json" for rate in rates}
    found = {rate: json.loads(file.read_text()) for rate, file in files.items() if file.exists()}
    found = {rate: methods for rate, methods in found.items() if all(run["curve"] for run in methods.values())}
    report.finish(options.out, {**about, "seconds": time.time() - began, "rates": found})
    sys.exit(max(failed, default=0))


if __name__ == "__main__":
    main()
