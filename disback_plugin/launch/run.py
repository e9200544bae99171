"""Run a trainer's script with DisBack, without editing the script.

The script runs as `__main__` with its own arguments. When the script imports the module that the adapter's `Watch`
names, one function of that module is wrapped. At the function's first call, before the first optimizer step, `attach`
gets the trainer that the callers hold, and the wrapper is removed. Where the function only prepares networks
(`Watch.prepares`), `attach` is called before the first forward with gradients of a prepared network, with the roles
that the user named. An optimizer step before that stops the script.

While the trainer saves its checkpoint, the teacher is s'_0; afterwards the handle's state is appended to
"PATH.states.jsonl". When a later run loads that checkpoint, its fake score has the weights of that moment, by which the
state is found, and the run resumes there.
"""

from __future__ import annotations

import inspect
import logging
import os
import runpy
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from disback_plugin.attachment import attach
from disback_plugin.errors import DisbackError, OptionError, RoleError
from disback_plugin.handle import Handle
from disback_plugin.launch.checkpoint_states import CheckpointStates
from disback_plugin.launch.import_hooks import Watch, call_after_import, replace
from disback_plugin.launch.prepared_networks import PreparedNetworks
from disback_plugin.plugins.manager import PluginManager
from disback_plugin.weights.network import ScoreNetwork

__all__ = ["ScriptRunner"]

logger = logging.getLogger(__name__)

ROLES = ("teacher", "fake_score", "generator_optimizer", "fake_score_optimizer")


class ScriptRunner:
    """Run one script and attach DisBack to the trainer in it.

    Args:
        adapter: Name of an installed adapter whose module has a `WATCH`.
        path: Folder of the degradation path.
        plugins: As in `attach`.
        roles: Variables of the script by role, for an adapter that lets the user name them.
        options: Further arguments of `attach`: record, every, codec, schedule.

    Attributes:
        handle: The handle that `attach` returned, or None before that.

    Raises:
        OptionError: If the adapter is not installed or is blocked, or `roles` are given and it finds them itself.
        PluginError: If the adapter cannot be imported.
        RoleError: If the adapter has no `WATCH`.
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
        self._watches = _watches(self._plugins.load(adapter, f"--adapter {adapter}"), adapter)
        self._roles = _validated_roles(roles or {}, adapter, self._watches)
        self._states = CheckpointStates(self._path)
        self._prepared = PreparedNetworks(self._before_forward)
        self._until_attached, self._until_exit = ExitStack(), ExitStack()
        self._failure: DisbackError | None = None

    def run(self, script: str | os.PathLike[str], arguments: Sequence[str] = ()) -> None:
        """Run a script as `__main__`. Afterwards the teacher is s'_0 and no hook, wrapper or argument is left.

        Args:
            script: File of the script.
            arguments: The script's own command-line arguments.

        Raises:
            OptionError: If there is no such script, or an option is out of its domain.
            RoleError: If the adapter does not know a trainer of this shape; raised before the first optimizer step.

            Whatever the script raises, SystemExit too, is passed on.
        """
        if not Path(script).is_file():
            raise OptionError(
                f"no file {os.fspath(script)!r}",
                expected="a Python script",
                cure="correct the name; options come before it",
            )
        refused = False
        with self._until_exit, self._until_attached:
            try:
                self._watch_script()
                with _as_main(script, arguments):
                    runpy.run_path(os.fspath(script), run_name="__main__")
            except BaseException as error:
                refused = isinstance(error, DisbackError)
                if not (isinstance(error, SystemExit) and error.code in (None, 0)):
                    self._log_how_to_resume()
                raise
            finally:
                if self.handle is not None:
                    logger.info("ended: %r", self.handle)
                elif not refused:
                    logger.warning("the script ended before a training step: nothing was attached")

    # -- until the trainer is found -----------------------------------------------------------------------------------

    def _watch_script(self) -> None:
        self._until_attached.callback(register_optimizer_step_pre_hook(self._refuse_early_step).remove)
        self._until_attached.callback(self._prepared.close)
        saves = dict.fromkeys(save for watch in self._watches for save in watch.saves)
        callbacks: list[tuple[str, Callable[[ModuleType], object]]] = [
            *((watch.module, partial(self._wrap_call, watch)) for watch in self._watches),
            *((save.partition(":")[0], partial(self._wrap_save, save.partition(":")[2])) for save in saves),
        ]
        self._until_exit.enter_context(call_after_import(callbacks))

    def _wrap_call(self, watch: Watch, module: ModuleType) -> None:
        if self.handle is not None:
            return
        name = watch.call.partition(":")[2]
        wrap = self._collect_results if watch.prepares else partial(self._attach_at_first_call, watch)
        with self._remembered_failure():
            try:
                self._until_attached.enter_context(replace(module, name, wrap))
            except AttributeError as error:
                raise watch.mismatch(f"no {name} in {module.__name__} ({error})") from None

    def _attach_at_first_call(self, watch: Watch, original: Callable[..., Any]) -> Callable[..., Any]:
        def first_call(*args: Any, **kwargs: Any) -> Any:
            if self.handle is None:
                with self._remembered_failure():
                    self._attach(watch.find_trainer(inspect.currentframe()), watch)
            return original(*args, **kwargs)

        return first_call

    def _collect_results(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def prepare(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            if self.handle is None:
                self._prepared.add(result)
            return result

        return prepare

    def _before_forward(self) -> None:
        watch = next(watch for watch in self._watches if watch.prepares)
        try:
            trainer = watch.find_roles(inspect.currentframe(), self._roles)
        except RoleError:
            return  # perhaps some are yet to be made; if not, the first optimizer step raises this error
        with self._remembered_failure():
            self._attach(SimpleNamespace(**vars(trainer), prepared=self._prepared.objects), watch)

    def _refuse_early_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Raise, before the first step of any optimizer, the reason why DisBack is not attached yet."""
        if self._failure is not None:
            raise self._failure
        first, calls = self._watches[0], " or ".join(watch.call for watch in self._watches)
        step = f"a first step of {type(optimizer).__name__} before"
        if not self._prepared.objects:
            frames = " or ".join(dict.fromkeys(watch.frame for watch in self._watches))
            raise first.mismatch(f"{step} any call of {calls}" + f" below {frames}()" * bool(frames))
        first.find_roles(inspect.currentframe(), self._roles)  # raises, and names the role that is missing
        raise first.mismatch(f"{step} any forward of what {calls} returned, where all roles can be seen")

    @contextmanager
    def _remembered_failure(self) -> Iterator[None]:
        """Keep an error, so that a script that catches it is stopped at its first optimizer step."""
        try:
            yield
        except DisbackError as error:
            self._failure = error
            raise

    # -- from then on -------------------------------------------------------------------------------------------------

    def _attach(self, trainer: object, watch: Watch) -> None:
        roles = self._plugins.find_adapter(trainer, self._adapter)
        teacher = ScoreNetwork.of(roles.teacher, role="teacher")
        fake_score = ScoreNetwork.of(roles.fake_score, role="fake score")
        if self._prepared.have_run((teacher, fake_score)):
            raise watch.mismatch("a forward of teacher or fake score before all the roles could be seen from there")
        path = None if self._options.get("record") == 0 else self._path
        self.handle = self._until_exit.enter_context(
            attach(
                teacher=teacher,
                fake_score=fake_score,
                generator_optimizer=roles.generator_optimizer,
                fake_score_optimizer=roles.fake_score_optimizer,
                path=path,
                state=None if path is None else self._states.find(fake_score),
                plugins=self._plugins,
                **self._options,
            )
        )
        logger.info("attached to %s: %r", watch.knows, self.handle)
        self._until_attached.close()

    def _wrap_save(self, name: str, module: ModuleType) -> None:
        def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
            def save(*args: Any, **kwargs: Any) -> Any:
                if self.handle is None or self.handle.path is None:
                    return original(*args, **kwargs)
                with self.handle.original_teacher():
                    result = original(*args, **kwargs)
                self._states.append(self.handle)
                return result

            return save

        try:
            self._until_exit.enter_context(replace(module, name, wrap))
        except AttributeError:
            logger.warning("no %s in %s: no state is saved with the trainer's checkpoints", name, module.__name__)

    def _log_how_to_resume(self) -> None:
        handle = self.handle
        if handle is None or handle.path is None:
            return
        file = self._states.file
        logger.warning(
            "stopped while %s, after %d generator updates. The path in %s is kept: the same command goes on with it%s",
            handle.phase,
            handle.generator_updates,
            handle.path.folder,
            f"; with a checkpoint of {file} loaded it goes on from there" if file.exists() else "",
        )


def _watches(module: object, adapter: str) -> tuple[Watch, ...]:
    watch = getattr(module, "WATCH", ())
    watches = (watch,) if isinstance(watch, Watch) else tuple(watch)
    if not watches or not all(isinstance(each, Watch) for each in watches):
        raise RoleError(
            f"an adapter {adapter!r} that does not say where in a script the trainer is",
            expected="a disback_plugin.Watch, or several, as WATCH in its module",
            cure="call disback.attach(trainer, adapter=...) in the script instead",
        )
    return watches


def _validated_roles(roles: Mapping[str, str], adapter: str, watches: Sequence[Watch]) -> dict[str, str]:
    if roles and not any(watch.prepares for watch in watches):
        raise OptionError(
            f"--role {next(iter(roles))} with --adapter {adapter}, which knows where the roles are",
            expected="an adapter that lets you name them, as accelerate_loop",
            cure="omit --role",
        )
    for role, variable in roles.items():
        if role not in ROLES or not all(part.isidentifier() for part in variable.split(".")):
            raise OptionError(
                f"--role {role}={variable}",
                expected=f"one of {', '.join(ROLES)}, and a variable of the script, perhaps with dots",
                cure="write --role fake_score=fake_unet",
            )
    return dict(roles)


@contextmanager
def _as_main(script: str | os.PathLike[str], arguments: Sequence[str]) -> Iterator[None]:
    """Give a script the arguments and the import path that Python itself would give it."""
    argv, path = sys.argv[:], sys.path[:]
    sys.argv[:] = [os.fspath(script), *arguments]
    sys.path.insert(0, str(Path(script).resolve().parent))
    try:
        yield
    finally:
        sys.argv[:], sys.path[:] = argv, path
