"""Hooks on a script that nobody edits: on the imports of its modules, on its functions, and on its first forward."""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils.weak import WeakIdKeyDictionary

from disback_plugin.weights.network import ScoreNetwork


def replace(
    module: ModuleType, qualified: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> AbstractContextManager[Any]:
    """Return a context manager inside which `make(function)` stands in for a module's function or method.

    Raises:
        AttributeError: If there is no such function.

    Example:
        >>> import colorsys
        >>> with replace(colorsys, "rgb_to_hsv", lambda original: lambda *rgb: "wrapped"):
        ...     colorsys.rgb_to_hsv(0, 0, 0)
        'wrapped'
        >>> colorsys.rgb_to_hsv(0, 0, 0)
        (0.0, 0.0, 0)
    """
    *outer, name = qualified.split(".")
    owner = functools.reduce(getattr, outer, module)
    original = getattr(owner, name)
    return patch.object(owner, name, functools.wraps(original)(make(original)))


@contextmanager
def call_after_import(names: Collection[str], callback: Callable[[ModuleType], object]) -> Iterator[None]:
    """Call back inside the `with` block when a module has been imported, at once if it was imported before.

    wrapt, the known library for this, cannot remove its hooks.

    Args:
        names: Names of the modules.
        callback: A function of a module.

    Example:
        >>> _ = sys.modules.pop("colorsys", None)
        >>> with call_after_import(["colorsys"], lambda module: print(module.__name__, "is imported")):
        ...     import colorsys
        colorsys is imported
    """
    finder = _Finder(names, callback)
    sys.meta_path.insert(0, finder)
    try:
        for name in names:
            if name in sys.modules:
                callback(sys.modules[name])
        yield
    finally:
        sys.meta_path.remove(finder)
        importlib.invalidate_caches()


class _Finder(MetaPathFinder):
    """Find modules as the later finders do, and call back after their loader has run."""

    def __init__(self, names: Collection[str], callback: Callable[[ModuleType], object]) -> None:
        self._names, self._callback = names, callback
        self._searching: set[str] = set()

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in self._names or name in self._searching:  # a later finder may search from the first one again
            return None
        later = sys.meta_path[sys.meta_path.index(self) + 1 :]
        self._searching.add(name)
        try:
            spec = next(filter(None, (finder.find_spec(name, path, target) for finder in later)), None)
        finally:
            self._searching.discard(name)
        if spec is not None and spec.loader is not None and not isinstance(spec.loader, type):  # a class: of built-ins
            loader, load = spec.loader, spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                vars(loader).pop("exec_module", None)  # from now on it is as if the loader alone had been used
                load(module)
                self._callback(module)

            loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


class FirstForward:
    """Call back before each forward with gradients of a network that is trained, where no function is to be watched.

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
