"""A frozen copy of a network that runs as the network does: plain, in DDP, or sharded by FSDP2 on the same mesh.

`fully_shard` forbids `copy.deepcopy`, because its hooks and its state belong to one module. Here the modules are copied
without them, with empty parameters, and the copies are sharded anew. No rank holds more than its part.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from disback_plugin.weights.modules import is_fsdp2


def copy_of_module(network: nn.Module) -> Any:
    """Return a copy of a module that is not sharded.

    What a hook computes before each forward, as that of `weight_norm`, is copied without its graph.
    """
    held = (value for module in network.modules() for value in vars(module).values())
    computed = [value for value in held if isinstance(value, Tensor) and not value.is_leaf]
    return copy.deepcopy(network, {id(value): value.detach().clone() for value in computed})


def frozen_copy(network: nn.Module) -> Any:
    """Return a copy without gradients. Of one that FSDP2 shards, the weights have no values yet; all ranks must call.

    Args:
        network: The network, plain, in DDP or sharded by FSDP2.

    Example:
        >>> net = nn.Linear(2, 1)
        >>> torch.equal(frozen_copy(net).weight, net.weight)
        True
    """
    inner_first: list[Any] = [*network.modules()][::-1]
    sharded = [module for module in inner_first if is_fsdp2(module)]
    if not sharded:
        return copy_of_module(network).requires_grad_(False)
    from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

    for module in sharded:
        module.reshard()  # a root keeps its weights gathered after a forward
    copies = _unsharded_copies(network, sharded)
    parts: list[Any] = [tensor for tensor in network.parameters() if hasattr(tensor, "device_mesh")]
    for module in sharded:
        mesh = next((t.device_mesh for t in module.parameters() if hasattr(t, "device_mesh")), parts[0].device_mesh)
        offloads = parts[0].device.type != mesh.device_type
        fully_shard(
            copies[id(module)],
            mesh=mesh,
            reshard_after_forward=True,
            mp_policy=module._get_fsdp_state()._mp_policy,  # FSDP2 has no public name for it
            offload_policy=CPUOffloadPolicy() if offloads else OffloadPolicy(),
        )
    result = copies[id(network)]
    return result._apply(lambda tensor: torch.empty_like(tensor, device=parts[0].device) if tensor.is_meta else tensor)


def _unsharded_copies(network: nn.Module, sharded: list[Any]) -> dict[int, Any]:
    """Return a copy of each module by the id of the original, without FSDP's hooks; sharded weights are on "meta"."""
    memo: dict[int, Any] = {}
    for tensor in network.parameters():
        if hasattr(tensor, "device_mesh"):
            memo[id(tensor)] = nn.Parameter(torch.empty(tensor.shape, dtype=tensor.dtype, device="meta"))
    for module in sharded:
        kind: Any = type(module).__bases__[-1]  # FSDP2 derives a class of its own
        memo[id(module)] = kind.__new__(kind)
    for module in sharded:
        held = {name: value for name, value in vars(module).items() if not name.startswith("__composable_api")}
        for name, hooks in held.items():
            if name.endswith("_hooks"):
                held[name] = type(hooks)((key, hook) for key, hook in hooks.items() if not _is_of_fsdp(hook))
        vars(memo[id(module)]).update(copy.deepcopy(held, memo))
    copy.deepcopy(network, memo).requires_grad_(False)
    return memo


def _is_of_fsdp(hook: Any) -> bool:
    return str(getattr(getattr(hook, "hook", hook), "__module__", "")).startswith("torch.distributed.fsdp")
