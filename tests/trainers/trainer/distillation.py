"""Self-Forcing's trainer (trainer/distillation.py at 33593df): networks in `model`, the generator's update first."""

import copy

import torch
from networks import Net


class Model:  # model/dmd.py
    def __init__(self, real_width):
        self.real_score, self.generator = Net(real_width).requires_grad_(False), Net()
        self.fake_score = Net() if real_width > 8 else copy.deepcopy(self.real_score).requires_grad_(True)

    def text_encoder(self, text_prompts):
        return {"prompt_embeds": torch.zeros(len(text_prompts), 1)}

    def critic_loss(
        self, image_or_video_shape, conditional_dict, unconditional_dict, clean_latent, initial_latent=None
    ):  # :237
        noise, sigma = 80 * torch.randn(image_or_video_shape), torch.rand(8, 1) + 0.1
        with torch.no_grad():
            image = self.generator(noise, torch.full((8, 1), 80.0))
        noised = image + sigma * torch.randn_like(image)
        return (self.fake_score(noised, sigma) - image).square().mean(), {}


class Trainer:
    def __init__(self, config):
        torch.manual_seed(1)
        self.config, self.step = config, 0
        config.i2v, config.image_or_video_shape = False, [1, 2]
        self.model = Model(config.real_width)
        self.generator_optimizer = torch.optim.AdamW(self.model.generator.parameters(), lr=1e-2)  # :106
        self.critic_optimizer = torch.optim.AdamW(self.model.fake_score.parameters(), lr=1e-2)  # :114
        if config.generator_ckpt:  # :161, the fake score is not loaded
            self.model.generator.load_state_dict(torch.load(config.generator_ckpt)["generator"])

    def save(self):  # :182
        state = {"generator": self.model.generator.state_dict(), "critic": self.model.fake_score.state_dict()}
        torch.save(state, f"{self.config.logdir}/model_{self.step:06d}.pt")

    def fwdbwd_one_step(self, batch, train_generator):  # :209
        model = self.model
        if not train_generator:
            shape = [len(batch["prompts"]), *self.config.image_or_video_shape[1:]]
            loss, _ = model.critic_loss(shape, model.text_encoder(text_prompts=batch["prompts"]), None, None)
            loss.backward()
            return
        noise, sigma = 80 * torch.randn(8, 2), torch.rand(8, 1) + 0.1
        image = model.generator(noise, torch.full((8, 1), 80.0))
        noised = (image + sigma * torch.randn_like(image)).detach()
        with torch.no_grad():
            gradient = model.fake_score(noised, sigma) - model.real_score(noised, sigma)
        (gradient * image).mean().backward()

    def train(self):  # :312
        for _ in range(self.config.steps):
            batch = {"prompts": ["a cat"] * 8}
            if self.step % 5 == 0:  # dfake_gen_update_ratio
                self.generator_optimizer.zero_grad(set_to_none=True)
                self.fwdbwd_one_step(batch, True)
                self.generator_optimizer.step()
            self.critic_optimizer.zero_grad(set_to_none=True)
            self.fwdbwd_one_step(batch, False)
            self.critic_optimizer.step()
            self.step += 1
            if self.step % self.config.log_iters == 0:
                self.save()
        networks = self.model.real_score, self.model.fake_score, self.model.generator
        torch.save(networks, f"{self.config.logdir}/networks.pt")
