"""A distillation loop on a small U-Net: DMD on one core, both networks and both optimizers included."""

from __future__ import annotations

import torch

from disback_plugin import kernels
from disback_plugin.noise import Discrete, add_noise, expand
from disback_plugin.prediction import Prediction

SCHEDULE = Discrete((1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2).cumprod(0))
SHAPE = (4, 3, 32, 32)


def unet():
    from diffusers import UNet2DModel

    return UNet2DModel(
        sample_size=32, block_out_channels=(32, 64, 64), layers_per_block=1, norm_num_groups=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip


class Loop:
    """A one-step generator, a teacher, a fake score and their optimizers; `step()` updates the fake score and then the
    generator, each on samples of its own.
    """

    def __init__(self):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.generator, self.teacher, self.fake = (unet() for _ in range(3))
        self.teacher.requires_grad_(False)
        self.stream = torch.Generator().manual_seed(0)
        self.optimizers = {net: torch.optim.AdamW(net.parameters(), lr=1e-5) for net in (self.generator, self.fake)}

    def step(self):
        with torch.no_grad():
            x, eps, t, scales = self.sample()
        output = self.fake(add_noise(x, eps, **scales), t).sample
        self.update(self.fake, kernels.denoising(output, x, eps, **scales, prediction=Prediction.EPS))
        x, eps, t, scales = self.sample()
        with torch.no_grad():
            x_t = add_noise(x, eps, **scales)
            real, fake = self.teacher(x_t, t).sample, self.fake(x_t, t).sample
        self.update(self.generator, kernels.dmd(x, real, fake, eps=eps, **scales, prediction=Prediction.EPS))

    def sample(self):
        """Generated samples, their noise, times and scales."""
        z, eps = (torch.randn(SHAPE, generator=self.stream) for _ in range(2))
        t = torch.randint(20, 980, SHAPE[:1], generator=self.stream)
        alpha, sigma = (expand(value, like=z) for value in SCHEDULE(t))
        return z - self.generator(z, 999).sample, eps, t, {"alpha": alpha, "sigma": sigma}

    def update(self, network, loss):
        self.optimizers[network].zero_grad()
        loss.backward()
        self.optimizers[network].step()
