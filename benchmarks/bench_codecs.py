"""What each codec costs and saves on a real network: a diffusers U-Net of 43 M parameters, as teacher of digits.

The teacher is trained for a moment and then recorded on samples of the initial student (the teacher's own one-step
sample, as DMD2 and SiD start), one path a codec along the very same updates. The error of a codec in the scores is the
change that it makes in the network's output, on the student's noised samples, over the change from the node before:

    error = |s(decoded theta_i) - s(theta_i)| / |s(theta_i) - s(theta_{i-1})|

Takes minutes on one core:

    pytest benchmarks/bench_codecs.py -m slow -s

The tables, and when each row was measured, are in benchmarks/codecs.md. Goals: int8 >= 3.9x smaller than float32 at
<= 0.5 % error, exact without any; and a student of digits that is trained along an int8 path ends where it ends along
the exact one, within the noise of the seeds.
"""

from __future__ import annotations

import copy
import statistics

import pytest
import torch
from diffusers import UNet2DModel
from sklearn.datasets import load_digits
from torch import nn

from disback_plugin import losses
from disback_plugin.demo import Study, regime_of
from disback_plugin.noise import add_noise, expand, lognormal_sigma
from disback_plugin.path.codecs import CODECS
from disback_plugin.path.degradation_path import DegradationPath
from disback_plugin.path.manifest import Recording
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


def output_at(net, weights, inputs):
    """The output of the network on fixed inputs, at other weights than its own."""
    role = ScoreNetwork(net)
    before = {name: tensor.clone() for name, tensor in role.state_dict().items()}
    role.load_state_dict(weights)
    with torch.no_grad():
        output = net(*inputs)
    role.load_state_dict(before)
    return output


def error_in_scores(net, path, weights, previous, inputs):
    """The change of the output that the codec of the last node makes, over the change from the node before."""
    now, then, decoded = (output_at(net, state, inputs) for state in (weights, previous, path[-1]))
    return ((decoded - now).norm() / (now - then).norm()).item()


@pytest.mark.slow
@pytest.mark.parametrize("rate", [1e-4, 1e-5])
def bench_codecs(teacher, rate, tmp_path):
    torch.manual_seed(1)
    generator, student_score = copy.deepcopy(teacher).eval(), copy.deepcopy(teacher)
    optimizer = torch.optim.Adam(student_score.parameters(), lr=rate)
    role = ScoreNetwork(student_score)
    start = ScoreNetwork(teacher).state_dict()
    paths = {codec: DegradationPath.create(tmp_path / codec, start, Recording(60, 15, codec)) for codec in CODECS}
    errors = {codec: [] for codec in CODECS}
    for iteration in range(1, 61):
        with torch.no_grad():
            x_0 = generator(2.5 * torch.randn(16, 1, 8, 8), torch.full((16,), 2.5))
        step(student_score, optimizer, x_0)
        if iteration % 15 == 0:
            sigma = lognormal_sigma(len(x_0))
            inputs = add_noise(x_0, torch.randn_like(x_0), alpha=1.0, sigma=expand(sigma, x_0)), sigma
            for codec, path in paths.items():
                previous = path[-1]
                path.append(role.state_dict(), iteration=iteration)
                errors[codec].append(error_in_scores(student_score, path, role.state_dict(), previous, inputs))
    size = sum(4 * t.numel() for t in start.values())
    print(f"\nrate {rate:g}, {size // 4:,} parameters, four nodes\n")
    print("| codec | smaller than float32 | error in scores, worst node | error in weights | checkpoints |")
    print("|---|---|---|---|---|")
    ratio, error = {}, {}
    for codec, path in paths.items():
        ratio[codec] = min(size / node.bytes for node in path.nodes)
        error[codec] = max(errors[codec])
        share = sum(node.bytes for node in path.nodes) / size
        weights = max(node.weight_error for node in path.nodes)
        shares = f"{100 * error[codec]:.2g} % | {100 * weights:.2g} %"
        print(f"| `{codec}` | {ratio[codec]:.2f} | {shares} | {share:.2f} |")
        path.verify()
    assert ratio["int8"] >= 3.9
    assert error["int8"] <= 0.005
    assert error["exact"] == 0
    final = paths["exact"][4]
    assert all(torch.equal(final[name], tensor) for name, tensor in role.state_dict().items())


@pytest.mark.slow
def bench_students_of_coded_paths(tmp_path):
    """Ten seeds of the demonstration's first regime, along the same recording in five nodes, stored by both codecs."""
    regime = regime_of("digits", "scratch")
    finals = {}
    for codec in ("exact", "int8"):
        run = Study(regime, range(200, 210), tmp_path).distil(
            "disback", path=tmp_path / codec, record=25, every=5, codec=codec, schedule=Ramp(50)
        )
        finals[codec] = run.distance[-1]
    spread = statistics.stdev(finals["exact"])
    print(f"\nFrechet distance after {regime.rounds} rounds, ten seeds; they spread by {spread:.3f}\n")
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
