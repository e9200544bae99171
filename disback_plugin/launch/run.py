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
import json
import logging
import os
import runpy
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from disback_plugin import distributed
from disback_plugin.attachment import attach
from disback_plugin.errors import DisbackError, OptionError, RoleError
from disback_plugin.handle import Handle
from disback_plugin.launch import Watch, call_after_import, replace
from disback_plugin.loop.held_steps import is_initialization
from disback_plugin.loop.optimizers import parameters, unwrap
from disback_plugin.loop.roles import find_networks
from disback_plugin.path import files
from disback_plugin.plugins.manager import PluginManager
from disback_plugin.weights.network import ScoreNetwork

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
        self._states = self._path.with_name(f"{self._path.name}.states.jsonl")
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
        calls = {call for watch in self._watches for call in (watch.call, *watch.saves)}
        with self._until_exit, self._until_attached:
            try:
                self._until_attached.callback(register_optimizer_step_pre_hook(self._refuse_early_step).remove)
                self._until_attached.callback(self._prepared.close)
                modules = {call.partition(":")[0] for call in calls}
                self._until_exit.enter_context(call_after_import(modules, self._wrap_functions))
                with _as_main(script, arguments):
                    runpy.run_path(os.fspath(script), run_name="__main__")
            except BaseException as error:
                self._log_end(error)
                raise
            self._log_end(None)

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
                    self._failure = watch.mismatch(f"no {name} in {module.__name__} ({error})")
                    raise self._failure from None
        for name in {
            save.removeprefix(here) for watch in self._watches for save in watch.saves if save.startswith(here)
        }:
            try:
                self._until_exit.enter_context(replace(module, name, self._save_state_too))
            except AttributeError:
                logger.warning("no %s in %s: no state is saved with the trainer's checkpoints", name, module.__name__)

    def _attach_at_call(self, watch: Watch, original: Callable[..., Any]) -> Callable[..., Any]:
        """Return a wrapper that attaches at its first call or, with `prepares`, collects what the function returns."""

        def call(*args: Any, **kwargs: Any) -> Any:
            if self.handle is None and not watch.prepares:
                self._attach(watch, lambda: watch.find_trainer(inspect.currentframe()))
            result = original(*args, **kwargs)
            if self.handle is None and watch.prepares:
                self._prepared.add(result)
            return result

        return call

    def _before_forward(self) -> None:
        watch = next(watch for watch in self._watches if watch.prepares)
        try:
            roles = watch.find_roles(inspect.currentframe(), self._roles)
        except RoleError:
            return  # perhaps some are yet to be made; if not, the first optimizer step raises this error
        self._attach(watch, lambda: SimpleNamespace(**vars(roles), prepared=self._prepared.objects))

    def _refuse_early_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Raise, before the first step of any optimizer, the reason why DisBack is not attached yet."""
        if is_initialization(optimizer):  # a checkpoint is being loaded
            return
        if self._failure is not None:
            raise self._failure
        first, calls = self._watches[0], " or ".join(watch.call for watch in self._watches)
        step = f"a first step of {type(optimizer).__name__} before"
        if not self._prepared.objects:
            frames = " or ".join(dict.fromkeys(watch.frame for watch in self._watches))
            raise first.mismatch(f"{step} any call of {calls}" + f" below {frames}()" * bool(frames))
        first.find_roles(inspect.currentframe(), self._roles)  # raises, and names the role that is missing
        raise first.mismatch(f"{step} any forward of what {calls} returned, where all roles can be seen")

    def _attach(self, watch: Watch, find_trainer: Callable[[], object]) -> None:
        try:
            roles = self._plugins.find_adapter(find_trainer(), self._adapter)
            path = None if self._options.get("record") == 0 else self._path
            trained = parameters(unwrap(roles.fake_score_optimizer, role="fake_score_optimizer"))
            networks = roles.teacher, roles.fake_score
            teacher, fake_score, _ = find_networks(*networks, trained, path, sampled=roles.sample)
            if self._prepared.have_run((teacher, fake_score)):
                raise watch.mismatch("a forward of teacher or fake score before all the roles could be seen from there")
            handle = attach(
                teacher=teacher,
                fake_score=fake_score,
                generator_optimizer=roles.generator_optimizer,
                fake_score_optimizer=roles.fake_score_optimizer,
                sample=roles.sample,
                loss=roles.loss,
                path=path,
                state=None if path is None else self._saved_state(fake_score),
                plugins=self._plugins,
                **self._options,
            )
        except DisbackError as error:
            self._failure = error  # a script that catches the error is stopped at its first optimizer step
            raise
        self.handle = self._until_exit.enter_context(handle)
        logger.info("attached to %s: %r", watch.knows, handle)
        self._until_attached.close()

    # -- from then on -------------------------------------------------------------------------------------------------

    def _save_state_too(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Return a wrapper of a function that saves checkpoints: it appends the handle's state, on rank 0."""

        def save(*args: Any, **kwargs: Any) -> Any:
            handle = self.handle
            if handle is None or handle.path is None:
                return original(*args, **kwargs)
            with handle.original_teacher():
                result = original(*args, **kwargs)
            if distributed.is_main_process():
                earlier = self._states.read_text() if self._states.exists() else ""
                files.write_text(self._states, f"{earlier}{json.dumps(handle.state_dict())}\n")
                logger.info("saved the state at %d updates with the trainer's checkpoint", handle.generator_updates)
            return result

        return save

    def _saved_state(self, fake_score: ScoreNetwork) -> dict[str, Any] | None:
        """Return the last state that was saved when the fake score had its present weights, or None. Collective."""
        lines = distributed.on_main_process(
            lambda: self._states.read_text().splitlines() if self._states.exists() else []
        )
        states = map(json.loads, reversed(lines))
        return next((s for s in states if s["fake_score"] and fake_score.matches_checksum(s["fake_score"])), None)

    def _log_end(self, error: BaseException | None) -> None:
        """Log where the run ended, and how to resume it if the script failed."""
        handle = self.handle
        if handle is None:
            if not isinstance(error, DisbackError):
                logger.warning("the script ended before a training step: nothing was attached")
            return
        failed = error is not None and not (isinstance(error, SystemExit) and error.code in (None, 0))
        if failed and handle.path is not None:
            stopped = f"{handle.phase}, after {handle.generator_updates} generator updates"
            kept = f"The path in {handle.path.folder} is kept: the same command goes on with it"
            logger.warning("stopped while %s. %s, or from the trainer's checkpoint if it loads one", stopped, kept)
        logger.info("ended: %r", handle)


class PreparedNetworks:
    """Collect the objects that a script prepares; call back before each forward with gradients of a network in them.

    Before the first such forward nothing of a training step has been computed. A validation, which some scripts run on
    one rank only, records no gradients and does not count.

    Args:
        before_forward: Called before such a forward, until `close`.

    Attributes:
        objects: Networks, optimizers and whatever else was prepared, each once.

    Example:
        >>> net = nn.Sequential(nn.Linear(1, 1))
        >>> prepared = PreparedNetworks(lambda: print("about to run"))
        >>> prepared.add((net, net))
        >>> prepared.objects == [net]
        True
        >>> with torch.no_grad():
        ...     _ = net(torch.ones(1, 1))
        >>> prepared.close()
    """

    def __init__(self, before_forward: Callable[[], None]) -> None:
        self.objects: list[object] = []
        self._before_forward = before_forward
        self._hooks = ExitStack()
        self._hooked: set[nn.Module] = set()
        self._ran: set[int] = set()

    def add(self, result: object) -> None:
        """Add what a call has prepared: one object, or several in a tuple or list."""
        for each in result if isinstance(result, (tuple, list)) else (result,):
            if not any(each is known for known in self.objects):
                self.objects.append(each)
            if isinstance(each, nn.Module):
                # All modules inside too: a script may call a method of the network, or a part of it.
                for module in set(each.modules()) - self._hooked:
                    self._hooked.add(module)
                    self._hooks.callback(module.register_forward_pre_hook(self._about_to_run).remove)

    def close(self) -> None:
        """Remove every hook; a second call changes nothing."""
        self._hooks.close()
        self._hooked.clear()

    def have_run(self, networks: Iterable[ScoreNetwork]) -> bool:
        """Return whether a forward with gradients of one of these networks has been seen."""
        return any(id(tensor) in self._ran for network in networks for _, tensor in network.named_tensors())

    def _about_to_run(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if torch.is_grad_enabled() and module in self._hooked:
            self._before_forward()
            self._ran.update(id(parameter) for parameter in module.parameters(recurse=False))


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
