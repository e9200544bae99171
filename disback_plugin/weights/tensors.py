"""Names and tensors of a network, whatever wraps it, and which of them can be written in place.

Whatever wraps a network (DDP, `torch.compile`, activation checkpointing), its weights go by their canonical names, the
names of the plain module, so that a node recorded from one form fits every other.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from disback_plugin.errors import RoleError
from disback_plugin.weights.fsdp1 import flattened, free, locate
from disback_plugin.weights.sharding import held, is_sharded, trouble

__all__ = ["find", "named_modules", "own_tensors", "reshard", "unwrap"]

# Wrapper class -> attribute that holds the wrapped module. By name: importing torch._dynamo would take a second.
_WRAPPERS = {
    "OptimizedModule": "_orig_mod",
    "DistributedDataParallel": "module",
    "DataParallel": "module",
    "CheckpointWrapper": "_checkpoint_wrapped_module",
    "FullyShardedDataParallel": "_fsdp_wrapped_module",
}
# The same of peft, around a network that adapters were put into; its layers are in the network itself.
_ADAPTED = {"PeftModel": "base_model", "BaseTuner": "model"}


def unwrap(module: nn.Module, *, adapted: bool = False) -> nn.Module:
    """Return the plain module inside DDP, FSDP1, DataParallel, `torch.compile`, checkpoint wrappers and a `PeftModel`,
    however nested.

    Args:
        module: What is wrapped.
        adapted: Whether to stop at a `PeftModel`: what is called, and calls the network past its hooks.

    Example:
        >>> plain = nn.Linear(1, 1)
        >>> unwrap(nn.DataParallel(plain)) is plain
        True
    """
    for kind in type(module).__mro__:
        if kind.__name__ == "FullyShardedDataParallel" and not module._use_orig_params:
            raise RoleError(
                f"{kind.__name__} with use_orig_params=False, which keeps several weights in one, without their names",
                expected="weights that have names",
                cure="wrap it with use_orig_params=True (accelerate: fsdp_use_orig_params: true), or shard it with "
                "torch's fully_shard (FSDP2)",
            )
        package = kind.__module__.partition(".")[0]
        known = _WRAPPERS if package == "torch" else _ADAPTED if package == "peft" and not adapted else {}
        if kind.__name__ in known:
            return unwrap(getattr(module, known[kind.__name__]), adapted=adapted)
    return module


def find(root: object, prefix: str, role: str) -> list[nn.Module]:
    """Return the unwrapped modules from `root` down to that at a dotted canonical name inside it; `PeftModel` stays.

    Args:
        root: A module, plain or wrapped.
        prefix: The name; "" for `root` itself.
        role: What to call it in errors.

    Raises:
        RoleError: If `root` is no module, or holds nothing there.
    """
    if not isinstance(root, nn.Module):
        raise RoleError(
            f"{type(root).__name__} as the {role}", expected="a torch.nn.Module", cure=f"pass {role}=<module>"
        )
    module = unwrap(root, adapted=True)
    way = [module]
    for name in filter(None, prefix.split(".")):
        module = unwrap(module)
        child = module._modules.get(name)
        if child is None:
            raise RoleError(
                f"no {name!r} of prefix {prefix!r} in {type(module).__name__}, which has {sorted(module._modules)}",
                expected=f"the {role} there",
                cure="correct the prefix",
            )
        module = unwrap(child, adapted=True)
        way.append(module)
    return way


def reshard(holders: Iterable[nn.Module], roots: Iterable[nn.Module]) -> None:
    """Let FSDP2 free the parameters that it has gathered for a forward: those of `holders`, and of all inside `roots`.

    A root keeps its own after a forward, and would go on with them though the shards were written.
    """
    for module in (*holders, *(inner for root in roots for inner in root.modules())):
        # By name: to import torch.distributed.fsdp takes half a second.
        if any(kind.__name__ == "FSDPModule" for kind in type(module).__mro__):
            module.reshard()  # type: ignore[operator]


def named_modules(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    """Yield the canonical name, with a dot at its end, and the unwrapped form of a module and all inside it."""
    module = unwrap(module)
    yield prefix, module
    for name, child in module._modules.items():
        if child is not None:
            yield from named_modules(child, f"{prefix}{name}.")


def own_tensors(module: nn.Module, prefix: str, role: str) -> Iterator[tuple[str, Tensor]]:
    """Yield canonical name and live tensor of a module's own parameters and persistent buffers.

    Raises:
        RoleError: If one of them cannot be written in place, or the module keeps state that is no tensor.
    """
    kind = type(module)
    if kind.get_extra_state is not nn.Module.get_extra_state:
        raise RoleError(
            f"extra state in {prefix or 'the root'} ({kind.__name__}) of the {role}",
            expected="weights that are tensors only",
            cure="use a network whose state_dict() holds nothing but tensors",
        )
    # What FSDP1 has gathered for a forward, and keeps, is let go: the shards are what counts.
    parameters = [parameter for parameter in module._parameters.values() if parameter is not None]
    locate(parameters)
    free(parameters)
    persistent = {k: b for k, b in module._buffers.items() if k not in module._non_persistent_buffers_set}
    for name, tensor in (*module._parameters.items(), *persistent.items()):
        if tensor is not None:
            reason = _unwritable(tensor)
            if reason is None and (is_sharded(tensor) or flattened(tensor)):
                reason = trouble(tensor) or _unwritable(held(tensor)[0])
            if reason:
                raise RoleError(
                    f"{prefix}{name} of the {role} {reason[0]}", expected="a dense tensor in memory", cure=reason[1]
                )
            yield prefix + name, tensor


def _unwritable(tensor: Tensor) -> tuple[str, str] | None:
    """Return what is wrong with a weight and its cure, or None; of a DTensor, with what can be seen from outside."""
    if getattr(tensor, "_is_flat_param", False):
        return "is several weights in one, without their names", "wrap it with use_orig_params=True"
    if hasattr(tensor, "ds_id"):
        return "is partitioned by DeepSpeed's ZeRO-3", "use ZeRO-2, or shard it with torch's fully_shard (FSDP2)"
    if isinstance(tensor, (nn.UninitializedParameter, nn.UninitializedBuffer)):
        return "is lazy and has no shape yet", "run one forward first"
    if tensor.is_meta:
        return "is on the meta device and has no values", "load the weights first"
    if tensor.layout is not torch.strided:
        return f"is stored as {tensor.layout}", "use dense weights"
    if any(step == 0 and size > 1 for step, size in zip(tensor.stride(), tensor.shape, strict=True)):
        return "is expanded: its elements share memory", "register a .clone() of it"
    if tensor.dtype in (torch.complex128, torch.complex32):
        return f"is of {tensor.dtype}, which safetensors cannot hold", "use complex64 or two real tensors"
    if tensor.is_inference():
        return "was made in inference mode and cannot be written in place", "build the network outside inference_mode()"
    if is_sharded(tensor):
        return None
    narrow = tensor.is_floating_point() and tensor.element_size() < 2
    integer_weight = isinstance(tensor, nn.Parameter) and not (tensor.is_floating_point() or tensor.is_complex())
    plain = type(tensor) in (Tensor, nn.Parameter) or isinstance(tensor, nn.Buffer)
    if tensor.is_quantized or integer_weight or narrow or not plain:
        return f"is quantised ({type(tensor).__name__}, {tensor.dtype})", "load the network in bf16, fp16 or fp32"
    return None
