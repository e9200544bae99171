"""Networks that a script prepares in one place and uses in another: when the first of them is about to run.

Where a script has no function of its own to wrap, `attach` waits for the first forward whose gradients are recorded.
Nothing of a step has been computed then, and a validation that only some ranks do goes by.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from disback_plugin.weights.network import ScoreNetwork

__all__ = ["Prepared"]


class Prepared:
    """What was prepared so far, and a call back before each forward of a network among it that records gradients.

    Args:
        before: Called before such a forward, until `close`.

    Attributes:
        objects: Networks, optimizers and whatever else, each once.

    Example:
        >>> net = nn.Sequential(nn.Linear(1, 1))
        >>> prepared = Prepared(lambda: print("about to run"))
        >>> prepared.add((net, net))
        >>> prepared.objects == [net]
        True
        >>> with torch.no_grad():
        ...     _ = net(torch.ones(1, 1))
        >>> prepared.close()
    """

    def __init__(self, before: Callable[[], None]) -> None:
        self.objects: list[object] = []
        self._before = before
        self._hooks: dict[nn.Module, RemovableHandle] = {}
        self._ran: set[int] = set()

    def add(self, objects: object) -> None:
        """Take in what a call has prepared: one object, or several in a tuple or list."""
        for each in objects if isinstance(objects, (tuple, list)) else (objects,):
            if not any(each is known for known in self.objects):
                self.objects.append(each)
            if isinstance(each, nn.Module):
                # All inside too: a script may call a method of the network, or what it wraps.
                for module in each.modules():
                    if module not in self._hooks:
                        self._hooks[module] = module.register_forward_pre_hook(self._about_to_run)

    def close(self) -> None:
        """Take out every hook; a second call changes nothing."""
        for hook in self._hooks.values():
            hook.remove()
        self._hooks.clear()

    def have_run(self, networks: Iterable[ScoreNetwork]) -> bool:
        """Return whether a forward of one of these may be waiting for its backward."""
        return any(id(tensor) in self._ran for network in networks for _, tensor in network.named_tensors())

    def _about_to_run(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if not torch.is_grad_enabled() or not self._hooks:
            return
        self._before()
        self._ran.update(id(tensor) for tensor in module.parameters(recurse=False))
