"""Wrap a script's functions when their modules are imported, and unwrap them afterwards. Imports no torch."""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


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
    from unittest.mock import patch  # slow to import, and only `disback run` needs it

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

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in self._names:
            return None
        later = sys.meta_path[sys.meta_path.index(self) + 1 :]
        spec = next(filter(None, (finder.find_spec(name, path, target) for finder in later)), None)
        if spec is not None and spec.loader is not None and not isinstance(spec.loader, type):  # a class: of built-ins
            loader, load = spec.loader, spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                del loader.exec_module  # from now on it is as if the loader alone had been used
                load(module)
                self._callback(module)

            loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
