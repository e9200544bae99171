"""A script of accelerate whose networks FSDP2 shards, and which saves and loads the shards as diffusers' scripts do."""

from __future__ import annotations

import copy
import os

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import nn
from torch.distributed.fsdp import fully_shard


def net(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.SiLU(), nn.Linear(8, 4))


def save_shards(models, weights, folder):
    weights.clear()
    torch.save([{k: v.to_local() for k, v in m.state_dict().items()} for m in (student, critic)], shards)


dist.init_process_group("gloo")
shards = f"shards-{dist.get_rank()}.pt"
teacher, student = net(0).requires_grad_(False), net(1)
critic = copy.deepcopy(teacher).requires_grad_(True)
for each in (teacher, student, critic):
    fully_shard(each)
accelerator = Accelerator(cpu=True)
opt_g, opt_f = torch.optim.SGD(student.parameters(), 1e-2), torch.optim.SGD(critic.parameters(), 1e-2)
student, critic = (accelerator.prepare_model(each, evaluation_mode=True) for each in (student, critic))  # no DDP
opt_g, opt_f = accelerator.prepare(opt_g, opt_f)
accelerator.register_save_state_pre_hook(save_shards)
if os.path.exists(shards):
    for module, saved in zip((student, critic), torch.load(shards), strict=True):
        for k, v in module.state_dict().items():
            v.to_local().copy_(saved[k])
for _ in range(8):
    x = student(torch.randn(8, 4)).detach()
    eps = torch.randn_like(x)
    opt_f.zero_grad()
    accelerator.backward((critic(x + eps) - eps).square().mean())
    opt_f.step()
    x = student(torch.randn(8, 4))
    x_t = (x + torch.randn_like(x)).detach()
    with torch.no_grad():
        gradient = teacher(x_t) - critic(x_t)
    opt_g.zero_grad()
    accelerator.backward((gradient * x).sum(1).mean())
    opt_g.step()
accelerator.save_state("state")
dist.destroy_process_group()
