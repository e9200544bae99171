"""The plug-ins that one run knows of: asked for, blocked, loaded or broken; each of them apart from the others."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pluggy

from disback_plugin.errors import OptionError, PluginError
from disback_plugin.plugins.hookspecs import ARGUMENTS, PROJECT, Specs
from disback_plugin.plugins.installed import Plugin, examine, installed, load

__all__ = ["Shelf", "require_fit"]

# Hooks that only take note: without what implements no other a run is the same.
NOTES = {"disback_log", "disback_after_node_recorded", "disback_after_path_completed"}

logger = logging.getLogger(__name__)


class Shelf:
    """Installed plug-ins by name, and objects that a script passed; pluggy holds and orders those that take part.

    Attributes:
        asked: Names of those that the user asked for: where one of them is broken, that is an error.

    Example:
        >>> shelf = Shelf()
        >>> shelf.block("dmd2")
        >>> shelf["dmd2"].status, shelf.load("dmd2")
        ('blocked', False)
    """

    def __init__(self) -> None:
        found = installed()
        self._unusable = [plugin for plugin in found if plugin.status == "broken"]
        self._plugins = {plugin.name: plugin for plugin in found if plugin.status != "broken"}
        self._manager = pluggy.PluginManager(PROJECT)
        self._manager.add_hookspecs(Specs)
        self.asked: set[str] = set()

    def __getitem__(self, name: str) -> Plugin:
        return self._plugins[name]

    def names(self, group: str) -> list[str]:
        """Return the names of one group; of a name that is there twice only the one that is meant."""
        return [plugin.name for plugin in self._plugins.values() if plugin.group == group]

    def listed(self) -> list[Plugin]:
        """Return all, with what is known of them."""
        return sorted([*self._plugins.values(), *self._unusable], key=lambda plugin: (plugin.group, plugin.name))

    def block(self, name: str) -> None:
        """Keep a plug-in out, unread; one that is not installed is no error, as in pytest."""
        self._manager.set_blocked(name)
        if name in self._plugins:
            self._mark(name, "blocked", f"by no:{name}")

    def require(self, name: str, found: str) -> None:
        """Raise OptionError unless there is such a plug-in, and it is not blocked."""
        if name not in self._plugins:
            raise OptionError(
                found,
                expected=f"one of {sorted(plugin.name for plugin in self._plugins.values() if plugin.distribution)}",
                cure="install the distribution that has it, or pass teacher=, fake_score= and both optimizers yourself",
            )
        if self._plugins[name].status == "blocked":
            raise OptionError(
                f"{found}, which is blocked",
                expected=f"no no:{name} in plugins=, -p or DISBACK_PLUGINS",
                cure="drop one of the two",
            )

    def load(self, name: str, *, asked: bool = False) -> bool:
        """Import a plug-in and let it take part, unless it does; return whether it does now.

        Raises:
            PluginError: If it is broken, and was asked for.
        """
        if asked:
            self.asked.add(name)
        plugin = self._plugins[name]
        if plugin.status == "blocked" or self.has(name):
            return plugin.status != "blocked"
        if plugin.status == "broken" and not asked:
            return False
        try:
            loaded = load(plugin)
            hooks, faults, notes = examine(loaded)
            if not faults:
                self._manager.register(loaded, name=name)
        except (Exception, SystemExit) as error:  # a third party's module may raise anything, and call sys.exit
            self.fail(name, f"{type(error).__name__}: {error}", error)
            return False
        if faults:
            self.fail(name, "; ".join(faults))
            return False
        self._ready(replace(plugin, status="ready", reason="; ".join(notes), hooks=hooks))
        return True

    def add(self, plugin: object, name: str = "") -> str:
        """Let an object of the script take part, which counts as asked for; return its name.

        One with a name is lent, by an adapter or the run itself: it takes the place of another of that name, and, if it
        only takes note, was not asked for.

        Raises:
            OptionError: If it is no plug-in.
        """
        require_fit(plugin)
        named, name = bool(name), name or f"{getattr(plugin, '__name__', type(plugin).__name__)} at {id(plugin):#x}"
        if not self.holds(plugin):
            hooks, _, notes = examine(plugin)
            self.drop(name)
            self._manager.register(plugin, name=name)
            if not named or not set(hooks) <= NOTES:
                self.asked.add(name)
            self._ready(Plugin(name, status="ready", reason="; ".join(notes), hooks=hooks))
        return name

    def lend(self, name: str, make: Callable[[], object]) -> bool:
        """Let what an adapter, or the run itself, makes take part, and return True, unless its name is blocked."""
        if self._manager.is_blocked(name):
            return False
        self.add(make(), name)
        return True

    def forget(self, name: str) -> None:
        """Take an object of the script out again."""
        self.drop(name)
        del self._plugins[name]

    def drop(self, name: str) -> None:
        """Let a plug-in take part no more, if it does; it stays listed."""
        if self.has(name):
            self._manager.unregister(name=name)

    def has(self, name: str) -> bool:
        """Return whether the plug-in of a name takes part."""
        return self._manager.has_plugin(name)

    def holds(self, plugin: object) -> bool:
        """Return whether an object takes part."""
        return self._manager.is_registered(plugin)

    def fail(self, name: str, reason: str, cause: BaseException | None = None) -> None:
        """Note that a plug-in is broken, and let it take part no more.

        Raises:
            PluginError: If it was asked for.
        """
        self._mark(name, "broken", reason)
        self.drop(name)
        plugin = self._plugins[name]
        if name in self.asked:
            raise PluginError(
                f"the plug-in {plugin} broken ({reason})",
                expected="one that works",
                cure="correct it" + (f", or leave it out with no:{name}" if plugin.distribution else ", or drop it"),
            ) from cause
        logger.warning("the plug-in %s is broken and left out (%s); no:%s silences this", plugin, reason, name)

    def implementations(self, hook: str) -> Iterator[tuple[str, Callable[..., Any], tuple[str, ...]]]:
        """Return the implementations of a hook in the order of pluggy: name, function and its arguments."""
        for implementation in reversed(getattr(self._manager.hook, hook).get_hookimpls()):
            yield implementation.plugin_name, implementation.function, implementation.argnames

    def _ready(self, plugin: Plugin) -> None:
        self._plugins[plugin.name] = plugin
        if plugin.reason:
            logger.warning("the plug-in %s: %s", plugin, plugin.reason)

    def _mark(self, name: str, status: str, reason: str) -> None:
        self._plugins[name] = replace(self._plugins[name], status=status, reason=reason)


def require_fit(plugin: object) -> None:
    """Raise OptionError unless an object or module implements hooks, and each of them rightly."""
    faults = examine(plugin)[1]
    if faults:
        raise OptionError(
            f"a {type(plugin).__qualname__} as plug-in: {'; '.join(faults)}",
            expected=f"an object or module that implements some of {sorted(ARGUMENTS)}",
            cure="mark the functions with disback_plugin.hookimpl, and give them a hook's name and arguments",
        )
