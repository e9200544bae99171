"""Run a trainer's script with DisBack, without editing the script.

The script runs as `__main__` with its own arguments. When the script imports the module that a `Watch` names, one
function of that module is wrapped. At the function's first call, before the first optimizer step, `attach` gets the
trainer that the callers hold, and the wrapper is removed. Without such a function, `attach` is called before the first
forward with gradients (`hooks`), with the roles that the user named. An optimizer step before that stops the script.

While the trainer saves its checkpoint, the teacher is s'_0; afterwards the handle's state is kept (`states`). A later
run that loads that checkpoint resumes there.
"""

from __future__ import annotations

import inspect
import logging
import os
import runpy
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace as with_fields
from functools import partial
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any
from unittest.mock import patch

from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from disback_plugin import distributed, launch
from disback_plugin.attachment import attach
from disback_plugin.errors import DisbackError, OptionError, PluginError, RoleError
from disback_plugin.handle import Handle
from disback_plugin.launch import ROLES, Watch
from disback_plugin.launch.hooks import FirstForward, call_after_import, replace
from disback_plugin.launch.states import SavedStates
from disback_plugin.loop.optimizers import is_initialization, parameters, unwrap
from disback_plugin.loop.roles import find_networks, same_weights
from disback_plugin.plugins.hookspecs import ADAPTERS, Adapter
from disback_plugin.plugins.manager import PluginManager
from disback_plugin.weights.network import ScoreNetwork

logger = logging.getLogger(__name__)


class ScriptRunner:
    """Run one script and attach DisBack to the trainer in it.

    Args:
        adapter: Name of an installed adapter whose module has a `WATCH`; "" if the user names the roles.
        path: Folder of the degradation path.
        plugins: As in `attach`.
        roles: Variables of the script by role, where the user names them.
        watch: Without adapter: "module:qualified.name" of a function at whose first call to attach; "" for the first
            forward with gradients.
        saves: Further functions that write the trainer's checkpoint.
        restore: Variables of the script whose objects are passed as `restore` to `attach`; none for its default.
        evaluate: "module:function" that is passed as `evaluate` to `attach`, with variables of the script.
        options: Further arguments of `attach`: record, every, codec, schedule, evaluate_every.

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
        watch: str = "",
        saves: Sequence[str] = (),
        restore: Sequence[str] = (),
        evaluate: str = "",
        **options: Any,
    ) -> None:
        self.handle: Handle | None = None
        self._plugins = PluginManager.of(plugins)
        # Absolute: a script may change its working folder.
        self._adapter, self._path, self._options = adapter, Path(path).absolute(), options
        if adapter:
            watches = launch.watches_of(self._plugins.load(adapter, f"--adapter {adapter}"), adapter)
        else:
            watches = (Watch(launch.validated_watch(watch), frame="", knows="", needs=ROLES),)
        self._watches = tuple(with_fields(each, saves=(*each.saves, *saves)) for each in watches)
        self._roles, self._restore = launch.validated_roles(roles or {}, adapter, self._watches), restore
        self._states, self._evaluate = SavedStates(self._path), evaluate
        self._forwards: FirstForward | None = None
        self._generator: ScoreNetwork | None = None
        self._until_attached, self._until_exit = ExitStack(), ExitStack()
        self._failure: DisbackError | None = None
        self._missing = ""  # functions that an imported module does not have
        self._saving = False

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
        calls = {call for watch in self._watches for call in (watch.call, *watch.saves)}
        with self._until_exit, self._until_attached:
            try:
                self._until_attached.callback(register_optimizer_step_pre_hook(self._refuse_early_step).remove)
                prepares = any(watch.prepares for watch in self._watches)
                if prepares or not all(watch.call for watch in self._watches):
                    self._forwards = FirstForward(self._before_forward, prepared_only=prepares)
                    self._until_attached.callback(self._forwards.close)
                # The script is `__main__` while it runs; its functions exist once it has begun to train (`_attach`).
                modules = {call.partition(":")[0] for call in calls} - {"", "__main__"}
                self._until_exit.enter_context(call_after_import(modules, self._wrap_functions))
                # The arguments and the import path that Python itself would give the script.
                argv, folder = [os.fspath(script), *arguments], str(Path(script).resolve().parent)
                with patch.object(sys, "argv", argv), patch.object(sys, "path", [folder, *sys.path]):
                    runpy.run_path(os.fspath(script), run_name="__main__")
            finally:
                self._log_end(sys.exc_info()[1])

    # -- until the trainer is found -----------------------------------------------------------------------------------

    def _wrap_functions(self, module: ModuleType) -> None:
        """Wrap the functions of an imported module that the adapter names."""
        here = f"{module.__name__}:"
        for watch in self._watches:
            if self.handle is None and watch.call.startswith(here):
                name = watch.call.removeprefix(here)
                try:
                    self._until_attached.enter_context(replace(module, name, partial(self._attach_at_call, watch)))
                except AttributeError as error:
                    self._missing += f" ({error})"
        self._wrap_saves(module, self._watches)

    def _wrap_saves(self, module: ModuleType, watches: Sequence[Watch]) -> None:
        here = f"{module.__name__}:"
        for name in {save.removeprefix(here) for watch in watches for save in watch.saves if save.startswith(here)}:
            try:
                self._until_exit.enter_context(replace(module, name, self._save_state_too))
            except AttributeError:
                logger.warning("no %s in %s: no state is saved with the trainer's checkpoints", name, module.__name__)

    def _attach_at_call(self, watch: Watch, original: Callable[..., Any]) -> Callable[..., Any]:
        """Return a wrapper that attaches at its first call or, with `prepares`, collects what the function returns."""

        def call(*args: Any, **kwargs: Any) -> Any:
            if self.handle is None and not watch.prepares:
                self._attach(watch, inspect.currentframe())
            result = original(*args, **kwargs)
            if self.handle is None and self._forwards is not None:
                self._forwards.add(result)
            return result

        return call

    def _before_forward(self) -> None:
        watch = next(watch for watch in self._watches if watch.prepares or not watch.call)
        frame = inspect.currentframe()
        try:
            watch.find_trainer(frame, self._roles)
        except RoleError:
            return  # perhaps some are yet to be made; if not, the first optimizer step raises this error
        self._attach(watch, frame)

    def _refuse_early_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Raise, before the first step of any optimizer, the reason why DisBack is not attached yet."""
        if is_initialization(optimizer):  # a checkpoint is being loaded
            return
        if self._failure is not None:
            raise self._failure
        first, frame = self._watches[0], inspect.currentframe()
        calls, fits = " or ".join(watch.call for watch in self._watches if watch.call), self._fitting_adapter(frame)
        step = f"a first step of {type(optimizer).__name__} before"
        if calls and not (self._forwards is not None and self._forwards.prepared):
            frames = " or ".join(dict.fromkeys(watch.frame for watch in self._watches))
            below = f" below {frames}()" * bool(frames)
            raise first.mismatch(f"{step} any call of {calls}{below}{self._missing}", fits=fits)
        if not fits:
            first.find_trainer(frame, self._roles)  # raises, and names the role that is missing
        where = f"what {calls} returned" if calls else "a network that is trained"
        raise first.mismatch(f"{step} any forward of {where}, where all roles can be seen", fits=fits)

    def _fitting_adapter(self, frame: FrameType | None) -> str:
        """Return the name of another adapter whose trainer is among the callers of a frame, or ""."""
        for plugin in self._plugins.list_plugins(load=True):
            others = plugin.group == ADAPTERS and plugin.name != self._adapter
            module = self._plugins.get_plugin(plugin.name) if others else None
            with suppress(RoleError):
                for watch in launch.watches_of(module, plugin.name):
                    if watch.frame and watch.call.partition(":")[0] in sys.modules:
                        watch.find_trainer(frame)
                        return plugin.name
        return ""

    def _attach(self, watch: Watch, frame: FrameType | None) -> None:
        try:
            roles = self._find_roles(watch, frame)
            path = None if self._options.get("record") == 0 else self._path
            generator = _generator_of(roles.generator_optimizer)
            state, restored, copies = None, True, False
            if roles.fake_score is not None and roles.fake_score_optimizer is not None:
                trained = parameters(unwrap(roles.fake_score_optimizer, role="fake_score_optimizer"))
                networks = roles.teacher, roles.fake_score
                teacher, fake_score, apart = find_networks(*networks, trained, path, sampled=roles.sample)
                if self._forwards is not None and self._forwards.have_run((teacher, fake_score)):
                    raise watch.mismatch("a forward of a score network before all the roles could be seen from there")
                state, restored = (None, True) if path is None else self._states.find(fake_score, generator)
                alike = not apart and fake_score.lora_adapter is None
                copies = not restored and alike and same_weights(teacher, fake_score)
                roles = with_fields(roles, teacher=teacher, fake_score=fake_score)  # each is enumerated once
            handle = attach(
                roles,
                path=path,
                state=state,
                plugins=self._plugins,
                **self._options,
                restore=("schedulers", *launch.find_variables(frame, {name: name for name in self._restore}).values()),
                evaluate=launch.find_evaluation(self._evaluate, frame) if self._evaluate else None,
            )
        except DisbackError as error:
            self._failure = error  # a script that catches the error is stopped at its first optimizer step
            raise
        self.handle, self._generator = self._until_exit.enter_context(handle), generator
        if copies:  # as in the trainer's own resume
            fake_score.load_state_dict(teacher.state_dict())
        if not restored and distributed.is_main_process():
            ending = "begins again as a copy of the teacher's active node" if copies else "is left as it is"
            logger.warning(
                "the trainer has restored the generator of update %d, but not the fake score of that moment: s_phi %s",
                handle.generator_updates,
                ending,
            )
        logger.info("attached to %s: %r", watch.knows or "the script", handle)
        self._wrap_saves(sys.modules["__main__"], [watch])
        self._until_attached.close()

    def _find_roles(self, watch: Watch, frame: FrameType | None) -> Adapter:
        """Return the roles, from the adapter or as the user named them."""
        trainer: Any = watch.find_trainer(frame, self._roles)
        if watch.prepares and self._forwards is not None:
            trainer.prepared = self._forwards.prepared
        if not self._adapter:
            return Adapter(**vars(trainer))
        try:
            return self._plugins.find_adapter(trainer, self._adapter)
        except PluginError as error:
            if isinstance(error.__cause__, AttributeError):
                raise watch.mismatch(f"a trainer of other names ({error.__cause__})") from error
            raise

    # -- from then on -------------------------------------------------------------------------------------------------

    def _save_state_too(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Return a wrapper of a function that saves checkpoints: it keeps the handle's state, on rank 0."""

        def save(*args: Any, **kwargs: Any) -> Any:
            handle = self.handle
            if handle is None or handle.path is None or self._saving:  # one that saves may call another
                return original(*args, **kwargs)
            self._saving = True
            try:
                with handle.original_teacher():
                    result = original(*args, **kwargs)
            finally:
                self._saving = False
            # On every rank that saves: what FSDP has gathered is freed first, on all of them or on none.
            marks = {"generator": "" if self._generator is None else self._generator.local_checksum()}
            state = handle.state_dict() | marks
            if distributed.is_main_process():
                self._states.append(state)
                logger.info("saved the state at %d updates with the trainer's checkpoint", handle.generator_updates)
            return result

        return save

    def _log_end(self, error: BaseException | None) -> None:
        """Log where the run ended, and how to resume it if the script failed or has trained nothing."""
        handle = self.handle
        if handle is None:
            if not isinstance(error, DisbackError):
                logger.warning("the script ended before a training step: nothing was attached")
            return
        failed = error is not None and not (isinstance(error, SystemExit) and error.code in (None, 0))
        folder = None if handle.path is None else handle.path.folder
        kept = "" if folder is None else f"The path in {folder} is kept: the same command goes on with it"
        if failed and kept:
            stopped = f"{handle.phase}, after {handle.generator_updates} generator updates"
            logger.warning("stopped while %s. %s, or from the trainer's checkpoint if it loads one", stopped, kept)
        elif handle.phase != "done" and not handle.generator_updates and distributed.is_main_process():
            logger.warning("the script ended before the generator's first update: it was never trained. %s", kept)
        logger.info("ended: %r", handle)


def _generator_of(optimizers: Any) -> ScoreNetwork | None:
    """Return the parameters of the generator as a network, or None if some are of a kind that no role may have."""
    stepped = parameters(unwrap(optimizers, role="generator_optimizer"))
    try:
        return ScoreNetwork(nn.ParameterList(stepped), role="generator")
    except RoleError:
        return None
