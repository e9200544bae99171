"""All weights of a role, tensor by tensor: on rank 0 a shard's missing parts are asked for when they are read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

import torch.distributed as dist
from torch import Tensor

from disback_plugin.weights.fsdp1 import stretch_of
from disback_plugin.weights.sharding import gather, held, is_sharded
from disback_plugin.weights.tensor_meta import TensorMeta, layout_of

__all__ = ["FullState"]


class FullState(Mapping[str, Tensor]):
    """Whole live tensors by canonical name. If some are sharded, only rank 0 reads, and the others `serve` meanwhile.

    Args:
        tensors: Live tensors; of tied weights the same one under each name.

    Attributes:
        layout: What each tensor is.
        aliases: {name: first name} of tensors that are another one's twin.
        sharded: Whether some are held in part only.

    Example:
        >>> import torch
        >>> w = torch.zeros(2)
        >>> state = FullState({"left": w, "right": w})
        >>> state.aliases, list(state.own())
        ({'right': 'left'}, ['left'])
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = dict(tensors)
        self.layout: dict[str, TensorMeta] = layout_of(self._tensors)
        self.sharded = any(is_sharded(tensor) for tensor in self._tensors.values())
        self.aliases: dict[str, str] = {}
        first: dict[object, str] = {}
        for name, tensor in self._tensors.items():
            local = held(tensor)[0]
            key = (local.data_ptr(), local.dtype, tensor.shape, local.stride()) if local.numel() else id(tensor)
            if first.setdefault(key, name) != name:
                self.aliases[name] = first[key]

    @classmethod
    def of(cls, state: Mapping[str, Tensor]) -> FullState:
        """Return `state` as one."""
        return state if isinstance(state, FullState) else cls(state)

    def __getitem__(self, name: str) -> Tensor:
        """Return a whole tensor, detached, live unless it is sharded."""
        tensor = self._tensors[name]
        if not is_sharded(tensor):
            return tensor.detach()
        self._tell([*self._tensors].index(name))
        whole = gather(tensor)
        assert whole is not None, "only rank 0 reads what is sharded"
        return whole.detach()

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def own(self) -> list[str]:
        """Return the names without those of twins."""
        return [name for name in self._tensors if name not in self.aliases]

    def flat(self, name: str) -> Tensor:
        """Return a whole tensor on the CPU in row-major order, shape (elements,)."""
        return self[name].cpu().contiguous().view(-1)

    def overlapping(self) -> set[str]:
        """Return the names of different tensors that live in one memory, as a slice that is a buffer of its own.

        What FSDP1 has put side by side does not overlap.
        """
        places = {n: held(t)[0] for n in self.own() if stretch_of(t := self._tensors[n]) is None}
        used = Counter(t.untyped_storage().data_ptr() for t in places.values() if t.numel())
        return {n for n, t in places.items() if t.numel() and used[t.untyped_storage().data_ptr()] > 1}

    # -- between processes --------------------------------------------------------------------------------------------

    def serve(self) -> None:
        """Send what rank 0 asks for, until it calls `close`; for the other ranks."""
        names = list(self._tensors)
        while (index := self._tell(None)) >= 0:
            gather(self._tensors[names[index]])

    def close(self) -> None:
        """Let the others go."""
        self._tell(-1)

    def _tell(self, index: int | None) -> int:
        """Send a number from rank 0 to the others, and return it."""
        message = [index]
        dist.broadcast_object_list(message, src=0)
        assert message[0] is not None
        return message[0]
