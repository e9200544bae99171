"""What each codec costs and saves on a real network: a diffusers U-Net of 43 M parameters, as teacher of digits.

The teacher is trained for a moment and then recorded on samples of the initial student (the teacher's own one-step
sample, as DMD2 and SiD start), one path a codec along the very same updates. Takes about ten minutes on one core:

    pytest benchmarks/bench_codecs.py -m slow -s

The last tables are in benchmarks/codecs.md. Goals: int8 >= 3.9x smaller than float32 at <= 0.5 % error, int6 >= 5x at
<= 1 %, exact >= 1.4x; five int6 nodes smaller than one teacher checkpoint; and a student of digits that is trained
along an int8 path ends where it ends along the exact one, within the noise of the seeds.
"""

from __future__ import annotations

import copy
import statistics
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DModel
from disback_plugin.path.probes import Probe
from sklearn.datasets import load_digits
from torch import nn

from disback_plugin import losses
from disback_plugin.demo import study
from disback_plugin.noise import add_noise, expand, lognormal_sigma
from disback_plugin.path.codecs import SMALLEST_FIRST
from disback_plugin.path.degradation_path import DegradationPath
from disback_plugin.path.manifest import Recording
from disback_plugin.path.model_card import percent
from disback_plugin.prediction import Prediction
from disback_plugin.schedules import Ramp
from disback_plugin.weights.network import ScoreNetwork

SIGMA_DATA = 0.5


class Denoiser(nn.Module):
    """A U-Net under EDM's preconditioning (arXiv 2206.00364, Table 1); predicts x_0 from x_t = x_0 + sigma eps."""

    def __init__(self):
        super().__init__()
        self.unet = UNet2DModel(
            sample_size=8,
            in_channels=1,
            out_channels=1,
            block_out_channels=(128, 256, 384),
            down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        )

    def forward(self, x_t, sigma):
        variance = sigma**2 + SIGMA_DATA**2
        c_skip, c_out, c_in = SIGMA_DATA**2 / variance, sigma * SIGMA_DATA / variance.sqrt(), 1 / variance.sqrt()
        output = self.unet(expand(c_in, x_t) * x_t, 250 * sigma.log()).sample
        return expand(c_skip, x_t) * x_t + expand(c_out, x_t) * output


def step(net, optimizer, x_0):
    """One denoising update, Eq. 7."""
    sigma, eps = lognormal_sigma(len(x_0)), torch.randn_like(x_0)
    scale = expand(sigma, x_0)
    output = net(add_noise(x_0, eps, alpha=1.0, sigma=scale), sigma)
    weight = losses.edm_weight(scale, sigma_data=SIGMA_DATA)
    loss = losses.denoising(output, x_0, eps, alpha=1.0, sigma=scale, prediction=Prediction.X0, weight=weight)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


@pytest.fixture(scope="module")
def teacher():
    torch.manual_seed(0)
    digits = torch.tensor(load_digits().images / 8 - 1, dtype=torch.float32)[:, None]
    net = Denoiser()
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-4)
    for _ in range(150):
        step(net, optimizer, digits[torch.randint(len(digits), (16,))])
    return net


@pytest.mark.slow
@pytest.mark.parametrize("rate", [1e-4, 1e-5])
def bench_codecs(teacher, rate, tmp_path):
    torch.manual_seed(1)
    generator, student_score = copy.deepcopy(teacher).eval(), copy.deepcopy(teacher)
    optimizer = torch.optim.Adam(student_score.parameters(), lr=rate)
    role = ScoreNetwork(student_score)
    probe = Probe(role)
    start = ScoreNetwork(teacher).state_dict()
    paths = {
        codec: DegradationPath.create(tmp_path / codec, start, Recording(60, 15, codec))
        for codec in (*SMALLEST_FIRST, "auto")
    }
    for iteration in range(1, 61):
        with torch.no_grad():
            x_0 = generator(2.5 * torch.randn(16, 1, 8, 8), torch.full((16,), 2.5))
        step(student_score, optimizer, x_0)
        if iteration % 15 == 0:
            for path in paths.values():
                path.append(role.state_dict(), iteration=iteration, probe=probe)
    size = sum(4 * t.numel() for t in start.values())
    print(f"\nrate {rate:g}, {size // 4:,} parameters, four nodes\n")
    print("| codec | smaller than float32 | error in scores, worst node | error in weights | nodes | checkpoints |")
    print("|---|---|---|---|---|---|")
    ratio, error, share = {}, {}, {}
    for codec, path in paths.items():
        ratio[codec] = min(size / node.bytes for node in path.nodes)
        error[codec] = max(node.codec_error for node in path.nodes)
        share[codec] = sum(node.bytes for node in path.nodes) / size
        weights = max(node.weight_error for node in path.nodes)
        kinds = ", ".join(dict.fromkeys(node.codec for node in path.nodes))
        print(
            f"| `{codec}` | {ratio[codec]:.2f} | {percent(error[codec])} | {percent(weights)} | {kinds} "
            f"| {share[codec]:.2f} |"
        )
        path.verify()
    assert ratio["int8"] >= 3.9
    assert error["int8"] <= 0.005
    assert ratio["int6"] >= 5
    assert error["int6"] <= 0.01
    assert ratio["exact"] >= 1.4
    assert error["exact"] == 0
    assert share["int6"] * 5 / 4 <= 1
    assert error["auto"] <= 0.01
    assert Path(paths["exact"].folder / "node-004.safetensors").exists()
    final = paths["exact"][4]
    assert all(torch.equal(final[name], tensor) for name, tensor in role.state_dict().items())


@pytest.mark.slow
def bench_students_of_coded_paths(tmp_path):
    """Ten seeds of the demonstration's first regime, along the same recording in five nodes, stored in several ways."""
    regime = replace(study.regime_of("mlp", "scratch"), every=5)
    finals = {}
    for codec in ("exact", "bf16", "int8", "int6", "int4"):
        run = study.Study(replace(regime, codec=codec), range(200, 210), tmp_path).distil(
            "disback", path=tmp_path / codec, schedule=Ramp(50)
        )
        finals[codec] = run.ema[-1]
    spread = statistics.stdev(finals["exact"])
    print(f"\nFrechet distance after {regime.settings.updates} updates, ten seeds; they spread by {spread:.3f}\n")
    print("| codec | median | mean | mean difference to exact | its standard error |")
    print("|---|---|---|---|---|")
    shift, error = {}, {}
    for codec, values in finals.items():
        differences = [a - b for a, b in zip(values, finals["exact"], strict=True)]
        shift[codec], error[codec] = statistics.mean(differences), statistics.stdev(differences) / len(values) ** 0.5
        print(
            f"| `{codec}` | {statistics.median(values):.3f} | {statistics.mean(values):.3f} "
            f"| {shift[codec]:+.4f} | {error[codec]:.4f} |"
        )
    assert abs(shift["int8"]) <= max(2 * error["int8"], 0.1 * spread)
    assert abs(shift["int8"]) <= spread
