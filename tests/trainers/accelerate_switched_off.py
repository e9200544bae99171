"""A script of accelerate whose teacher is its fake score with the LoRA switched off, as in SwiftBrush.

VinAIResearch/SwiftBrush 686c231, train_swiftbrush.py:444-453 (one network with a LoRA), 593 (an optimizer over all its
parameters), 766-772 (the adapters off for the teacher, and on again). A checkpoint here can be loaded; its own cannot.
"""

import argparse
import json

import torch
from accelerate import Accelerator
from networks import Net
from peft import LoraConfig, inject_adapter_in_model

parser = argparse.ArgumentParser()
parser.add_argument("--outdir", required=True)
parser.add_argument("--save_at", type=int, default=-1)
parser.add_argument("--load")
options = parser.parse_args()

torch.manual_seed(1)
accelerator = Accelerator(cpu=True)
layers = [name for name, module in Net().named_modules() if isinstance(module, torch.nn.Linear)]
teacher_lora = inject_adapter_in_model(LoraConfig(r=2, target_modules=layers), Net())
unet = Net()
opt_g = torch.optim.Adam(unet.parameters(), lr=1e-2)
opt_f = torch.optim.Adam(teacher_lora.parameters(), lr=1e-2)
unet, teacher_lora, opt_g, opt_f = accelerator.prepare(unet, teacher_lora, opt_g, opt_f)
start = 0
if options.load:
    accelerator.load_state(options.load)
    start = int(options.load.rpartition("-")[2])


def switch(on):
    for module in teacher_lora.modules():
        if hasattr(module, "enable_adapters"):
            module.enable_adapters(on)


losses = []
for step in range(start, 16):
    torch.manual_seed(100 * step)
    sigma = torch.rand(8, 1) + 0.1
    image = unet(80 * torch.randn(8, 2), torch.full((8, 1), 80.0))
    noised = image.detach() + sigma * torch.randn(8, 2)
    with torch.no_grad():
        switch(False)
        real = teacher_lora(noised, sigma)
        switch(True)
        difference = teacher_lora(noised, sigma) - real
    accelerator.backward((difference * image).mean())
    opt_g.step()
    opt_g.zero_grad()
    loss_fake = (teacher_lora(noised, sigma) - image.detach()).square().mean()
    accelerator.backward(loss_fake)
    opt_f.step()
    opt_f.zero_grad()
    losses += [real.abs().mean().item(), loss_fake.item()]
    if step + 1 == options.save_at:
        accelerator.save_state(f"{options.outdir}/checkpoint-{step + 1}")

switch(False)
torch.save((unet.state_dict(), teacher_lora.state_dict()), f"{options.outdir}/networks.pt")
with open(f"{options.outdir}/losses.json", "w") as f:
    json.dump(losses, f)
