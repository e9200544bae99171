"""`disback run`: attach DisBack to a trainer's script without editing it.

`Watch` is the public class with which an adapter says where a trainer keeps its networks. This module finds the trainer
inside a running script and wraps the script's functions when their modules are imported; `launch.run` runs the script.
Importing this module loads no torch.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import FrameType, ModuleType, SimpleNamespace
from typing import Any

from disback_plugin.errors import RoleError


@dataclass(frozen=True)
class Watch:
    """Tell `disback run` where a script keeps its trainer. An adapter's module has one as `WATCH`, or a sequence of
    them; then the first whose function is called counts.

    The function `call` is wrapped when its module is imported. Its first call must come before the first optimizer step
    and outside any forward of teacher and fake score, best at the start of the first training round. At that call the
    trainer is read from the local variables of the innermost caller named `frame`, the adapter is asked for the roles,
    and the wrapper is removed.

    With `prepares=True`, `call` is a library function that prepares networks and optimizers for scripts whose variable
    names the adapter cannot know. Then DisBack attaches at the first forward with gradients of a prepared network, and
    the trainer is a namespace of the roles, read from the variables that the user named, and of the list `prepared`.

    Attributes:
        call: "module:qualified.name" of a function of the trainer.
        frame: Name of the function, up the stack, that holds the trainer; "<module>" for a script's top level; "" with
            `prepares`.
        knows: Upstream repository and version for which this was written, for error messages.
        take: Name of the local variable that is the trainer; "" for a namespace of all local variables.
        needs: Dotted names of attributes that the trainer must have. With `prepares`, the roles that must be found; a
            role that the user does not name is a variable of the role's own name.
        saves: Functions, named like `call`, that write the trainer's checkpoint. While they run, the teacher is s'_0.
        prepares: Whether `call` prepares networks, and the user names the roles.

    Example:
        >>> WATCH = Watch(
        ...     "training.sid_loss:SID_EDMLoss.__call__",
        ...     frame="training_loop",
        ...     knows="SiD of March 2025",
        ...     needs=("true_score",),
        ... )
    """

    call: str
    frame: str
    knows: str
    take: str = ""
    needs: Sequence[str] = ()
    saves: Sequence[str] = ()
    prepares: bool = False

    def find_trainer(self, start: FrameType | None) -> object:
        """Return the trainer that a caller of a frame holds.

        Args:
            start: Frame at which the search up the stack begins.

        Raises:
            RoleError: If there is no such caller or variable, or the trainer lacks an attribute.
        """
        found = (variables for name, variables in _callers(start) if name == self.frame)
        variables = next(found, None)
        if variables is None:
            raise self.mismatch(f"no function {self.frame!r} among the callers of {self.call}")
        if self.take and self.take not in variables:
            raise self.mismatch(f"no variable {self.take!r} in {self.frame}(), which has {sorted(variables)}")
        trainer = variables[self.take] if self.take else SimpleNamespace(**variables)
        missing = [name for name in self.needs if _get(trainer, name) is MISSING]
        if missing:
            where = f"{self.take or 'the local variables'} of {self.frame}()"
            raise self.mismatch(f"no {', '.join(missing)} in {where}")
        return trainer

    def find_roles(self, start: FrameType | None, variables: Mapping[str, str]) -> SimpleNamespace:
        """Return the roles by name, each from the innermost caller of a frame that has the role's variable.

        Args:
            start: Frame at which the search up the stack begins.
            variables: Dotted variable by role.

        Raises:
            RoleError: If no caller has one of the variables.
        """
        callers = list(_callers(start))
        roles = SimpleNamespace()
        for role, variable in ({name: name for name in self.needs} | {**variables}).items():
            values = (_get(SimpleNamespace(**held), variable) for _, held in callers)
            value = next((value for value in values if value is not MISSING), MISSING)
            if value is MISSING:
                raise _unknown_variable(role, variable, callers)
            setattr(roles, role, value)
        return roles

    def mismatch(self, found: str) -> RoleError:
        """Return the error for a trainer of another version; `found` says in words what is missing."""
        return RoleError(
            found,
            expected=f"the names of {self.knows}, for which this adapter was written",
            cure="use that version, or call disback.attach with the four roles in your script",
        )


def _unknown_variable(role: str, variable: str, callers: Sequence[tuple[str, Mapping[str, object]]]) -> RoleError:
    module = sys.modules["torch"].nn.Module  # the script has imported torch
    found = []
    for caller, variables in callers:
        names = sorted(name for name, value in variables.items() if isinstance(value, module))
        where = "the script" if caller == "<module>" else f"{caller}()"
        found += [f"{', '.join(names)} in {where}"] if names else []
    return RoleError(
        f"no variable {variable!r} for the {role.replace('_', ' ')} where the networks are used",
        expected=f"one of the script's own, each role a network of its own: {'; '.join(found) or 'there are none'}",
        cure=f"name it with --role {role}=VARIABLE. A script without fake score (consistency distillation as LCM, "
        "flash-diffusion, adversarial losses alone) has no score difference that DisBack could help",
    )


def _callers(frame: FrameType | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield name and local variables of the script's own functions up the stack, the innermost first.

    The variables are a copy, so that the interpreter keeps none alive.
    """
    while frame is not None:
        if str(frame.f_globals.get("__name__")).partition(".")[0] not in ("torch", "accelerate", "disback_plugin"):
            variables = frame.f_locals
            copy = dict(variables)
            if frame.f_code.co_flags & inspect.CO_OPTIMIZED and isinstance(variables, dict):
                variables.clear()  # before Python 3.13 a snapshot that lives as long as the frame
            yield frame.f_code.co_name, copy
        frame = frame.f_back


# What `_get` returns if there is no such attribute.
MISSING = object()


def _get(trainer: object, dotted: str) -> Any:
    """Return a dotted attribute; a name may be a key of a mapping, or an attribute of what DDP and the like wrap."""
    for name in dotted.split("."):
        if isinstance(trainer, Mapping) and name in trainer:
            trainer = trainer[name]
        else:
            trainer = getattr(trainer, name, getattr(getattr(trainer, "module", None), name, MISSING))
    return trainer


# -- hooks on functions and imports -----------------------------------------------------------------------------------


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
