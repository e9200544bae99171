"""The plug-ins of one run: pluggy registers, blocks and orders them; this module isolates the run from their errors.

A run uses every installed plug-in of the entry-point group `disback.hooks`, the adapter that knows its trainer (group
`disback.adapters`, imported only then), and the names and objects of `attach(..., plugins=...)`.

`plugins=("no:NAME",)`, `disback -p no:NAME` and `DISBACK_PLUGINS="no:NAME,no:OTHER"` block plug-ins unimported.
With `DISBACK_DISABLE_PLUGIN_AUTOLOAD=1` a run uses only the installed plug-ins that were asked for by name.
`DISBACK_TRACE_PLUGINS=1` logs each call and its answer. Imports no torch.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import EntryPoint
from itertools import chain, count
from typing import Any, TypeVar

import pluggy

from disback_plugin import distributed
from disback_plugin.errors import DisbackError, OptionError, PluginError, RoleError
from disback_plugin.plugins import hookspecs
from disback_plugin.plugins.hookspecs import ADAPTERS, HOOKS, Adapter, Plugin, installed
from disback_plugin.plugins.run_log import NAME, RunLog

logger = logging.getLogger(__name__)
T = TypeVar("T")


class PluginManager(pluggy.PluginManager):
    """The plug-ins of one run, each isolated from the run and from the other plug-ins.

    A plug-in that raises, at import or in a hook, is named in a warning and left out of the rest of the run; one that
    was asked for, by name or as an object, raises PluginError.

    Args:
        wanted: "NAME" asks for an installed plug-in, "no:NAME" blocks one if it is there, all else is a plug-in.
        autoload: Whether to use the installed plug-ins that were not asked for; None: unless
            `DISBACK_DISABLE_PLUGIN_AUTOLOAD` is set.

    Raises:
        OptionError: If a name is not installed, or both asked for and blocked, or an object is not a plug-in.
        PluginError: If a plug-in that was asked for by name is broken.

    Example:
        >>> import disback_plugin as disback
        >>> class Print:
        ...     disback_log = disback.hookimpl(lambda self, values: print(values))
        >>> PluginManager(Print(), "no:dmd2").call("disback_log", values={"loss": 0.5}, step=7)
        {'loss': 0.5}
    """

    def __init__(self, *wanted: object, autoload: bool | None = None) -> None:
        super().__init__(hookspecs.PROJECT)
        self.add_hookspecs(hookspecs.Specs)
        if _is_set("DISBACK_TRACE_PLUGINS"):  # warnings, which are seen without any logging handler
            self.trace.root.setwriter(lambda text: logger.warning("trace: %s", text.strip()))
        self._autoload = not _is_set("DISBACK_DISABLE_PLUGIN_AUTOLOAD") if autoload is None else autoload
        plugins = installed()
        self._known = {plugin.name: plugin for plugin in reversed(plugins)}
        self._doubled = [plugin for plugin in plugins if self._known[plugin.name] is not plugin]
        self._asked: set[str] = set()
        names = os.environ.get("DISBACK_PLUGINS", "").replace(",", " ").split()
        names += [name for name in wanted if isinstance(name, str)]
        for name in (name.removeprefix("no:") for name in names if name.startswith("no:")):
            self.set_blocked(name)
            if name in self._known:
                self._known[name].status, self._known[name].reason = "blocked", f"by no:{name}"
        for plugin in (each for each in wanted if not isinstance(each, str)):
            self.add(plugin)
        for name in (name for name in names if not name.startswith("no:")):
            self.load(name)
        if self._autoload:
            self._load_group(HOOKS)

    @classmethod
    def of(cls, plugins: PluginManager | Sequence[object]) -> PluginManager:
        """Return the manager that was passed, or `PluginManager(*plugins)`; refuse a single plug-in or name."""
        if isinstance(plugins, PluginManager):
            return plugins
        if isinstance(plugins, str) or not isinstance(plugins, Sequence):
            raise OptionError(f"plugins={plugins!r}", expected="a sequence", cure="write plugins=(plugin,)")
        return cls(*plugins)

    def list_plugins(self, *, load: bool = False) -> list[Plugin]:
        """Return every plug-in, installed or passed as an object, sorted by group and name.

        Args:
            load: Import every plug-in that is not blocked first, so that each is ready, blocked or broken.
        """
        if load:
            self._load_group(ADAPTERS)
            self._load_group(HOOKS)
        return sorted([*self._known.values(), *self._doubled], key=lambda plugin: (plugin.group, plugin.name))

    def load(self, name: str, found: str = "") -> Any:
        """Import and register an installed plug-in that the user asked for; return the module or object.

        Args:
            name: Name of its entry point.
            found: The user's words for the plug-in, for an error; "": plug-in 'NAME'.

        Raises:
            OptionError: If no such plug-in is installed, or it is blocked; then it is not imported.
            PluginError: If it is broken.
        """
        if name not in self._known or self.is_blocked(name):
            available = sorted(known for known, plugin in self._known.items() if plugin.status != "blocked")
            raise OptionError(
                (found or f"plug-in {name!r}") + ", which is blocked" * self.is_blocked(name),
                expected=f"one of {available}",
                cure=f"install the distribution that has it, or drop no:{name}",
            )
        self._asked.add(name)
        self._load(name)
        return self.get_plugin(name)

    def add(self, plugin: object, name: str = "") -> None:
        """Register an object as a plug-in, unless it is registered already.

        Args:
            plugin: The plug-in.
            name: The name of a plug-in that the run or its adapter adds, in place of another of that name. It counts as
                asked for only if it does more than report.

        Raises:
            OptionError: If it is not a plug-in.
        """
        if self.is_registered(plugin):
            return
        base = getattr(plugin, "__name__", type(plugin).__name__)
        names = chain([base], (f"{base} {number}" for number in count(2)))
        entry = Plugin(name or next(each for each in names if each not in self._known and not self.is_blocked(each)))
        self.unregister(name=entry.name)
        try:
            self._register(plugin, entry)
        except (ValueError, pluggy.PluginValidationError) as error:
            raise OptionError(
                f"a {type(plugin).__qualname__} as plug-in: {' '.join(str(error).split())}",
                expected=f"an object or module that implements some of {', '.join(hookspecs.HOOK_NAMES)}",
                cure="mark the functions with disback_plugin.hookimpl, and give them a hook's name and arguments",
            ) from error
        self._known[entry.name] = entry
        if not name or not hookspecs.REPORTING.issuperset(entry.hooks):
            self._asked.add(entry.name)

    def find_adapter(self, trainer: object, name: str | None = None) -> Adapter:
        """Return the roles in a trainer. The adapter that knows the trainer stays a plug-in of this run.

        Args:
            trainer: The live trainer.
            name: The adapter to ask; None: ask all, and skip those that cannot be imported.

        Raises:
            OptionError: If there is no adapter of this name, or it is blocked.
            RoleError: If no adapter knows the trainer, or one does and refuses it.
            PluginError: If the named adapter is broken.
        """
        if name is not None:
            self.load(name, f"adapter={name!r}")
        candidates = [name] if name is not None else self._load_group(ADAPTERS) if self._autoload else []
        asked = [each for each in candidates if self.has_plugin(each)]
        known_by, roles, errors = self._ask("disback_adapter", {"trainer": trainer}, _as_adapter, only=name)
        refusals = [errors.pop(each) for each in [*errors] if isinstance(errors[each], DisbackError)]
        self._leave_out_all(errors, "disback_adapter")
        for other in {*asked} - self._asked - {known_by}:
            self.unregister(name=other)
        if roles is None:
            broken = [self._known[each] for each in candidates if self._known[each].status == "broken"]
            left_out = [f"; left out: {plugin} ({plugin.reason})" for plugin in broken]
            raise (
                refusals[0]
                if refusals
                else RoleError(
                    f"a {type(trainer).__module__}.{type(trainer).__qualname__} that no adapter understands "
                    f"(asked {name or sorted(asked)}{''.join(left_out)})",
                    expected="a trainer that one of them knows",
                    cure="pass teacher=, fake_score=, generator_optimizer= and fake_score_optimizer= instead",
                )
            )
        for lent, make in roles.plugins.items():
            if not self.is_blocked(lent):
                self.add(make(), lent)
        return roles

    def add_run_log(self, file: str | os.PathLike[str] | None, path: str | os.PathLike[str] | None) -> RunLog | None:
        """Register the run log, in `file` or else beside the folder `path`; return it, or None if it is blocked."""
        if self.is_blocked(NAME) or (file is None and path is None):
            return None
        log = RunLog(file) if file is not None else RunLog.beside(path or "")
        self.add(log, NAME)
        return log

    # -- calls --------------------------------------------------------------------------------------------------------

    def listens(self, hook: str) -> bool:
        """Return whether a plug-in implements a hook; the run log does not count."""
        return any(each.plugin_name != NAME for each in getattr(self.hook, hook).get_hookimpls())

    def call(self, hook: str, **arguments: Any) -> None:
        """Call every implementation of a hook that has no result, with the arguments of `Specs`, by name."""
        _, _, errors = self._ask(hook, arguments, lambda answer: None)
        self._leave_out_all(errors, hook)

    def should_advance(self, **arguments: Any) -> bool | None:
        """Return rank 0's first answer to `disback_should_advance`, on every rank; None if no plug-in answers.

        Collective, if a plug-in has this hook. A plug-in that raises on one rank is left out on all. `arguments` are
        those of the hook in `Specs`, by name.
        """
        hook = "disback_should_advance"
        if not self.listens(hook):
            return None
        _, advance, errors = self._ask(hook, arguments, lambda answer: None if answer is None else bool(answer))
        gathered = distributed.gather((advance, {name: _describe(error) for name, error in errors.items()}))
        for rank, (_, descriptions) in enumerate(gathered):
            for name, description in descriptions.items():
                errors.setdefault(name, RuntimeError(f"on rank {rank}, {description}"))
        self._leave_out_all(errors, hook)
        return gathered[0][0]

    def _ask(
        self, hook: str, arguments: dict[str, Any], validated: Callable[[Any], T | None], only: str | None = None
    ) -> tuple[str, T | None, dict[str, Exception]]:
        """Call the implementations of a hook in pluggy's order until one answers.

        Returns:
            The plug-in that answered or "", its answer or None, and the errors of plug-ins that raised, by name.
        """
        errors: dict[str, Exception] = {}
        for each in reversed(getattr(self.hook, hook).get_hookimpls()):
            if only not in (None, each.plugin_name):
                continue
            answer: T | None = None
            try:
                answer = validated(each.function(*[arguments[name] for name in each.argnames]))
            except Exception as error:
                errors[each.plugin_name] = error
            self.trace(f"{each.plugin_name}: {hook}", arguments, "->", errors.get(each.plugin_name, answer))
            if answer is not None:
                return each.plugin_name, answer, errors
        return "", None, errors

    # -- registration -------------------------------------------------------------------------------------------------

    def _load_group(self, group: str) -> list[str]:
        """Import and register the installed plug-ins of a group; return the names of all, also of those left out."""
        names = sorted(plugin.name for plugin in self._known.values() if plugin.group == group)  # on all ranks alike
        for name in names:
            self._load(name)
        return names

    def _load(self, name: str) -> None:
        """Import and register an installed plug-in, unless it is blocked, or broken and not asked for."""
        plugin = self._known[name]
        if self.has_plugin(name) or self.is_blocked(name) or (plugin.status == "broken" and name not in self._asked):
            return
        try:
            self._register(EntryPoint(plugin.name, plugin.value, plugin.group).load(), plugin)
        except (Exception, SystemExit) as error:  # a third party's module may raise anything, or call sys.exit
            self._leave_out(name, error)

    def _register(self, plugin: Any, entry: Plugin) -> None:
        """Validate and register a plug-in. Raises ValueError or pluggy's PluginValidationError."""
        if isinstance(plugin, type):
            raise ValueError("it is a class, not a module or an instance")
        for name in hookspecs.HOOK_NAMES:
            if callable(getattr(plugin, name, None)) and self.parse_hookimpl_opts(plugin, name) is None:
                raise ValueError(f"{name} is not marked with @hookimpl")
        try:
            self.register(plugin, entry.name)
            self.check_pending()
            callers = self.get_hookcallers(plugin)
            if not callers:
                raise ValueError("it implements no hook")
            for each in chain.from_iterable(caller.get_hookimpls() for caller in callers):
                if each.wrapper or each.hookwrapper:
                    raise ValueError(f"{each.function.__name__} is a wrapper, which a plug-in cannot be")
        except Exception:
            self.unregister(name=entry.name)
            raise
        entry.status, entry.reason, entry.hooks = "ready", "", tuple(sorted(caller.name for caller in callers))

    def _leave_out_all(self, errors: Mapping[str, Exception], hook: str) -> None:
        for name in sorted(errors):  # on all ranks alike
            self._leave_out(name, errors[name], hook)

    def _leave_out(self, name: str, error: BaseException, hook: str = "") -> None:
        """Unregister a broken plug-in and warn; raise PluginError if it was asked for."""
        plugin = self._known[name]
        plugin.status, plugin.reason = "broken", _describe(error, f" in {hook}" if hook else "")
        self.unregister(name=name)
        if name in self._asked:
            raise PluginError(
                f"the plug-in {plugin} broken ({plugin.reason})",
                expected="a plug-in that works",
                cure="correct it" + (f", or block it: {_blocking(name)}" if plugin.distribution else ", or omit it"),
            ) from error
        logger.warning(
            "the plug-in %s is broken and left out (%s); block it: %s", plugin, plugin.reason, _blocking(name)
        )


def find_adapter(trainer: object, name: str | None = None) -> Adapter:
    """Return the roles in a trainer as `PluginManager.find_adapter` does, with the installed adapters.

    Args:
        trainer: The live trainer.
        name: The adapter to ask; None asks all.

    Example:
        >>> try:
        ...     find_adapter(object())
        ... except RoleError as error:
        ...     print(type(error).__name__)
        RoleError
    """
    return PluginManager().find_adapter(trainer, name)


def _blocking(name: str) -> str:
    return f'disback -p no:{name} ..., or plugins=("no:{name}",)'


def _is_set(variable: str) -> bool:
    return os.environ.get(variable, "") not in ("", "0")


def _describe(error: BaseException, where: str = "") -> str:
    return f"{type(error).__name__}{where}: {' '.join(str(error).split())}"


def _as_adapter(answer: Any) -> Adapter | None:
    if answer is not None and not isinstance(answer, Adapter):
        raise TypeError(f"an answer that is a {type(answer).__qualname__}, not an Adapter or None")
    return answer
