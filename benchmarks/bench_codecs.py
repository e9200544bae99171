"""What each codec costs and saves on a real network: a diffusers U-Net of 43 M parameters, as teacher of digits.

The teacher is trained for a moment and then recorded on samples of the initial student (the teacher's own one-step
sample, as DMD2 and SiD start), one path a codec along the very same updates. Takes about ten minutes on one core:

    pytest benchmarks/bench_codecs.py -m slow -s

The last table is in benchmarks/codecs.md. Goals: int8 >= 3.9x smaller than float32 at <= 0.5 % error, int6 >= 5x at
<= 1 %, exact >= 1.4x; five int6 nodes smaller than one teacher checkpoint.
"""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DModel
from sklearn.datasets import load_digits
from torch import nn

from disback_plugin import losses
from disback_plugin.codecs import SMALLEST_FIRST
from disback_plugin.manifest import Recording, percent
from disback_plugin.noise import add_noise, expand, lognormal_sigma
from disback_plugin.probes import Probe
from disback_plugin.scores import Prediction
from disback_plugin.trajectory import DegradationPath
from disback_plugin.weights import ScoreNetwork

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
