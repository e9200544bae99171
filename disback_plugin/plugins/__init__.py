"""Plug-ins: the hooks, the manager that loads and calls plug-ins, the run log, trackers and other ready-made plug-ins.

Names are imported on first use, so that `import disback_plugin.plugins` does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from disback_plugin.plugins.hookspecs import Adapter, hookimpl
    from disback_plugin.plugins.manager import PluginManager, find_adapter
    from disback_plugin.plugins.nonfinite_counter import MaskedSamples
    from disback_plugin.plugins.run_log import RunLog, Trackers
    from disback_plugin.plugins.teacher_features import OriginalFeatures

# fmt: off
__all__ = [
    "Adapter", "MaskedSamples", "OriginalFeatures", "PluginManager", "RunLog", "Trackers", "find_adapter", "hookimpl"
]
# fmt: on
_MODULES = {"MaskedSamples": "nonfinite_counter", "OriginalFeatures": "teacher_features"}
_MODULES |= {"Adapter": "hookspecs", "hookimpl": "hookspecs", "RunLog": "run_log", "Trackers": "run_log"}


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES.get(name, 'manager')}"), name)
