"""Find the trainer inside a running script, and wrap the script's functions when their modules are imported.

`Watch` is the public class with which an adapter says where a trainer keeps its networks. Importing this module loads
no torch.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import FrameType, ModuleType, SimpleNamespace
from typing import Any

from disback_plugin.errors import RoleError

__all__ = ["Watch", "call_after_import", "replace"]


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
        >>> Watch(
        ...     "training.sid_loss:SID_EDMLoss.__call__",
        ...     frame="training_loop",
        ...     knows="SiD of March 2025",
        ...     needs=("true_score",),
        ... ).module
        'training.sid_loss'
    """

    call: str
    frame: str
    knows: str
    take: str = ""
    needs: Sequence[str] = ()
    saves: Sequence[str] = ()
    prepares: bool = False

    @property
    def module(self) -> str:
        """The module that defines `call`."""
        return self.call.partition(":")[0]

    def find_trainer(self, start: FrameType | None) -> object:
        """Return the trainer that a caller of a frame holds.

        Args:
            start: Frame at which the search up the stack begins.

        Raises:
            RoleError: If there is no such caller or variable, or the trainer lacks an attribute.
        """
        frame = start
        while frame is not None and frame.f_code.co_name != self.frame:
            frame = frame.f_back
        if frame is None:
            raise self.mismatch(f"no function {self.frame!r} among the callers of {self.call}")
        variables = _local_variables(frame)
        if self.take and self.take not in variables:
            raise self.mismatch(f"no variable {self.take!r} in {self.frame}(), which has {sorted(variables)}")
        trainer = variables[self.take] if self.take else SimpleNamespace(**variables)
        missing = [name for name in self.needs if not _has(trainer, name)]
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
        roles: dict[str, object] = {}
        for role, variable in {**{name: name for name in self.needs}, **variables}.items():
            holders = (SimpleNamespace(**held) for _, held in callers)
            holder = next((holder for holder in holders if _has(holder, variable)), None)
            if holder is None:
                raise _unknown_variable(role, variable, callers)
            roles[role] = _get(holder, variable)
        return SimpleNamespace(**roles)

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
        found += [f"{', '.join(names)} in {caller}"] if names else []
    return RoleError(
        f"no variable {variable!r} for the {role.replace('_', ' ')} where the networks are used",
        expected=f"one of the script's own, each role a network of its own: {'; '.join(found) or 'there are none'}",
        cure=f"name it with --role {role}=VARIABLE. A script without fake score (consistency distillation as LCM, "
        "flash-diffusion, adversarial losses alone) has no score difference that DisBack could help",
    )


def _local_variables(frame: FrameType) -> dict[str, Any]:
    """Return a copy of the local variables of a running function, so that the interpreter keeps none alive."""
    variables = frame.f_locals
    copy = dict(variables)
    if frame.f_code.co_flags & inspect.CO_OPTIMIZED and isinstance(variables, dict):
        variables.clear()  # before Python 3.13 a snapshot that lives as long as the frame
    return copy


def _callers(frame: FrameType | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield name and local variables of the script's own functions up the stack, the innermost first."""
    while frame is not None:
        if str(frame.f_globals.get("__name__")).partition(".")[0] not in ("torch", "accelerate", "disback_plugin"):
            name = frame.f_code.co_name
            yield "the script" if name == "<module>" else f"{name}()", _local_variables(frame)
        frame = frame.f_back


def _get(trainer: object, dotted: str) -> Any:
    """Return a dotted attribute; a name may be a key of a mapping, or an attribute of what DDP and the like wrap.

    Raises:
        AttributeError: If there is none.
    """
    for name in dotted.split("."):
        if isinstance(trainer, Mapping) and name in trainer:
            trainer = trainer[name]
        else:
            trainer = getattr(trainer if hasattr(trainer, name) else getattr(trainer, "module", trainer), name)
    return trainer


def _has(trainer: object, dotted: str) -> bool:
    try:
        _get(trainer, dotted)
    except AttributeError:
        return False
    return True


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
def call_after_import(callbacks: Iterable[tuple[str, Callable[[ModuleType], object]]]) -> Iterator[None]:
    """Call back inside the `with` block when a module has been imported, at once if it was imported before.

    wrapt, the known library for this, cannot remove its hooks.

    Args:
        callbacks: Pairs of a module's name and a function of that module.

    Example:
        >>> _ = sys.modules.pop("colorsys", None)
        >>> with call_after_import([("colorsys", lambda module: print(module.__name__, "is imported"))]):
        ...     import colorsys
        colorsys is imported
    """
    finder = _Finder()
    sys.meta_path.insert(0, finder)
    try:
        for name, callback in callbacks:
            finder.callbacks.setdefault(name, []).append(callback)
            if name in sys.modules:
                callback(sys.modules[name])
        yield
    finally:
        sys.meta_path.remove(finder)
        importlib.invalidate_caches()


class _Finder(MetaPathFinder):
    """Find modules as the later finders do, with a loader that calls back."""

    def __init__(self) -> None:
        self.callbacks: dict[str, list[Callable[[ModuleType], object]]] = {}

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in self.callbacks:
            return None
        for finder in sys.meta_path[sys.meta_path.index(self) + 1 :]:
            spec = finder.find_spec(name, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Loader(spec.loader, self.callbacks[name])
                return spec
        return None


class _Loader(Loader):
    """Load one module with its own loader, which stays as if it alone had been used, then call back."""

    def __init__(self, loader: Loader, callbacks: Sequence[Callable[[ModuleType], object]]) -> None:
        self._loader, self._callbacks = loader, callbacks

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        module.__loader__ = self._loader
        self._loader.exec_module(module)
        for callback in self._callbacks:
            callback(module)
