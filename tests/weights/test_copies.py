"""A frozen copy runs as the network does, and shares nothing with it."""

from __future__ import annotations

import copy

import pytest
import torch
from ranks import returned
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from disback_plugin.weights.modules import frozen_copy
from disback_plugin.weights.network import ScoreNetwork
from disback_plugin.weights.sharding import local_tensor


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(5, 7), nn.Linear(7, 5)
        self.register_buffer("scale", torch.full((5,), 0.5))
        self.register_buffer("table", torch.arange(5.0), persistent=False)

    def forward(self, x):
        return self.second(self.first(x.to(self.first.weight.dtype)).tanh()) * self.scale + self.table


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.again, self.out = self.blocks[0], nn.Linear(5, 3)
        self.calls = []
        self.blocks[1].register_forward_hook(lambda module, args, output: output + 1)  # a hook that is not FSDP's

    def forward(self, x, features=False):
        for block in (*self.blocks, self.again):
            x = block(x)
        return x if features else self.out(x.to(self.out.weight.dtype))


def sharded(form):
    torch.manual_seed(3)
    net = Net().requires_grad_(False)
    plain = copy.deepcopy(net)
    if form == "wrapped":
        net.blocks[2] = checkpoint_wrapper(net.blocks[2])
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16) if form == "bf16" else MixedPrecisionPolicy()
    if form == "group":
        fully_shard([net.blocks[0], net.blocks[1]])
    for block in net.blocks[: {"root": 0, "group": 0}.get(form, 2)]:
        fully_shard(block, mp_policy=policy)
    return (net if form == "inside" else fully_shard(net, mp_policy=policy)), plain


def copied(forms):
    for form in forms:
        net, plain = sharded(form)
        x = torch.randn(4, 5, requires_grad=True)
        before, expected = net(x).detach(), torch.autograd.grad(net(x, features=True).square().sum(), x)
        state, attributes = torch.get_rng_state(), [*vars(net.blocks[0])]
        copy_of_it = frozen_copy(net)
        assert torch.equal(state, torch.get_rng_state())
        assert [*vars(net.blocks[0])] == attributes
        ScoreNetwork(copy_of_it).load_state_dict(plain.state_dict())
        held = sum(local_tensor(p).numel() for p in copy_of_it.parameters())
        assert held < 0.75 * sum(p.numel() for p in plain.parameters()), form
        with torch.no_grad():
            for _, tensor in ScoreNetwork(net).named_tensors():
                local_tensor(tensor).add_(1)
        assert torch.equal(copy_of_it(x), before), form
        assert torch.equal(torch.autograd.grad(copy_of_it(x, features=True).square().sum(), x)[0], expected[0]), form
        assert not torch.equal(net(x), before)
        assert not any(p.requires_grad for p in copy_of_it.parameters())
        assert copy_of_it.again is copy_of_it.blocks[0]
        assert ScoreNetwork(copy_of_it).state_dict().keys() == plain.state_dict().keys()
    return len(forms)


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.slow
def test_a_sharded_network_has_a_sharded_copy_with_weights_and_gradients_of_its_own(nursery, ranks):
    forms = ["nested", "root", "wrapped"] if ranks == 3 else ["nested", "bf16", "inside", "group", "wrapped"]
    assert returned(nursery.play(copied, ranks, forms)) == [len(forms)] * ranks


def test_a_plain_copy_has_the_values():
    net = Net()
    made = frozen_copy(net)
    x = torch.ones(2, 5)
    assert torch.equal(made(x), net(x))
    assert not made.out.weight.requires_grad
    assert net.out.weight.requires_grad
