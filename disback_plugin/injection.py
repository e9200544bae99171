"""Both stages on a script that nobody edits.

The script runs as `__main__`, with its own arguments. When it imports the module that the adapter watches, one function
of it is wrapped; at that function's first call, before the first optimizer step, `attach` is given the trainer that
the callers hold, and the wrapper is gone. If an optimizer steps before that, the script is stopped.

Whenever the trainer saves its checkpoint, the teacher is s'_0 meanwhile, and the handle's state is appended to
"PATH.states.jsonl". A later run whose fake score holds the weights of one of them, because the trainer has loaded that
checkpoint, goes on from there.
"""

from __future__ import annotations

import functools
import inspect
import json
import logging
import os
import runpy
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import entry_points
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from disback_plugin import files
from disback_plugin.attachment import attach
from disback_plugin.errors import DisbackError, OptionError, RoleError
from disback_plugin.handle import Handle
from disback_plugin.hooks import GROUP, Adapter, Plugins
from disback_plugin.schedules import Schedule
from disback_plugin.watching import AfterImport, Undo, Watch, replace
from disback_plugin.weights import ScoreNetwork

__all__ = ["Launch", "run"]

logger = logging.getLogger(__name__)


class Launch:
    """Waits for a trainer in this process and attaches to it; a context manager that leaves nothing behind.

    Args:
        adapter: Name of an installed adapter whose module has a `WATCH`.
        path: Folder of the path.
        plugins: As in `attach`.
        options: Further arguments of `attach`: record, every, codec, schedule.

    Attributes:
        handle: What `attach` returned, or None before.

    Raises:
        OptionError: If there is no such adapter.
        RoleError: If it cannot be imported, or says nothing about scripts.
    """

    def __init__(
        self, adapter: str, path: str | os.PathLike[str], *, plugins: Sequence[object] = (), **options: Any
    ) -> None:
        self.handle: Handle | None = None
        self._plugins = Plugins.of(plugins)
        self._adapter, self._path, self._options = adapter, Path(path), options
        self._watches = _watches(adapter)
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
        for undo in (*self._waiting, *reversed(self._undo)):
            undo()
        self._waiting.clear()
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
                    self._attach(inspect.currentframe(), watch)
                return original(*args, **kwargs)

            return first_call

        with self._remembered():
            try:
                self._waiting.append(replace(module, name, make))
            except AttributeError as error:
                raise watch.missed(f"no {name} in {module.__name__} ({error})") from None

    def _attach(self, frame: FrameType | None, watch: Watch) -> None:
        with self._remembered():
            roles = self._plugins.adapter(watch.trainer(frame), self._adapter)
            path = None if self._options.get("record") == 0 else self._path
            self.handle = attach(
                teacher=roles.teacher,
                fake_score=roles.fake_score,
                generator_optimizer=roles.generator_optimizer,
                fake_score_optimizer=roles.fake_score_optimizer,
                path=path,
                state=self._state_of(roles),
                plugins=self._plugins,
                **self._options,
            )
            logger.info("attached to %s: %r", watch.knows, self.handle)
        for undo in self._waiting:
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
        frames = " or ".join(dict.fromkeys(watch.frame for watch in self._watches))
        raise self._watches[0].missed(
            f"a first step of {type(optimizer).__name__} before any call of {watched} below {frames}()"
        )

    # -- the trainer's own checkpoints --------------------------------------------------------------------------------

    @property
    def states(self) -> Path:
        """The file of the states at the trainer's checkpoints, one JSON object a line."""
        return self._path.with_name(f"{self._path.name}.states.jsonl")

    def _wrap_save(self, name: str, module: ModuleType) -> None:
        def make(original: Callable[..., Any]) -> Callable[..., Any]:
            def save(*args: Any, **kwargs: Any) -> Any:
                if self.handle is None or self.handle.path is None:
                    return original(*args, **kwargs)
                with self.handle.original_teacher():
                    saved = original(*args, **kwargs)
                self._remember(self.handle)
                return saved

            return save

        try:
            self._undo.append(replace(module, name, make))
        except AttributeError:
            logger.warning("no %s in %s: the trainer's checkpoints will not be followed", name, module.__name__)

    def _remember(self, handle: Handle) -> None:
        if os.environ.get("RANK", "0") != "0":
            return
        state = handle.state_dict()
        earlier = self.states.read_text() if self.states.exists() else ""
        files.write_text(self.states, f"{earlier}{json.dumps(state)}\n")
        logger.info("saved the state at %d generator updates with the trainer's checkpoint", handle.generator_updates)

    def _state_of(self, roles: Adapter) -> dict[str, Any] | None:
        """Return the state that was saved when the fake score held what it holds now, or None."""
        if self._options.get("record") == 0 or not self.states.exists():
            return None
        states = [json.loads(line) for line in self.states.read_text().splitlines()]
        now = ScoreNetwork.of(roles.fake_score, role="fake score").checksum()
        return next((state for state in reversed(states) if state["fake_score"] == now), None)


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
    with Launch(adapter, path, plugins=plugins, **options) as launch:
        try:
            with _as_main(script, arguments):
                runpy.run_path(os.fspath(script), run_name="__main__")
        except BaseException as reason:
            if not (isinstance(reason, SystemExit) and reason.code in (None, 0)):
                _say_how_to_go_on(launch)
            raise
        finally:
            if launch.handle is None:
                logger.warning("the script ended before a training step: nothing was attached")
            else:
                logger.info("ended: %r", launch.handle)


def _say_how_to_go_on(launch: Launch) -> None:
    handle = launch.handle
    if handle is None or handle.path is None:
        return
    saved = f"; with a checkpoint of {launch.states} loaded it goes on from there" if launch.states.exists() else ""
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
