"""One role's weights: read them, write them in place, name them by content.

A *role* is the teacher s_theta or the fake score s_phi: a whole module, a sub-module of a wrapped root, or several
modules (experts), or one LoRA adapter of a network (`lora`). Its weights go by their canonical names (`modules`). A
write is in place and all or nothing: every
key, shape and dtype class is checked before the first copy. Of a role sharded by FSDP each process writes its own
shards, and nothing is sent.
"""

from __future__ import annotations

import copy
import logging
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from disback_plugin.distributed import on_rank_zero
from disback_plugin.errors import MismatchError, RoleError
from disback_plugin.weights import lora
from disback_plugin.weights.check import check, ties, two_values
from disback_plugin.weights.checksum import Checksum, fingerprint
from disback_plugin.weights.fsdp1 import address, detached, shape_of, stretch_of
from disback_plugin.weights.full_state import FullState
from disback_plugin.weights.inplace_copy import Source, bump, part_of, write_tensor
from disback_plugin.weights.peft_layers import adapter_tensors, base_parameters, runs_under
from disback_plugin.weights.sharding import Part, add_up, chunk_of, count, cut_of, held, is_sharded
from disback_plugin.weights.tensor_meta import layout_of, pieces
from disback_plugin.weights.tensors import find, named_modules, own_tensors, reshard

__all__ = ["Network", "ScoreNetwork"]

logger = logging.getLogger(__name__)


class ScoreNetwork:
    """The weights of one role, under canonical names.

    Args:
        module: The network, plain, wrapped or sharded; or a mapping from names to networks (experts).
        prefix: Dotted canonical name of the role inside `module`, as "real_unet" inside DMD2's guidance model.
        adapter: Name of the LoRA adapter that the role is, on a base that it may share with others; None for the whole.
        role: What to call it in errors.

    Raises:
        RoleError: If `module` is no module, holds nothing at `prefix`, or has weights that cannot be written in place:
            on the meta device, quantised, sharded by DeepSpeed, along two dimensions or by FSDP1 without
            `use_orig_params=True`, lazy or made in inference mode. Of an adapter's base only its being whole is asked.

    Example:
        >>> net = ScoreNetwork(nn.ModuleDict({"real_unet": nn.Linear(2, 1)}), prefix="real_unet")
        >>> sorted(net.state_dict())
        ['bias', 'weight']
    """

    def __init__(
        self,
        module: nn.Module | Mapping[str, nn.Module],
        prefix: str = "",
        *,
        adapter: str | None = None,
        role: str = "network",
    ) -> None:
        self.role, self.adapter = role, adapter
        self.identity: str | None = None
        self._marks: dict[str, Tensor] = {}
        # A ModuleDict is a module first: its experts are found under the same names anyway.
        experts = module if isinstance(module, Mapping) and not isinstance(module, nn.Module) else None
        roots = {"": module} if experts is None else {f"{name}.": expert for name, expert in experts.items()}
        found = {name: find(root, prefix, role) for name, root in roots.items()}
        self._roots = {name: holders[-1] for name, holders in found.items()}
        self._holders = [holder for holders in found.values() for holder in holders[:-1]]
        if adapter is not None:
            told = {name: lora.identity(root, adapter, role) for name, root in self._roots.items()}
            # Nothing to write, but a name: what is recorded on one base fits no other.
            self._marks = {f"{name}on base {base}": torch.empty(0) for name, base in told.items()}
            self.identity = repr(sorted(told.items()))
        if not self.state_dict():
            raise RoleError(
                f"a {role} without weights ({', '.join(type(root).__name__ for root in self._roots.values())})",
                expected="a network with parameters",
                cure="pass the module that holds the weights",
            )

    @classmethod
    def of(cls, network: Network, *, role: str) -> ScoreNetwork:
        """Return `network` as a ScoreNetwork that goes by the name of `role` in errors."""
        if isinstance(network, ScoreNetwork):
            named = copy.copy(network)
            named.role = role
            return named
        return cls(network, role=role)

    def on(self, modules: Mapping[str, nn.Module]) -> ScoreNetwork:
        """Return the same role on copies of what `modules` returns."""
        moved = copy.copy(self)
        moved._roots, moved._holders = dict(modules), []
        return moved

    def base(self) -> list[nn.Parameter]:
        """Return the parameters that an adapter works on, and that must stand still; none of a whole network."""
        roots = self._roots.values() if self.adapter is not None else ()
        return [parameter for root in roots for _, parameter in base_parameters(root)]

    @contextmanager
    def running(self) -> Iterator[None]:
        """Let forwards of the modules be the role's: under its adapter, if it is one."""
        with ExitStack() as stack:
            for root in self._roots.values() if self.adapter is not None else ():
                stack.enter_context(lora.under(root, self.adapter))
            yield

    @property
    def is_running(self) -> bool:
        """Whether a forward of the modules would be the role's at this moment."""
        return self.adapter is None or all(runs_under(root, self.adapter) for root in self._roots.values())

    # -- read ---------------------------------------------------------------------------------------------------------

    def modules(self) -> dict[str, nn.Module]:
        """Return the unwrapped module that holds the weights under the key "", or each expert by its name and a dot."""
        return dict(self._roots)

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield canonical name and live tensor of every parameter and persistent buffer; tied ones under each name.

        What FSDP has gathered for a forward, and keeps, is let go first: the shards are what counts.
        """
        reshard(self._holders, self._roots.values())
        for prefix, root in self._roots.items():
            if self.adapter is not None:
                own = adapter_tensors(root, self.adapter, self.role)
                yield from ((prefix + name, tensor) for name, tensor in own)
                continue
            for name, module in named_modules(root, prefix):
                yield from own_tensors(module, name, self.role)
        yield from self._marks.items()

    def state_dict(self) -> dict[str, Tensor]:
        """Return canonical names and detached live tensors, which change when the network does.

        If sharded they are DTensors; under FSDP1 flat, and what this process holds (`whole` has all).
        """
        return {name: detached(tensor) for name, tensor in self.named_tensors()}

    def fingerprint(self) -> str:
        """Return the SHA-256 of all names, dtypes, shapes and values: 64 hexadecimal digits.

        Of a sharded role, rank 0 is sent everything, tensor by tensor: all ranks must call.
        """
        state = self.whole()
        return on_rank_zero(lambda: fingerprint(state), state) if state.sharded else fingerprint(state)

    def checksum(self) -> str:
        """Return a digest of all values at the speed of memory: another one after an update (`fingerprints`).

        Of a sharded role, the sums of the shards are added up: all ranks must call.
        """
        total, live = Checksum(), dict(self.named_tensors())
        for name, tensor in live.items():
            count(total, name, tensor)
        add_up(total, live)
        return total.digest()

    def mark(self) -> str:
        """Return what tells moments apart, without communication: `checksum`, or that of this process's shards."""
        live = dict(self.named_tensors())
        if any(held(tensor)[1].stop is not None and cut_of(tensor) is None for tensor in live.values()):
            return ""  # cut by FSDP1, at places that other processes, or other numbers of them, could not tell
        cuts = {cut for tensor in live.values() if (cut := cut_of(tensor)) is not None}
        if not cuts:
            return self.checksum()
        rank, ranks, dim = min(cuts)
        if len(cuts) > 1 or dim != 0:
            return ""
        return f"{self._of_chunk(live, rank, ranks).digest()} of shard {rank} of {ranks}"

    def bears(self, mark: str) -> bool:
        """Return whether the network holds what it held when `mark` was made, by however many processes; all call."""
        if not mark:
            logger.warning("whether the %s holds the weights of the saved moment cannot be told", self.role)
            return True
        part = re.fullmatch(r"(\w+) of shard (\d+) of ([1-9]\d*)", mark)
        if part is None:
            return self.checksum() == mark
        live = dict(self.named_tensors())
        total = self._of_chunk(live, int(part[2]), int(part[3]))
        add_up(total, live)
        return total.digest() == part[1]

    def _of_chunk(self, live: Mapping[str, Tensor], rank: int, ranks: int) -> Checksum:
        """Return the checksum of one of several chunks of each parameter, as far as this process holds it."""
        total = Checksum()
        for name, tensor in live.items():
            cut = isinstance(tensor, nn.Parameter) and tensor.ndim > 0
            count(total, name, tensor, chunk_of(shape_of(tensor), rank, ranks) if cut else None)
        return total

    def rounding(self, source: Source) -> float:
        """Return |cast(theta) - theta|, Euclidean: what a write of a source into this network's dtypes rounds away."""
        layout, square = source.layout(), 0.0
        for name, live in self.state_dict().items():
            given = layout[name].dtype
            if not live.is_floating_point() or torch.finfo(live.dtype).bits >= torch.finfo(given).bits:
                continue
            for start, stop in pieces(layout[name].shape.numel()):
                values = source.read(name, start, stop)
                square += float((values.to(live.dtype).double() - values.double()).square().sum())
        return math.sqrt(square)

    def witness(self) -> Tensor:
        """Return one live tensor that nobody but an optimizer or a load writes: a parameter if there is one."""
        tensors = [tensor for _, tensor in self.named_tensors()]
        return next((tensor for tensor in tensors if isinstance(tensor, nn.Parameter)), tensors[0])

    def storages(self) -> set[int]:
        """Return the addresses of the memory that the weights live in."""
        local = [held(tensor)[0] for _, tensor in self.named_tensors()]
        return {address(tensor) for tensor in local if tensor.numel()}

    def check_same_layout(self, other: ScoreNetwork) -> None:
        """Raise MismatchError unless `other` has the same keys, shapes and dtype classes."""
        lora.check_pair(self.identity, other.identity)
        own, others = dict(self.named_tensors()), dict(other.named_tensors())
        check(layout_of(others), layout_of(own), self.role, other.role)
        untied = ties(own).items() - ties(others).items()
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

    @property
    def sharded(self) -> bool:
        """Whether this process holds a part of it only, or what FSDP1 treats so: no process can run a copy."""
        return any(is_sharded(t) or stretch_of(t) is not None for _, t in self.named_tensors())

    def whole(self) -> FullState:
        """Return the whole live weights, which rank 0 may read while the others serve it (`ranks.on_rank_zero`)."""
        return FullState(dict(self.named_tensors()))

    def parts(self) -> dict[str, Part] | None:
        """Return what this process holds of each tensor, by canonical name; None if it holds all of it."""
        parts = {name: held(tensor)[1] for name, tensor in self.named_tensors()}
        return parts if any(part.stop is not None for part in parts.values()) else None

    # -- write --------------------------------------------------------------------------------------------------------

    def load_state_dict(self, state: Mapping[str, Tensor], *, non_blocking: bool = False) -> None:
        """Write `state` into the network, in place, all or nothing, cast to the network's dtypes.

        Storage, Parameter objects, dtype, device and flags stay; version counters move, so that autograd notices a
        write between a forward and its backward.

        Args:
            state: One tensor for each canonical name, no more, no less; whole ones, or sharded as the network is.
            non_blocking: Whether to return before copies from pinned memory to a GPU are done, as `Tensor.copy_` does.

        Raises:
            MismatchError: If keys, a shape or a dtype class differ, or tied weights were given two values. Then nothing
                was written.
        """
        live = dict(self.named_tensors())
        check(layout_of(state), layout_of(live), self.role, "the state")
        given = {name: part_of(state[name], held(tensor)[1]) for name, tensor in live.items()}
        self.load_parts(given, non_blocking=non_blocking)

    def load_parts(self, state: Mapping[str, Tensor], *, non_blocking: bool = False) -> None:
        """Write what this process holds of a state, whose layout fits, into the network.

        Args:
            state: By canonical name, what `parts` says of each tensor.
            non_blocking: As in `load_state_dict`.

        Raises:
            MismatchError: If tied weights were given two values. Then nothing was written.
        """
        live = dict(self.named_tensors())
        twins = ties(live)
        for name, twin in twins.items():
            if not torch.equal(state[twin], state[name]):
                raise two_values(twin, name, self.role)
        own = [name for name in live if name not in twins]
        with torch.no_grad():
            torch._foreach_copy_([held(live[n])[0] for n in own], [state[n] for n in own], non_blocking)
            bump(live[name] for name in own)

    def write(self, source: Source) -> str:
        """Write a source into the network, in place, piece by piece, cast once to the network's dtypes.

        Where the network is contiguous and on the CPU, pieces are decoded straight into it; elsewhere one tensor at a
        time is assembled in between.

        Args:
            source: One tensor for each canonical name, no more, no less.

        Returns:
            The checksum of what was read, before any cast, over every name of the source; of the parts that this
            process holds (`parts`), if it does not hold all.

        Raises:
            MismatchError: As `load_state_dict`. Then nothing was written. What `source.read` raises is passed on, and
                then the network is half written.
        """
        layout, total = source.layout(), Checksum()
        live = dict(self.named_tensors())
        twins = ties(live)
        check(layout, layout_of(live), self.role, "the state")
        names = {name: [name] for name in live if name not in twins}
        for name, twin in twins.items():
            cells = list(held(live[twin])[1].cells(source.grain(name)))
            places = [(cell.start, cell.stop) for cell in cells]
            if not all(torch.equal(source.read(name, a, b).clone(), source.read(twin, a, b)) for a, b in places):
                raise two_values(twin, name, self.role)
            names[twin].append(name)
        with torch.no_grad():
            for name, known in names.items():
                write_tensor(live[name], source, name, layout[name], total, known)
            bump(live[name] for name in names)
        return total.digest()


# What users pass as a role: `ScoreNetwork.of` takes it.
Network = ScoreNetwork | nn.Module | Mapping[str, nn.Module]
