"""List the installed plug-ins and adapters.

List the plug-ins and adapters of all installed distributions, without importing any. With --check each is imported, and
exit code 1 means that one is broken.

Example:
  disback plugins
  disback plugins --env
  disback -p no:mine plugins --check
"""

from __future__ import annotations

import argparse
import json
import logging

from disback_plugin._text_table import aligned


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `disback plugins`."""
    parser.add_argument("--check", action="store_true", help="import each, and show its hooks or its error")
    parser.add_argument("--env", action="store_true", help="add the versions that a bug report needs")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")


def run(options: argparse.Namespace) -> int:
    """Print the plug-ins; return 1 if --check found a broken one."""
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
        listed = {"plugins": [vars(plugin) for plugin in plugins]}
        print(json.dumps(listed | ({"environment": environment} if environment else {})))
    else:
        rows = [("name", "distribution", "group", "entry point", "status", "hooks", "reason")]
        for each in plugins:
            hooks = ", ".join(hook.removeprefix("disback_") for hook in each.hooks)
            distribution = f"{each.distribution} {each.version}"
            rows.append((each.name, distribution, each.group, each.value, each.status, hooks, each.reason))
        print("\n".join([aligned(rows, indent=""), *(f"{name} {version}" for name, version in environment.items())]))
    return int(options.check and any(plugin.status == "broken" for plugin in plugins))
