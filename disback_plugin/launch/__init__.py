"""`disback run`: attach DisBack to a trainer's script without editing it.

`Watch` is the public class with which an adapter, or the command line, says where a trainer keeps its networks. This
module finds the trainer inside a running script, `launch.hooks` wraps the script's functions, and `launch.run` runs the
script. Importing this module loads no torch.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pkgutil import resolve_name
from types import FrameType, SimpleNamespace
from typing import Any

from disback_plugin.errors import OptionError, RoleError

ROLES = ("teacher", "fake_score", "generator_optimizer", "fake_score_optimizer")


@dataclass(frozen=True)
class Watch:
    """Tell `disback run` where a script keeps its trainer. An adapter's module has one as `WATCH`, or a sequence of
    them; then the first whose function is called counts.

    The function `call` is wrapped when its module is imported. Its first call must come before the first optimizer step
    and outside any forward of teacher and fake score, best at the start of the first training round. At that call the
    trainer is read from the local variables of the innermost caller named `frame`, the adapter is asked for the roles,
    and the wrapper is removed.

    Without `frame` the user names the variables of the roles, and the trainer is a namespace of the roles. Without
    `call`, or with `prepares`, DisBack attaches at the first forward with gradients of a trainable network.

    Attributes:
        call: "module:qualified.name" of a function of the trainer; "" for the first forward with gradients.
        frame: Name of the function, up the stack, that holds the trainer; "<module>" for a script's top level; "" where
            the user names the variables.
        knows: Upstream repository and version for which this was written, for error messages.
        take: Name of the local variable that is the trainer; "" for a namespace of all local variables.
        needs: Dotted names of attributes that the trainer must have. Without `frame`, the roles that must be found; a
            role that the user does not name is a variable of the role's own name.
        saves: Functions, named like `call`, that write the trainer's checkpoint. While they run, the teacher is s'_0.
            Their module may be "__main__", the script itself.
        prepares: Whether `call` is a library function that prepares networks and optimizers for scripts whose variable
            names the adapter cannot know. The trainer then also has the list `prepared` of what it returned.

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

    def find_trainer(self, start: FrameType | None, roles: Mapping[str, str] | None = None) -> object:
        """Return the trainer that a caller of a frame holds; without `frame`, a namespace of the roles.

        Args:
            start: Frame at which the search up the stack begins.
            roles: Dotted variable by role, where the user names them, as `find_variables` takes them.

        Raises:
            RoleError: If there is no such caller or variable, or the trainer lacks an attribute.
        """
        if not self.frame:
            return SimpleNamespace(**find_variables(start, {name: name for name in self.needs} | {**(roles or {})}))
        variables = next((held for name, held in _callers(start) if name == self.frame), None)
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

    def mismatch(self, found: str, *, fits: str = "") -> RoleError:
        """Return the error for a trainer of another version.

        Args:
            found: What is missing, in words.
            fits: Name of the adapter that knows the trainer, if there is one.
        """
        expected = "the roles where the command says"
        cure = "correct --watch and --role, or omit --watch: DisBack then attaches at the first forward with gradients"
        if self.knows:
            expected, cure = f"the names of {self.knows}, for which this adapter was written", "use that version"
        cure += ", or call disback.attach with the four roles in your script"
        if fits:
            cure = f"use --adapter {fits}, which knows this trainer"
        return RoleError(found, expected=expected, cure=cure)


def find_variables(start: FrameType | None, names: Mapping[str, str]) -> dict[str, Any]:
    """Return objects by role, each a variable of the innermost caller of a frame that has it.

    Args:
        start: Frame at which the search up the stack begins.
        names: Dotted variable by role; several with commas between them make a tuple.

    Raises:
        RoleError: If no caller has one of the variables.
    """
    callers, found = [*_callers(start)], {}
    for role, variables in names.items():
        values = tuple(_find(role, variable, callers) for variable in variables.split(","))
        found[role] = values if len(values) > 1 else values[0]
    return found


def _find(role: str, variable: str, callers: Sequence[tuple[str, Mapping[str, object]]]) -> object:
    """Return a dotted variable of the innermost caller that has it."""
    for _, held in callers:
        value = _get(SimpleNamespace(**held), variable)
        if value is not MISSING:
            return value
    torch, found = sys.modules["torch"], []  # the script has imported torch
    optimizer = role.endswith("optimizer")
    kind, what = (torch.optim.Optimizer, "an optimizer") if optimizer else (torch.nn.Module, "a network")
    for caller, variables in callers:
        names = sorted(name for name, value in variables.items() if isinstance(value, kind))
        where = "the script" if caller == "<module>" else f"{caller}()"
        found += [f"{', '.join(names)} in {where}"] if names else []
    raise RoleError(
        f"no variable {variable!r} for the {role.replace('_', ' ')} where the networks are used",
        expected=f"one of the script's own, each role {what} of its own: {'; '.join(found) or 'there are none'}",
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
    """Return a dotted attribute; a name may be a key of a mapping, an index, or an attribute of what DDP wraps."""
    for name in dotted.split("."):
        if isinstance(trainer, Mapping) and name in trainer:
            trainer = trainer[name]
        elif isinstance(trainer, Sequence) and name.isdecimal():
            trainer = trainer[int(name)] if int(name) < len(trainer) else MISSING
        else:
            trainer = getattr(trainer, name, getattr(getattr(trainer, "module", None), name, MISSING))
    return trainer


# -- options of the command line ---------------------------------------------------------------------------------------


def find_evaluation(name: str, frame: FrameType | None) -> Callable[[], Any]:
    """Return the function of `--evaluate` without arguments, for `attach`: each one without default is a variable.

    Args:
        name: "MODULE:FUNCTION"; the script itself is `__main__`.
        frame: Frame from which on the callers' variables are searched, as they are now.

    Raises:
        OptionError: If there is no such function.
        RoleError: If no caller has one of the variables.
    """
    try:
        function = resolve_name(name)
        given = inspect.signature(function).parameters.values()
    except (ImportError, AttributeError, ValueError, TypeError) as error:
        raise OptionError(
            f"no function {name!r} ({error})",
            expected="--evaluate MODULE:FUNCTION, importable from the script's folder, or __main__:FUNCTION",
            cure="correct the name, or set PYTHONPATH",
        ) from error
    needed = {argument.name: argument.name for argument in given if argument.default is argument.empty}
    try:
        return partial(function, **find_variables(frame, needed))
    except RoleError as error:
        raise RoleError(
            f"an argument of {name} that is no variable of the script, among {', '.join(needed)}",
            expected="variables of the script, where its networks are used",
            cure="rename the argument, or give it a default",
        ) from error


def watches_of(module: object, adapter: str) -> tuple[Watch, ...]:
    """Return what an adapter's module watches for; raise RoleError if it has no `WATCH`."""
    watch = getattr(module, "WATCH", ())
    watches = (watch,) if isinstance(watch, Watch) else tuple(watch)
    if not watches or not all(isinstance(each, Watch) for each in watches):
        raise RoleError(
            f"an adapter {adapter!r} that does not say where in a script the trainer is",
            expected="a disback_plugin.Watch, or several, as WATCH in its module",
            cure="call disback.attach(trainer, adapter=...) in the script instead",
        )
    return watches


def validated_watch(watch: str) -> str:
    """Return `watch` if it names a function of a module that can be imported, or nothing; raise OptionError if not."""
    module, _, name = watch.partition(":")
    if watch and (not name or module in ("", "__main__")):
        raise OptionError(
            f"--watch {watch}",
            expected="module:function or module:Class.method, of a module that the script imports",
            cure="omit --watch: DisBack then attaches at the first forward with gradients of a network that is trained",
        )
    return watch


def validated_roles(roles: Mapping[str, str], adapter: str, watches: Sequence[Watch]) -> dict[str, str]:
    """Return the variables by role; raise OptionError unless the user may name them and they are names."""
    if roles and all(watch.frame for watch in watches):
        raise OptionError(
            f"--role {next(iter(roles))} with --adapter {adapter}, which knows where the roles are",
            expected="an adapter that lets you name them, as accelerate_loop",
            cure="omit --role, or --adapter",
        )
    for role, variables in roles.items():
        parts = [part for variable in variables.split(",") for part in variable.split(".")]
        if role not in ROLES or not all(part.isidentifier() or part.isdecimal() for part in parts):
            raise OptionError(
                f"--role {role}={variables}",
                expected=f"one of {', '.join(ROLES)}, and a variable of the script, perhaps with dots",
                cure="write --role fake_score=fake_unet",
            )
    return dict(roles)
