"""Train the teachers of `disback demo` again: `python benchmarks/train_demo_teachers.py --out DIR`, in five minutes.

Eq. 5 with the noise levels and the weight of EDM (arXiv 2206.00364, Table 1), on all of the data. The teacher is an
average of the weights over the last part of the training. "digits-conv" is a teacher of `bench_convergence.py`.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from ensemble_unet import UNet
from safetensors.torch import save_file

from disback_plugin.demo.trainer import denoising_loss
from disback_plugin.demo.worlds import DATA, NETWORKS, Denoiser, ensemble, random_weights
from disback_plugin.noise import lognormal_sigma

# Updates, batch, and the peak of Adam's learning rate, which rises for 100 updates and falls as a cosine to zero.
RECIPES = {"digits": (8_000, 256, 2e-3), "digits-conv": (6_000, 128, 4e-3), "gaussians": (5_000, 256, 2e-3)}
AVERAGE = 0.999
NETWORKS["digits-conv"] = lambda members: Denoiser(UNet(members))


def train(network, steps, batch, rate):
    """Return the averaged weights of one denoiser (E = 1)."""
    data, stream = DATA[network.removesuffix("-conv")](), torch.Generator().manual_seed(0)
    teacher = ensemble(network, [random_weights(network, stream)])
    average = [parameter.detach().clone() for parameter in teacher.parameters()]
    optimizer = torch.optim.Adam(teacher.parameters(), lr=rate, betas=(0.9, 0.99))
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda k: min(1.0, k / 100) * (1 + math.cos(math.pi * k / steps)) / 2
    )
    for _ in range(steps):
        x_0 = data[torch.randint(len(data), (1, batch), generator=stream)]
        sigma = lognormal_sigma(batch, generator=stream).reshape(1, batch, 1)
        optimizer.zero_grad()
        denoising_loss(teacher, x_0, sigma, torch.randn(x_0.shape, generator=stream)).backward()
        optimizer.step()
        scheduler.step()
        torch._foreach_lerp_(average, [weight.detach() for weight in teacher.parameters()], 1 - AVERAGE)
    return dict(zip(teacher.state_dict(), average, strict=True))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--network", choices=sorted(RECIPES), action="append", help="only this one")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    for name in options.network or sorted(RECIPES):
        save_file(train(name, *RECIPES[name]), options.out / f"{name}.safetensors")
