"""A script of accelerate under its own FSDP2: two calls of `prepare`, and checkpoints of torch.distributed.checkpoint.

`Accelerator.load_state` steps each optimizer once at a rate of 0 before the script's first forward
(`torch.distributed.checkpoint.state_dict`, `_init_optim_state`).
"""

import argparse
import copy
import os

import torch
import torch.distributed as dist
from accelerate import Accelerator, FullyShardedDataParallelPlugin, PartialState
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.fsdp import fully_shard

parser = argparse.ArgumentParser()
parser.add_argument("--rounds", type=int, required=True)
parser.add_argument("--resume")
options = parser.parse_args()


def net(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.SiLU(), nn.Linear(8, 4))


PartialState(cpu=True)
PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU  # accelerate shards on devices only
plugin = FullyShardedDataParallelPlugin(
    fsdp_version=2, state_dict_type="SHARDED_STATE_DICT", auto_wrap_policy="NO_WRAP", cpu_ram_efficient_loading=False
)
accelerator = Accelerator(fsdp_plugin=plugin)
teacher, student = net(0).requires_grad_(False), net(1)
critic = copy.deepcopy(teacher).requires_grad_(True)
fully_shard(teacher)
opt_g, opt_f = torch.optim.AdamW(student.parameters(), 1e-2), torch.optim.AdamW(critic.parameters(), 1e-2)
student, opt_g = accelerator.prepare(student, opt_g)
critic, opt_f = accelerator.prepare(critic, opt_f)
start = 0
if options.resume:
    accelerator.load_state(options.resume)
    start = int(options.resume.rpartition("-")[2])


def normal(round_, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1000 * round_ + accelerator.process_index))


for round_ in range(start, options.rounds):
    x = student(normal(round_, 8, 4)).detach()
    eps = normal(round_, 8, 4)
    opt_f.zero_grad()
    accelerator.backward((critic(x + eps) - eps).square().mean())
    opt_f.step()
    x = student(normal(round_, 8, 4))
    x_t = (x + eps).detach()
    with torch.no_grad():
        gradient = teacher(x_t) - critic(x_t)
    opt_g.zero_grad()
    accelerator.backward((gradient * x).sum(1).mean())
    opt_g.step()
accelerator.save_state(f"state-{options.rounds}")
parts = [[tensor.full_tensor() for tensor in net.state_dict().values()] for net in (teacher, critic, student)]
if accelerator.is_main_process:
    torch.save(parts, f"end-{options.rounds}-{os.path.basename(options.resume or 'whole')}.pt")
dist.destroy_process_group()
