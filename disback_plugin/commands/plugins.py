"""`disback plugins`."""

from __future__ import annotations

import argparse
import json

from disback_plugin.cli import Commands, command, json_option

__all__ = ["add"]


def add(commands: Commands[argparse.ArgumentParser]) -> None:
    """Add `disback plugins` to the commands."""
    plugins = command(
        commands,
        "plugins",
        help="list the installed plug-ins and adapters",
        description="List the plug-ins and adapters of all installed distributions, without importing one. With "
        "--check each is imported, and exit code 1 means that one is broken.",
        examples="disback plugins\ndisback plugins --env\ndisback -p no:mine plugins --check",
    )
    plugins.add_argument(
        "--check", action="store_true", help="import each, and say whether it works, and what it hooks"
    )
    plugins.add_argument("--env", action="store_true", help="add the versions of what matters, for a bug report")
    json_option(plugins)
    plugins.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Print the plug-ins; return 1 if a check found a broken one."""
    import logging
    from dataclasses import asdict

    from disback_plugin.plugins.installed import environment, table
    from disback_plugin.plugins.manager import PluginManager

    plugins = PluginManager(*options.plugins, autoload=False)
    logger = logging.getLogger("disback_plugin")
    before = logger.level
    logger.setLevel(logging.ERROR)  # the table says what the warnings would
    try:
        found = plugins.check() if options.check else plugins.listed()
    finally:
        logger.setLevel(before)
    around = environment() if options.env else {}
    if options.json:
        listed = {"plugins": [asdict(plugin) for plugin in found]}
        print(json.dumps(listed | ({"environment": around} if options.env else {})))
    else:
        print(table(found))
        for name, version in around.items():
            print(f"{name} {version}")
    return int(options.check and any(plugin.status == "broken" for plugin in found))
