"""A distillation run small enough for a test: real losses, real optimizers, its own random stream."""

from __future__ import annotations

import torch
from torch import nn

from disback_plugin import losses
from disback_plugin.noise import add_noise
from disback_plugin.prediction import Prediction

OPTIMIZERS = {
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "adam-fused": lambda p: torch.optim.Adam(p, lr=1e-2, fused=True),
    "adam-foreach": lambda p: torch.optim.Adam(p, lr=1e-2, foreach=True),
    "sgd-momentum": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, weight_decay=0.1),
    "nadam": lambda p: torch.optim.NAdam(p, lr=1e-2),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-2, momentum=0.9),
}


class Score(nn.Module):
    """A small eps-predictor with everything that a state dict can hold: tied weights, float and integer buffers."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(3, width), nn.BatchNorm1d(width), nn.Tanh(), nn.Linear(width, 2))
        self.left = nn.Linear(2, 2, bias=False)
        self.right = nn.Linear(2, 2, bias=False)
        self.right.weight = self.left.weight
        self.register_buffer("scratch", torch.zeros(3), persistent=False)

    def forward(self, x_t, sigma):
        y = self.inner(torch.cat([x_t, sigma.expand(len(x_t), 1)], dim=1))
        return self.right(self.left(y)) + y


class Run:
    """Generator, teacher, fake score and their loop, as any trainer has them. `step()` is one round of the loop."""

    def __init__(self, seed: int = 0, optimizer: str = "adam", dtype: torch.dtype = torch.float32) -> None:
        self.stream = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.teacher, self.fake_score = Score().to(dtype), Score()
            self.generator = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2))
        # As Diff-Instruct and SiD do: the fake score starts as the teacher.
        self.fake_score.load_state_dict(self.teacher.state_dict())
        self.teacher.eval().requires_grad_(False)
        self.optimizer_g = OPTIMIZERS[optimizer](self.generator.parameters())
        self.optimizer_f = OPTIMIZERS[optimizer](self.fake_score.parameters())

    def roles(self):
        return {
            "teacher": self.teacher,
            "fake_score": self.fake_score,
            "generator_optimizer": self.optimizer_g,
            "fake_score_optimizer": self.optimizer_f,
        }

    def randn(self, *shape):
        return torch.randn(*shape, generator=self.stream)

    def fake_step(self):
        x_0 = self.generator(self.randn(16, 2)).detach()
        eps, sigma = self.randn(16, 2), self.randn(16, 1).exp()
        output = self.fake_score(add_noise(x_0, eps, alpha=1.0, sigma=sigma), sigma)
        loss = losses.denoising(output, x_0, eps, alpha=1.0, sigma=sigma, prediction=Prediction.EPS)
        self.optimizer_f.zero_grad()
        loss.backward()
        self.optimizer_f.step()

    def generator_loss(self):
        x = self.generator(self.randn(16, 2))
        eps, sigma = self.randn(16, 2), self.randn(16, 1).exp()
        x_t = add_noise(x.detach(), eps, alpha=1.0, sigma=sigma)
        with torch.no_grad():
            real, fake = self.teacher(x_t.to(self.dtype), sigma.to(self.dtype)).float(), self.fake_score(x_t, sigma)
        return losses.diff_instruct(
            x, real, fake, alpha=1.0, sigma=sigma, prediction=Prediction.EPS, weight=sigma.square()
        )

    @property
    def dtype(self):
        return self.teacher.left.weight.dtype

    def generator_step(self):
        self.optimizer_g.zero_grad()
        self.generator_loss().backward()
        self.optimizer_g.step()

    def step(self):
        self.fake_step()
        self.generator_step()

    def steps(self, count):
        for _ in range(count):
            self.step()

    def checkpoint(self):
        """What a trainer saves: everything but the teacher."""
        return {
            "generator": clone(self.generator.state_dict()),
            "fake_score": clone(self.fake_score.state_dict()),
            "optimizer_g": clone(self.optimizer_g.state_dict()),
            "optimizer_f": clone(self.optimizer_f.state_dict()),
            "stream": self.stream.get_state(),
        }

    def load(self, checkpoint):
        checkpoint = clone(checkpoint)
        self.generator.load_state_dict(checkpoint["generator"])
        self.fake_score.load_state_dict(checkpoint["fake_score"])
        self.optimizer_g.load_state_dict(checkpoint["optimizer_g"])
        self.optimizer_f.load_state_dict(checkpoint["optimizer_f"])
        self.stream.set_state(checkpoint["stream"])


def clone(tree):
    if isinstance(tree, torch.Tensor):
        return tree.detach().clone()
    if isinstance(tree, dict):
        return {key: clone(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [clone(value) for value in tree]
    return tree


def weights_of(network):
    """Return copies of a network's weights and buffers."""
    return clone(dict(network.state_dict()))


def difference(a, b):
    """Names at which two nested states differ in a single bit, dtype or shape; empty if they are the same."""
    if isinstance(a, torch.Tensor):
        same = isinstance(b, torch.Tensor) and a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)
        return [] if same else ["."]
    if isinstance(a, dict):
        if a.keys() != b.keys():
            return sorted(map(str, a.keys() ^ b.keys()))
        return [f"{key}/{name}" for key in a for name in difference(a[key], b[key])]
    if isinstance(a, list):
        return [f"{i}/{name}" for i, pair in enumerate(zip(a, b, strict=True)) for name in difference(*pair)]
    return [] if a == b else ["."]


def everything(run):
    """All that a run consists of, the teacher included."""
    return run.checkpoint() | {"teacher": clone(dict(run.teacher.state_dict()))}


def all_of(run, handle):
    """Everything that an attached run is, as it could be compared."""
    return everything(run) | {
        "state": {k: v for k, v in handle.state_dict().items() if k != "path"},
        "position": handle.position,
    }


def hooks(run):
    """How many hooks there are on its optimizers."""
    return [
        len(registry)
        for optimizer in (run.optimizer_g, run.optimizer_f)
        for registry in (optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks)
    ]
