"""Self-Forcing's trainer (trainer/distillation.py at 33593df): networks in `model`, the generator's update first."""

import copy
from types import SimpleNamespace

import torch
from networks import Net


class Trainer:
    def __init__(self, config):
        torch.manual_seed(1)
        self.config, self.step = config, 0
        real_score = Net().requires_grad_(False)
        self.model = SimpleNamespace(generator=Net(), real_score=real_score, fake_score=copy.deepcopy(real_score))
        self.model.fake_score.requires_grad_(True)
        self.generator_optimizer = torch.optim.AdamW(self.model.generator.parameters(), lr=1e-2)  # :106
        self.critic_optimizer = torch.optim.AdamW(self.model.fake_score.parameters(), lr=1e-2)  # :114
        if config.generator_ckpt:  # :161, the fake score is not loaded
            self.model.generator.load_state_dict(torch.load(config.generator_ckpt)["generator"])

    def save(self):  # :182
        state = {"generator": self.model.generator.state_dict(), "critic": self.model.fake_score.state_dict()}
        torch.save(state, f"{self.config.logdir}/model_{self.step:06d}.pt")

    def fwdbwd_one_step(self, train_generator):  # :209
        model, noise = self.model, 80 * torch.randn(8, 2)
        sigma = torch.rand(8, 1) + 0.1
        with torch.set_grad_enabled(train_generator):
            image = model.generator(noise, torch.full((8, 1), 80.0))
        noised = (image + sigma * torch.randn_like(image)).detach()
        if not train_generator:
            (model.fake_score(noised, sigma) - image).square().mean().backward()
            return
        with torch.no_grad():
            gradient = model.fake_score(noised, sigma) - model.real_score(noised, sigma)
        (gradient * image).mean().backward()

    def train(self):  # :312
        for _ in range(self.config.steps):
            if self.step % 5 == 0:  # dfake_gen_update_ratio
                self.generator_optimizer.zero_grad(set_to_none=True)
                self.fwdbwd_one_step(True)
                self.generator_optimizer.step()
            self.critic_optimizer.zero_grad(set_to_none=True)
            self.fwdbwd_one_step(False)
            self.critic_optimizer.step()
            self.step += 1
            if self.step % self.config.log_iters == 0:
                self.save()
        networks = self.model.real_score, self.model.fake_score, self.model.generator
        torch.save(networks, f"{self.config.logdir}/networks.pt")
