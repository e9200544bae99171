"""The weights of one role: read them, write them in place, and identify them by their content.

A *role* is the teacher s_theta or the fake score s_phi: a whole module, a sub-module of a wrapped root, several modules
(experts), or one LoRA adapter of a network (`lora`). Each rank writes its own part of a sharded role and sends nothing.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Collection, Mapping
from functools import partial
from math import sqrt

import torch
from torch import Tensor, nn

from disback_plugin.errors import MismatchError, RoleError
from disback_plugin.weights import lora, marks
from disback_plugin.weights.modules import WeightTable, find
from disback_plugin.weights.sharding import FullState, Weight, increment_versions, part_of
from disback_plugin.weights.tensors import Checksum, Part, Source, TensorMeta, check_layout, host_tensor, masked, pieces

logger = logging.getLogger(__name__)


class ScoreNetwork:
    """The weights of one role, under canonical names.

    The weights are enumerated when it is built. If a parameter, a persistent buffer or a sub-module is replaced later,
    they are enumerated and validated again at the next use.

    Args:
        module: The network, plain, wrapped or sharded; or a mapping from names to networks (experts).
        prefix: Dotted canonical name of the role inside `module`, as "real_unet" inside DMD2's guidance model.
        lora_adapter: Name of the LoRA adapter that is the role, on a base that it may share with others; None for the
            whole network.
        role: The name of the network in errors.

    Raises:
        RoleError: If `module` is no module, holds nothing at `prefix`, or has weights that cannot be written in place:
            on the meta device, quantised, trained by DeepSpeed (ZeRO), sharded along two dimensions or by FSDP1 without
            `use_orig_params=True`, lazy or made in inference mode. The base of a LoRA adapter only has to be whole.

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
        lora_adapter: str | None = None,
        role: str = "network",
    ) -> None:
        self.role, self.lora_adapter, self.others = role, lora_adapter, list[str]()
        # A ModuleDict is a module first: its experts have the same names in any case.
        experts = module if isinstance(module, Mapping) and not isinstance(module, nn.Module) else None
        roots = {"": module} if experts is None else {f"{name}.": expert for name, expert in experts.items()}
        found = {name: find(root, prefix, role) for name, root in roots.items()}
        self._roots = {name: holders[-1] for name, holders in found.items()}
        self.running = next(iter(self._roots.values())) if prefix else module  # as a loop runs it, in its wrappers
        around = [holder for holders in found.values() for holder in holders[:-1]]
        self._enumerate = partial(WeightTable, self._roots, around)
        self._table = self._enumerate(role) if lora_adapter is None else self.select_adapter(lora_adapter)
        if not self._table.weights:
            kinds = ", ".join(type(root).__name__ for root in self._roots.values())
            cure = "pass the module that holds the weights"
            raise RoleError(f"a {role} without weights ({kinds})", expected="a network with parameters", cure=cure)

    def select_adapter(self, lora_adapter: str, only: Collection[str] | None = None) -> WeightTable:
        """Make the weights those of `lora_adapter` and return their table; `only` names what identifies the base."""
        names = []  # a node recorded on one base fits no other
        for prefix, root in self._roots.items():
            own = only and {name.removeprefix(prefix) for name in only if name.startswith(prefix)}
            names.append(f"{prefix}on base {lora.identity(root, lora_adapter, self.role, own)}")
        select = partial(lora.adapter_modules, lora_adapter=lora_adapter)
        self.lora_adapter, self._enumerate = lora_adapter, partial(self._enumerate, select=select, names=names)
        self._table = self._enumerate(self.role)
        return self._table

    @classmethod
    def of(cls, network: Network, *, role: str, like: ScoreNetwork | None = None) -> ScoreNetwork:
        """Return `network` as a ScoreNetwork that has the name `role` in errors.

        Args:
            network: The network.
            role: The name.
            like: The teacher. Weights that it lacks, as those of a discriminator's head, are then no part of the role:
                nothing reads or writes them. None for all weights.
        """
        named = copy.copy(network) if isinstance(network, ScoreNetwork) else cls(network, role=role)
        named.role = role
        names = set() if like is None else {weight.name for weight in like._weights()}
        named.others = [weight.name for weight in named._weights() if weight.name not in names] if names else []
        if named.others and named.lora_adapter is None:
            named._enumerate = partial(named._enumerate, only=names)
            named._table = named._enumerate(role)
        return named

    def _weights(self) -> list[Weight]:
        """Return the weights, after FSDP has freed what it gathered; enumerate them again if one was replaced."""
        if not self._table.is_current():
            self._table = self._enumerate(self.role)
        return self._table.weights

    # -- read ---------------------------------------------------------------------------------------------------------

    def modules(self) -> dict[str, nn.Module]:
        """Return the unwrapped module that holds the weights under the key "", or each expert by its name and a dot."""
        return dict(self._roots)

    def base_parameters(self) -> list[nn.Parameter]:
        """Return the parameters that a LoRA adapter works on, which must not be trained; none of a whole network."""
        if self.lora_adapter is None:
            return []
        return [parameter for root in self._roots.values() for _, parameter in lora.base_parameters(root)]

    def weight_modules(self) -> list[nn.Module]:
        """Return the modules that hold a weight of their own, which a forward of the network calls."""
        return self._table.modules

    def named_tensors(self) -> list[tuple[str, Tensor]]:
        """Return canonical name and live tensor of each parameter and persistent buffer; tied ones under each name."""
        return [(weight.name, weight.tensor) for weight in self._weights()]

    def state_dict(self) -> dict[str, Tensor]:
        """Return canonical names and detached live tensors, which change when the network does.

        Sharded tensors are DTensors, or under FSDP1 the flat parts of this rank (`full_state` has everything).
        """
        return {weight.name: weight.tensor.detach() for weight in self._weights()}

    def full_state(self) -> FullState:
        """Return the whole live weights; rank 0 may read sharded ones while the others serve their shards."""
        return FullState(self._weights())

    def fingerprint(self) -> str:
        """Return the SHA-256 of all names, dtypes, shapes and values: 64 hexadecimal digits.

        All ranks of a sharded network must call: they send it to rank 0, tensor by tensor.
        """
        return self.full_state().fingerprint()

    def checksum(self) -> str:
        """Return a digest of all values at the speed of memory, which every update changes (`checksum`).

        The sums of a sharded network's parts are added up: all ranks must call.
        """
        return marks.weights_checksum(self._weights())

    def local_checksum(self) -> str:
        """Return a text that identifies the present weights, computed without communication (`marks.mark`)."""
        return marks.mark(self._weights())

    def checksum_like(self, text: str) -> str:
        """Return the checksum of what `text`, a `local_checksum`, was computed from; "" if it cannot be told.

        All ranks must call.
        """
        return marks.checksum_like(self._weights(), text)

    def matches_checksum(self, text: str) -> bool:
        """Return whether the weights are those from which `local_checksum` computed `text`, on any number of ranks.

        All ranks must call. For weights that were rounded since, and where it cannot be told, as of an empty text or
        after FSDP1 on another number of ranks, the answer is True, with a warning.
        """
        present, (exact, *rounded) = self.checksum_like(text), marks.checksums_in(text)
        if not present:
            logger.warning("it cannot be told whether the %s holds the weights of the saved moment", self.role)
        elif present in rounded and present != exact:
            logger.warning(
                "the %s holds the weights of the saved moment rounded to half precision, as a checkpoint may", self.role
            )
        return present in ("", exact, *rounded)

    def relative_rounding(self, source: Source, distance: float) -> float:
        """Return what a write of a source into this network's dtypes rounds away, Euclidean, over a distance."""
        layout, square = source.layout(), 0.0
        for weight in self._weights():
            own, read = weight.meta.dtype, layout[weight.name].dtype
            if own.is_floating_point and torch.finfo(own).bits < torch.finfo(read).bits:
                for start, stop in pieces(weight.meta.shape.numel()):
                    values = source.read(weight.name, start, stop)
                    square += float((values.to(own).double() - values.double()).square().sum())
        return sqrt(square) / distance

    def first_parameter(self) -> Tensor:
        """Return the first live parameter, or the first buffer of a network without parameters."""
        return max(self._weights(), key=lambda weight: weight.is_parameter).tensor

    def witnesses(self, count: int = 8) -> list[tuple[Mapping[str, object], str, Tensor]]:
        """Return `count` live parameters, from the first to the last, with what holds each, and its name there."""
        self._weights()
        slots = [slot for slot in self._table.slots if isinstance(slot[2], nn.Parameter)]
        slots = slots or [slot for slot in self._table.slots if isinstance(slot[2], Tensor)]
        return slots[:: -(-len(slots) // count)] if slots else []

    @property
    def sharded(self) -> bool:
        """Whether the network is distributed over ranks, or managed by FSDP1, so that no rank can run a copy of it."""
        return any(weight.sharded or weight.flattened for weight in self._weights())

    def parts(self) -> dict[str, Part] | None:
        """Return the part of each tensor that this rank holds, by canonical name; None if it holds all of each."""
        parts = {weight.name: weight.part for weight in self._weights()}
        return parts if any(part.stop is not None for part in parts.values()) else None

    def check_original(self) -> None:
        """Raise MismatchError if the weights are known not to be node 0: a path compares those of a whole network."""

    def install(self) -> None:
        """Begin to take part in forwards, where the weights are not those that a forward uses by itself."""

    def remove(self) -> None:
        """End what `install` began."""

    def check_same_layout(self, other: ScoreNetwork) -> None:
        """Raise MismatchError unless `other` has the same keys, shapes, dtype classes and ties."""
        own, others = self._weights(), other._weights()
        missing = ({weight.name for weight in own} - {weight.name for weight in others}) or {""}
        # A wrapper that is not known adds a prefix to all names.
        inner = [name.removesuffix(min(missing)) for name in other.others if name.endswith(f".{min(missing)}")]
        hint = f"pass the module inside, ScoreNetwork(..., prefix={inner[0][:-1]!r})" if inner else ""
        check_layout(other._table.layout, self._table.layout, self.role, other.role, hint)
        ties = {weight.name: weight.tied_to for weight in others}
        for weight in own:
            if weight.tied_to is not None and ties[weight.name] != weight.tied_to:
                found = f"{weight.name!r} and {weight.tied_to!r}, one tensor in the {self.role} and two in {other.role}"
                cure = "make one network a copy.deepcopy of the other"
                raise MismatchError(found, expected=f"weights that the {other.role} ties as well", cure=cure)

    # -- write --------------------------------------------------------------------------------------------------------

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Write `state` into the network, in place, all or nothing, cast to the network's dtypes.

        Storage, Parameter objects, dtype, device and flags stay. Version counters move, so that autograd notices a
        write between a forward and its backward.

        Args:
            state: One tensor for each canonical name, no more, no less; whole ones, or sharded as the network is.

        Raises:
            MismatchError: If keys, a shape or a dtype class differ, or if tied weights have two values in `state`. Then
                nothing was written.
        """
        weights = self._weights()
        # Of a weight that FSDP1 has flattened, the state may hold this rank's part.
        whole = {(weight.name, weight.tensor.shape): weight.meta.shape for weight in weights}
        layout = {name: TensorMeta(t.dtype, whole.get((name, t.shape), t.shape)) for name, t in state.items()}
        check_layout(layout, self._table.layout, self.role, "the state")
        given = {weight.name: part_of(state[weight.name], weight.part) for weight in weights}
        own = self._untied(weights, lambda weight, first: torch.equal(given[weight.name], given[first]))
        with torch.no_grad():
            torch._foreach_copy_([weight.local() for weight in own], [given[weight.name] for weight in own])
        increment_versions(own)

    def write(self, source: Source, *, keep_finer: bool = False) -> str:
        """Write a source into the network, in place, piece by piece, cast once to the network's dtypes.

        Pieces are decoded directly into contiguous weights on the CPU, and elsewhere one tensor at a time on the host.

        Args:
            source: One tensor for each canonical name, no more, no less.
            keep_finer: Whether values stay that equal the source's up to a cast to its dtype.

        Returns:
            The checksum of the values read, before any cast, over every name of the source; of the parts that this rank
            holds (`parts`), if it does not hold all.

        Raises:
            MismatchError: As `load_state_dict`. Then nothing was written. What `source.read` raises is passed on, and
                then the network is half written.
        """
        weights, layout, total = self._weights(), source.layout(), Checksum()
        check_layout(layout, self._table.layout, self.role, "the state")

        def equal(weight: Weight, first: str) -> bool:
            ranges = [(cell.start, cell.stop) for cell in weight.part.cells()]
            return all(torch.equal(source.read(weight.name, *r).clone(), source.read(first, *r)) for r in ranges)

        own = self._untied(weights, equal)
        with torch.no_grad():
            for weight in own:
                dtype, local = layout[weight.name].dtype, weight.local()
                finer = keep_finer and dtype != torch.promote_types(dtype, local.dtype) == local.dtype
                before = local.clone() if finer else None
                _write_weight(weight, source, dtype, total)
                if before is not None:
                    local.copy_(torch.where(before.to(dtype) == local.to(dtype), before, local))
        increment_versions(own)
        return total.digest()

    def _untied(self, weights: list[Weight], equal: Callable[[Weight, str], bool]) -> list[Weight]:
        """Return the weights without further names of tied ones; raise if a state has another value under such a name.

        Args:
            weights: All weights.
            equal: A function that says whether a tied weight and the one of its first name are equal in the state.
        """
        if self.lora_adapter is not None:
            lora.require_unmerged(self._roots.values(), self.role)
        for weight in weights:
            if weight.tied_to is not None and not equal(weight, weight.tied_to):
                found = f"two values for the tied weights {weight.tied_to!r} and {weight.name!r} of the {self.role}"
                raise MismatchError(found, expected="one", cure="write a state of a network that ties the same weights")
        return [weight for weight in weights if weight.tied_to is None]


# The types that users may pass as a role: `ScoreNetwork.of` takes them.
Network = ScoreNetwork | nn.Module | Mapping[str, nn.Module]


def _write_weight(weight: Weight, source: Source, dtype: torch.dtype, total: Checksum) -> None:
    """Write the part that this rank holds of one tensor of a source into the live tensor.

    Args:
        weight: The weight.
        source: The source to read from.
        dtype: The dtype of the tensor there.
        total: A checksum, to which all values are added before any cast, under each of the weight's names.
    """
    local = weight.local()
    direct, pinned = local.device.type == "cpu" and local.is_contiguous(), local.device.type == "cuda"
    flat = local.detach().view(-1) if direct else host_tensor(local.numel(), dtype, pinned=pinned)
    for cell in weight.part.cells():
        piece = flat[cell.at]
        decoded = cell.keep is None and piece.dtype == dtype
        values = source.read(weight.name, cell.start, cell.stop, out=piece if decoded else None)
        if not decoded:
            piece.copy_(values if cell.keep is None else values[cell.keep])
        counted = masked(values, cell)
        for name in weight.names:
            total.add(name, counted)
    if not direct:
        local.copy_(flat.view(local.shape), non_blocking=pinned)
