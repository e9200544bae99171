"""The installed plug-ins, listed by their entry points without importing any.

    [project.entry-points."disback.adapters"]     # imported only when a trainer needs an adapter
    my_trainer = "my_package.disback_adapter"

    [project.entry-points."disback.hooks"]        # imported by every run
    my_tracker = "my_package.disback_tracker"

A plug-in's name is the name of its entry point.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib.metadata import distributions
from itertools import chain

from disback_plugin.plugins.hookspecs import PROJECT

ADAPTERS, HOOKS = "disback.adapters", "disback.hooks"
# If several distributions have a plug-in of one name, this distribution's is used.
OURS = "disback-plugin"


@dataclass
class Plugin:
    """An entry in the list of plug-ins.

    Attributes:
        name: Name of the entry point; for an object that the script passed, the name of its class.
        distribution: The distribution that has the entry point; "" for an object.
        version: The distribution's version.
        group: `ADAPTERS` or `HOOKS`; "" for an object.
        value: The entry point's value, "package.module" or "package.module:object".
        status: "installed" (not imported yet), "ready" (imported and valid), "blocked" or "broken".
        reason: The error of a broken plug-in, the option that blocks a blocked one; else "".
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
        return f"{self.name} of " + (f"{self.distribution} {self.version}" if self.distribution else "the script")


def installed() -> list[Plugin]:
    """Return the plug-ins of all installed distributions without importing any, the one to use of each name first.

    A second plug-in of one name is marked as broken, and so is a distribution whose entry points are unreadable.

    Example:
        >>> [plugin.value for plugin in installed() if plugin.name == "dmd2"]
        ['disback_adapters.dmd2']
    """
    found: dict[str, list[Plugin]] = {}
    for distribution in distributions():
        name, version = "an unknown distribution", ""
        try:
            if f"{PROJECT}." not in (distribution.read_text("entry_points.txt") or ""):
                continue
            name, version = distribution.metadata["Name"] or name, distribution.metadata["Version"] or version
            points = [point for point in distribution.entry_points if point.group in (ADAPTERS, HOOKS)]
            plugins = [Plugin(point.name, name, version, point.group, point.value) for point in points]
        except Exception as error:  # one unreadable distribution must not hide the plug-ins of the others
            reason = f"its entry points cannot be read ({error})"
            plugins = [Plugin(name, name, version, HOOKS, status="broken", reason=reason)]
        found.setdefault(name, plugins)  # a distribution that is on sys.path twice is imported from the first
    used: dict[str, Plugin] = {}
    listed = [*found.pop(OURS, []), *chain.from_iterable(found[name] for name in sorted(found))]
    for plugin in listed:
        if used.setdefault(plugin.name, plugin) is not plugin:
            plugin.status, plugin.reason = "broken", f"its name is taken by {used[plugin.name]}"
    return listed
