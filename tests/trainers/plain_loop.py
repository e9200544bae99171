"""A script of nobody: no accelerate, no class, its networks in a dict and its optimizers in a list."""

import argparse
import copy
import os
from pathlib import Path

import torch
from networks import Net

parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=24)
parser.add_argument("--save_at", type=int, default=-1)
parser.add_argument("--load")
parser.add_argument("--chdir")
parser.add_argument("--fails", action="store_true")
options = parser.parse_args()
if options.chdir:  # as Hydra does
    Path(options.chdir).mkdir(parents=True)
    os.chdir(options.chdir)


class Ramp:
    """The ramp of an average."""

    steps = 0

    def state_dict(self):
        return {"steps": self.steps}

    def load_state_dict(self, state):
        self.steps = state["steps"]


def save(file):
    torch.save({name: part.state_dict() for name, part in parts.items()}, file)


torch.manual_seed(1)
real = Net().requires_grad_(False)
nets = {"real": real, "fake": copy.deepcopy(real).requires_grad_(True), "student": Net()}
first, last = (torch.optim.Adam(nets["fake"].inner[i].parameters(), lr=1e-2) for i in (0, 2))
opts = [torch.optim.Adam(nets["student"].parameters(), lr=1e-2), [first, last]]
ramp = Ramp()
parts = {**nets, "opt_g": opts[0], "opt_f": first, "opt_f2": last}
if options.load:
    for name, state in torch.load(options.load).items():
        parts[name].load_state_dict(state)
sigma = torch.full((8, 1), 0.5)
if options.fails:
    nets["fake"](torch.zeros(8, 2), sigma).sum().backward(torch.ones(3))
for step in range(options.steps):
    image = nets["student"](torch.randn(8, 2), torch.full((8, 1), 80.0))
    noised = (image + 0.5 * torch.randn_like(image)).detach()
    if step % 2 == 0:
        for optimizer in opts[1]:
            optimizer.zero_grad()
        (nets["fake"](noised, sigma) - image.detach()).square().mean().backward()
        for optimizer in opts[1]:
            optimizer.step()
    opts[0].zero_grad()
    with torch.no_grad():
        gradient = nets["fake"](noised, sigma) - nets["real"](noised, sigma)
    (gradient * image).mean().backward()
    opts[0].step()
    ramp.steps += 1
    if step == options.save_at:
        save("saved.pt")
torch.save([nets["real"], nets["fake"], nets["student"]], "networks.pt")
Path("ramp").write_text(str(ramp.steps))
