"""The same kind of script inside functions: the networks are attributes, two in one root."""

import argparse
import json
from types import SimpleNamespace

import torch
from accelerate import Accelerator
from networks import Net
from torch import nn


class Critics(nn.Module):
    """Both scores in one root, prepared as one."""

    def __init__(self):
        super().__init__()
        self.real = Net().requires_grad_(False)
        self.fake = Net()

    def forward(self, which, x, sigma):
        return getattr(self, which)(x, sigma)


def train(run, accelerator, optimizers, options):
    losses = []
    for step in range(options.rounds):
        torch.manual_seed(100 * step + accelerator.process_index)
        sigma = torch.rand(8, 1) + 0.1
        with torch.no_grad():
            image = run.generator(80 * torch.randn(8, 2), torch.full((8, 1), 80.0))
        loss = (run.critics("fake", image + sigma * torch.randn(8, 2), sigma) - image).square().mean()
        accelerator.backward(loss)
        optimizers["fake"].step()
        optimizers["fake"].zero_grad()
        losses.append(loss.item())
        image = run.generator(80 * torch.randn(8, 2), torch.full((8, 1), 80.0))
        noised = (image + sigma * torch.randn(8, 2)).detach()
        with torch.no_grad():
            difference = run.critics("fake", noised, sigma) - run.critics("real", noised, sigma)
        loss = (difference * image).mean()
        accelerator.backward(loss)
        optimizers["student"].step()
        optimizers["student"].zero_grad()
        losses.append(loss.item())
    return losses


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--outdir", required=True)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--unprepared", action="store_true", help="the fake score's optimizer")
    options = parser.parse_args()
    torch.manual_seed(1)
    accelerator = Accelerator(cpu=True)
    run = SimpleNamespace(critics=Critics(), generator=Net())
    fake = torch.optim.Adam([p for p in run.critics.parameters() if p.requires_grad], lr=1e-2)
    student = torch.optim.Adam(run.generator.parameters(), lr=1e-2)
    run.critics, run.generator, student = accelerator.prepare(run.critics, run.generator, student)
    if not options.unprepared:
        fake = accelerator.prepare_optimizer(fake)
    losses = train(run, accelerator, {"fake": fake, "student": student}, options)
    if accelerator.is_main_process:
        critics = accelerator.unwrap_model(run.critics)
        torch.save(
            (critics.real, critics.fake, accelerator.unwrap_model(run.generator)), f"{options.outdir}/networks.pt"
        )
        with open(f"{options.outdir}/losses.json", "w") as f:
            json.dump(losses, f)


if __name__ == "__main__":
    main()
