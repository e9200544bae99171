"""The entries of a network's table of weights, and the part of each that one rank holds.

`torch.distributed.fsdp.fully_shard` (FSDP2) makes each parameter a DTensor. It is cut along one dimension into as many
chunks as there are ranks, the last ones smaller or empty, and perhaps repeated over a second dimension of the mesh
(HSDP). FSDP1 flattens all weights of a unit side by side, and each rank holds an equal stretch of them: with
`use_orig_params=True` a parameter is replaced by that part of itself that lies in this rank's stretch, flat and often
empty. Only its unit (`FullyShardedDataParallel`) knows its whole shape, and has no public name for it. Parts are read
and written without communication.
"""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from disback_plugin import distributed
from disback_plugin.errors import RoleError
from disback_plugin.weights.tensors import Part, TensorMeta, fingerprint

T = TypeVar("T")


class Weight:
    """One entry of the table of a network: a live parameter or persistent buffer, of which this rank holds everything.

    Args:
        name: The canonical name.
        tensor: The live tensor.

    Attributes:
        meta: Its dtype and its whole shape.
        part: The part that this rank holds.
        group: The process group of the ranks that share it; None if each of them holds all of it.
        device: The device from which the group sends.
        chunk: This rank in the group, the number of ranks and the dimension that is cut into equal chunks; None if the
            weight is cut at other places, or not at all.
        names: All names of the tensor, if this is the first of them.
        tied_to: The first name of the same tensor, if this is another of its names.
        sharded: Whether it is distributed over ranks.
        flattened: Whether FSDP1 has flattened it.
    """

    sharded = flattened = False
    group: Any = None
    chunk: tuple[int, int, int] | None = None
    tied_to: str | None = None

    def __init__(self, name: str, tensor: Tensor) -> None:
        self.name, self.tensor, self.is_parameter = name, tensor, isinstance(tensor, nn.Parameter)
        self.meta, self.part, self.device = TensorMeta(tensor.dtype, tensor.shape), Part(tensor.shape), tensor.device
        self.names: list[str] = []

    @staticmethod
    def of(name: str, tensor: Tensor) -> Weight:
        """Return the entry of a tensor of any kind.

        Raises:
            RoleError: If FSDP1 has flattened it, and its unit cannot be found.
        """
        if hasattr(tensor, "to_local"):
            return ShardedWeight(name, tensor)
        return FlatWeight(name, tensor) if getattr(tensor, "_fsdp_flattened", False) else Weight(name, tensor)

    def problem(self) -> tuple[str, str] | None:
        """Return why a sharded weight cannot be written part by part, and the cure; None if it can."""
        return None

    def local(self) -> Tensor:
        """Return the memory of this rank."""
        return self.tensor

    def whole(self) -> Tensor:
        """Return the whole tensor. All ranks that share it have to call."""
        return self.tensor


class ShardedWeight(Weight):
    """A DTensor."""

    sharded = True

    def __init__(self, name: str, tensor: Any) -> None:
        super().__init__(name, tensor)
        self.device = torch.device(tensor.device_mesh.device_type)
        coordinates = tensor.device_mesh.get_coordinate()
        for axis, placement in enumerate(tensor.placements):
            if placement.is_shard() and coordinates is not None:
                self.chunk = coordinates[axis], tensor.device_mesh.size(axis), placement.dim % tensor.ndim
                self.part, self.group = Part.chunk(tensor.shape, *self.chunk), tensor.device_mesh.get_group(axis)

    def problem(self) -> tuple[str, str] | None:
        """Return why the DTensor is not cut along one dimension, and the cure; None if it is, or is not cut."""
        from torch.distributed.tensor import DTensor, Replicate, Shard

        assert isinstance(self.tensor, DTensor)
        kinds = [type(placement) for placement in self.tensor.placements if type(placement) is not Replicate]
        if kinds not in ([], [Shard]):
            cure = "shard it along one dimension of the mesh (fully_shard), without TP"
            return f"is laid out as {self.tensor.placements}", cure
        if self.tensor.device_mesh.get_coordinate() is None:
            return "is on a device mesh that this rank is no part of", "attach on the ranks of that mesh only"
        return None

    def local(self) -> Tensor:
        """Return the local shard."""
        return local_tensor(self.tensor)

    def whole(self) -> Tensor:
        """Return the whole tensor. All ranks that share it have to call."""
        # Offloaded shards are on the host, from where the group may have no way to send them.
        tensor: Any = self.tensor.detach() if self.group is None else self.tensor.detach().to(self.device)
        whole: Tensor = tensor.full_tensor()
        return whole


class FlatWeight(Weight):
    """A parameter that FSDP1 has flattened; its attribute `sharded` tells whether each rank holds a part of it only."""

    flattened = True

    def __init__(self, name: str, tensor: Tensor) -> None:
        super().__init__(name, tensor)
        unit, index = _place_of(tensor)
        if unit is None:
            found = "a parameter of an FSDP1 unit that cannot be found"
            raise RoleError(found, expected="the wrapped module", cure="keep the wrapped module alive")
        self.sharded, self._flat, self._index = unit._handle.uses_sharded_strategy, unit._handle.flat_param, index
        if self.sharded:
            shape, info = self._flat._shapes[index], self._flat._shard_param_infos[index]
            held = (info.intra_param_start_idx, info.intra_param_end_idx + 1) if info.in_shard else (0, 0)
            self.meta, self.part = TensorMeta(tensor.dtype, shape), Part(torch.Size([shape.numel()]), 0, *held)
            self.group, self.device = unit._handle.process_group, torch.device(str(unit._handle.device))

    def problem(self) -> tuple[str, str] | None:
        """Return why the unit cannot be written stretch by stretch now, and the cure; None if it can."""
        if not self._flat._contiguities[self._index]:
            return "is not contiguous in an FSDP1 unit", "call .contiguous() on it before wrapping"
        if self._flat._param_extensions[self._index] is not None:
            return "is tensor-parallel in an FSDP1 unit", "shard it along one dimension, without TP"
        if self.tensor.numel() != self.part.elements:
            return "is not in shards now", "use it outside forwards and outside FSDP.summon_full_params"
        return None

    def whole(self) -> Tensor:
        """Return the whole tensor. All ranks that share it have to call."""
        if not self.sharded:
            return self.tensor
        whole = torch.zeros(self.part.shape, dtype=self.meta.dtype, device=self.device)
        whole[self.part.start : self.part.stop] = self.tensor.detach()
        torch.distributed.all_reduce(whole.view(torch.uint8), group=self.group)  # the other ranks add zeros
        return whole.view(self.meta.shape)


# -- units of FSDP1 ----------------------------------------------------------------------------------------------------


# A reference to the unit and the index in it, by parameter; None if the unit cannot be found. Nothing is kept on the
# parameter itself, which may be copied whole.
_PLACES: WeakIdKeyDictionary = WeakIdKeyDictionary()


def fsdp1_resharders(parameters: Iterable[Tensor | None]) -> list[Callable[[], None]]:
    """Return a function for each FSDP1 unit of the parameters that frees what FSDP1 has gathered of it and keeps."""
    units = [_place_of(p)[0] for p in parameters if p is not None and getattr(p, "_fsdp_flattened", False)]
    return [partial(_reshard, unit) for unit in set(units) - {None}]


def _reshard(unit: Any) -> None:
    # Before the root's first forward nothing can have been gathered, and most attributes are missing.
    if unit._is_root is None or unit._handle._training_state.name != "IDLE":
        return
    if unit._handle.uses_sharded_strategy and not unit._handle.needs_unshard():
        from torch.distributed.fsdp._runtime_utils import _reshard as reshard

        reshard(unit, unit._handle, True)


def _place_of(parameter: Tensor) -> tuple[Any, int]:
    """Return the unit of a flattened parameter, or None if it cannot be found, and the index in it.

    A parameter does not know its unit: the units are looked for among all objects, once.
    """
    if parameter not in _PLACES:
        _PLACES[parameter] = None
        for unit in gc.get_objects():
            # By type: isinstance would wake lazy modules.
            if any(kind.__name__ == "FullyShardedDataParallel" for kind in type(unit).__mro__):
                handle = getattr(unit, "_handle", None)
                if handle is not None and handle._use_orig_params:
                    for index, own in enumerate(handle.flat_param._params):
                        _PLACES[own] = weakref.ref(unit), index
    unit, index = _PLACES[parameter] or (lambda: None, 0)
    return unit(), index


# -- any tensor --------------------------------------------------------------------------------------------------------


def local_tensor(tensor: Tensor) -> Tensor:
    """Return the memory that this rank holds of a tensor: a DTensor's local one, any other tensor itself."""
    if not hasattr(tensor, "to_local"):
        return tensor
    with torch.no_grad():
        local: Tensor = tensor.to_local()
    return local


def part_of(given: Tensor, part: Part) -> Tensor:
    """Return the part that this rank holds of a tensor, which is whole or sharded as the network is."""
    local = local_tensor(given)
    if local.numel() == part.elements:
        return local.reshape(part.local_shape)
    return given.reshape(part.shape).narrow(part.dim, part.start, part.local_shape[part.dim])


def increment_versions(weights: Iterable[Weight]) -> None:
    """Increment the version counters of sharded weights: a DTensor's does not follow a write into its local memory."""
    sharded = [weight.tensor for weight in weights if weight.sharded]
    if sharded:
        torch.autograd.graph.increment_version(sharded)


def whole_shape(tensor: Tensor) -> torch.Size:
    """Return the shape of a tensor, or the whole shape of a parameter that FSDP1 has flattened.

    Example:
        >>> whole_shape(torch.zeros(2, 3))
        torch.Size([2, 3])
    """
    return FlatWeight("", tensor).meta.shape if getattr(tensor, "_fsdp_flattened", False) else tensor.shape


def has_gradient(parameter: Tensor) -> bool:
    """Return whether a parameter has a gradient, perhaps on other ranks while this rank holds nothing of it."""
    if parameter.grad is not None or parameter.numel() or not getattr(parameter, "_fsdp_flattened", False):
        return parameter.grad is not None
    unit, _ = _place_of(parameter)
    return unit is not None and unit._handle.flat_param.grad is not None


class FullState(Mapping[str, Tensor]):
    """A lazy full state dict. Reading a sharded tensor on rank 0 gathers its parts from the other ranks.

    If it is `sharded`, only rank 0 can read, inside `distributed.on_main_process(action, state)`.

    Args:
        state: Live tensors by name, tied ones under each name; or the weights of a network.

    Attributes:
        layout: Dtype and shape of each tensor.
        aliases: {name: first name} of tensors that are tied to another.
        sharded: Whether some tensors are distributed over ranks.
        buffers: Names of the tensors that are no parameters, where some are: running statistics, filters, counters.

    Example:
        >>> w = torch.zeros(2)
        >>> state = FullState({"left": w, "right": w})
        >>> state.aliases, list(state.own())
        ({'right': 'left'}, ['left'])
    """

    def __init__(self, state: Mapping[str, Tensor] | Iterable[Weight]) -> None:
        weights = [Weight.of(*item) for item in state.items()] if isinstance(state, Mapping) else state
        self._weights = {weight.name: weight for weight in weights}
        self.layout: dict[str, TensorMeta] = {name: weight.meta for name, weight in self._weights.items()}
        self.sharded = any(weight.sharded for weight in self._weights.values())
        buffers = {name for name, weight in self._weights.items() if not weight.is_parameter}
        self.buffers = buffers if len(buffers) < len(self._weights) else set()
        self.aliases: dict[str, str] = {}
        first: dict[object, str] = {}
        for name, weight in self._weights.items():
            local = weight.local()
            key = (local.data_ptr(), local.dtype, local.shape, local.stride()) if local.numel() else id(weight.tensor)
            if first.setdefault(key, name) != name:
                self.aliases[name] = first[key]

    @classmethod
    def of(cls, state: Mapping[str, Tensor]) -> FullState:
        """Return `state` as a FullState."""
        return state if isinstance(state, FullState) else cls(state)

    def __getitem__(self, name: str) -> Tensor:
        """Return a whole tensor, detached; it is live unless it is sharded."""
        weight = self._weights[name]
        if weight.sharded:
            distributed.broadcast(name)
        return weight.whole().detach()

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)

    def serve(self, name: str) -> None:
        """Send this rank's part of a tensor that rank 0 reads."""
        self._weights[name].whole()

    def own(self) -> list[str]:
        """Return the names without those of tied tensors after the first."""
        return [name for name in self._weights if name not in self.aliases]

    def flat(self, name: str) -> Tensor:
        """Return a whole tensor on the CPU in row-major order, shape (elements,)."""
        return self[name].cpu().contiguous().view(-1)

    def fingerprint(self) -> str:
        """Return the SHA-256 of all names, dtypes, shapes and values (`tensors.fingerprint`).

        All ranks must call if the state is sharded: they send it to rank 0, tensor by tensor.
        """
        return self.read(fingerprint)

    def read(self, action: Callable[[FullState], T]) -> T:
        """Return the result of a function that reads this state: on rank 0 for all, if the state is sharded."""
        return distributed.on_main_process(lambda: action(self), self) if self.sharded else action(self)

    def overlapping(self) -> set[str]:
        """Return the names of different tensors in one memory, as a slice that is a buffer of its own.

        Parameters that FSDP1 has put side by side do not overlap.
        """
        local = {name: self._weights[name].local() for name in self.own() if not self._weights[name].flattened}
        addresses = {name: t.untyped_storage().data_ptr() for name, t in local.items() if t.numel()}
        used = Counter(addresses.values())
        return {name for name, address in addresses.items() if used[address] > 1}
