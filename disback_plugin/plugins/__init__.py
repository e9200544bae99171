"""pluggy plug-ins: hook specifications, their manager, the run log and trackers."""

from disback_plugin.plugins.manager import *  # noqa: F403
from disback_plugin.plugins.manager import __all__ as __all__
