"""Plug-ins: the hooks, the manager that loads and calls plug-ins, the run log, trackers and other ready-made plug-ins.

Imports no torch.
"""

from disback_plugin.plugins.builtin import MaskedSamples, OriginalFeatures, Trackers
from disback_plugin.plugins.hookspecs import Adapter, hookimpl
from disback_plugin.plugins.manager import PluginManager, find_adapter
from disback_plugin.plugins.run_log import RunLog

# fmt: off
__all__ = [
    "Adapter", "MaskedSamples", "OriginalFeatures", "PluginManager", "RunLog", "Trackers", "find_adapter", "hookimpl"
]
# fmt: on
