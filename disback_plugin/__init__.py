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
    from disback_plugin import hooks, kernels, lora, losses, metrics, noise, pipelines, rounds, schedules
    from disback_plugin.attachment import attach
    from disback_plugin.backtracking.features import OriginalFeatures
    from disback_plugin.errors import DisbackError
    from disback_plugin.handle import Handle
    from disback_plugin.hooks import Adapter, hookimpl
    from disback_plugin.loops.watching import Watch
    from disback_plugin.outlook import preflight
    from disback_plugin.plugging.masking import MaskedSamples
    from disback_plugin.plugging.runlog import RunLog
    from disback_plugin.plugging.trackers import Trackers
    from disback_plugin.recording import record
    from disback_plugin.scheduler import TrajectoryScheduler
    from disback_plugin.scores import Prediction
    from disback_plugin.trajectory import DegradationPath
    from disback_plugin.weights import ScoreNetwork

__all__ = [
    "Adapter",
    "DegradationPath",
    "DisbackError",
    "Handle",
    "MaskedSamples",
    "OriginalFeatures",
    "Prediction",
    "RunLog",
    "ScoreNetwork",
    "Trackers",
    "TrajectoryScheduler",
    "Watch",
    "attach",
    "hookimpl",
    "hooks",
    "kernels",
    "lora",
    "losses",
    "metrics",
    "noise",
    "pipelines",
    "preflight",
    "record",
    "rounds",
    "schedules",
]

_HOME = {
    "Adapter": "hooks",
    "DegradationPath": "trajectory",
    "DisbackError": "errors",
    "Handle": "handle",
    "MaskedSamples": "plugging.masking",
    "OriginalFeatures": "backtracking.features",
    "Prediction": "scores",
    "RunLog": "plugging.runlog",
    "ScoreNetwork": "weights",
    "Trackers": "plugging.trackers",
    "TrajectoryScheduler": "scheduler",
    "Watch": "loops.watching",
    "attach": "attachment",
    "hookimpl": "hooks",
    "preflight": "outlook",
    "record": "recording",
}


def __getattr__(name: str) -> object:
    if name not in __all__ and name != "__version__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    if name == "__version__":
        return import_module("importlib.metadata").version("disback-plugin")
    home = import_module(f"{__name__}.{_HOME.get(name, name)}")
    value = getattr(home, name) if name in _HOME else home
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
