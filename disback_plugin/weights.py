"""One role's weights: read them, write them in place, name them by content.

A *role* is the teacher s_theta or the fake score s_phi: a whole module, a sub-module of a wrapped root, or several
modules (experts). Whatever wraps it (DDP, `torch.compile`, activation checkpointing), its weights go by their
canonical names, the names of the plain module, so that a node recorded from one form fits every other.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from disback_plugin.errors import MismatchError, RoleError

__all__ = ["ScoreNetwork", "fingerprint", "unwrap"]

# Wrapper class -> attribute that holds the wrapped module. By name: importing torch._dynamo would take a second.
_WRAPPERS = {
    "OptimizedModule": "_orig_mod",
    "DistributedDataParallel": "module",
    "DataParallel": "module",
    "CheckpointWrapper": "_checkpoint_wrapped_module",
}


class ScoreNetwork:
    """The weights of one role, under canonical names.

    Args:
        module: The network, plain or wrapped; or a mapping from names to networks (experts).
        prefix: Dotted canonical name of the role inside `module`, as "real_unet" inside DMD2's guidance model.
        role: What to call it in errors.

    Raises:
        RoleError: If `module` is no module, holds nothing at `prefix`, or has weights that cannot be written in place:
            on the meta device, quantised, sharded, lazy or made in inference mode.

    Example:
        >>> net = ScoreNetwork(nn.ModuleDict({"real_unet": nn.Linear(2, 1)}), prefix="real_unet")
        >>> sorted(net.state_dict())
        ['bias', 'weight']
    """

    def __init__(self, module: nn.Module | Mapping[str, nn.Module], prefix: str = "", *, role: str = "network") -> None:
        self.role = role
        # A ModuleDict is a module first: its experts are found under the same names anyway.
        experts = module if isinstance(module, Mapping) and not isinstance(module, nn.Module) else None
        roots = {"": module} if experts is None else {f"{name}.": expert for name, expert in experts.items()}
        self._roots = {name: _find(root, prefix, role) for name, root in roots.items()}
        if not self.state_dict():
            raise RoleError(
                f"a {role} without weights ({', '.join(type(root).__name__ for root in self._roots.values())})",
                expected="a network with parameters",
                cure="pass the module that holds the weights",
            )

    @classmethod
    def of(cls, network: ScoreNetwork | nn.Module | Mapping[str, nn.Module], *, role: str) -> ScoreNetwork:
        """Return `network` as a ScoreNetwork that goes by the name of `role` in errors."""
        if isinstance(network, ScoreNetwork):
            named = copy.copy(network)
            named.role = role
            return named
        return cls(network, role=role)

    def modules(self) -> list[nn.Module]:
        """Return the unwrapped module, or modules, that hold the weights."""
        return list(self._roots.values())

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield canonical name and live tensor of every parameter and persistent buffer; tied ones under each name."""
        for prefix, root in self._roots.items():
            for name, module in _walk(root, prefix):
                yield from _own_tensors(module, name, self.role)

    def state_dict(self) -> dict[str, Tensor]:
        """Return canonical names and detached live tensors: they change when the network does."""
        return {name: tensor.detach() for name, tensor in self.named_tensors()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Write `state` into the network, in place, all or nothing, cast to the network's dtypes.

        Storage, Parameter objects, dtype, device and flags stay; version counters move, so that autograd notices a
        write between a forward and its backward.

        Args:
            state: One tensor for each canonical name, no more, no less.

        Raises:
            MismatchError: If keys, a shape or a dtype class differ, or tied weights were given two values. Then nothing
                was written.
        """
        pairs = self._pairs(state)
        with torch.no_grad():
            for live, source in pairs:
                live.copy_(source)

    def interpolate(self, low: Mapping[str, Tensor], high: Mapping[str, Tensor], fraction: float) -> None:
        """Write (1 - fraction) low + fraction high, in place, all or nothing, computed in float32 and cast once.

        Args:
            low: State at fraction 0.
            high: State at fraction 1.
            fraction: Where between them, in [0, 1]. Integer tensors are not mixed: they come from the nearer state.

        Raises:
            MismatchError: As `load_state_dict`.
        """
        lows, highs = self._pairs(low), self._pairs(high)
        with torch.no_grad():
            for (live, a), (_, b) in zip(lows, highs, strict=True):
                live.copy_(_lerp(a.to(live.device), b.to(live.device), fraction))

    def fingerprint(self) -> str:
        """Return the SHA-256 of all names, dtypes, shapes and values: 64 hexadecimal digits."""
        return fingerprint(self.state_dict())

    def glimpse(self) -> str:
        """Return a digest of the sums of all weights, read as integers: cheap, exact, and another after any update."""
        sums = [_integers(tensor).sum(dtype=torch.int64).cpu() for tensor in self.state_dict().values()]
        return hashlib.sha256(_bytes(torch.stack(sums))).hexdigest()

    def holds(self, state: Mapping[str, Tensor]) -> bool:
        """Return whether every weight equals that of `state` bit for bit."""
        return all(torch.equal(tensor, state[name].to(tensor)) for name, tensor in self.state_dict().items())

    def rounding(self, state: Mapping[str, Tensor]) -> float:
        """Return |cast(state) - state|, Euclidean: what a write into this network's dtypes rounds away."""
        pairs = [(state[name], t.dtype) for name, t in self.state_dict().items() if t.is_floating_point()]
        narrowed = [s for s, dtype in pairs if torch.finfo(dtype).bits < torch.finfo(s.dtype).bits]
        squares = (float((s.to(d).double() - s.double()).square().sum()) for s, d in pairs) if narrowed else ()
        return math.sqrt(sum(squares))

    def witness(self) -> Tensor:
        """Return one live tensor that nobody but an optimizer or a load writes: a parameter if there is one."""
        tensors = [tensor for _, tensor in self.named_tensors()]
        return next((tensor for tensor in tensors if isinstance(tensor, nn.Parameter)), tensors[0])

    def storages(self) -> set[int]:
        """Return the addresses of the memory that the weights live in."""
        return {t.untyped_storage().data_ptr() for t in self.state_dict().values() if t.numel()}

    def check_same_layout(self, other: ScoreNetwork) -> None:
        """Raise MismatchError unless `other` has the same keys, shapes and dtype classes."""
        _check(other.state_dict(), self.state_dict(), self.role, other.role)

    def _pairs(self, state: Mapping[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
        live = dict(self.named_tensors())
        _check(state, live, self.role, "the state")
        first: dict[int, str] = {}
        for name, tensor in live.items():
            twin = first.setdefault(id(tensor), name)
            if twin != name and not torch.equal(state[twin], state[name]):
                raise MismatchError(
                    f"two values for the tied weights {twin!r} and {name!r} of the {self.role}",
                    expected="one",
                    cure="write a state of a network that ties the same weights",
                )
        return [(tensor, state[name]) for name, tensor in live.items() if first[id(tensor)] == name]


def fingerprint(state: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of a state's names, dtypes, shapes and values, independent of order and device.

    Example:
        >>> fingerprint({"w": torch.zeros(2)}) == fingerprint({"w": torch.ones(2)})
        False
    """
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach()
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(_bytes(tensor))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> bytes | memoryview:
    return tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def _integers(tensor: Tensor) -> Tensor:
    """Return the bits of a tensor as integers: their sum depends on no order of summation."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    sizes = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.view(sizes[tensor.element_size()]) if tensor.is_floating_point() else tensor


def unwrap(module: nn.Module) -> nn.Module:
    """Return the plain module inside DDP, DataParallel, `torch.compile` and checkpoint wrappers, however nested.

    Example:
        >>> plain = nn.Linear(1, 1)
        >>> unwrap(nn.DataParallel(plain)) is plain
        True
    """
    for kind in type(module).__mro__:
        if kind.__name__ == "FullyShardedDataParallel":
            raise RoleError(
                f"a module sharded by {kind.__name__}",
                expected="a whole one",
                cure="attach before sharding; sharded roles are not supported by this version",
            )
        attribute = _WRAPPERS.get(kind.__name__)
        if attribute is not None and kind.__module__.partition(".")[0] == "torch":
            return unwrap(getattr(module, attribute))
    return module


def _find(root: object, prefix: str, role: str) -> nn.Module:
    if not isinstance(root, nn.Module):
        raise RoleError(
            f"{type(root).__name__} as the {role}", expected="a torch.nn.Module", cure=f"pass {role}=<module>"
        )
    module = unwrap(root)
    for name in filter(None, prefix.split(".")):
        child = module._modules.get(name)
        if child is None:
            raise RoleError(
                f"no {name!r} of prefix {prefix!r} in {type(module).__name__}, which has {sorted(module._modules)}",
                expected=f"the {role} there",
                cure="correct the prefix",
            )
        module = unwrap(child)
    return module


def _walk(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    module = unwrap(module)
    yield prefix, module
    for name, child in module._modules.items():
        if child is not None:
            yield from _walk(child, f"{prefix}{name}.")


def _own_tensors(module: nn.Module, prefix: str, role: str) -> Iterator[tuple[str, Tensor]]:
    kind = type(module)
    if kind.get_extra_state is not nn.Module.get_extra_state:
        raise RoleError(
            f"extra state in {prefix or 'the root'} ({kind.__name__}) of the {role}",
            expected="weights that are tensors only",
            cure="use a network whose state_dict() holds nothing but tensors",
        )
    persistent = {k: b for k, b in module._buffers.items() if k not in module._non_persistent_buffers_set}
    for name, tensor in (*module._parameters.items(), *persistent.items()):
        if tensor is not None:
            reason = _unwritable(tensor)
            if reason:
                raise RoleError(
                    f"{prefix}{name} of the {role} {reason[0]}", expected="a dense tensor in memory", cure=reason[1]
                )
            yield prefix + name, tensor


def _unwritable(tensor: Tensor) -> tuple[str, str] | None:
    """Return what is wrong with a weight and its cure, or None."""
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
    if hasattr(tensor, "to_local"):
        return "is sharded (a DTensor)", "attach before sharding; sharded roles are not supported by this version"
    narrow = tensor.is_floating_point() and tensor.element_size() < 2
    integer_weight = isinstance(tensor, nn.Parameter) and not (tensor.is_floating_point() or tensor.is_complex())
    plain = type(tensor) in (Tensor, nn.Parameter) or isinstance(tensor, nn.Buffer)
    if tensor.is_quantized or integer_weight or narrow or not plain:
        return f"is quantised ({type(tensor).__name__}, {tensor.dtype})", "load the network in bf16, fp16 or fp32"
    return None


def _check(state: Mapping[str, Tensor], live: Mapping[str, Tensor], role: str, source: str) -> None:
    """Raise MismatchError unless `state` has the keys, the shapes and the dtype classes of `live`."""
    missing, unknown = sorted(live.keys() - state.keys()), sorted(state.keys() - live.keys())
    if missing or unknown:
        raise MismatchError(
            f"{source} without {len(missing)} keys {missing[:3]} and with {len(unknown)} unknown {unknown[:3]}",
            expected=f"the {len(live)} keys of the {role}, no more and no less",
            cure="use two networks of one architecture (LoRA layers and added heads must not be in the role)",
        )
    for name, tensor in live.items():
        given = state[name]
        if given.shape != tensor.shape:
            raise MismatchError(
                f"{name} of shape {tuple(given.shape)} in {source}",
                expected=f"{tuple(tensor.shape)} as in the {role}",
                cure="use two networks of one configuration",
            )
        if _dtype_class(given) != _dtype_class(tensor):
            raise MismatchError(
                f"{name} of {given.dtype} in {source}",
                expected=f"a dtype like {tensor.dtype} of the {role}",
                cure="use weights of the same class of dtype",
            )


def _dtype_class(tensor: Tensor) -> str:
    if tensor.is_floating_point():
        return "floating"
    return "complex" if tensor.is_complex() else "bool" if tensor.dtype == torch.bool else "integer"


def _lerp(low: Tensor, high: Tensor, fraction: float) -> Tensor:
    if not (low.is_floating_point() or low.is_complex()):
        return low if fraction < 0.5 else high
    dtype = torch.promote_types(torch.promote_types(low.dtype, high.dtype), torch.float32)
    # An attention mask's -inf stays: -inf minus -inf would be NaN.
    return torch.where(low == high, low.to(dtype), torch.lerp(low.to(dtype), high.to(dtype), fraction))
