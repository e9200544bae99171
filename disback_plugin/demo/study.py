"""Does it converge faster? Four runs from the same seeds, each with the same trainer and another thing attached.

| run           | recording | s_phi starts from | teacher                 | generator's gradient        |
|---------------|-----------|-------------------|-------------------------|-----------------------------|
| diff-instruct | no        | s'_0              | s'_0                    | as it is                    |
| warm          | yes       | s'_N              | s'_0                    | as it is                    |
| grad-ramp     | no        | s'_0              | s'_0                    | 1 - 0.99 (1 - u / 100)+     |
| disback       | yes       | s'_N              | walks back along a path | as the schedule says        |

The first is named after its loss, "dmd" or "sid" with another one, which is then that of all four.
`warm` and `grad-ramp` are controls: each has one half of what DisBack does, and no path.
"""

from __future__ import annotations

import math
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

import disback_plugin as disback
from disback_plugin.demo import digits, pictures
from disback_plugin.demo.networks import PIXELS
from disback_plugin.demo.regimes import Plan
from disback_plugin.demo.trainer import Streams, Trainer, generate
from disback_plugin.metrics import frechet_distance, mismatch_degree
from disback_plugin.prediction import Prediction
from disback_plugin.schedules import GradientRamp, Schedule, WarmStart

__all__ = ["Run", "Study", "summarise"]

# In forward passes of one network, a backward pass being two. Diff-Instruct: the fake score's update takes a generator
# and a fake-score forward and a backward (4), the generator's two more forwards, its own and its backward (5). SiD goes
# back through both networks to their input: counted as one more for each.
COST_OF_UPDATE = {"diff-instruct": 9, "dmd": 9, "sid": 11}
COST_OF_RECORDING = 4

# Noise scales of the mismatch degree: below them its target says more of its own samples than of their distribution.
MISMATCH_SIGMAS = (1.0, 2.0, 4.0)

# Purposes of a seed's noise streams; the trainer's own is 1.
_RECORDING, _EVALUATION = 2, 3


@dataclass
class Run:
    """What one run left: distances of each seed over updates.

    Attributes:
        name: As in the table above.
        recorded: Recording iterations that it took, to be counted in its compute.
        updates: Updates of each evaluation.
        ema: Distance of the generator's average, one list of E values an evaluation.
        raw: Distance of the generator itself.
        samples: Images of the first member at the end, shape (n, 64).
        seconds: Wall time, recording included.
        cost: Of an update, in forward passes of one network.
    """

    name: str
    recorded: int
    updates: list[int]
    ema: list[list[float]]
    raw: list[list[float]]
    samples: Tensor
    seconds: float = 0.0
    cost: float = COST_OF_UPDATE["diff-instruct"]

    def crossing(self, threshold: float, member: int) -> float:
        """Return the updates after which a seed's average first is at `threshold`, interpolated; inf if never."""
        before = math.inf
        for i, values in enumerate(self.ema):
            value = values[member]
            if value <= threshold:
                if i == 0:
                    return float(self.updates[0])
                part = (before - threshold) / (before - value)
                return self.updates[i - 1] + part * (self.updates[i] - self.updates[i - 1])
            before = value
        return math.inf

    def compute(self, updates: float) -> float:
        """Return the cost of so many updates, recording included, in forward passes of one network."""
        return COST_OF_RECORDING * self.recorded + self.cost * updates


class Study:
    """The four runs of a plan.

    Args:
        plan: The regime.
        seeds: One seed a member.
        folder: Where the path goes, as `folder/path`, a log of each run, `folder/NAME.log.jsonl`, and their samples on
            the way, `folder/samples/`; a path and logs of an earlier study there are replaced.
        progress: Called with the name of the run after each of its updates.
    """

    def __init__(
        self, plan: Plan, seeds: Sequence[int], folder: Path, progress: Callable[[str], object] = lambda name: None
    ) -> None:
        self.plan, self.seeds, self.progress = plan, list(seeds), progress
        self.folder = folder
        self._data = digits.load()
        self._features = digits.principal_components(self._data)
        self._z = Streams(self.seeds, _EVALUATION).randn(plan.samples, PIXELS)

    def run_all(self) -> dict[str, Run]:
        """Record the path, then distil four times; returns the runs by name."""
        if disback.DegradationPath.exists(self.folder / "path"):
            shutil.rmtree(self.folder / "path")
        baseline = self.plan.settings.loss
        for name in (baseline, "warm", "grad-ramp", "disback"):
            self._log_of(name).unlink(missing_ok=True)
        with tempfile.TemporaryDirectory() as control:
            return {
                baseline: self.distil(baseline),
                "warm": self.distil("warm", path=Path(control), schedule=WarmStart()),
                "grad-ramp": self.distil("grad-ramp", schedule=GradientRamp()),
                "disback": self.distil("disback", path=self.folder / "path", schedule=self.plan.schedule),
            }

    def distil(self, name: str, *, path: Path | None = None, schedule: Schedule | None = None) -> Run:
        """Distil once.

        Args:
            name: Of the run.
            path: Folder for a path that is recorded first; None: no recording.
            schedule: What is attached; None: nothing.
        """
        started = time.perf_counter()
        trainer = Trainer(self.plan.settings, self.seeds)
        if path is not None:
            self._record(trainer, path, self._log_of(name))
        if schedule is None:
            log = disback.RunLog(self._log_of(name))
            log.begin(name, settings=asdict(self.plan.settings))
            run = self._train(name, trainer, log.log)
        else:
            with disback.attach(
                teacher=trainer.teacher,
                fake_score=trainer.fake_score,
                generator_optimizer=trainer.generator_optimizer,
                fake_score_optimizer=trainer.fake_score_optimizer,
                path=path,
                record=0 if path is None else self.plan.record,
                every=self.plan.every,
                schedule=schedule,
                log=self._log_of(name),
            ) as handle:
                run = self._train(name, trainer, lambda values, update: handle.log(values))
        run.recorded, run.cost = 0 if path is None else self.plan.record, COST_OF_UPDATE[self.plan.settings.loss]
        run.seconds = time.perf_counter() - started
        return run

    def _log_of(self, name: str) -> Path:
        return self.folder / f"{name}.log.jsonl"

    def _record(self, trainer: Trainer, path: Path, log: Path) -> None:
        """Algorithm 1 before the loop: cheaper than inside it, where the generator's gradients are computed in vain."""
        training = trainer.streams
        trainer.streams = Streams(self.seeds, _RECORDING)  # so that all runs train on the same noise
        disback.record(
            trainer.teacher,
            trainer.fake_score,
            trainer.fake_step,
            path=path,
            iterations=self.plan.record,
            every=self.plan.every,
            codec=self.plan.codec,
            log=log,
        )
        trainer.streams = training

    def _train(self, name: str, trainer: Trainer, log: Callable[[dict[str, Any], int], None]) -> Run:
        from timm.utils.model_ema import ModelEmaV3

        average = ModelEmaV3(trainer.generator, decay=self.plan.ema)
        run = Run(name, 0, [], [], [], torch.empty(0))
        losses: list[tuple[Tensor, Tensor]] = []
        for update in range(self.plan.settings.updates + 1):
            if update:
                losses.append(trainer.step())
                average.update(trainer.generator)
                self.progress(name)
            if update % self.plan.evaluate_every == 0:
                run.updates.append(update)
                run.ema.append(self._distances(average.module))
                run.raw.append(self._distances(trainer.generator))
                log(self._notes(run, trainer, average.module, losses), update)
                losses.clear()
        run.samples = self.generate(average.module)[0, :64]
        return run

    @torch.no_grad()
    def _notes(
        self, run: Run, trainer: Trainer, average: torch.nn.Module, losses: list[tuple[Tensor, Tensor]]
    ) -> dict[str, Any]:
        """Return what is logged of an evaluation: medians over the seeds, mean losses since the last, and samples."""
        notes: dict[str, Any] = {
            "distance": median(run.ema[-1]),
            "distance of the raw weights": median(run.raw[-1]),
            "mismatch of the target": self._mismatch(trainer),
        }
        if losses:
            fake_score, generator = torch.tensor(losses).mean(dim=0).tolist()
            notes |= {"loss of s_phi": fake_score, "loss of the generator": generator}
        shown = self.plan.evaluate_every * max(self.plan.settings.updates // (5 * self.plan.evaluate_every), 1)
        if run.updates[-1] % shown == 0:
            file = self.folder / "samples" / f"{run.name}-{run.updates[-1]:05d}.png"
            pictures.grid(self.generate(average)[0], file)
            notes["samples"] = file
        return notes

    def _mismatch(self, trainer: Trainer) -> float:
        """Return how far the teacher, where it stands, is from the first seed's student (Eq. 9), in units of eps."""
        x, members = self.generate(trainer.generator)[0], trainer.members

        def target(x_t: Tensor, sigma: Tensor) -> Tensor:
            output: Tensor = trainer.teacher(x_t.expand(members, *x_t.shape), sigma[:, 0])
            return output[0]

        half, sigmas = len(x) // 2, MISMATCH_SIGMAS
        found = mismatch_degree(
            target, x[:half][:100], x[half:], sigmas, include_source=False, prediction=Prediction.X0, weights=sigmas
        )
        return found["total"]

    @torch.no_grad()
    def generate(self, generator: torch.nn.Module) -> Tensor:
        """Return samples of a generator from the evaluation's own noise, shape (E, n, 64)."""
        return generate(generator, self._z, self.plan.settings)

    def _distances(self, generator: torch.nn.Module) -> list[float]:
        real = self._features(self._data)
        return [frechet_distance(features, real) for features in self._features(self.generate(generator))]


def summarise(plan: Plan, seeds: Sequence[int], runs: dict[str, Run], seconds: float) -> dict[str, Any]:
    """Return the result as plain numbers, ready for JSON.

    A seed that never reaches a threshold has no number (None) in `runs`. In a ratio, the baseline not reaching it
    counts as reaching it at the very end, which flatters the baseline; DisBack not reaching it counts as 0.
    """
    names = [f"{threshold:g}" for threshold in plan.thresholds]
    ratios = {
        kind: {name: _ratio(runs, threshold, cost) for name, threshold in zip(names, plan.thresholds, strict=True)}
        for kind, cost in (("updates", lambda run, u: u), ("compute", Run.compute))
    }
    return {
        "seeds": len(seeds),
        "thresholds": list(plan.thresholds),
        "loss": plan.settings.loss,
        "network": plan.settings.network,
        "student": plan.settings.student,
        "schedule": repr(plan.schedule),
        "rate": plan.settings.rate,
        "record": plan.record,
        "runs": {name: _report(plan, run) for name, run in runs.items()},
        "ratio_updates": ratios["updates"],
        "ratio_compute": ratios["compute"],
        "final": {name: median(run.ema[-1]) for name, run in runs.items()},
        "final_raw": {name: median(run.raw[-1]) for name, run in runs.items()},
        "seconds": round(seconds, 1),
    }


def _report(plan: Plan, run: Run) -> dict[str, Any]:
    crossings = {
        f"{threshold:g}": [run.crossing(threshold, member) for member in range(len(run.ema[0]))]
        for threshold in plan.thresholds
    }
    middle = {threshold: median(values) for threshold, values in crossings.items()}
    return {
        "updates": {threshold: _finite(value) for threshold, value in middle.items()},
        "compute": {threshold: _finite(run.compute(value)) for threshold, value in middle.items()},
        "updates_of_seeds": {threshold: [_finite(v) for v in values] for threshold, values in crossings.items()},
        "recording_iterations": run.recorded,
        "curve": {
            "updates": run.updates,
            "ema": [[round(v, 4) for v in values] for values in run.ema],
            "raw": [[round(v, 4) for v in values] for values in run.raw],
        },
        "seconds": round(run.seconds, 1),
    }


def _ratio(runs: dict[str, Run], threshold: float, cost: Callable[[Run, float], float]) -> dict[str, float]:
    (baseline, *_), ours = runs.values(), runs["disback"]
    ratios = []
    for member in range(len(baseline.ema[0])):
        plain = min(baseline.crossing(threshold, member), float(baseline.updates[-1]))
        walked = ours.crossing(threshold, member)
        ratios.append(cost(baseline, plain) / cost(ours, walked) if 0 < walked < math.inf else 0.0)
    return {"median": round(median(ratios), 3), "min": round(min(ratios), 3), "max": round(max(ratios), 3)}


def _finite(value: float) -> float | None:
    return round(value, 1) if math.isfinite(value) else None
