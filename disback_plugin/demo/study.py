"""Compare convergence: four runs from the same seeds, with the same trainer.

| run           | recording | s_phi starts from | teacher                   | generator's gradient        |
|---------------|-----------|-------------------|---------------------------|-----------------------------|
| diff-instruct | no        | s'_0              | s'_0                      | as it is                    |
| warm          | yes       | s'_N              | s'_0                      | as it is                    |
| grad-ramp     | no        | s'_0              | s'_0                      | 1 - 0.99 (1 - u / 100)+     |
| disback       | yes       | s'_N              | moves back along the path | as the schedule says        |

With another loss the first run is named "dmd" or "sid", and all four use that loss. `warm` and `grad-ramp` are
controls: each has one half of what DisBack does, and no path.
"""

from __future__ import annotations

import json
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

import disback_plugin as disback
from disback_plugin.demo import figures
from disback_plugin.demo.networks import PIXELS
from disback_plugin.demo.trainer import LOSSES, Regime, Streams, Trainer, digits, generate
from disback_plugin.errors import OptionError
from disback_plugin.metrics import frechet_distance
from disback_plugin.schedules import GradientRamp, Schedule, WarmStart, parse

__all__ = ["Run", "Study", "demo", "principal_components", "regime_of", "summarise"]

# Costs in forward passes of one network, a backward pass being two. Diff-Instruct: the fake score's update takes a
# generator and a fake-score forward and a backward (4), the generator's two more forwards, its own and its backward
# (5). SiD goes back through both networks to their input, which counts as one more for each.
COST_OF_UPDATE = {"diff-instruct": 9, "dmd": 9, "sid": 11}
COST_OF_RECORDING = 4
# Purposes of a seed's noise streams; the trainer's own is 1.
_RECORDING, _EVALUATION = 2, 3

# Learning rate and thresholds of each network, student and loss. The rate is the best of several for the loss without
# DisBack, found on seeds 100 to 104 (or 100 to 102), of which no seed diverged (SiD diverges at 2e-3).
RATES: dict[tuple[str, str], dict[str, tuple[float, tuple[float, ...]]]] = {
    ("mlp", "scratch"): {"diff-instruct": (1e-3, (5, 4, 3, 2)), "dmd": (1e-3, (10, 9)), "sid": (5e-4, (7, 5))},
    ("mlp", "teacher"): {"diff-instruct": (5e-4, (4, 3, 2)), "dmd": (5e-4, (4, 2.5)), "sid": (5e-4, (3, 2))},
    ("mlp", "far"): {"diff-instruct": (2e-3, (6, 4, 3)), "dmd": (2e-3, (10, 7)), "sid": (1e-3, (7, 4))},
    ("conv", "scratch"): {"diff-instruct": (2e-3, (6, 5)), "dmd": (2e-3, (9, 7)), "sid": (1e-3, (10, 7))},
    ("conv", "teacher"): {"diff-instruct": (1e-3, (4, 2, 1)), "dmd": (5e-4, (2, 1)), "sid": (5e-4, (2, 1))},
    ("conv", "far"): {"diff-instruct": (2e-3, (4, 2, 1)), "dmd": (2e-3, (4, 2)), "sid": (2e-3, (20, 15))},
}


def regime_of(network: str, student: str, loss: str = "diff-instruct", **options: Any) -> Regime:
    """Return the regime of a network, a student and a loss; `options` replace fields of it, as `schedule`."""
    rate, thresholds = RATES[network, student][loss]
    updates = 800 if (network, student, loss) == ("mlp", "scratch", "diff-instruct") else 300
    sigma_init, batch = 80.0 if student == "scratch" else 2.5, 64 if network == "mlp" else 32
    fields: dict[str, Any] = {"rate": rate, "updates": updates, "thresholds": thresholds}
    fields |= {"sigma_init": sigma_init, "batch": batch}
    return Regime(network, student, loss=loss, **(fields | options))


@dataclass
class Run:
    """The result of one run: distances of each seed over updates.

    Attributes:
        recorded: Recording iterations, which count in the compute.
        cost: Cost of an update, in forward passes of one network.
        updates: Updates of each evaluation.
        ema: Distance of the generator's average, one list of E values an evaluation.
        raw: Distance of the generator itself.
        samples: Images of the first member at the end, shape (n, 64).
    """

    recorded: int
    cost: int
    updates: list[int] = field(default_factory=list)
    ema: list[list[float]] = field(default_factory=list)
    raw: list[list[float]] = field(default_factory=list)
    samples: Tensor = field(default_factory=lambda: torch.empty(0))

    def crossing(self, threshold: float, member: int) -> float:
        """Return the updates after which a seed's average first is at `threshold`, interpolated; inf if never."""
        values = [evaluation[member] for evaluation in self.ema]
        i = next((i for i, value in enumerate(values) if value <= threshold), None)
        if not i:
            return math.inf if i is None else float(self.updates[0])
        part = (values[i - 1] - threshold) / (values[i - 1] - values[i])
        return self.updates[i - 1] + part * (self.updates[i] - self.updates[i - 1])

    def compute(self, updates: float) -> float:
        """Return the cost of so many updates, recording included, in forward passes of one network."""
        return COST_OF_RECORDING * self.recorded + self.cost * updates


class Study:
    """Run the four runs of a regime.

    Args:
        regime: What to run.
        seeds: One seed a member.
        folder: Folder for the path (`path`), each run's log (`NAME.log.jsonl`) and samples (`samples`). A path and logs
            of an earlier study in it are replaced.
    """

    def __init__(self, regime: Regime, seeds: Sequence[int], folder: Path) -> None:
        self.regime, self.seeds, self.folder = regime, list(seeds), folder
        data = digits()
        self._features = principal_components(data)
        self._real = self._features(data)
        self._z = Streams(self.seeds, _EVALUATION).randn(regime.samples, PIXELS)

    def run_all(self) -> dict[str, Run]:
        """Distil four times; return the runs by name. The path of "disback" stays in the folder."""
        if disback.DegradationPath.exists(self.folder / "path"):
            shutil.rmtree(self.folder / "path")
        with tempfile.TemporaryDirectory() as control:
            return {
                self.regime.loss: self.distil(self.regime.loss, WarmStart()),
                "warm": self.distil("warm", WarmStart(), path=Path(control)),
                "grad-ramp": self.distil("grad-ramp", GradientRamp()),
                "disback": self.distil("disback", self.regime.schedule, path=self.folder / "path"),
            }

    def distil(self, name: str, schedule: Schedule, *, path: Path | None = None) -> Run:
        """Distil once.

        Args:
            name: Of the run.
            schedule: Of DisBack. Without a path, `WarmStart` changes nothing in a run, bit for bit.
            path: Folder for a path that is recorded first; None for no recording.
        """
        log = self.folder / f"{name}.log.jsonl"
        log.unlink(missing_ok=True)
        trainer = Trainer(self.regime, self.seeds)
        run = Run(0 if path is None else self.regime.record, COST_OF_UPDATE[self.regime.loss])
        with disback.attach(
            teacher=trainer.teacher,
            fake_score=trainer.fake_score,
            generator_optimizer=trainer.generator_optimizer,
            fake_score_optimizer=trainer.fake_score_optimizer,
            path=path,
            record=run.recorded,
            every=self.regime.every,
            codec=self.regime.codec,
            schedule=schedule,
            log=log,
        ) as handle:
            training, trainer.streams = trainer.streams, Streams(self.seeds, _RECORDING)
            while handle.phase == "recording":
                handle.log({"loss of s_phi": trainer.fake_step()})
                trainer.generator_optimizer.step()  # without gradients, which would be computed for nothing
            trainer.streams = training  # all runs train on the same noise
            self._train(name, run, trainer, handle)
        return run

    def _train(self, name: str, run: Run, trainer: Trainer, handle: disback.Handle) -> None:
        from timm.utils.model_ema import ModelEmaV3

        average = ModelEmaV3(trainer.generator, decay=self.regime.ema)
        losses: list[tuple[Tensor, Tensor]] = []
        for update in tqdm(range(self.regime.updates + 1), desc=name, unit="update", disable=None):
            if update:
                losses.append(trainer.step())
                average.update(trainer.generator)
            if update % self.regime.evaluate_every == 0:
                run.updates.append(update)
                run.ema.append(self._distances(average.module))
                run.raw.append(self._distances(trainer.generator))
                handle.log(self._values(name, run, average.module, losses))
                losses.clear()
        run.samples = self._generate(average.module)[0, :64]

    def _values(
        self, name: str, run: Run, average: torch.nn.Module, losses: list[tuple[Tensor, Tensor]]
    ) -> dict[str, Any]:
        """Return the log of an evaluation: medians over the seeds, mean losses since the last one, and samples."""
        values: dict[str, Any] = {
            "distance": median(run.ema[-1]),
            "distance of the raw weights": median(run.raw[-1]),
        }
        if losses:
            fake_score, generator = torch.tensor(losses).mean(dim=0).tolist()
            values |= {"loss of s_phi": fake_score, "loss of the generator": generator}
        update, every = run.updates[-1], self.regime.evaluate_every
        if update % (every * max(self.regime.updates // (5 * every), 1)) == 0:
            values["samples"] = self.folder / "samples" / f"{name}-{update:05d}.png"
            figures.grid(self._generate(average)[0], values["samples"])
        return values

    @torch.no_grad()
    def _generate(self, generator: torch.nn.Module) -> Tensor:
        return generate(generator, self._z, self.regime)

    def _distances(self, generator: torch.nn.Module) -> list[float]:
        return [frechet_distance(features, self._real) for features in self._features(self._generate(generator))]


def principal_components(data: Tensor, count: int = 20) -> Callable[[Tensor], Tensor]:
    """Return a function from samples, shape (..., d), to their first principal components, shape (..., count).

    The Frechet distance on 20 components is quiet: 1,000 samples are enough to see a difference of a few per cent.

    Args:
        data: Samples that define the components, shape (n, d).
        count: Number of components, 1 <= count <= min(n, d).

    Example:
        >>> principal_components(torch.tensor([[0.0, 0.0], [0.0, 2.0]]), count=1)(torch.tensor([[5.0, 3.0]])).abs()
        tensor([[2.]])
    """
    mean = data.double().mean(dim=0)
    directions = torch.linalg.svd(data.double() - mean, full_matrices=False).Vh[:count].mT.float()
    return lambda x: (x - mean.float()) @ directions


def summarise(regime: Regime, seeds: Sequence[int], runs: dict[str, Run], seconds: float) -> dict[str, Any]:
    """Return the result as plain numbers, ready for JSON.

    A seed that never reaches a threshold has no number (None) in `runs`. In a ratio, the baseline not reaching it
    counts as reaching it at the very end, which flatters the baseline; DisBack not reaching it counts as 0.
    """
    members = range(len(seeds))
    crossings = {
        name: {f"{at:g}": [run.crossing(at, member) for member in members] for at in regime.thresholds}
        for name, run in runs.items()
    }
    baseline, ours = runs[regime.loss], runs["disback"]

    def ratio(at: str, cost: Callable[[Run, float], float]) -> dict[str, float]:
        pairs = zip(crossings[regime.loss][at], crossings["disback"][at], strict=True)
        found = [
            cost(baseline, min(plain, baseline.updates[-1])) / cost(ours, own) if 0 < own < math.inf else 0.0
            for plain, own in pairs
        ]
        return {"median": round(median(found), 3), "min": round(min(found), 3), "max": round(max(found), 3)}

    def report(run: Run, crossed: dict[str, list[float]]) -> dict[str, Any]:
        ema, raw = ([[round(v, 4) for v in values] for values in curve] for curve in (run.ema, run.raw))
        return {
            "updates": {at: _finite(median(values)) for at, values in crossed.items()},
            "compute": {at: _finite(run.compute(median(values))) for at, values in crossed.items()},
            "updates_of_seeds": {at: [_finite(value) for value in values] for at, values in crossed.items()},
            "recording_iterations": run.recorded,
            "curve": {"updates": run.updates, "ema": ema, "raw": raw},
        }

    return {
        "seeds": len(seeds),
        "thresholds": list(regime.thresholds),
        "loss": regime.loss,
        "network": regime.network,
        "student": regime.student,
        "schedule": repr(regime.schedule),
        "rate": regime.rate,
        "record": regime.record,
        "runs": {name: report(run, crossings[name]) for name, run in runs.items()},
        "ratio_updates": {at: ratio(at, lambda run, updates: updates) for at in crossings["disback"]},
        "ratio_compute": {at: ratio(at, Run.compute) for at in crossings["disback"]},
        "final": {name: median(run.ema[-1]) for name, run in runs.items()},
        "final_raw": {name: median(run.raw[-1]) for name, run in runs.items()},
        "seconds": round(seconds, 1),
    }


def _finite(value: float) -> float | None:
    return round(value, 1) if math.isfinite(value) else None


def demo(*, seeds: int, student: str, network: str, schedule: str | None, loss: str, out: Path) -> dict[str, Any]:
    """Distil one-step generators of digits with and without DisBack, and write figures, path and result.

    Args:
        seeds: Number of seeds, 0 to seeds - 1, >= 1.
        student: "scratch", "teacher" or "far".
        network: "mlp" or "conv".
        schedule: Of DisBack, as `schedules.parse` reads it; None for the regime's own.
        loss: Of the generator: "diff-instruct", "dmd" or "sid".
        out: Folder for convergence.png, samples.png, result.json, path/, and the log of each run.

    Returns:
        The content of result.json.

    Raises:
        OptionError: If a value is out of its domain.
        PathError: If `out` holds something else at `path/`.
    """
    if seeds < 1:
        raise OptionError(f"--seeds {seeds}", expected="a number >= 1", cure="omit it for 5")
    if out.exists() and not out.is_dir():
        raise OptionError(f"--out {out}, a file", expected="a folder, or nothing there", cure="pass another --out")
    started = time.perf_counter()
    regime = regime_of(network, student, loss, **({} if schedule is None else {"schedule": parse(schedule)}))
    out.mkdir(parents=True, exist_ok=True)
    runs = Study(regime, range(seeds), out).run_all()
    images = {
        "the digits": digits(),
        f"one step, {LOSSES[loss]}": runs[loss].samples,
        "one step, DisBack": runs["disback"].samples,
    }
    figures.samples(images, out / "samples.png")
    figures.convergence(runs, regime.thresholds, out / "convergence.png")
    result = summarise(regime, range(seeds), runs, time.perf_counter() - started)
    (out / "result.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result
