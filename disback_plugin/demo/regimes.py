"""The regimes of the demonstration: network, student and loss, and the settings that were found for each."""

from __future__ import annotations

from dataclasses import dataclass, replace

from disback_plugin.demo.trainer import Settings
from disback_plugin.schedules import Ramp, Schedule

__all__ = ["LOSSES", "OF_LOSSES", "PLANS", "Plan", "plan"]

LOSSES = {"diff-instruct": "Diff-Instruct", "dmd": "DMD", "sid": "SiD"}


@dataclass(frozen=True)
class Plan:
    """A regime: the trainer's settings and what DisBack does in it.

    Attributes:
        settings: Of the trainer, the same in all four runs.
        record: Recording iterations.
        every: Iterations between two nodes.
        codec: How the nodes are stored.
        schedule: Of the run "disback".
        thresholds: Distances whose first crossing is reported, falling.
        evaluate_every: Generator updates between two evaluations.
        samples: Samples a member and evaluation.
        ema: Decay of the generator's exponential moving average.
    """

    settings: Settings
    record: int
    every: int
    schedule: Schedule
    thresholds: tuple[float, ...]
    codec: str = "int8"
    evaluate_every: int = 20
    samples: int = 1_000
    ema: float = 0.99


# Found on seeds 100 to 104, each rate the best of Diff-Instruct's (of three, on seeds 100 to 102, where the student is
# far); seeds 0 to 4 had no part in it. One short recording
# and one short descent for all regimes: one node did better than five, 25 iterations as well as 50.
PLANS = {
    (settings.network, settings.student): Plan(settings, record=25, every=25, schedule=Ramp(50), thresholds=thresholds)
    for settings, thresholds in (
        (Settings("mlp", "scratch", rate=1e-3, updates=800, sigma_init=80.0), (5.0, 4.0, 3.0, 2.0)),
        (Settings("mlp", "teacher", rate=5e-4, updates=300, sigma_init=2.5), (4.0, 3.0, 2.0)),
        (Settings("conv", "scratch", rate=2e-3, updates=300, sigma_init=80.0, batch=32), (6.0, 5.0)),
        (Settings("conv", "teacher", rate=1e-3, updates=300, sigma_init=2.5, batch=32), (4.0, 2.0, 1.0)),
        (Settings("mlp", "far", rate=2e-3, updates=300, sigma_init=2.5), (6.0, 4.0, 3.0)),
        (Settings("conv", "far", rate=2e-3, updates=300, sigma_init=2.5, batch=32), (4.0, 2.0, 1.0)),
    )
}
# With another loss: the rate that did best without DisBack of 5e-4, 1e-3 and 2e-3, on seeds 100 to 102, where no seed
# diverged (SiD does at 2e-3), and thresholds at about 2 and 1.3 times what that ended at. DisBack's settings are those
# found for Diff-Instruct.
OF_LOSSES = {
    "dmd": {
        ("mlp", "scratch"): (1e-3, (10.0, 9.0)),
        ("mlp", "teacher"): (5e-4, (4.0, 2.5)),
        ("mlp", "far"): (2e-3, (10.0, 7.0)),
        ("conv", "scratch"): (2e-3, (9.0, 7.0)),
        ("conv", "teacher"): (5e-4, (2.0, 1.0)),
        ("conv", "far"): (2e-3, (4.0, 2.0)),
    },
    "sid": {
        ("mlp", "scratch"): (5e-4, (7.0, 5.0)),
        ("mlp", "teacher"): (5e-4, (3.0, 2.0)),
        ("mlp", "far"): (1e-3, (7.0, 4.0)),
        ("conv", "scratch"): (1e-3, (10.0, 7.0)),
        ("conv", "teacher"): (5e-4, (2.0, 1.0)),
        ("conv", "far"): (1e-3, (20.0, 15.0)),
    },
}


def plan(network: str, student: str, schedule: Schedule | None = None, loss: str = "diff-instruct") -> Plan:
    """Return the regime of a network, a student and a loss, with another schedule for DisBack if one is given."""
    regime = PLANS[network, student]
    if loss in OF_LOSSES:
        rate, thresholds = OF_LOSSES[loss][network, student]
        settings = replace(regime.settings, loss=loss, rate=rate, updates=300)
        regime = replace(regime, settings=settings, thresholds=thresholds)
    return regime if schedule is None else replace(regime, schedule=schedule)
