"""Parameters under FSDP1: all weights of a unit are flattened side by side, and each rank holds an equal stretch.

With `use_orig_params=True` a parameter is replaced by that part of itself that lies in this rank's stretch: flat, and
often empty. Only its unit (`torch.distributed.fsdp.FullyShardedDataParallel`) knows its whole shape, and has no public
name for it. Everything that is particular to FSDP1 is in this file, which is imported only where FSDP1 is in use.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterable
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from disback_plugin.errors import RoleError
from disback_plugin.weights.tensors import Part

__all__ = ["FlatSharding", "resharders", "sharding_of", "unit_has_gradient"]


class FlatSharding:
    """How ranks share a parameter of a unit, with the attributes and methods of `sharding.Sharding`.

    Args:
        parameter: The parameter.
        place: The unit, and the index and the first element of the parameter in it.
    """

    def __init__(self, parameter: Tensor, place: tuple[Any, int, int]) -> None:
        unit, self.index, self.offset = place
        self.tensor, self.handle, self.chunk = parameter, unit._handle, None
        self.shape: torch.Size = self.handle.flat_param._shapes[self.index]
        self.group = self.handle.process_group
        self.device = torch.device(str(self.handle.device))
        self.part = self.part_of(self.handle.rank)

    def part_of(self, rank: int) -> Part:
        """Return the part that a rank holds, as a range of the flattened parameter."""
        share, elements = self.handle.flat_param._sharded_size.numel(), self.shape.numel()
        start, stop = (min(max(r * share - self.offset, 0), elements) for r in (rank, rank + 1))
        return Part(torch.Size([elements]), 0, start, stop)

    def problem(self) -> tuple[str, str] | None:
        """Return why the parameter cannot be written in place, and the cure; None if it can."""
        if not self.handle.flat_param._contiguities[self.index]:
            return "is not contiguous in an FSDP1 unit", "call .contiguous() on it before wrapping"
        if self.handle.flat_param._param_extensions[self.index] is not None:
            return "is tensor-parallel in an FSDP1 unit", "shard it along one dimension, without TP"
        if self.tensor.numel() != self.part.elements:
            return "is not in shards now", "use it outside forwards and outside FSDP.summon_full_params"
        return None

    def whole(self) -> Tensor:
        """Return the whole parameter. All ranks that share it have to call."""
        parts = [self.part_of(rank) for rank in range(self.handle.world_size)]
        own = self.tensor.detach().to(self.device)
        sent = own.new_zeros(max(part.elements for part in parts))
        sent[: own.numel()] = own
        chunks = [torch.empty_like(sent) for _ in parts]
        received = [chunk.view(torch.uint8) for chunk in chunks]
        torch.distributed.all_gather(received, sent.view(torch.uint8), self.group)
        pairs = zip(chunks, parts, strict=True)
        return torch.cat([chunk[: part.elements] for chunk, part in pairs]).view(self.shape)


# Unit, index and first element by parameter; None if the unit cannot be found. Nothing is kept on the parameter itself,
# which may be copied whole.
_PLACES: WeakIdKeyDictionary = WeakIdKeyDictionary()


def sharding_of(parameter: Tensor) -> FlatSharding | None:
    """Return how ranks share a flattened parameter; None if each of them holds all of it.

    Raises:
        RoleError: If its unit cannot be found.
    """
    place = _place_of(parameter)
    if place is None:
        found = "a parameter of an FSDP1 unit that cannot be found"
        raise RoleError(found, expected="the wrapped module", cure="keep the wrapped module alive")
    return FlatSharding(parameter, place) if place[0]._handle.uses_sharded_strategy else None


def unit_has_gradient(parameter: Tensor) -> bool:
    """Return whether the unit of a flattened parameter has a gradient, perhaps on other ranks only."""
    place = _place_of(parameter)
    return place is not None and place[0]._handle.flat_param.grad is not None


def resharders(parameters: Iterable[Tensor]) -> list[Callable[[], None]]:
    """Return a function for each unit of the parameters that frees what FSDP1 has gathered of it and keeps."""
    places = [_place_of(parameter) for parameter in parameters]
    units = {id(place[0]): place[0] for place in places if place is not None}
    return [partial(_reshard, unit) for unit in units.values()]


def _reshard(unit: Any) -> None:
    # Before the root's first forward nothing can have been gathered, and most attributes are missing.
    if unit._is_root is None or unit._handle._training_state.name != "IDLE":
        return
    if unit._handle.uses_sharded_strategy and not unit._handle.needs_unshard():
        from torch.distributed.fsdp._runtime_utils import _reshard as reshard

        reshard(unit, unit._handle, True)


def _place_of(parameter: Tensor) -> tuple[Any, int, int] | None:
    """Return the unit, the index and the first element of a flattened parameter; None if the unit cannot be found.

    A parameter does not know its unit: the units are looked for among all objects, once.
    """
    if parameter not in _PLACES:
        _PLACES[parameter] = None
        for unit in gc.get_objects():
            # By type: isinstance would wake lazy modules.
            if any(kind.__name__ == "FullyShardedDataParallel" for kind in type(unit).__mro__):
                _note_places(unit)
    place = _PLACES[parameter]
    unit = None if place is None else place[0]()
    return None if unit is None else (unit, *place[1:])


def _note_places(unit: Any) -> None:
    """Note the places of the parameters of a unit."""
    handle = getattr(unit, "_handle", None)
    if handle is not None and handle._use_orig_params:
        flat = handle.flat_param
        starts = list(accumulate(flat._numels_with_padding, initial=0))[:-1]
        offsets = [start for start, padding in zip(starts, flat._is_padding_mask, strict=True) if not padding]
        for index, parameter in enumerate(flat._params):
            _PLACES[parameter] = weakref.ref(unit), index, offsets[index]
