"""Where FSDP1 keeps a weight: of all weights of a unit, flattened side by side, each process holds an equal stretch.

With `use_orig_params=True` a parameter goes on as that part of itself that falls into this process's stretch: flat, and
often empty. What it is as a whole is known to its unit alone (`torch.distributed.fsdp.FullyShardedDataParallel`), which
has no public name for it.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

__all__ = ["FlatSlice", "address", "detached", "flattened", "free", "locate", "shape_of", "stretch_of", "trains"]


@dataclass(frozen=True)
class FlatSlice:
    """What of a parameter is held where.

    Args:
        shape: Of the whole parameter.
        offset: Its first element among those of the unit.
        share: Elements of the unit that each process holds.
        rank: This process, among those that share the unit.
        ranks: How many share it; 1 if each of them holds all of it.
        group: Their process group.
        device: Where the group sends from.
        unit: The unit, a FullyShardedDataParallel, weakly.
        trouble: Why it cannot be written in place, and the cure.

    Example:
        >>> FlatSlice(torch.Size([2, 3]), 4, 5, 1, 2).held_by(0), FlatSlice(torch.Size([2, 3]), 4, 5, 1, 2).held_by(1)
        ((0, 1), (1, 6))
    """

    shape: torch.Size
    offset: int
    share: int
    rank: int
    ranks: int
    group: Any = None
    device: str = "cpu"
    unit: Any = None
    trouble: tuple[str, str] | None = None

    def held_by(self, rank: int) -> tuple[int, int]:
        """Return first element and end of what a process holds, in the parameter's row-major order."""
        elements = self.shape.numel()
        start, stop = (min(max(r * self.share - self.offset, 0), elements) for r in (rank, rank + 1))
        return start, stop


# By parameter. Nothing is left on the parameter itself, which may be copied whole.
_KNOWN: WeakIdKeyDictionary = WeakIdKeyDictionary()


def stretch_of(tensor: Tensor) -> FlatSlice | None:
    """Return where FSDP1 keeps a parameter; None if it does not, or it was not asked for with `locate`."""
    # Most tensors are told by the mark.
    known: FlatSlice | None = _KNOWN.get(tensor) if flattened(tensor) else None  # type: ignore[no-untyped-call]
    return known


def shape_of(tensor: Tensor) -> torch.Size:
    """Return the shape of a tensor, the whole one of what FSDP1 has flattened.

    Example:
        >>> shape_of(torch.zeros(2, 3))
        torch.Size([2, 3])
    """
    stretch = stretch_of(tensor)
    return tensor.shape if stretch is None else stretch.shape


def address(tensor: Tensor) -> int:
    """Return where the memory of a tensor is; of one that FSDP1 has put beside others, where its own part is."""
    return tensor.untyped_storage().data_ptr() if stretch_of(tensor) is None else tensor.data_ptr()


def detached(tensor: Tensor) -> Tensor:
    """Return `tensor.detach()`, of which as much is known.

    Example:
        >>> detached(torch.ones(1, requires_grad=True)).requires_grad
        False
    """
    bare, stretch = tensor.detach(), stretch_of(tensor)
    if stretch is not None:
        bare._fsdp_flattened = True  # type: ignore[attr-defined]
        _KNOWN[bare] = stretch
    return bare


def trains(parameter: Tensor) -> bool:
    """Return whether a parameter has a gradient, perhaps on other processes, this one holding nothing of it."""
    if parameter.grad is not None:
        return True
    stretch = None if parameter.numel() else stretch_of(parameter)
    unit = None if stretch is None else stretch.unit()
    return unit is not None and unit._handle.flat_param.grad is not None


def locate(parameters: Iterable[Tensor]) -> None:
    """Learn where FSDP1 keeps parameters, all of their units with them; plain tensors are left alone.

    A parameter is marked as flattened, but does not know its unit: the units are looked for among all objects, once.
    """
    if any(flattened(parameter) and stretch_of(parameter) is None for parameter in parameters):
        for unit in gc.get_objects():
            # By type: isinstance would wake lazy modules.
            if any(kind.__name__ == "FullyShardedDataParallel" for kind in type(unit).__mro__):
                _learn(unit)


def free(parameters: Iterable[Tensor]) -> None:
    """Let FSDP1 free what it has gathered of units for a forward and keeps: their parameters may be written."""
    stretches = [stretch for parameter in parameters if (stretch := stretch_of(parameter)) is not None]
    for unit in {id(unit): unit for stretch in stretches if (unit := stretch.unit()) is not None}.values():
        handle = unit._handle
        # Before the root's first forward nothing can have been gathered, and most attributes are missing.
        idle = unit._is_root is not None and handle._training_state.name == "IDLE"
        if idle and handle.uses_sharded_strategy and not handle.needs_unshard():
            from torch.distributed.fsdp._runtime_utils import _reshard

            _reshard(unit, handle, True)


def flattened(tensor: Tensor) -> bool:
    """Return whether FSDP1 has marked a parameter as flattened."""
    return getattr(tensor, "_fsdp_flattened", False) is True


def _learn(unit: Any) -> None:
    """Note where the parameters of a unit are."""
    handle = getattr(unit, "_handle", None)
    if handle is None or not handle._use_orig_params:
        return
    flat = handle.flat_param
    starts = list(accumulate(flat._numels_with_padding, initial=0))[:-1]
    offsets = [start for start, padding in zip(starts, flat._is_padding_mask, strict=True) if not padding]
    for index, (parameter, shape, offset) in enumerate(zip(flat._params, flat._shapes, offsets, strict=True)):
        trouble = None
        if not flat._contiguities[index]:
            trouble = "is not contiguous in an FSDP1 unit", "call .contiguous() on it before wrapping"
        elif flat._param_extensions[index] is not None:
            trouble = "is tensor-parallel in an FSDP1 unit", "shard it along one dimension, without TP"
        _KNOWN[parameter] = FlatSlice(
            shape,
            offset,
            flat._sharded_size.numel(),
            handle.rank,
            handle.world_size if handle.uses_sharded_strategy else 1,
            handle.process_group,
            str(handle.device),
            weakref.ref(unit),
            trouble,
        )
