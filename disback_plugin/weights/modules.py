"""The modules of a network: what is inside its wrappers, the table of their weights, enumerated once, and copies.

Whatever wraps a network, its weights have the names of the plain module: a node from one form fits every other.

A copy runs as the network does: plain, in DDP, or sharded by FSDP2 on the same mesh. `fully_shard` forbids
`copy.deepcopy`, because its hooks and its state belong to one module. Its modules are therefore copied without them,
with empty parameters, and the copies are sharded anew. No rank holds more than its part.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from disback_plugin.errors import RoleError
from disback_plugin.weights.sharding import Weight, fsdp1_resharders

# Wrapper class -> its package and the attribute that holds the module; by name, as importing torch._dynamo takes long.
# peft's are around a network whose layers hold the adapters.
_WRAPPERS = {
    "OptimizedModule": ("torch", "_orig_mod"),
    "DistributedDataParallel": ("torch", "module"),
    "DataParallel": ("torch", "module"),
    "CheckpointWrapper": ("torch", "_checkpoint_wrapped_module"),
    "FullyShardedDataParallel": ("torch", "_fsdp_wrapped_module"),
    "DeepSpeedEngine": ("deepspeed", "module"),
    "_FabricModule": ("lightning", "_forward_module"),  # also in lightning_fabric
    "PeftModel": ("peft", "base_model"),
    "BaseTuner": ("peft", "model"),
}

NO_DEEPSPEED = "train with DDP, or shard with torch's fully_shard (FSDP2; in accelerate fsdp_version: 2)"

Modules = list[tuple[str, nn.Module]]


def unwrap(module: nn.Module, *, keep_peft: bool = False) -> nn.Module:
    """Return the module inside DDP, FSDP1, DataParallel, `torch.compile`, checkpoints, Fabric's and peft's wrappers.

    Args:
        module: The module, wrapped any number of times.
        keep_peft: Whether to stop at a `PeftModel`, which calls the network past its hooks.

    Raises:
        RoleError: If FSDP1 wraps it with `use_orig_params=False`, inductor compiles it with `freezing`, or it is
            TorchScript.

    Example:
        >>> plain = nn.Linear(1, 1)
        >>> unwrap(nn.DataParallel(plain)) is plain
        True
    """
    while True:
        for kind in type(module).__mro__:
            package, attribute = _WRAPPERS.get(kind.__name__, ("", ""))
            if not package or not kind.__module__.startswith(package) or (keep_peft and package == "peft"):
                continue
            if attribute == "_fsdp_wrapped_module" and not module._use_orig_params:
                found = f"{kind.__name__} with use_orig_params=False, which keeps several weights in one, without names"
                cure = "wrap it with use_orig_params=True (accelerate: fsdp_use_orig_params: true), or use fully_shard"
                raise RoleError(found, expected="weights that have names", cure=cure)
            if attribute == "_orig_mod" and freezes(getattr(module.dynamo_ctx, "compiler_config", None)):
                found = f"{kind.__name__} whose graph has weights as constants"
                raise RoleError(found, expected="live ones", cure="compile it without freezing")
            module = getattr(module, attribute)
            break
        else:
            if isinstance(module, torch.jit.ScriptModule):
                found = f"a {type(module).__name__}, whose forward and weights TorchScript has compiled"
                cure = "pass the module from before torch.jit.script or trace, and torch.compile it instead"
                raise RoleError(found, expected="a torch.nn.Module that runs in Python", cure=cure)
            return module


def freezes(config: Mapping[str, Any] | None = None) -> bool:
    """Return whether inductor makes the weights of an inference graph constants, by its options or for every graph."""
    everywhere = getattr(sys.modules.get("torch._inductor.config"), "freezing", False)
    return bool(everywhere or (config or {}).get("freezing"))


def is_compiled(root: nn.Module) -> bool:
    """Return whether `torch.compile` has wrapped a network or a part of it, or compiled it in place."""
    return any(m._compiled_call_impl is not None or type(m).__name__ == "OptimizedModule" for m in root.modules())


def find(root: object, prefix: str, role: str) -> list[nn.Module]:
    """Return the modules from `root` down to the one at a canonical name inside it, unwrapped except for `PeftModel`.

    Args:
        root: A module, plain or wrapped.
        prefix: The dotted name; "" for `root` itself.
        role: The name of the network in errors.

    Raises:
        RoleError: If `root` is no module, or holds nothing under that name.
    """
    if not isinstance(root, nn.Module):
        found = f"{type(root).__name__} as the {role}"
        raise RoleError(found, expected="a torch.nn.Module", cure=f"pass {role}=<module>")
    modules = [unwrap(root, keep_peft=True)]
    for name in filter(None, prefix.split(".")):
        parent = unwrap(modules[-1])
        child = parent._modules.get(name)
        if child is None:
            found = f"no {name!r} of prefix {prefix!r} in {type(parent).__name__}, which has {sorted(parent._modules)}"
            raise RoleError(found, expected=f"the {role} there", cure="correct the prefix")
        modules.append(unwrap(child, keep_peft=True))
    return modules


def roots_of(network: Any) -> list[nn.Module]:
    """Return the plain modules of a network as users pass it: a module, several by name, or a `ScoreNetwork`."""
    parts = network if isinstance(network, (nn.Module, Mapping)) else getattr(network, "modules", dict)()
    each = parts.values() if isinstance(parts, Mapping) and not isinstance(parts, nn.Module) else [parts]
    return [unwrap(root) for root in each if isinstance(root, nn.Module)]


def named_modules(module: nn.Module, prefix: str = "") -> Modules:
    """Return the canonical name, with a dot at its end, and the unwrapped form of a module and of all inside it."""
    found, waiting = [], [(prefix, module)]
    while waiting:
        name, each = waiting.pop()
        each = unwrap(each)
        found.append((name, each))
        for key, child in reversed(each._modules.items()):
            if child is not None:
                waiting.append((f"{name}{key}.", child))
    return found


class WeightTable:
    """The weights of a network, and what tells whether they are still the same objects.

    Args:
        roots: The unwrapped modules, by the prefix of their names.
        holders: The modules around them, whose FSDP2 state has to be freed too.
        role: The name of the network in errors.
        select: A function from the `named_modules` of a root to those whose own tensors are the weights, with their
            names; None for all.
        names: Further names that identify the network, for which the table has empty tensors.
        only: The names of the weights that count; None for all.

    Attributes:
        weights: The table; tied tensors stand under each of their names.
        layout: Dtype and whole shape of each.
        modules: The modules that hold parameters of their own.

    Raises:
        RoleError: If a tensor cannot be written in place, or a module keeps state that is no tensor.
    """

    def __init__(
        self,
        roots: Mapping[str, nn.Module],
        holders: Iterable[nn.Module],
        role: str,
        select: Callable[[Modules], Modules] | None = None,
        names: Iterable[str] = (),
        only: Collection[str] | None = None,
    ) -> None:
        everything, selected = [], []
        for prefix, root in roots.items():
            modules = named_modules(root, prefix)
            everything += modules
            selected += modules if select is None else select(modules)
        around: list[Any] = [*holders, *(module for _, module in everything)]
        self._resharders: list[Callable[[], None]] = [module.reshard for module in around if is_fsdp2(module)]
        self._reshard()
        self._resharders += fsdp1_resharders([p for _, module in selected for p in module._parameters.values()])
        self._reshard()
        # The slot of each object: the dictionary of its module, its name there, and the object.
        self.slots: list[tuple[Mapping[str, Any], str, Any]] = []
        for _, module in everything:
            self.slots += [(module._modules, name, child) for name, child in module._modules.items()]
        self.weights: list[Weight] = []
        for name, module in selected:
            self._add(name, module, role, only)
        self.modules = [module for _, module in selected if module._parameters]
        self.weights += [Weight(name, torch.empty(0)) for name in names]
        self.layout = {weight.name: weight.meta for weight in self.weights}
        # The shape of a tensor of FSDP1 is not that of the weight.
        self._shapes = [weight.tensor.shape for weight in self.weights]
        first: dict[int, Weight] = {}
        for weight in self.weights:
            found = first.setdefault(id(weight.tensor), weight)
            found.names.append(weight.name)
            weight.tied_to = None if found is weight else found.name

    def is_current(self) -> bool:
        """Let FSDP free what it has gathered and keeps; return whether the live tensors are those of the table."""
        self._reshard()
        return all(slots.get(name) is known for slots, name, known in self.slots) and all(
            weight.tensor.dtype is weight.meta.dtype and weight.tensor.shape == shape
            for weight, shape in zip(self.weights, self._shapes, strict=True)
        )

    def _reshard(self) -> None:
        """Let FSDP free what it has gathered for a forward: a root would go on with it after a write to its shards."""
        for reshard in self._resharders:
            reshard()

    def _add(self, prefix: str, module: nn.Module, role: str, only: Collection[str] | None) -> None:
        """Add a module's own parameters and persistent buffers."""
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            found = f"extra state in {prefix or 'the root'} ({type(module).__name__}) of the {role}"
            cure = "use a network whose state_dict() holds nothing but tensors"
            raise RoleError(found, expected="weights that are tensors only", cure=cure)
        for holder in (module._parameters, module._buffers):
            for name, tensor in holder.items():
                if holder is module._buffers and name in module._non_persistent_buffers_set:
                    continue
                self.slots.append((holder, name, tensor))
                if tensor is not None and (only is None or prefix + name in only):
                    self.weights.append(_validated(prefix + name, tensor, role))


def is_fsdp2(module: nn.Module) -> bool:
    """Return whether FSDP2 manages a module, by name: to import torch.distributed.fsdp takes half a second."""
    return "FSDPModule" in [kind.__name__ for kind in type(module).__mro__]


def _validated(name: str, tensor: Tensor, role: str) -> Weight:
    """Return the entry of a tensor; raise RoleError if it cannot be written in place."""
    reason = _unwritable(tensor)
    if reason is None:
        weight = Weight.of(name, tensor)
        reason = weight.problem() or _unwritable(weight.local()) if weight.sharded else None
        if reason is None:
            return weight
    raise RoleError(f"{name} of the {role} {reason[0]}", expected="a dense tensor in memory", cure=reason[1])


def _unwritable(tensor: Tensor) -> tuple[str, str] | None:
    """Return why a tensor cannot be written in place, and the cure, or None; of a DTensor, as far as it shows."""
    if getattr(tensor, "_is_flat_param", False):
        return "is several weights in one, without their names", "wrap it with use_orig_params=True"
    if hasattr(tensor, "ds_id"):
        return "is partitioned by DeepSpeed's ZeRO-3", NO_DEEPSPEED
    if hasattr(tensor, "_hp_mapping"):
        found = "is trained by DeepSpeed (ZeRO-1, ZeRO-2) through a float32 partition, which undoes each write into it"
        return found, NO_DEEPSPEED
    if isinstance(tensor, (nn.UninitializedParameter, nn.UninitializedBuffer)):
        return "is lazy and has no shape yet", "run one forward first"
    if tensor.is_meta:
        return "is on the meta device and has no values", "load the weights first"
    if tensor.layout is not torch.strided:
        return f"is stored as {tensor.layout}", "use dense weights"
    if 0 in tensor.stride() and any(s == 0 and n > 1 for s, n in zip(tensor.stride(), tensor.shape, strict=True)):
        return "is expanded: its elements share memory", "register a .clone() of it"
    if tensor.dtype in (torch.complex128, torch.complex32):
        return f"is of {tensor.dtype}, which safetensors cannot hold", "use complex64 or two real tensors"
    if tensor.is_inference():
        return "was made in inference mode and cannot be written in place", "build the network outside inference_mode()"
    if hasattr(tensor, "to_local"):
        return None
    narrow = tensor.is_floating_point() and tensor.element_size() < 2
    integer_weight = isinstance(tensor, nn.Parameter) and not (tensor.is_floating_point() or tensor.is_complex())
    # A subclass with operations of its own packs its values; any other is dense.
    packed = type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__
    if tensor.is_quantized or integer_weight or narrow or packed:
        return f"is quantised ({type(tensor).__name__}, {tensor.dtype})", "load the network in bf16, fp16 or fp32"
    return None


# -- copies ------------------------------------------------------------------------------------------------------------


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
