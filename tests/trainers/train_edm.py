"""Stand-in of tianweiy/DMD2 at 8d8fa55, main/edm/train_edm.py: the generator's turn first, every second step."""

import argparse
import json

import torch
from accelerate import Accelerator
from main.edm.edm_unified_model import EDMUniModel


class Trainer:
    def __init__(self, args):
        torch.manual_seed(1)
        self.args, self.step, self.losses = args, 0, []
        self.accelerator = Accelerator(cpu=True)
        self.model = EDMUniModel()
        if args.gan_alone:  # main/sd_guidance.py:69-70
            del self.model.guidance_model.real_unet
        if getattr(args, "renamed", None):  # a later version
            guidance = self.model.guidance_model
            guidance.add_module("scores", guidance._modules.pop(args.renamed))
        self.optimizer_guidance = torch.optim.AdamW(
            [param for param in self.model.guidance_model.parameters() if param.requires_grad], lr=1e-2
        )
        self.optimizer_generator = torch.optim.AdamW(self.model.feedforward_model.parameters(), lr=1e-2)
        prepared = self.accelerator.prepare(  # :126-132
            self.model.feedforward_model,
            self.model.guidance_model,
            self.optimizer_guidance,
            self.optimizer_generator,
        )
        self.model.feedforward_model, self.model.guidance_model = prepared[:2]
        self.optimizer_guidance, self.optimizer_generator = prepared[2:]
        if args.checkpoint_path is not None:  # :162, inside __init__
            self.step = int(args.checkpoint_path.split("_")[-1]) + 1
            self.accelerator.load_state(args.checkpoint_path)

    def train_one_step(self):
        self.model.train()
        noise = torch.randn(8, 2)
        compute = self.step % 2 == 0
        loss, image = self.model(noise, compute_generator_gradient=compute, generator_turn=True)
        if compute:
            self.accelerator.backward(loss)
            self.optimizer_generator.step()
            self.optimizer_generator.zero_grad()
            self.optimizer_guidance.zero_grad()
            self.losses.append(loss.item())
        loss = self.model(noise, generator_turn=False, image=image)
        self.accelerator.backward(loss)
        self.optimizer_guidance.step()
        self.optimizer_guidance.zero_grad()
        self.losses.append(loss.item())

    def save(self):  # :165
        self.accelerator.save_state(f"{self.args.output_path}/checkpoint_{self.step:06d}")

    def train(self):
        for _ in range(self.step, self.args.train_iters):
            self.train_one_step()
            if self.step == self.args.save_at:
                self.save()
            if self.step == self.args.interrupt_at:
                raise KeyboardInterrupt
            self.step += 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--output_path", required=True)
    parser.add_argument("--train_iters", type=int, default=30)
    parser.add_argument("--save_at", type=int, default=-1)
    parser.add_argument("--interrupt_at", type=int, default=-1)
    parser.add_argument("--checkpoint_path")
    parser.add_argument("--gan_alone", action="store_true")
    parser.add_argument("--renamed")
    arguments = parser.parse_args()
    trainer = Trainer(arguments)
    trainer.train()
    guidance = trainer.accelerator.unwrap_model(trainer.model.guidance_model)
    networks = guidance.real_unet, guidance.fake_unet, trainer.accelerator.unwrap_model(trainer.model.feedforward_model)
    torch.save(networks, f"{arguments.output_path}/networks.pt")
    with open(f"{arguments.output_path}/losses.json", "w") as f:
        json.dump(trainer.losses, f)
