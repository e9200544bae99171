"""One role's weights: read them, write them in place, name them by content.

A *role* is the teacher s_theta or the fake score s_phi: a whole module, a sub-module of a wrapped root, or several
modules (experts). Its weights go by their canonical names (`modules`). A write is in place and all or nothing: every
key, shape and dtype class is checked before the first copy.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from disback_plugin.errors import MismatchError, RoleError
from disback_plugin.fingerprints import Checksum, checksum, fingerprint
from disback_plugin.modules import find, named_modules, own_tensors

__all__ = ["PIECE", "Layout", "ScoreNetwork", "Source", "dtype_class", "layout_of", "pieces", "room"]

# Elements that are read, decoded and written at once: large enough that a call's fixed costs vanish, small enough for
# a processor's cache, and a whole number of every codec's blocks.
PIECE = 1 << 20


@dataclass(frozen=True)
class Layout:
    """What a tensor is, apart from its values."""

    dtype: torch.dtype
    shape: torch.Size


class Source(Protocol):
    """A state that is read piece by piece, so that it need not be in memory as a whole."""

    def layout(self) -> Mapping[str, Layout]:
        """Return what each tensor is, by canonical name; tied ones under each name."""
        ...

    def read(self, name: str, start: int, stop: int, out: Tensor | None = None) -> Tensor:
        """Return elements [start, stop) of a tensor in row-major order, on the CPU, shape (stop - start,).

        `start` is a multiple of `PIECE`, and `stop - start` at most that. With `out`, of this shape, the tensor's dtype
        and in memory of the CPU, the values are written there and `out` is returned; without it, what is returned may
        be overwritten by the next call.
        """
        ...


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
        self._roots = {name: find(root, prefix, role) for name, root in roots.items()}
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

    # -- read ---------------------------------------------------------------------------------------------------------

    def modules(self) -> dict[str, nn.Module]:
        """Return the unwrapped module that holds the weights under the key "", or each expert by its name and a dot."""
        return dict(self._roots)

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield canonical name and live tensor of every parameter and persistent buffer; tied ones under each name."""
        for prefix, root in self._roots.items():
            for name, module in named_modules(root, prefix):
                yield from own_tensors(module, name, self.role)

    def state_dict(self) -> dict[str, Tensor]:
        """Return canonical names and detached live tensors: they change when the network does."""
        return {name: tensor.detach() for name, tensor in self.named_tensors()}

    def fingerprint(self) -> str:
        """Return the SHA-256 of all names, dtypes, shapes and values: 64 hexadecimal digits."""
        return fingerprint(self.state_dict())

    def checksum(self) -> str:
        """Return a digest of all values at the speed of memory: another one after an update (`fingerprints`)."""
        return checksum(self.state_dict())

    def rounding(self, source: Source) -> float:
        """Return |cast(theta) - theta|, Euclidean: what a write of a source into this network's dtypes rounds away."""
        layout, square = source.layout(), 0.0
        for name, live in self.state_dict().items():
            given = layout[name].dtype
            if not live.is_floating_point() or torch.finfo(live.dtype).bits >= torch.finfo(given).bits:
                continue
            for start, stop in pieces(live.numel()):
                values = source.read(name, start, stop)
                square += float((values.to(live.dtype).double() - values.double()).square().sum())
        return math.sqrt(square)

    def witness(self) -> Tensor:
        """Return one live tensor that nobody but an optimizer or a load writes: a parameter if there is one."""
        tensors = [tensor for _, tensor in self.named_tensors()]
        return next((tensor for tensor in tensors if isinstance(tensor, nn.Parameter)), tensors[0])

    def storages(self) -> set[int]:
        """Return the addresses of the memory that the weights live in."""
        return {t.untyped_storage().data_ptr() for t in self.state_dict().values() if t.numel()}

    def check_same_layout(self, other: ScoreNetwork) -> None:
        """Raise MismatchError unless `other` has the same keys, shapes and dtype classes."""
        own, others = dict(self.named_tensors()), dict(other.named_tensors())
        _check(layout_of(others), layout_of(own), self.role, other.role)
        untied = _ties(own).items() - _ties(others).items()
        if untied:
            name, twin = min(untied)
            raise MismatchError(
                f"{name!r} and {twin!r} that are one tensor in the {self.role} and two in the {other.role}",
                expected=f"weights that the {other.role} ties as well",
                cure="make one network a copy.deepcopy of the other",
            )

    def buffers(self) -> set[str]:
        """Return the canonical names of what is no parameter: running statistics, filters, counters."""
        return {name for name, tensor in self.named_tensors() if not isinstance(tensor, nn.Parameter)}

    # -- write --------------------------------------------------------------------------------------------------------

    def load_state_dict(self, state: Mapping[str, Tensor], *, non_blocking: bool = False) -> None:
        """Write `state` into the network, in place, all or nothing, cast to the network's dtypes.

        Storage, Parameter objects, dtype, device and flags stay; version counters move, so that autograd notices a
        write between a forward and its backward.

        Args:
            state: One tensor for each canonical name, no more, no less.
            non_blocking: Whether to return before copies from pinned memory to a GPU are done, as `Tensor.copy_` does.

        Raises:
            MismatchError: If keys, a shape or a dtype class differ, or tied weights were given two values. Then nothing
                was written.
        """
        live, ties = self._writable(layout_of(state))
        for name, twin in ties.items():
            if not torch.equal(state[twin], state[name]):
                raise _two_values(twin, name, self.role)
        with torch.no_grad():
            torch._foreach_copy_(list(live.values()), [state[name] for name in live], non_blocking)

    def write(self, source: Source) -> str:
        """Write a source into the network, in place, piece by piece, cast once to the network's dtypes.

        Where the network is contiguous and on the CPU, pieces are decoded straight into it; elsewhere one tensor at a
        time is assembled in between.

        Args:
            source: One tensor for each canonical name, no more, no less.

        Returns:
            The checksum of what was read, before any cast, over every name of the source.

        Raises:
            MismatchError: As `load_state_dict`. Then nothing was written. What `source.read` raises is passed on, and
                then the network is half written.
        """
        layout, total = source.layout(), Checksum()
        live, ties = self._writable(layout)
        names = {name: [name] for name in live}
        for name, twin in ties.items():
            parts = pieces(layout[name].shape.numel())
            if not all(torch.equal(source.read(name, a, b).clone(), source.read(twin, a, b)) for a, b in parts):
                raise _two_values(twin, name, self.role)
            names[twin].append(name)
        with torch.no_grad():
            for name, tensor in live.items():
                _write(tensor, source, name, layout[name], total, names[name])
        return total.digest()

    def _writable(self, given: Mapping[str, Layout]) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Return the live tensors, and {name: first name} of the other names of tied ones, after a check that something
        of this layout fits them.
        """
        live = dict(self.named_tensors())
        ties = _ties(live)
        _check(given, layout_of(live), self.role, "the state")
        return {name: tensor for name, tensor in live.items() if name not in ties}, ties


def layout_of(state: Mapping[str, Tensor]) -> dict[str, Layout]:
    """Return what each tensor of a state is, apart from its values.

    Example:
        >>> layout_of({"w": torch.zeros(2)})["w"].shape
        torch.Size([2])
    """
    return {name: Layout(tensor.dtype, tensor.shape) for name, tensor in state.items()}


def room(elements: int, dtype: torch.dtype, *, pinned: bool = False) -> Tensor:
    """Return new memory on the host, shape (elements,), whatever default device or inference mode the caller is in.

    Example:
        >>> room(3, torch.bfloat16).shape
        torch.Size([3])
    """
    with torch.inference_mode(False):
        return torch.empty(elements, dtype=dtype, device="cpu", pin_memory=pinned)


def pieces(elements: int) -> Iterator[tuple[int, int]]:
    """Yield start and stop of the pieces of a tensor; an empty one has one, empty, piece.

    Example:
        >>> list(pieces(PIECE + 1))
        [(0, 1048576), (1048576, 1048577)]
    """
    for start in range(0, max(elements, 1), PIECE):
        yield start, min(start + PIECE, elements)


def _write(live: Tensor, source: Source, name: str, given: Layout, total: Checksum, names: list[str]) -> None:
    """Write one tensor of a source into a live one."""
    straight = live.device.type == "cpu" and live.is_contiguous()
    pinned = live.device.type == "cuda"
    flat = live.detach().view(-1) if straight else room(live.numel(), given.dtype, pinned=pinned)
    for start, stop in pieces(live.numel()):
        piece = flat[start:stop]
        if piece.dtype == given.dtype:
            values = source.read(name, start, stop, out=piece)
        else:
            values = source.read(name, start, stop)
            piece.copy_(values)
        for tied in names:
            total.add(tied, values)
    if not straight:
        live.copy_(flat.view(given.shape), non_blocking=pinned)


def _ties(live: Mapping[str, Tensor]) -> dict[str, str]:
    """Return {name: first name of the same tensor} of every other name of a tied weight."""
    first: dict[int, str] = {}
    firsts = {name: first.setdefault(id(tensor), name) for name, tensor in live.items()}
    return {name: twin for name, twin in firsts.items() if name != twin}


def _two_values(twin: str, name: str, role: str) -> MismatchError:
    return MismatchError(
        f"two values for the tied weights {twin!r} and {name!r} of the {role}",
        expected="one",
        cure="write a state of a network that ties the same weights",
    )


def _check(given: Mapping[str, Layout], live: Mapping[str, Layout], role: str, source: str) -> None:
    """Raise MismatchError unless something given has the keys, the shapes and the dtype classes of `live`."""
    missing, unknown = sorted(live.keys() - given.keys()), sorted(given.keys() - live.keys())
    if missing or unknown:
        raise MismatchError(
            f"{source} without {len(missing)} keys {missing[:3]} and with {len(unknown)} unknown {unknown[:3]}",
            expected=f"the {len(live)} keys of the {role}, no more and no less",
            cure="use two networks of one architecture (LoRA layers and added heads must not be in the role)",
        )
    for name, own in live.items():
        if given[name].shape != own.shape:
            raise MismatchError(
                f"{name} of shape {tuple(given[name].shape)} in {source}",
                expected=f"{tuple(own.shape)} as in the {role}",
                cure="use two networks of one configuration",
            )
        if dtype_class(given[name].dtype) != dtype_class(own.dtype):
            raise MismatchError(
                f"{name} of {given[name].dtype} in {source}",
                expected=f"a dtype like {own.dtype} of the {role}",
                cure="use weights of the same class of dtype",
            )


def dtype_class(dtype: torch.dtype) -> str:
    """Return "floating", "complex", "bool" or "integer": within a class, a write casts."""
    if dtype.is_floating_point:
        return "floating"
    return "complex" if dtype.is_complex else "bool" if dtype == torch.bool else "integer"
