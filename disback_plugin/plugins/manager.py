"""The pluggy host: the plug-ins of one run, which of them broke, and the calls of its steps. Imports no torch.

What a plug-in may implement is in `hookspecs`, where it comes from in `plugins` and `shelf`. A run takes

* the installed plug-ins of the group `disback.hooks`, all of them, and the adapter that knows its trainer;
* what it was given by name or as an object (`attach(..., plugins=...)`), and what its script registered (`register`);
* nothing that is blocked: `plugins=("no:NAME",)`, `disback -p no:NAME`, `DISBACK_PLUGINS="no:NAME,no:OTHER"`. With
  `DISBACK_DISABLE_PLUGIN_AUTOLOAD=1` nothing that was not asked for by name.

A plug-in that breaks, at import or in a hook, is named in the log with its distribution and left out from then on; one
that was asked for raises. pluggy orders and checks; the calls are resolved once, to bound methods, so that a step pays
for no dispatch, and where nobody listens for nothing. `DISBACK_TRACE_PLUGINS=1` logs every call and its answer.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from operator import itemgetter
from typing import TYPE_CHECKING, Any

from disback_plugin import distributed
from disback_plugin.errors import DisbackError, OptionError, RoleError
from disback_plugin.plugins.hookspecs import ARGUMENTS, Adapter, hookimpl
from disback_plugin.plugins.installed import ADAPTERS, HOOKS, Plugin
from disback_plugin.plugins.run_log import NAME, RunLog
from disback_plugin.plugins.shelf import Shelf, require_fit

if TYPE_CHECKING:
    from disback_plugin.path.degradation_path import DegradationPath
    from disback_plugin.path.manifest import Node
    from disback_plugin.scheduler import TrajectoryScheduler

__all__ = ["GROUP", "Adapter", "PluginManager", "find_adapter", "hookimpl", "register"]

logger = logging.getLogger(__name__)

GROUP = ADAPTERS

# A plug-in's name, and its implementation of a hook, called with all of the hook's arguments in order.
Call = tuple[str, Callable[..., Any]]


class _Script:
    """What the script of this process registered; runs look at `changes` before they call anything."""

    plugins: tuple[object, ...] = ()
    changes = 0


def register(plugin: object) -> Callable[[], None]:
    """Let a plug-in hear the runs of this process, those under way too.

    For one run alone pass it to that: `attach(..., plugins=(plugin,))`.

    Args:
        plugin: An object or module with functions marked `@hookimpl` and named after a hook of `Specs`.

    Returns:
        A function that takes it out again.

    Raises:
        OptionError: If it implements no hook, or one of them wrongly, or is registered already.

    Example:
        >>> class Print:
        ...     @hookimpl
        ...     def disback_log(self, values, step):
        ...         print(step, dict(values))
        >>> unregister = register(Print())
        >>> PluginManager().log({"disback/masked_samples": 0}, 50)
        50 {'disback/masked_samples': 0}
        >>> unregister()
    """
    require_fit(plugin)
    if any(known is plugin for known in _Script.plugins):
        raise OptionError("a plug-in that is registered already", expected="a new one", cure="register it once")
    _Script.plugins, _Script.changes = (*_Script.plugins, plugin), _Script.changes + 1

    def unregister() -> None:
        left = tuple(known for known in _Script.plugins if known is not plugin)
        if left != _Script.plugins:
            _Script.plugins, _Script.changes = left, _Script.changes + 1

    return unregister


class PluginManager:
    """The plug-ins of one run: listed without an import, loaded by name, each isolated from the run and the others.

    Args:
        wanted: "NAME" asks for an installed plug-in, "no:NAME" blocks one, anything else is a plug-in itself. A blocked
            name that is not installed is no error, as in pytest.
        autoload: Whether the installed ones that nobody asked for are used; None: unless
            `DISBACK_DISABLE_PLUGIN_AUTOLOAD` is set.
        environ: Where `DISBACK_PLUGINS` and the other variables are read; None: the process's environment.

    Raises:
        OptionError: If a name is not installed, or both asked for and blocked, or an object is no plug-in.
        PluginError: If one that was asked for by name is broken.

    Example:
        >>> class Count:
        ...     nodes = 0
        ...
        ...     @hookimpl
        ...     def disback_after_node_recorded(self, node):
        ...         self.nodes += 1
        >>> count = Count()
        >>> PluginManager(count, "no:dmd2").node_recorded(None, None)
        >>> count.nodes
        1
    """

    def __init__(self, *wanted: object, autoload: bool | None = None, environ: Mapping[str, str] | None = None) -> None:
        environ = os.environ if environ is None else environ
        names = [name.strip() for name in environ.get("DISBACK_PLUGINS", "").split(",") if name.strip()]
        names += [name for name in wanted if isinstance(name, str)]
        self._autoload = not _is_on(environ, "DISBACK_DISABLE_PLUGIN_AUTOLOAD") if autoload is None else autoload
        self._trace = _is_on(environ, "DISBACK_TRACE_PLUGINS")
        self._shelf = Shelf()
        self._of_script: dict[str, object] = {}
        self._changes = -1  # no plan of calls yet
        self._calls: dict[str, tuple[Call, ...]] = {}
        self._block(names)
        for plugin in wanted:
            if not isinstance(plugin, str):
                self._shelf.add(plugin)
        for name in names:
            if not name.startswith("no:"):
                self._shelf.require(name, f"plug-in {name!r}")
                self._shelf.load(name, asked=True)
        for name in self._shelf.names(HOOKS) if self._autoload else ():
            self._shelf.load(name)

    @classmethod
    def of(cls, plugins: PluginManager | Sequence[object]) -> PluginManager:
        """Return what it is given, or `PluginManager(*plugins)`.

        Raises:
            OptionError: If it is one plug-in or name instead of several.
        """
        if isinstance(plugins, PluginManager):
            return plugins
        if isinstance(plugins, str) or not isinstance(plugins, Sequence):
            raise OptionError(
                f"plugins={plugins!r}", expected="a sequence", cure="put it into a tuple: plugins=(plugin,)"
            )
        return cls(*plugins)

    # -- what there is ------------------------------------------------------------------------------------------------

    def listed(self) -> list[Plugin]:
        """Return every plug-in, installed or given as an object, with what is known of it; imports nothing."""
        return self._shelf.listed()

    def check(self) -> list[Plugin]:
        """Import every plug-in that is not blocked; return the list, each of it ready, blocked or broken."""
        for group in (ADAPTERS, HOOKS):
            for name in self._shelf.names(group):
                self._shelf.load(name)
        self._changes = -1
        return self.listed()

    # -- what a run calls ---------------------------------------------------------------------------------------------

    def adapter(self, trainer: object, name: str | None = None) -> Adapter:
        """Return the roles in a trainer; the adapter that knew them takes part in the run from now on.

        Args:
            trainer: The live trainer.
            name: The adapter to ask; None asks all, and skips those that cannot be imported.

        Raises:
            OptionError: If there is no adapter of this name, or it is blocked.
            RoleError: If no adapter understands the trainer, or one does, and it cannot have DisBack.
            PluginError: If the named one is broken.
        """
        if name is not None:
            self._shelf.require(name, f"adapter={name!r}")
            candidates = [name]
        else:
            candidates = self._shelf.names(ADAPTERS) if self._autoload else []
        before = [each for each in candidates if self._shelf.has(each)]
        loaded = [each for each in candidates if self._shelf.load(each, asked=name is not None)]
        self._resolve()
        knows, answer = self._ask(trainer, name)
        for other in loaded:  # what does not know this trainer has no part in the run
            if other != knows and other not in before:
                self._shelf.drop(other)
        self._resolve()
        if isinstance(answer, Adapter):
            for lent, make in answer.plugins.items():
                self._shelf.lend(lent, make)
            self._resolve()
            return answer
        broken = [self._shelf[each] for each in candidates if self._shelf[each].status == "broken"]
        asked = f"{name or sorted(loaded)}"
        if broken:
            asked += f"; left out: {', '.join(f'{plugin} ({plugin.reason})' for plugin in broken)}"
        raise answer or RoleError(
            f"a {type(trainer).__module__}.{type(trainer).__qualname__} that no adapter understands (asked {asked})",
            expected="a trainer that one of them knows",
            cure="pass teacher=, fake_score=, generator_optimizer= and fake_score_optimizer= instead of the trainer",
        )

    def _ask(self, trainer: object, only: str | None) -> tuple[str, Adapter | DisbackError | None]:
        """Return who knows a trainer, and the roles; if nobody does, the first who knows it and refuses."""
        refusal: DisbackError | None = None
        for name, function in self._calls_of("disback_adapter"):
            if only is not None and name != only:
                continue
            try:
                answer = function(trainer)
                if answer is not None and not isinstance(answer, Adapter):
                    raise TypeError(f"an answer that is a {type(answer).__qualname__}, not an Adapter or None")
            except DisbackError as error:
                refusal = refusal or error
            except Exception as error:
                self._failed(name, "disback_adapter", error)
            else:
                if answer is not None:
                    return name, answer
        return "", refusal

    def node_recorded(self, path: DegradationPath, node: Node) -> None:
        """Call `disback_after_node_recorded(path, node)`."""
        self._call_all("disback_after_node_recorded", (path, node))

    def path_completed(self, path: DegradationPath) -> None:
        """Call `disback_after_path_completed(path)`."""
        self._call_all("disback_after_path_completed", (path,))

    def should_advance(
        self, scheduler: TrajectoryScheduler, position: float, updates_in_node: int, signal: Any
    ) -> bool | None:
        """Return the first answer to `disback_should_advance(scheduler, position, updates_in_node, signal)`; None if
        nobody has one.

        In a distributed run every rank is asked, and the first rank's answer holds for all, so that they cannot part. A
        plug-in that raises on one of them is left out on all. Where no plug-in has this hook, nothing is exchanged.
        """
        calls = self._calls_of("disback_should_advance")
        if not calls:
            return None
        leave: bool | None = None
        failed: dict[int, Exception] = {}
        for index, (_, function) in enumerate(calls):
            try:
                answer = function(scheduler, position, updates_in_node, signal)
                leave = None if answer is None else bool(answer)
            except Exception as error:
                failed[index] = error
            if leave is not None:
                break
        told = distributed.gather(
            (leave, {index: f"{type(error).__name__}: {error}" for index, error in failed.items()})
        )
        for rank, (_, reasons) in enumerate(told):
            for index, reason in reasons.items():
                failed.setdefault(index, RuntimeError(f"on rank {rank}, {reason}"))
        for index in sorted(failed):
            self._failed(calls[index][0], "disback_should_advance", failed[index])
        leave = told[0][0]
        return leave

    def node_swapped(self, scheduler: TrajectoryScheduler, position: float, previous: float, update: int) -> None:
        """Call `disback_after_node_swapped(scheduler, position, previous, update)`."""
        self._call_all("disback_after_node_swapped", (scheduler, position, previous, update))

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Call `disback_log(values, step)`, which is for the main process only: the caller sees to that."""
        self._call_all("disback_log", (values, step))

    def listens(self, hook: str) -> bool:
        """Return whether some plug-in implements a hook; the run's own log does not count."""
        return any(name != NAME for name, _ in self._calls_of(hook))

    def keep_log(self, file: str | os.PathLike[str] | None, path: str | os.PathLike[str] | None) -> RunLog | None:
        """Let the log of a run take part from now on; return it, or None if "no:run_log" keeps it out.

        Args:
            file: The file; None: beside the path, and without a path no log.
            path: The folder of the path, if there is one.
        """
        if file is not None:
            log = RunLog(file)
        elif path is not None:
            log = RunLog.beside(path)
        else:
            return None
        lent = self._shelf.lend(NAME, lambda: log)
        self._resolve()
        return log if lent else None

    # -- calls --------------------------------------------------------------------------------------------------------

    def _calls_of(self, hook: str) -> tuple[Call, ...]:
        if self._changes != _Script.changes:
            self._resolve()
        return self._calls[hook]

    def _call_all(self, hook: str, arguments: tuple[Any, ...]) -> None:
        for name, function in self._calls_of(hook):
            try:
                function(*arguments)
            except Exception as error:
                self._failed(name, hook, error)

    def _failed(self, name: str, hook: str, error: Exception) -> None:
        """Leave a plug-in out from now on, and raise if it was asked for."""
        try:
            self._shelf.fail(name, f"{type(error).__name__} in {hook}: {error}", error)
        finally:
            self._resolve()  # it is not called on the way out either

    def _resolve(self) -> None:
        """Bring the plan of calls up to date with the script's plug-ins and those that are loaded."""
        self._changes = _Script.changes
        for name in [name for name, plugin in self._of_script.items() if not _is_in(plugin, _Script.plugins)]:
            self._shelf.forget(name)
            del self._of_script[name]
        for plugin in _Script.plugins:
            if not self._shelf.holds(plugin) and not _is_in(plugin, self._of_script.values()):
                self._of_script[self._shelf.add(plugin)] = plugin
        self._calls = {hook: tuple(self._functions(hook)) for hook in ARGUMENTS}

    def _functions(self, hook: str) -> Iterator[Call]:
        for name, function, wanted in self._shelf.implementations(hook):
            positional = _positional(function, wanted, ARGUMENTS[hook])
            yield name, _traced(positional, f"{name}: {hook}") if self._trace else positional

    def _block(self, names: list[str]) -> None:
        for name in [name.removeprefix("no:") for name in names if name.startswith("no:")]:
            if name in names:
                raise OptionError(
                    f"plug-in {name!r} both asked for and blocked", expected="one of the two", cure="drop one"
                )
            self._shelf.block(name)


def find_adapter(trainer: object, name: str | None = None) -> Adapter:
    """Return the roles in a trainer, as `PluginManager.adapter` finds them.

    Args:
        trainer: The live trainer.
        name: The adapter to ask; None asks all that are installed.

    Raises:
        OptionError: If there is no adapter of this name.
        RoleError: If no adapter understands the trainer.
        PluginError: If the named one is broken.

    Example:
        >>> from disback_plugin.errors import RoleError
        >>> try:
        ...     find_adapter(object())
        ... except RoleError as error:
        ...     print(type(error).__name__)
        RoleError
    """
    return PluginManager().adapter(trainer, name)


def _is_on(environ: Mapping[str, str], variable: str) -> bool:
    return environ.get(variable, "") not in ("", "0")


def _is_in(plugin: object, others: Any) -> bool:
    return any(other is plugin for other in others)


def _positional(
    function: Callable[..., Any], wanted: tuple[str, ...], arguments: tuple[str, ...]
) -> Callable[..., Any]:
    """Return a function of all arguments of a hook that passes on those that an implementation wants."""
    indices = [arguments.index(name) for name in wanted]
    if indices == list(range(len(arguments))):
        return function
    if not indices:
        return lambda *given: function()
    if len(indices) == 1:
        (index,) = indices
        return lambda *given: function(given[index])
    pick = itemgetter(*indices)
    return lambda *given: function(*pick(given))


def _traced(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    def traced(*arguments: Any) -> Any:
        answer = function(*arguments)
        # Asked for by a variable of the environment: it has to be seen without any handler set up.
        logger.warning("trace: %s%r -> %r", name, arguments, answer)
        return answer

    return traced
