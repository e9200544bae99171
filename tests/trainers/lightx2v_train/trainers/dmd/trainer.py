"""LightX2V's DMD (trainers/dmd/trainer.py:171-655): networks are made in train(), and the generator's turn is first."""

import copy
from types import SimpleNamespace

import torch
from networks import Net

from lightx2v_train.trainers.dmd.checkpoint import DmdCheckpointManager


class Model:  # model_zoo/base.py
    def __init__(self, network):
        self.transformer = network

    def denoiser_module(self):
        return self.transformer


class DmdTrainer:
    fake_train_type = "full"

    def __init__(self, folder, iterations, resume, save_at, ida):
        self.folder, self.iterations, self.resume, self.save_at, self.losses = folder, iterations, resume, save_at, []
        self.ida_trick = SimpleNamespace(enabled=ida, config=SimpleNamespace(decay=0.97))
        self.checkpoint_manager = DmdCheckpointManager(self)
        torch.manual_seed(1)
        self.model = Model(Net())

    def setup(self):
        network = self.model.denoiser_module()
        self.optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)  # base.py:setup
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: min(1.0, step / 3))
        self.fake_model = Model(copy.deepcopy(network))
        self.teacher_model = Model(copy.deepcopy(network).eval().requires_grad_(False))
        self.fake_optimizer = torch.optim.AdamW(self.fake_model.denoiser_module().parameters(), lr=1e-2)
        return self.checkpoint_manager.load(self.resume) if self.resume else 0

    def _iter_train_samples(self):
        while True:
            yield torch.randn(8, 2)

    def forward_loss(self, noise, stage):
        sigma = torch.rand(8, 1) + 0.1
        x = self.model.denoiser_module()(noise, torch.ones(8, 1))
        x_t = (x + sigma * torch.randn_like(x)).detach()
        if stage == "fake":
            return (self.fake_model.denoiser_module()(x_t, sigma) - x.detach()).square().mean()
        with torch.no_grad():
            fake, real = (each.denoiser_module()(x_t, sigma) for each in (self.fake_model, self.teacher_model))
        return ((fake - real) * x).mean()

    def train(self):
        iteration = self.setup()
        samples = self._iter_train_samples()
        while iteration < self.iterations:
            for stage in ("student", *["fake"] * 2):
                optimizer = self.optimizer if stage == "student" else self.fake_optimizer
                optimizer.zero_grad(set_to_none=True)
                loss = self.forward_loss(next(samples), stage)
                loss.backward()
                optimizer.step()
                if stage == "student":
                    self.lr_scheduler.step()
                optimizer.zero_grad(set_to_none=True)
                self.losses.append(loss.item())
            iteration += 1
            if iteration == self.save_at:
                self.save_checkpoint(iteration, None)

    def save_checkpoint(self, iteration, save_total_limit):
        return self.checkpoint_manager.save_checkpoint(iteration, save_total_limit)
