"""Both stages on a script that nobody edits.

The script runs as `__main__`, with its own arguments. When it imports the module that the adapter watches, one function
of it is wrapped; at that function's first call, before the first optimizer step, `attach` is given the trainer that
the callers hold, and the wrapper is gone. Where that function only prepares the networks, the moment is the first
forward of one of them, and the user names the roles (`Watch.prepares`). If an optimizer steps before that, the script
is stopped.

Whenever the trainer saves its checkpoint, the teacher is s'_0 meanwhile, and the handle's state is appended to
"PATH.states.jsonl". A later run whose fake score holds the weights of one of them, because the trainer has loaded that
checkpoint, goes on from there.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import logging
import os
import runpy
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from disback_plugin.attachment import attach
from disback_plugin.errors import DisbackError, OptionError, RoleError
from disback_plugin.handle import Handle
from disback_plugin.launch.checkpoint_states import States
from disback_plugin.launch.prepared_networks import Prepared
from disback_plugin.launch.watch import AfterImport, Undo, Watch, replace
from disback_plugin.plugins.manager import GROUP, Adapter, PluginManager
from disback_plugin.schedules import Schedule
from disback_plugin.weights.network import ScoreNetwork

__all__ = ["Launch", "run"]

logger = logging.getLogger(__name__)


class Launch:
    """Waits for a trainer in this process and attaches to it; a context manager that leaves nothing behind.

    Args:
        adapter: Name of an installed adapter whose module has a `WATCH`.
        path: Folder of the path.
        plugins: As in `attach`.
        roles: Variables of the script by role, for an adapter that lets the user name them.
        options: Further arguments of `attach`: record, every, codec, schedule.

    Attributes:
        handle: What `attach` returned, or None before.
        states: The handle's states at the trainer's checkpoints.

    Raises:
        OptionError: If there is no such adapter, or roles are named and it finds them itself.
        RoleError: If it cannot be imported, or says nothing about scripts.
    """

    def __init__(
        self,
        adapter: str,
        path: str | os.PathLike[str],
        *,
        plugins: Sequence[object] = (),
        roles: Mapping[str, str] | None = None,
        **options: Any,
    ) -> None:
        self.handle: Handle | None = None
        self._plugins = PluginManager.of(plugins)
        self._adapter, self._path, self._options = adapter, Path(path), options
        self.states = States(self._path)
        self._watches = _watches(adapter)
        self._roles = _checked(roles or {}, adapter, self._watches)
        self._prepared = Prepared(self._before_forward)
        self._undo: list[Undo] = []
        self._waiting: list[Undo] = []
        self._imports: AfterImport | None = None
        self._failure: DisbackError | None = None

    def __enter__(self) -> Launch:
        self._waiting.append(register_optimizer_step_pre_hook(self._too_early).remove)
        callbacks: dict[str, list[Callable[[ModuleType], None]]] = {}
        for watch in self._watches:
            callbacks.setdefault(watch.module, []).append(functools.partial(self._wrap_call, watch))
        for save in dict.fromkeys(save for watch in self._watches for save in watch.saves):
            module, _, name = save.partition(":")
            callbacks.setdefault(module, []).append(functools.partial(self._wrap_save, name))
        self._imports = AfterImport({name: functools.partial(_call_all, calls) for name, calls in callbacks.items()})
        return self

    def __exit__(self, *reason: object) -> None:
        if self._imports is not None:
            self._imports.close()
        self._wait_no_more()
        for undo in reversed(self._undo):
            undo()
        self._undo.clear()
        if self.handle is not None:
            self.handle.detach()

    # -- before the trainer is found ----------------------------------------------------------------------------------

    def _wrap_call(self, watch: Watch, module: ModuleType) -> None:
        if self.handle is not None:
            return
        name = watch.call.partition(":")[2]

        def make(original: Callable[..., Any]) -> Callable[..., Any]:
            def first_call(*args: Any, **kwargs: Any) -> Any:
                if self.handle is None:
                    with self._remembered():
                        self._attach(watch.trainer(inspect.currentframe()), watch)
                return original(*args, **kwargs)

            def preparation(*args: Any, **kwargs: Any) -> Any:
                answer = original(*args, **kwargs)
                if self.handle is None:
                    self._prepared.add(answer)
                return answer

            return preparation if watch.prepares else first_call

        with self._remembered():
            try:
                self._waiting.append(replace(module, name, make))
            except AttributeError as error:
                raise watch.missed(f"no {name} in {module.__name__} ({error})") from None

    def _before_forward(self) -> None:
        watch = next(watch for watch in self._watches if watch.prepares)
        try:
            trainer = watch.named(inspect.currentframe(), self._roles)
        except RoleError:
            return  # not all is there yet; if nothing comes before the first step, it is said then
        with self._remembered():
            self._attach(SimpleNamespace(**vars(trainer), prepared=self._prepared.objects), watch)

    def _attach(self, trainer: object, watch: Watch) -> None:
        roles = self._plugins.adapter(trainer, self._adapter)
        networks = (
            ScoreNetwork.of(roles.teacher, role="teacher"),
            ScoreNetwork.of(roles.fake_score, role="fake score"),
        )
        if self._prepared.have_run(networks):
            raise watch.missed("a forward of teacher or fake score before all the roles could be seen from there")
        path = None if self._options.get("record") == 0 else self._path
        self.handle = attach(
            teacher=networks[0],
            fake_score=networks[1],
            generator_optimizer=roles.generator_optimizer,
            fake_score_optimizer=roles.fake_score_optimizer,
            path=path,
            state=None if path is None else self.states.of(networks[1]),
            plugins=self._plugins,
            **self._options,
        )
        logger.info("attached to %s: %r", watch.knows, self.handle)
        self._wait_no_more()

    def _wait_no_more(self) -> None:
        self._prepared.close()
        for undo in reversed(self._waiting):
            undo()
        self._waiting.clear()

    @contextmanager
    def _remembered(self) -> Iterator[None]:
        """A script that swallows our error must not get any further."""
        try:
            yield
        except DisbackError as error:
            self._failure = error
            raise

    def _too_early(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._failure is not None:
            raise self._failure
        watched = " or ".join(watch.call for watch in self._watches)
        step = f"a first step of {type(optimizer).__name__} before"
        if not self._prepared.objects:
            frames = " or ".join(dict.fromkeys(watch.frame for watch in self._watches))
            raise self._watches[0].missed(f"{step} any call of {watched}" + f" below {frames}()" * bool(frames))
        self._watches[0].named(inspect.currentframe(), self._roles)  # says which role is missing
        raise self._watches[0].missed(f"{step} any forward of what {watched} returned, where all roles can be seen")

    def _wrap_save(self, name: str, module: ModuleType) -> None:
        def make(original: Callable[..., Any]) -> Callable[..., Any]:
            def save(*args: Any, **kwargs: Any) -> Any:
                if self.handle is None or self.handle.path is None:
                    return original(*args, **kwargs)
                with self.handle.original_teacher():
                    saved = original(*args, **kwargs)
                self.states.append(self.handle)
                return saved

            return save

        try:
            self._undo.append(replace(module, name, make))
        except AttributeError:
            logger.warning("no %s in %s: the trainer's checkpoints will not be followed", name, module.__name__)


def _call_all(calls: Sequence[Callable[[ModuleType], None]], module: ModuleType) -> None:
    for call in calls:
        call(module)


def _watches(adapter: str) -> tuple[Watch, ...]:
    points = {point.name: point for point in entry_points(group=GROUP)}
    if adapter not in points:
        raise OptionError(
            f"--adapter {adapter}",
            expected=f"one of {', '.join(sorted(points))}",
            cure="install the distribution that has it, or call disback.attach in the script",
        )
    try:
        module = points[adapter].load()
    except Exception as error:  # a third party's module may raise anything
        raise RoleError(
            f"an adapter {adapter!r} that cannot be imported ({type(error).__name__}: {error})",
            expected="a module that can",
            cure="mend or upgrade the distribution that it is from",
        ) from error
    watch = getattr(module, "WATCH", ())
    watches = (watch,) if isinstance(watch, Watch) else tuple(watch)
    if not watches or not all(isinstance(each, Watch) for each in watches):
        raise RoleError(
            f"an adapter {adapter!r} that does not say where in a script the trainer is",
            expected="a disback_plugin.Watch, or several, as WATCH in its module",
            cure="call disback.attach(trainer, adapter=...) in the script instead",
        )
    return watches


def _checked(roles: Mapping[str, str], adapter: str, watches: Sequence[Watch]) -> dict[str, str]:
    """Return the roles that the user named."""
    if roles and not any(watch.prepares for watch in watches):
        raise OptionError(
            f"--role {next(iter(roles))} with --adapter {adapter}, which knows where the roles are",
            expected="an adapter that lets you name them, as accelerate_loop",
            cure="leave --role out",
        )
    known = [field.name for field in dataclasses.fields(Adapter)]
    for role, variable in roles.items():
        if role not in known or not all(part.isidentifier() for part in variable.split(".")):
            raise OptionError(
                f"--role {role}={variable}",
                expected=f"one of {', '.join(known)}, and a variable of the script, perhaps with dots",
                cure="write --role fake_score=fake_unet",
            )
    return dict(roles)


def run(
    script: str | os.PathLike[str],
    arguments: Sequence[str] = (),
    *,
    adapter: str,
    path: str | os.PathLike[str] = "disback-path",
    record: int = 200,
    every: int = 50,
    codec: str = "int8",
    schedule: Schedule | str = "auto",
    plugins: Sequence[object] = (),
    roles: Mapping[str, str] | None = None,
) -> None:
    """Run a script as `__main__` with DisBack on the trainer in it, whose files are not touched.

    Args:
        script: File of the script.
        arguments: Its command-line arguments.
        adapter: Name of the adapter that knows the trainer; its module has a `WATCH`.
        path: As in `attach`.
        record: As in `attach`.
        every: As in `attach`.
        codec: As in `attach`.
        schedule: As in `attach`.
        plugins: As in `attach`.
        roles: Variables of the script by role (teacher, fake_score, ...), for an adapter that lets the user name them.

    Raises:
        OptionError: If there is no such script or adapter, or an option is out of its domain.
        RoleError: If the trainer's shape is not the one that the adapter knows: before its first optimizer step.

        What the script raises, SystemExit too, is passed on. However it ends, the teacher is s'_0 again, and no hook,
        wrapper or argument is left in the process.
    """
    if not Path(script).is_file():
        raise OptionError(
            f"no file {os.fspath(script)!r}",
            expected="a Python script",
            cure="correct the name; options come before it",
        )
    options = {"record": record, "every": every, "codec": codec, "schedule": schedule}
    with Launch(adapter, path, plugins=plugins, roles=roles, **options) as launch:
        refused = False
        try:
            with _as_main(script, arguments):
                runpy.run_path(os.fspath(script), run_name="__main__")
        except BaseException as reason:
            refused = isinstance(reason, DisbackError)  # which says itself what is wrong
            if not (isinstance(reason, SystemExit) and reason.code in (None, 0)):
                _say_how_to_go_on(launch)
            raise
        finally:
            if launch.handle is None and not refused:
                logger.warning("the script ended before a training step: nothing was attached")
            elif launch.handle is not None:
                logger.info("ended: %r", launch.handle)


def _say_how_to_go_on(launch: Launch) -> None:
    handle = launch.handle
    if handle is None or handle.path is None:
        return
    file = launch.states.file
    saved = f"; with a checkpoint of {file} loaded it goes on from there" if file.exists() else ""
    logger.warning(
        "stopped while %s, after %d generator updates. The path in %s is kept: the same command goes on with it%s",
        handle.phase,
        handle.generator_updates,
        handle.path.folder,
        saved,
    )


@contextmanager
def _as_main(script: str | os.PathLike[str], arguments: Sequence[str]) -> Iterator[None]:
    """Give a script the arguments and the import path that Python would have given it."""
    argv, path = sys.argv[:], sys.path[:]
    sys.argv[:] = [os.fspath(script), *arguments]
    sys.path.insert(0, str(Path(script).resolve().parent))
    try:
        yield
    finally:
        sys.argv[:], sys.path[:] = argv, path
