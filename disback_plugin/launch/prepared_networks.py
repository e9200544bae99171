"""Find the moment before the first forward of networks that a script prepares in one place and uses in another."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from disback_plugin.weights.network import ScoreNetwork

__all__ = ["PreparedNetworks"]


class PreparedNetworks:
    """Collect the objects that a script prepares; call back before each forward with gradients of a network in them.

    Before the first such forward nothing of a training step has been computed. A validation, which some scripts run on
    one rank only, records no gradients and does not count.

    Args:
        before_forward: Called before such a forward, until `close`.

    Attributes:
        objects: Networks, optimizers and whatever else was prepared, each once.

    Example:
        >>> net = nn.Sequential(nn.Linear(1, 1))
        >>> prepared = PreparedNetworks(lambda: print("about to run"))
        >>> prepared.add((net, net))
        >>> prepared.objects == [net]
        True
        >>> with torch.no_grad():
        ...     _ = net(torch.ones(1, 1))
        >>> prepared.close()
    """

    def __init__(self, before_forward: Callable[[], None]) -> None:
        self.objects: list[object] = []
        self._before_forward = before_forward
        self._hooks = ExitStack()
        self._hooked: set[nn.Module] = set()
        self._ran: set[int] = set()

    def add(self, result: object) -> None:
        """Add what a call has prepared: one object, or several in a tuple or list."""
        for each in result if isinstance(result, (tuple, list)) else (result,):
            if not any(each is known for known in self.objects):
                self.objects.append(each)
            if isinstance(each, nn.Module):
                # All modules inside too: a script may call a method of the network, or a part of it.
                for module in set(each.modules()) - self._hooked:
                    self._hooked.add(module)
                    self._hooks.callback(module.register_forward_pre_hook(self._about_to_run).remove)

    def close(self) -> None:
        """Remove every hook; a second call changes nothing."""
        self._hooks.close()
        self._hooked.clear()

    def have_run(self, networks: Iterable[ScoreNetwork]) -> bool:
        """Return whether a forward with gradients of one of these networks has been seen."""
        return any(id(tensor) in self._ran for network in networks for _, tensor in network.named_tensors())

    def _about_to_run(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if torch.is_grad_enabled() and module in self._hooked:
            self._before_forward()
            self._ran.update(id(parameter) for parameter in module.parameters(recurse=False))
