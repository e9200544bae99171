"""Watching a script that nobody edits: what an adapter says about it, and hooks on its imports that leave no trace.

Imports no torch.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import FrameType, ModuleType, SimpleNamespace
from typing import Any

from disback_plugin.errors import RoleError

__all__ = ["AfterImport", "Watch", "replace"]

Undo = Callable[[], None]


@dataclass(frozen=True)
class Watch:
    """Where `disback run` finds the trainer of a running script. An adapter's module keeps one, or several of which the
    first that is called counts, as `WATCH`.

    The function `call` is wrapped when its module is imported. Its first call must come before the first optimizer step
    and outside any forward of teacher and fake score, best at the start of the first round. There the trainer is taken
    from the local variables of the innermost caller named `frame`, the adapter is asked for the roles, and the wrapper
    is gone.

    Of a script that is anybody's, only the call that prepares its networks and optimizers is known (`prepares`). There
    the moment is the first forward with gradients of a network that it returned, and the trainer is a namespace of the
    roles, taken from the variables that the user named, and of all that was `prepared`.

    Attributes:
        call: "module:qualified.name" of a function of the trainer.
        frame: Name of the function, up the stack, that holds the trainer; "<module>" for a script's top level. "" where
            the user names the roles.
        knows: The upstream repository and version that this was written for, for errors.
        take: Name of the local variable that is the trainer; "" for a namespace of all of them.
        needs: Dotted names of attributes that the trainer must have; what is missing is named.
        saves: Functions, named as `call` is, that write the trainer's checkpoint. While one runs, the teacher is s'_0.
        prepares: Whether `call` prepares networks, and the user names the roles. `needs` are those that must be there;
            a role that nobody named is a variable of its own name.

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
        """The module that `call` is in."""
        return self.call.partition(":")[0]

    def trainer(self, start: FrameType | None) -> object:
        """Return the trainer that the callers of a frame hold.

        Args:
            start: The frame to begin at.

        Raises:
            RoleError: If there is no such frame or variable, or the trainer lacks an attribute.
        """
        frame = start
        while frame is not None and frame.f_code.co_name != self.frame:
            frame = frame.f_back
        if frame is None:
            raise self.missed(f"no function {self.frame!r} among the callers of {self.call}")
        held = _locals(frame)
        if self.take and self.take not in held:
            raise self.missed(f"no variable {self.take!r} in {self.frame}(), which has {sorted(held)}")
        trainer = held[self.take] if self.take else SimpleNamespace(**held)
        missing = [name for name in self.needs if not _has(trainer, name)]
        if missing:
            where = f"{self.take or 'the local variables'} of {self.frame}()"
            raise self.missed(f"no {', '.join(missing)} in {where}")
        return trainer

    def named(self, start: FrameType | None, roles: Mapping[str, str]) -> SimpleNamespace:
        """Return the roles, each from the innermost caller of a frame that has its variable.

        Args:
            start: The frame to begin at.
            roles: Dotted variables by role.

        Raises:
            RoleError: If one is nowhere among the callers.
        """
        callers = list(_callers(start))
        found: dict[str, object] = {}
        for role, variable in {**{name: name for name in self.needs}, **roles}.items():
            holders = [held for _, held in callers if _has(SimpleNamespace(**held), variable)]
            if not holders:
                raise self._unnamed(role, variable, callers)
            found[role] = _get(SimpleNamespace(**holders[0]), variable)
        return SimpleNamespace(**found)

    def _unnamed(self, role: str, variable: str, callers: Sequence[tuple[str, Mapping[str, object]]]) -> RoleError:
        there = [f"{', '.join(names)} in {name}" for name, held in callers if (names := _networks(held))]
        return RoleError(
            f"no variable {variable!r} for the {role.replace('_', ' ')} where the networks are used",
            expected=f"one of the script's own, each role a network of its own: {'; '.join(there) or 'there are none'}",
            cure=f"name it with --role {role}=VARIABLE. A script without fake score (consistency distillation as LCM, "
            "flash-diffusion, adversarial losses alone) has no score difference that DisBack could help",
        )

    def missed(self, found: str) -> RoleError:
        """Return the error that says what was missed (`found`, in words), and which version was expected."""
        return RoleError(
            f"{found}",
            expected=f"the names of {self.knows}, which this adapter was written for",
            cure="use that version, or call disback.attach with the four roles in your script",
        )


def _locals(frame: FrameType) -> dict[str, Any]:
    """Return the local variables of a running function; the interpreter keeps no copy that would hold them alive."""
    held = frame.f_locals
    copy = dict(held)
    if frame.f_code.co_flags & inspect.CO_OPTIMIZED and isinstance(held, dict):
        held.clear()  # of a function before Python 3.13: a snapshot, kept as long as the frame
    return copy


def _callers(frame: FrameType | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield name and local variables of the script's own functions up the stack, the innermost first."""
    while frame is not None:
        if str(frame.f_globals.get("__name__")).partition(".")[0] not in ("torch", "accelerate", "disback_plugin"):
            name = frame.f_code.co_name
            yield "the script" if name == "<module>" else f"{name}()", _locals(frame)
        frame = frame.f_back


def _networks(variables: Mapping[str, object]) -> list[str]:
    module = sys.modules["torch"].nn.Module  # who asks has imported it
    return sorted(name for name, value in variables.items() if isinstance(value, module))


def _get(trainer: object, dotted: str) -> Any:
    """Return a dotted attribute; a key of a mapping counts, and DDP and its like are seen through.

    Raises:
        AttributeError: If it is not there.
    """
    for name in dotted.split("."):
        if isinstance(trainer, Mapping) and name in trainer:
            trainer = trainer[name]
            continue
        trainer = getattr(trainer if hasattr(trainer, name) else getattr(trainer, "module", trainer), name)
    return trainer


def _has(trainer: object, dotted: str) -> bool:
    try:
        _get(trainer, dotted)
    except AttributeError:
        return False
    return True


def replace(module: ModuleType, qualified: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Undo:
    """Put `make(function)` in the place of a module's function or method; return what puts the original back.

    Raises:
        AttributeError: If there is no such function.

    Example:
        >>> import colorsys
        >>> undo = replace(colorsys, "rgb_to_hsv", lambda original: lambda *rgb: "wrapped")
        >>> colorsys.rgb_to_hsv(0, 0, 0)
        'wrapped'
        >>> undo()
        >>> colorsys.rgb_to_hsv(0, 0, 0)
        (0.0, 0.0, 0)
    """
    *outer, name = qualified.split(".")
    owner = functools.reduce(getattr, outer, module)
    original = getattr(owner, name)
    own = vars(owner).get(name)
    setattr(owner, name, functools.wraps(original)(make(original)))

    def undo() -> None:
        if own is None:  # it was inherited
            delattr(owner, name)
        else:
            setattr(owner, name, own)

    return undo


class AfterImport(MetaPathFinder):
    """Calls back when a module has been imported, at once if it is there already; after `close` nothing is left.

    The well-known library for this, wrapt, has no way to take a hook out again.

    Args:
        callbacks: What to call with a module, by the module's name.

    Example:
        >>> _ = sys.modules.pop("colorsys", None)
        >>> hook = AfterImport({"colorsys": lambda module: print(module.__name__, "is there")})
        >>> import colorsys
        colorsys is there
        >>> hook.close()
    """

    def __init__(self, callbacks: Mapping[str, Callable[[ModuleType], None]]) -> None:
        self._callbacks = dict(callbacks)
        sys.meta_path.insert(0, self)
        for name, callback in callbacks.items():
            if name in sys.modules:
                callback(sys.modules[name])

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the spec that the finders after this one have, with a loader that calls back, or None."""
        callback = self._callbacks.get(name)
        if callback is None:
            return None
        for finder in sys.meta_path[sys.meta_path.index(self) + 1 :]:
            spec = finder.find_spec(name, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _CallBack(spec.loader, callback)
                return spec
        return None

    def close(self) -> None:
        """Stop watching; a second call changes nothing."""
        if self in sys.meta_path:
            sys.meta_path.remove(self)
        importlib.invalidate_caches()


class _CallBack(Loader):
    """A loader for one import: it hands the module back to the real one, runs that, and calls back."""

    def __init__(self, loader: Loader, callback: Callable[[ModuleType], None]) -> None:
        self._loader, self._callback = loader, callback

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        module.__loader__ = self._loader
        self._loader.exec_module(module)
        self._callback(module)
