"""The first forward of a training step, at which DisBack attaches to a script that has no function to watch for."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils.weak import WeakIdKeyDictionary

from disback_plugin.weights.network import ScoreNetwork


class FirstForward:
    """Call back before each forward with gradients of a network that is trained.

    Before the first such forward nothing of a training step has been computed. A validation, which some scripts run on
    one rank only, records no gradients and does not count.

    Args:
        before_forward: Called before such a forward, until `close`.
        prepared_only: Whether only networks that were added count; else all with a parameter that requires gradients.

    Attributes:
        prepared: The networks, optimizers and whatever else was added, each once.

    Example:
        >>> net = nn.Linear(1, 1)
        >>> forwards = FirstForward(lambda: print("about to run"))
        >>> with torch.no_grad():
        ...     _ = net(torch.ones(1, 1))
        >>> _ = net(torch.ones(1, 1))
        about to run
        >>> forwards.close()
    """

    def __init__(self, before_forward: Callable[[], None], *, prepared_only: bool = False) -> None:
        self.prepared: list[object] = []
        self._before_forward, self._prepared_only = before_forward, prepared_only
        self._modules: set[nn.Module] = set()
        self._ran = WeakIdKeyDictionary()
        # All modules: a script may call a method of a network, or a part of it.
        self.close = register_module_forward_pre_hook(self._about_to_run).remove

    def add(self, result: object) -> None:
        """Add what a call has prepared: one object, or several in a tuple or list."""
        for each in result if isinstance(result, (tuple, list)) else (result,):
            if not any(each is known for known in self.prepared):
                self.prepared.append(each)
            if isinstance(each, nn.Module):
                self._modules.update(each.modules())

    def have_run(self, networks: Iterable[ScoreNetwork]) -> bool:
        """Return whether a forward with gradients of one of these networks has been seen."""
        return any(tensor in self._ran for network in networks for _, tensor in network.named_tensors())

    def _about_to_run(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return
        if self._prepared_only:
            counts = module in self._modules
        else:
            counts = any(parameter.requires_grad for parameter in module.parameters())
        if counts:
            self._before_forward()
        self._ran.update(dict.fromkeys(module.parameters(recurse=False)))
