"""What the stand-ins of DMD2's main/train_sd.py at 8d8fa55 and of its fork share: names and the order of calls."""

import argparse
import copy
import json
from pathlib import Path

import torch
from accelerate import Accelerator
from networks import Net
from torch import nn


class SDGuidance(nn.Module):
    def __init__(self, bf16):
        super().__init__()
        self.real_unet = Net().requires_grad_(False)  # main/sd_guidance.py:45-50
        self.fake_unet = copy.deepcopy(self.real_unet).requires_grad_(True)  # :53-58
        self.register_buffer("alphas_cumprod", torch.linspace(1, 0.01, 10))
        self.dummy_network = nn.ModuleDict({"fc": nn.Linear(2, 2)}).requires_grad_(False)
        if bf16:  # :67
            self.real_unet.to(torch.bfloat16)

    def forward(self, image, generator_turn, guidance_turn):
        sigma = torch.rand(len(image), 1) + 0.1
        if guidance_turn:
            noised = image + sigma * torch.randn_like(image)
            return {"loss_fake_mean": (self.fake_unet(noised, sigma) - image).square().mean()}
        noised = (image + sigma * torch.randn_like(image)).detach()
        with torch.no_grad():  # :179-241
            kind = self.real_unet.inner[0].weight.dtype
            difference = self.fake_unet(noised, sigma) - self.real_unet(noised.to(kind), sigma.to(kind)).to(image.dtype)
        return {"loss_dm": (difference * image).mean()}


class UniModel(nn.Module):
    """main/sd_unified_model.py: not wrapped itself, only its two children are."""

    def __init__(self, bf16=False):
        super().__init__()
        self.guidance_model = SDGuidance(bf16)
        self.feedforward_model = copy.deepcopy(self.guidance_model.fake_unet)

    def forward(self, noise, compute_generator_gradient=True, generator_turn=False, guidance_turn=False, image=None):
        if guidance_turn:  # :353
            return self.guidance_model(image, generator_turn=False, guidance_turn=True), {}
        with torch.set_grad_enabled(compute_generator_gradient):  # :268
            image = self.feedforward_model(noise, torch.full((len(noise), 1), 80.0))
        losses = {}
        if compute_generator_gradient:
            self.guidance_model.requires_grad_(False)  # :304
            losses = self.guidance_model(image, generator_turn=True, guidance_turn=False)
            self.guidance_model.requires_grad_(True)  # :310, the teacher's flags too
        return losses, {"guidance_data_dict": {"image": image.detach()}}


class Trainer:
    def __init__(self, args, kind):
        torch.manual_seed(1)
        self.args, self.step, self.losses = args, args.step, []
        self.accelerator = Accelerator(cpu=True)
        self.model = kind(args.use_fp16)
        if args.ckpt_only_path is not None:  # :93-101
            folder = Path(args.ckpt_only_path)
            self.model.feedforward_model.load_state_dict(torch.load(folder / "pytorch_model.bin"))
            self.model.guidance_model.load_state_dict(torch.load(folder / "pytorch_model_1.bin"))
            self.step = int(folder.name.split("_")[-1])
        self.optimizer_generator = torch.optim.AdamW(  # :191-202
            [param for param in self.model.feedforward_model.parameters() if param.requires_grad], lr=1e-2
        )
        self.optimizer_guidance = torch.optim.AdamW(
            [param for param in self.model.guidance_model.parameters() if param.requires_grad], lr=1e-2
        )
        self.scheduler_generator, self.scheduler_guidance = (
            torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=5)
            for optimizer in (self.optimizer_generator, self.optimizer_guidance)
        )
        (
            self.model.feedforward_model,
            self.model.guidance_model,
            self.optimizer_generator,
            self.optimizer_guidance,
            self.scheduler_generator,
            self.scheduler_guidance,
        ) = self.accelerator.prepare(  # :229-233
            self.model.feedforward_model,
            self.model.guidance_model,
            self.optimizer_generator,
            self.optimizer_guidance,
            self.scheduler_generator,
            self.scheduler_guidance,
        )
        if args.checkpoint_path is not None:  # :266-269, inside __init__
            self.step = int(args.checkpoint_path.split("_")[-1]) + 1
            self.accelerator.load_state(args.checkpoint_path)

    def train_one_step(self):
        self.model.train()
        noise = torch.randn(8, 2)
        compute = self.step % self.args.dfake_gen_update_ratio == 0  # :330
        losses, log = self.model(noise, compute_generator_gradient=compute, generator_turn=True)
        if compute:
            self.accelerator.backward(losses["loss_dm"])
            self.accelerator.clip_grad_norm_(self.model.feedforward_model.parameters(), 10)
            self.optimizer_generator.step()
            self.optimizer_generator.zero_grad()
            self.optimizer_guidance.zero_grad()
        self.scheduler_generator.step()  # :383, every step
        later, _ = self.model(noise, guidance_turn=True, image=log["guidance_data_dict"]["image"])
        self.accelerator.backward(later["loss_fake_mean"])
        self.accelerator.clip_grad_norm_(self.model.guidance_model.parameters(), 10)
        self.optimizer_guidance.step()
        self.optimizer_guidance.zero_grad()
        self.optimizer_generator.zero_grad()
        self.scheduler_guidance.step()
        self.losses += [loss.item() for loss in (losses | later).values()]

    def save(self):  # :271
        folder = Path(self.args.output_path) / f"checkpoint_{self.step:06d}"
        if not self.args.fsdp:
            self.accelerator.save_state(folder)
            return
        folder.mkdir()  # :289-293, the networks alone
        torch.save(self.model.feedforward_model.state_dict(), folder / "pytorch_model.bin")
        torch.save(self.model.guidance_model.state_dict(), folder / "pytorch_model_1.bin")

    def before_step(self, index): ...

    def train(self):
        for index in range(self.step, self.args.step + self.args.train_iters):
            self.before_step(index)
            self.train_one_step()
            if self.step == self.args.save_at:
                self.save()
            self.accelerator.wait_for_everyone()
            self.step += 1


def parse_args(**more):
    parser = argparse.ArgumentParser()
    parser.add_argument("--output_path", required=True)
    parser.add_argument("--train_iters", type=int, default=30)
    parser.add_argument("--dfake_gen_update_ratio", type=int, default=2)
    parser.add_argument("--step", type=int, default=0)
    parser.add_argument("--save_at", type=int, default=-1)
    parser.add_argument("--checkpoint_path")
    parser.add_argument("--ckpt_only_path")
    parser.add_argument("--fsdp", action="store_true")
    parser.add_argument("--use_fp16", action="store_true")
    for name, kind in more.items():
        parser.add_argument(f"--{name}", type=kind, required=True)
    return parser.parse_args()


def write_down(trainer):
    unwrap = trainer.accelerator.unwrap_model
    guidance = unwrap(trainer.model.guidance_model)
    networks = guidance.real_unet, guidance.fake_unet, unwrap(trainer.model.feedforward_model)
    torch.save(networks, f"{trainer.args.output_path}/networks.pt")
    with open(f"{trainer.args.output_path}/losses.json", "w") as f:
        json.dump(trainer.losses, f)
