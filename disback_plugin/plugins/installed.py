"""Which plug-ins there are: listed without importing one, loaded by name, and checked against the hooks.

    [project.entry-points."disback.adapters"]     # imported only when a trainer needs an adapter
    my_trainer = "my_package.disback_adapter"

    [project.entry-points."disback.hooks"]        # imported by every run
    my_tracker = "my_package.disback_tracker"

A plug-in's name is that of its entry point. Imports no torch.
"""

from __future__ import annotations

import difflib
import platform
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import Distribution, EntryPoint, PackageNotFoundError, distributions, version

import pluggy

from disback_plugin.plugins.hookspecs import ARGUMENTS, PROJECT

__all__ = ["ADAPTERS", "HOOKS", "Plugin", "environment", "examine", "installed", "load", "table"]

ADAPTERS, HOOKS = "disback.adapters", "disback.hooks"

# Of two plug-ins with one name ours is meant.
OURS, UNKNOWN = "disback-plugin", "an unknown distribution"


@dataclass(frozen=True)
class Plugin:
    """One plug-in, as far as it is known.

    Attributes:
        name: Name of the entry point; of an object that a script passed, that of its class.
        distribution: Who installed it, with the version; "" for an object of the script.
        version: Of the distribution.
        group: `ADAPTERS` or `HOOKS`; "" for an object of the script.
        value: What the entry point names.
        status: "installed" (nothing of it was imported yet), "ready" (it was, and fits), "blocked" or "broken".
        reason: What broke it, or who blocked it; of a ready one, what its author should know; else "".
        hooks: The hooks that it implements, once it is ready.

    Example:
        >>> print(Plugin("mine", "disback-mine", "1.0", HOOKS, "mine.plugin"))
        mine of disback-mine 1.0
    """

    name: str
    distribution: str = ""
    version: str = ""
    group: str = ""
    value: str = ""
    status: str = "installed"
    reason: str = ""
    hooks: tuple[str, ...] = ()

    def __str__(self) -> str:
        return (
            f"{self.name} of {self.distribution} {self.version}" if self.distribution else f"{self.name} of the script"
        )


def installed() -> list[Plugin]:
    """Return the plug-ins of every installed distribution, sorted by group and name; nothing is imported.

    A name is one plug-in's: of several, all but one are returned as broken. So is a distribution whose entry points
    cannot be read, under its own name.

    Example:
        >>> [plugin.value for plugin in installed() if plugin.name == "dmd2"]
        ['disback_adapters.dmd2']
    """
    found = [plugin for distribution in _concerned() for plugin in _plugins_of(distribution)]
    found.sort(key=lambda plugin: (plugin.group, plugin.name, plugin.distribution != OURS))
    first: dict[str, Plugin] = {}
    for plugin in found:
        first.setdefault(plugin.name, plugin)
    return [plugin if first[plugin.name] is plugin else _doubled(plugin, first[plugin.name]) for plugin in found]


def _concerned() -> Iterator[Distribution]:
    """Return the distributions that name one of our groups; of two with one name the first on the path."""
    seen: set[str] = set()
    for distribution in distributions():
        try:
            text = distribution.read_text("entry_points.txt") or ""
        except Exception:  # whatever it is, it is none of ours
            continue
        if f"{PROJECT}." not in text:
            continue
        name = re.sub(r"[-_.]+", "-", _named(distribution)[0]).lower()
        if name not in seen or name == UNKNOWN:
            seen.add(name)
            yield distribution


def _plugins_of(distribution: Distribution) -> list[Plugin]:
    name, release = _named(distribution)
    try:
        points = [point for point in distribution.entry_points if point.group in (ADAPTERS, HOOKS)]
    except Exception as error:  # one broken file would else hide everybody's plug-ins
        return [
            Plugin(name, name, release, HOOKS, status="broken", reason=f"its entry points cannot be read ({error})")
        ]
    return [Plugin(point.name, name, release, point.group, point.value) for point in points]


def _named(distribution: Distribution) -> tuple[str, str]:
    try:
        return distribution.metadata["Name"] or UNKNOWN, distribution.metadata["Version"] or ""
    except Exception:  # no metadata, or none that can be read
        return UNKNOWN, ""


def _doubled(plugin: Plugin, first: Plugin) -> Plugin:
    known = (plugin.name, plugin.distribution, plugin.version, plugin.group, plugin.value)
    return Plugin(*known, status="broken", reason=f"its name is taken by {first}")


def load(plugin: Plugin) -> object:
    """Import what an entry point names, and return it. A third party's module may raise anything.

    Raises:
        ValueError: If the entry point names nothing that can be imported.
    """
    if not EntryPoint.pattern.match(plugin.value):
        raise ValueError(f"an entry point that is {plugin.value!r}, not package.module or package.module:object")
    return EntryPoint(plugin.name, plugin.value, plugin.group).load()


def examine(plugin: object) -> tuple[tuple[str, ...], list[str], list[str]]:
    """Return the hooks that a module or object implements, what is wrong with it, and what its author should know.

    Example:
        >>> from disback_plugin.plugins.hookspecs import hookimpl
        >>> class Misspelt:
        ...     @hookimpl
        ...     def disback_after_node_swop(self, position): ...
        >>> examine(Misspelt())[1]
        ['disback_after_node_swop is no hook (disback_after_node_swapped is)']
    """
    reader = pluggy.PluginManager(PROJECT)
    hooks: list[str] = []
    faults: list[str] = []
    notes: list[str] = []
    if isinstance(plugin, type):
        return (), ["it is a class, not a module or an instance"], []
    for name in dir(plugin):
        options = reader.parse_hookimpl_opts(plugin, name)
        if options is None:
            if name in ARGUMENTS and callable(getattr(plugin, name)):
                faults.append(f"{name} is not marked with @hookimpl")
            continue
        hook = options.get("specname") or name
        if hook not in ARGUMENTS:
            near = difflib.get_close_matches(hook, ARGUMENTS, n=1, cutoff=0.0)
            faults.append(f"{hook} is no hook ({', '.join(near)} is)")
            continue
        implementation = pluggy.HookImpl(plugin, "", getattr(plugin, name), options)
        unknown = [argument for argument in implementation.argnames if argument not in ARGUMENTS[hook]]
        if unknown:
            faults.append(f"{hook} has no argument {_listing(unknown)}, only {_listing(ARGUMENTS[hook])}")
        if implementation.wrapper or implementation.hookwrapper:
            faults.append(f"{hook} is a wrapper, and a plug-in answers for itself alone")
        if implementation.kwargnames:
            notes.append(
                f"{hook} never gets {_listing(implementation.kwargnames)}: an argument with a default is not passed"
            )
        hooks.append(hook)
    if not hooks and not faults:
        faults.append("it implements no hook")
    return tuple(sorted(hooks)), faults, notes


def _listing(names: Iterable[str]) -> str:
    return ", ".join(names)


def table(plugins: Iterable[Plugin]) -> str:
    """Return the plug-ins as aligned lines.

    Example:
        >>> print(table([Plugin("mine", "disback-mine", "1.0", HOOKS, "mine.hooks", "broken", "ValueError: no")]))
        name  distribution      group          entry point  status  hooks  reason
        mine  disback-mine 1.0  disback.hooks  mine.hooks   broken         ValueError: no
    """
    rows = [("name", "distribution", "group", "entry point", "status", "hooks", "reason")]
    for plugin in plugins:
        hooks = ", ".join(hook.removeprefix(f"{PROJECT}_") for hook in plugin.hooks)
        by = f"{plugin.distribution} {plugin.version}"
        rows.append((plugin.name, by, plugin.group, plugin.value, plugin.status, hooks, plugin.reason))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def environment() -> dict[str, str]:
    """Return the versions that a bug report needs, by the name of the distribution; nothing is imported for it.

    Example:
        >>> list(environment())
        ['python', 'platform', 'disback-plugin', 'torch', 'diffusers', 'accelerate', 'timm', 'peft', 'pluggy']
    """
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for name in ("disback-plugin", "torch", "diffusers", "accelerate", "timm", "peft", "pluggy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found
