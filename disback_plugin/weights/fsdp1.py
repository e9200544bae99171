"""Parameters under FSDP1: all weights of a unit are flattened side by side, and each rank holds an equal stretch.

With `use_orig_params=True` a parameter is replaced by that part of itself that lies in this rank's stretch: flat, and
often empty. Only its unit (`torch.distributed.fsdp.FullyShardedDataParallel`) knows its whole shape, and has no public
name for it. Everything that is particular to FSDP1 is in this file, which is imported only where FSDP1 is in use.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from disback_plugin.weights.tensors import Part, Sharding

__all__ = ["FlatSlice", "problem", "resharders", "sharding_of", "unit_has_gradient"]


@dataclass(frozen=True)
class FlatSlice(Sharding):
    """The place of a parameter in its unit.

    Args:
        offset: Its first element among those of the unit.
        share: Number of elements of the unit that each rank holds.
        unit: A weak reference to the unit, a FullyShardedDataParallel.
        problem: Why it cannot be written in place, and the cure.

    Example:
        >>> place = FlatSlice(torch.Size([2, 3]), 0, 2, None, torch.device("cpu"), offset=4, share=5)
        >>> [(part.start, part.stop) for part in map(place.part_of, range(2))]
        [(0, 1), (1, 6)]
    """

    dim: None = None
    offset: int = 0
    share: int = 0
    unit: Callable[[], Any] = lambda: None
    problem: tuple[str, str] | None = None

    def part_of(self, rank: int) -> Part:
        """Return the part that a rank holds, as a range of the flattened parameter."""
        elements = self.shape.numel()
        start, stop = (min(max(r * self.share - self.offset, 0), elements) for r in (rank, rank + 1))
        return Part(torch.Size([elements]), 0, start, stop)


# By parameter; None of one whose unit is gone. Nothing is kept on the parameter itself, which may be copied whole.
_KNOWN: WeakIdKeyDictionary = WeakIdKeyDictionary()


def sharding_of(parameter: Tensor) -> FlatSlice | None:
    """Return how ranks share a flattened parameter; None if each of them holds all of it."""
    place = _place_of(parameter)
    return None if place is None or place.ranks == 1 else place


def problem(parameter: Tensor) -> tuple[str, str] | None:
    """Return why a flattened parameter cannot be written in place, and the cure; None if it can."""
    place = _place_of(parameter)
    if place is None:
        return "is in an FSDP1 unit that cannot be found", "keep the wrapped module alive"
    if place.ranks == 1:
        return None
    if place.problem is None and parameter.numel() != place.part_of(place.rank).elements:
        return "is not in shards now", "use it outside forwards and outside FSDP.summon_full_params"
    return place.problem


def unit_has_gradient(parameter: Tensor) -> bool:
    """Return whether the unit of a flattened parameter has a gradient, perhaps on other ranks only."""
    place = _place_of(parameter)
    unit = None if place is None else place.unit()
    return unit is not None and unit._handle.flat_param.grad is not None


def resharders(parameters: Iterable[Tensor]) -> list[Callable[[], None]]:
    """Return a function for each unit of the parameters that frees what FSDP1 has gathered of it and keeps."""
    places = (_place_of(parameter) for parameter in parameters)
    units = {id(unit): place.unit for place in places if place is not None and (unit := place.unit()) is not None}
    return [partial(_reshard, unit) for unit in units.values()]


def _reshard(reference: Callable[[], Any]) -> None:
    unit = reference()
    if unit is None:
        return
    handle = unit._handle
    # Before the root's first forward nothing can have been gathered, and most attributes are missing.
    idle = unit._is_root is not None and handle._training_state.name == "IDLE"
    if idle and handle.uses_sharded_strategy and not handle.needs_unshard():
        from torch.distributed.fsdp._runtime_utils import _reshard as reshard

        reshard(unit, handle, True)


def _place_of(parameter: Tensor) -> FlatSlice | None:
    """Return the place of a flattened parameter in its unit; None if the unit cannot be found.

    A parameter does not know its unit: the units are looked for among all objects, once.
    """
    if parameter not in _KNOWN:
        _KNOWN[parameter] = None
        for unit in gc.get_objects():
            # By type: isinstance would wake lazy modules.
            if any(kind.__name__ == "FullyShardedDataParallel" for kind in type(unit).__mro__):
                _note_places(unit)
    place: FlatSlice | None = _KNOWN[parameter]
    return place


def _note_places(unit: Any) -> None:
    """Note the places of the parameters of a unit."""
    handle = getattr(unit, "_handle", None)
    if handle is None or not handle._use_orig_params:
        return
    flat = handle.flat_param
    starts = list(accumulate(flat._numels_with_padding, initial=0))[:-1]
    offsets = [start for start, padding in zip(starts, flat._is_padding_mask, strict=True) if not padding]
    for index, (parameter, shape, offset) in enumerate(zip(flat._params, flat._shapes, offsets, strict=True)):
        problem = None
        if not flat._contiguities[index]:
            problem = "is not contiguous in an FSDP1 unit", "call .contiguous() on it before wrapping"
        elif flat._param_extensions[index] is not None:
            problem = "is tensor-parallel in an FSDP1 unit", "shard it along one dimension, without TP"
        _KNOWN[parameter] = FlatSlice(
            shape,
            handle.rank,
            handle.world_size if handle.uses_sharded_strategy else 1,
            handle.process_group,
            torch.device(str(handle.device)),
            offset=offset,
            share=flat._sharded_size.numel(),
            unit=weakref.ref(unit),
            problem=problem,
        )
