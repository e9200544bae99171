"""A script as anybody writes it with accelerate: all at the top level, two calls of prepare, gradients accumulated."""

import argparse
import copy
import json

import torch
from accelerate import Accelerator
from networks import Net

parser = argparse.ArgumentParser()
parser.add_argument("--outdir", required=True)
parser.add_argument("--rounds", type=int, default=40)
parser.add_argument("--save_at", type=int, default=-1)
parser.add_argument("--load")
parser.add_argument("--third", action="store_true", help="an optimizer more, as a discriminator's")
options = parser.parse_args()

torch.manual_seed(1)
accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
real_unet = Net().requires_grad_(False)
unet, fake_unet = Net(), Net()
opt_g = torch.optim.AdamW(unet.parameters(), lr=1e-2)
opt_f = torch.optim.AdamW(fake_unet.parameters(), lr=1e-2)
unet, opt_g = accelerator.prepare(unet, opt_g)
fake_unet, opt_f = accelerator.prepare(fake_unet, opt_f)
if options.third:
    accelerator.prepare(torch.optim.SGD(torch.nn.Linear(1, 1).parameters(), lr=0.1))
start = 0
if options.load:
    accelerator.load_state(options.load)
    start = int(options.load.rpartition("-")[2])
if accelerator.is_main_process:  # a validation that the other ranks do not do
    with torch.no_grad():
        accelerator.unwrap_model(unet)(torch.zeros(1, 2), torch.ones(1, 1))
accelerator.wait_for_everyone()

losses = []
for step in range(start, options.rounds):
    torch.manual_seed(100 * step + accelerator.process_index)
    with accelerator.accumulate(unet, fake_unet):
        sigma = torch.rand(8, 1) + 0.1
        image = unet(80 * torch.randn(8, 2), torch.full((8, 1), 80.0))
        noised = image.detach() + sigma * torch.randn(8, 2)
        with torch.no_grad():
            difference = fake_unet(noised, sigma) - real_unet(noised, sigma)
        loss = (difference * image).mean()
        accelerator.backward(loss)
        opt_g.step()
        opt_g.zero_grad()
        loss_fake = (fake_unet(noised, sigma) - image.detach()).square().mean()
        accelerator.backward(loss_fake)
        opt_f.step()
        opt_f.zero_grad()
    losses += [loss.item(), loss_fake.item()]
    if step + 1 == options.save_at:
        accelerator.save_state(f"{options.outdir}/checkpoint-{step + 1}")

if accelerator.is_main_process:
    networks = real_unet, accelerator.unwrap_model(fake_unet), accelerator.unwrap_model(unet)
    torch.save(copy.deepcopy(networks), f"{options.outdir}/networks.pt")
    with open(f"{options.outdir}/losses.json", "w") as f:
        json.dump(losses, f)
