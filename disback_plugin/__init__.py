"""DisBack (Distribution Backtracking Distillation, arXiv 2408.15991) for score-distillation trainers that exist.

    with disback.attach(teacher=real_score, fake_score=fake_score, generator_optimizer=opt_g,
                        fake_score_optimizer=opt_f, path="runs/path"):
        ...  # the training loop, unchanged

Names are imported on first use: `import disback_plugin` does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from disback_plugin import kernels, losses, metrics, noise, plugins, schedules
    from disback_plugin.attachment import attach
    from disback_plugin.errors import DisbackError
    from disback_plugin.handle import Handle
    from disback_plugin.launch import Watch
    from disback_plugin.path.degradation_path import DegradationPath
    from disback_plugin.plugins.hookspecs import Adapter, hookimpl
    from disback_plugin.prediction import Prediction
    from disback_plugin.recording import record
    from disback_plugin.scheduler import TrajectoryScheduler
    from disback_plugin.weights import lora
    from disback_plugin.weights.network import ScoreNetwork

# fmt: off
__all__ = [
    "Adapter", "DegradationPath", "DisbackError", "Handle", "Prediction", "ScoreNetwork", "TrajectoryScheduler",
    "Watch", "attach", "hookimpl", "kernels", "lora", "losses", "metrics", "noise", "plugins", "record", "schedules",
]
# The module of each name; a public module without an entry has its own name.
_MODULES = {
    "Adapter": "plugins.hookspecs", "DegradationPath": "path.degradation_path", "DisbackError": "errors",
    "Handle": "handle", "Prediction": "prediction", "ScoreNetwork": "weights.network",
    "TrajectoryScheduler": "scheduler", "Watch": "launch", "attach": "attachment", "hookimpl": "plugins.hookspecs",
    "lora": "weights.lora", "record": "recording",
}
# Names that version 0.1.0 had here.
_MOVED = dict.fromkeys(("MaskedSamples", "OriginalFeatures", "RunLog", "Trackers"), "plugins")
# fmt: on


def __getattr__(name: str) -> object:
    if name == "__version__":
        return import_module("importlib.metadata").version("disback-plugin")
    if name not in __all__ and name not in _MOVED:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(f"{__name__}.{(_MODULES | _MOVED).get(name, name)}")
    globals()[name] = value = getattr(module, name, module)
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
