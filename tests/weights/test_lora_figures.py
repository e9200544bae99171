"""What the README says of LoRA nodes, measured: by hand, with -m slow (four minutes, 6 GB)."""

from __future__ import annotations

import copy
import statistics

import pytest
import torch
from diffusers import UNet2DConditionModel
from lora_worlds import Eps, Under, inject
from peft import LoraConfig
from torch import nn

import disback_plugin as disback
from disback_plugin import lora, losses, metrics
from disback_plugin.path.codecs import Entry
from disback_plugin.prediction import Prediction
from disback_plugin.weights.network import ScoreNetwork
from disback_plugin.weights.tensors import TensorMeta

pytestmark = pytest.mark.slow

ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
LCM_LORA = [
    *(*ATTENTION, "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2", "conv_shortcut"),
    *("downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj"),
]
NODES = 4  # of the paper's recording


def whole_path(state):
    """Bytes of a path of whole networks in float32, nodes in int8."""
    entries = [Entry("int8", TensorMeta(tensor.dtype, tensor.shape)) for tensor in state.values()]
    node = sum(meta.shape.numel() * meta.dtype.itemsize for entry in entries for meta in entry.stored("").values())
    return sum(t.numel() * t.element_size() for t in state.values()) + NODES * node


@pytest.mark.parametrize(("targets", "most"), [(ATTENTION, 0.03), (LCM_LORA, 0.08)], ids=["attention", "lcm-lora"])
def test_a_path_of_rank_64_is_a_small_part_of_that_of_whole_networks_of_stable_diffusion(tmp_path, targets, most):
    unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768)  # Stable Diffusion 1.5's
    full, base = whole_path(unet.state_dict()), lora.base_checksum(unet)
    unet.add_adapter(LoraConfig(r=64, target_modules=targets), "fake")
    lora.add_teacher(unet, like="fake")
    trained = [p for n, p in unet.named_parameters() if ".fake." in n]

    @torch.no_grad()
    def step():
        for parameter in trained:
            parameter.add_(torch.randn_like(parameter), alpha=1e-3)

    teacher, fake = ScoreNetwork(unet, lora_adapter="teacher"), ScoreNetwork(unet, lora_adapter="fake")
    path = disback.record(teacher, fake, step, path=tmp_path, iterations=NODES, every=1)
    for position in (4.0, 2.5, 1.0, 0.0):
        teacher.write(path.source(position))
    share = sum(file.stat().st_size for file in tmp_path.iterdir()) / full
    assert share < most
    assert lora.base_checksum(unet) == base


class Teacher(Eps):
    """One of four blobs in the plane."""

    def __init__(self):
        super().__init__(64)

    def forward(self, x_t, sigma):
        return super().forward(x_t / (1 + sigma**2).sqrt(), sigma)


def data(count, stream):
    modes = torch.tensor([[2.0, 0.0], [-2.0, 0.0], [0.0, 2.0], [0.0, -2.0]])
    return modes[torch.randint(4, (count,), generator=stream)] + 0.3 * torch.randn(count, 2, generator=stream)


def noised(x, stream):
    eps, sigma = torch.randn(len(x), 2, generator=stream), torch.randn(len(x), 1, generator=stream) * 1.2 - 0.4
    return x + sigma.exp() * eps, eps, sigma.exp()


def update(optimizer, loss):
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def trained_teacher(seed):
    torch.manual_seed(seed)
    network, stream = Teacher(), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    for _ in range(2000):
        x_t, eps, sigma = noised(data(128, stream), stream)
        update(optimizer, (network(x_t, sigma) - eps).square().mean())
    return network


def roles(base, adapters):
    """Teacher and fake score to call, the same as roles, and what is trained: adapters of rank 8, or two networks."""
    if not adapters:
        fake = copy.deepcopy(base)
        return base, fake, base, fake, list(fake.parameters())
    inject(base, "fake", r=8)
    lora.add_teacher(base, like="fake")
    own = [p.requires_grad_(True) for n, p in base.named_parameters() if ".fake." in n]
    called = [Under(base, name) for name in ("teacher", "fake")]
    return *called, *(ScoreNetwork(base, lora_adapter=name) for name in ("teacher", "fake")), own


def distance(teacher, folder, seed, *, adapters, rate):
    """Sliced Wasserstein distance to the data of a student distilled in 800 updates."""
    torch.manual_seed(seed)
    stream = torch.Generator().manual_seed(seed + 100)
    generator = nn.Sequential(nn.Linear(2, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 2))
    with torch.no_grad():
        generator[-1].bias += 4.0
    s_theta, s_phi, *played, own = roles(copy.deepcopy(teacher), adapters)
    optimizer_g, optimizer_f = torch.optim.Adam(generator.parameters(), 1e-3), torch.optim.Adam(own, rate)
    optimizers = {"generator_optimizer": optimizer_g, "fake_score_optimizer": optimizer_f}
    plan = {"path": folder, "record": 100, "every": 25, "schedule": "ramp:100"}
    with disback.attach(teacher=played[0], fake_score=played[1], **optimizers, **plan) as handle:
        while handle.generator_updates < 800:
            x_t, eps, sigma = noised(generator(torch.randn(64, 2, generator=stream)).detach(), stream)
            update(optimizer_f, (s_phi(x_t, sigma) - eps).square().mean())
            x = generator(torch.randn(64, 2, generator=stream))
            x_t, eps, sigma = noised(x.detach(), stream)
            with torch.no_grad():
                real, fake = s_theta(x_t, sigma), s_phi(x_t, sigma)
            scales = {"alpha": 1.0, "sigma": sigma, "prediction": Prediction.EPS, "weight": sigma.square() / 64}
            update(optimizer_g, losses.diff_instruct(x, real, fake, **scales))
    stream.manual_seed(7)
    with torch.no_grad():
        samples = generator(torch.randn(2000, 2, generator=stream))
    return float(metrics.sliced_wasserstein(samples, data(2000, stream)))


def test_a_student_of_adapters_ends_where_one_of_whole_networks_does(tmp_path):
    teacher = trained_teacher(1)
    # Each at the best of three learning rates, found on another teacher and other seeds.
    ways = {"adapters": {"adapters": True, "rate": 3e-2}, "whole": {"adapters": False, "rate": 1e-2}}
    ends = {
        name: [distance(teacher, tmp_path / f"{name}-{seed}", seed, **way) for seed in range(10, 20)]
        for name, way in ways.items()
    }
    differences = [a - b for a, b in zip(ends["adapters"], ends["whole"], strict=True)]
    error = statistics.stdev(differences) / len(differences) ** 0.5
    assert abs(statistics.mean(differences)) < 2 * error, ends
    assert error < 0.1 * statistics.mean(ends["whole"]), "too much noise to tell anything"
