"""`disback plugins`."""

from __future__ import annotations

import argparse
import json

from disback_plugin._text_table import aligned
from disback_plugin.cli import Commands, command, json_option

__all__ = ["add"]


def add(commands: Commands[argparse.ArgumentParser]) -> None:
    """Add `disback plugins` to the commands."""
    plugins = command(
        commands,
        "plugins",
        help="list the installed plug-ins and adapters",
        description="List the plug-ins and adapters of all installed distributions, without importing any. With "
        "--check each is imported, and exit code 1 means that one is broken.",
        examples="disback plugins\ndisback plugins --env\ndisback -p no:mine plugins --check",
    )
    plugins.add_argument("--check", action="store_true", help="import each, and show its hooks or its error")
    plugins.add_argument("--env", action="store_true", help="add the versions that a bug report needs")
    json_option(plugins)
    plugins.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print the plug-ins; return 1 if --check found a broken one."""
    import logging
    from dataclasses import asdict

    from disback_plugin.plugins.manager import PluginManager
    from disback_plugin.plugins.run_log import versions

    logger = logging.getLogger("disback_plugin")
    before = logger.level
    logger.setLevel(logging.ERROR)  # the table shows the reasons that the warnings give
    try:
        plugins = PluginManager(*options.plugins, autoload=False).list_plugins(load=options.check)
    finally:
        logger.setLevel(before)
    environment = versions() if options.env else {}
    if options.json:
        listed = {"plugins": [asdict(plugin) for plugin in plugins]}
        print(json.dumps(listed | ({"environment": environment} if environment else {})))
    else:
        rows = [("name", "distribution", "group", "entry point", "status", "hooks", "reason")]
        for plugin in plugins:
            hooks = ", ".join(hook.removeprefix("disback_") for hook in plugin.hooks)
            distribution = f"{plugin.distribution} {plugin.version}"
            rows.append((plugin.name, distribution, plugin.group, plugin.value, plugin.status, hooks, plugin.reason))
        print(aligned(rows, indent=""))
        for name, version in environment.items():
            print(f"{name} {version}")
    return int(options.check and any(plugin.status == "broken" for plugin in plugins))
