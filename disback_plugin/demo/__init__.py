"""Demonstrate DisBack: distil one-step generators of handwritten digits, with and without a degradation path.

Four runs from the same seeds, with the same trainer and at equal compute:

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
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

import disback_plugin as disback
from disback_plugin.demo.networks import PIXELS
from disback_plugin.demo.trainer import Regime, Streams, Trainer, digits, generate, regime_of
from disback_plugin.errors import OptionError
from disback_plugin.metrics import frechet_distance
from disback_plugin.report.figures import crossing
from disback_plugin.schedules import GradientRamp, Schedule, WarmStart, parse

# Forward passes of one network in a round of training, a backward pass being two. Diff-Instruct: the fake score's
# update takes a generator and a fake-score forward and a backward (4), the generator's two more forwards, its own and
# its backward (5). SiD goes back through both networks to their input, which counts as one more for each.
COST_OF_ROUND = {"diff-instruct": 9, "dmd": 9, "sid": 11}
COST_OF_RECORDING = 4
RECORD = 25  # recording iterations at most, and between two nodes
EVALUATE_EVERY, SAMPLES, EMA = 20, 1_000, 0.99
# Purposes of a seed's noise streams; the trainer's own is 1.
RECORDING, EVALUATION = 2, 3
# These colours are distinguishable without colour vision (Okabe and Ito).
COLOURS = ("#555555", "#E69F00", "#56B4E9", "#D55E00")


@dataclass
class Run:
    """The result of one run.

    Attributes:
        recorded: Recording iterations.
        rounds: Rounds of training at each evaluation, the recording included at its share of a round's compute.
        distance: Distances of the averaged generators to the digits: E values an evaluation.
    """

    recorded: int
    rounds: list[int] = field(default_factory=list)
    distance: list[list[float]] = field(default_factory=list)


@dataclass(frozen=True)
class Warm(WarmStart):
    """The control without backtracking, whose recording ends when that of the compared schedule does."""

    until_fitted: bool = False


class Study:
    """Distil E generators side by side, and measure their distance to the digits.

    Args:
        regime: Everything that a run depends on, except its seeds.
        seeds: One seed for each generator.
        folder: Folder for the log of each run, NAME.log.jsonl, and for the path of "disback".

    Attributes:
        samples: Images of the first seed at the end of each run, shape (n, 64).
    """

    def __init__(self, regime: Regime, seeds: Sequence[int], folder: Path) -> None:
        self.regime, self.seeds, self.folder = regime, seeds, folder
        self.samples: dict[str, Tensor] = {}
        data = digits()
        self._features = principal_components(data)
        self._real = self._features(data)
        self._z = Streams(seeds, EVALUATION).randn(SAMPLES, PIXELS)

    def distil_all(self, schedule: Schedule) -> dict[str, Run]:
        """Distil four times, with `schedule` for DisBack; return the runs by name. An earlier path is replaced."""
        path = self.folder / "path"
        if disback.DegradationPath.exists(path):
            shutil.rmtree(path)
        warm, loss = Warm(until_fitted=schedule.until_fitted), self.regime.loss
        with tempfile.TemporaryDirectory() as control:
            return {
                loss: self.distil(loss, schedule=WarmStart(), record=0),
                "warm": self.distil("warm", schedule=warm, record=RECORD, every=RECORD, path=control),
                "grad-ramp": self.distil("grad-ramp", schedule=GradientRamp(), record=0),
                "disback": self.distil("disback", schedule=schedule, record=RECORD, every=RECORD, path=path),
            }

    def distil(self, name: str, **options: Any) -> Run:
        """Distil once, with the `options` of `disback.attach`; the name is that of the log."""
        from timm.utils.model_ema import ModelEmaV3

        log = self.folder / f"{name}.log.jsonl"
        log.unlink(missing_ok=True)
        trainer = Trainer(self.regime, self.seeds)
        average = ModelEmaV3(trainer.generator, decay=EMA)
        with disback.attach(
            teacher=trainer.teacher,
            fake_score=trainer.fake_score,
            generator_optimizer=trainer.generator_optimizer,
            fake_score_optimizer=trainer.fake_score_optimizer,
            log=log,
            **options,
        ) as handle:
            training, trainer.streams = trainer.streams, Streams(self.seeds, RECORDING)
            while handle.phase == "recording":
                handle.log({"loss of s_phi": trainer.fake_step()})
                trainer.generator_optimizer.step()  # without gradients, which would be computed for nothing
            trainer.streams = training  # all runs train on the same noise
            run = Run(handle.fake_score_updates)
            before = math.ceil(COST_OF_RECORDING * run.recorded / COST_OF_ROUND[self.regime.loss])
            last, losses = self.regime.rounds - before, {}
            for update in tqdm(range(last + 1), desc=name, unit="update", disable=None):
                if update:
                    losses = dict(zip(("loss of s_phi", "loss of the generator"), trainer.step(), strict=True))
                    average.update(trainer.generator)
                if update % EVALUATE_EVERY == 0 or update == last:
                    run.rounds.append(before + update)
                    run.distance.append(self.distances(average.module))
                    handle.log({"distance": median(run.distance[-1])} | losses)
        self.samples[name] = self._generate(average.module)[0]
        return run

    def distances(self, generator: nn.Module) -> list[float]:
        """Return the Frechet distance of each seed's samples to the digits, in 20 principal components."""
        return [frechet_distance(features, self._real) for features in self._features(self._generate(generator))]

    @torch.no_grad()
    def _generate(self, generator: nn.Module) -> Tensor:
        return generate(generator, self._z, self.regime)


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


def summarise(run: Run, baseline: Run) -> dict[str, Any]:
    """Return a run as plain numbers: curves of each seed, medians at the end, and the rounds to the baseline's end.

    A seed that never comes to its baseline's final distance counts as infinitely many rounds in the median; a median
    of infinity is None.
    """
    curves = (list(zip(run.rounds, curve, strict=True)) for curve in zip(*run.distance, strict=True))
    reached = map(crossing, curves, baseline.distance[-1])
    rounds = median(math.inf if value is None else value for value in reached)
    reached_at = rounds if math.isfinite(rounds) else None
    return {"final": median(run.distance[-1]), "rounds_to_baseline": reached_at} | asdict(run)


def draw(runs: dict[str, Run], samples: dict[str, Tensor], folder: Path) -> None:
    """Draw the distances over the rounds (median, and a band from best to worst seed), and samples side by side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for (name, run), colour in zip(runs.items(), COLOURS, strict=True):
        axes.plot(run.rounds, [*map(median, run.distance)], color=colour, label=name, linewidth=2)
        axes.fill_between(run.rounds, [*map(min, run.distance)], [*map(max, run.distance)], color=colour, alpha=0.12)
    axes.set(xlabel="rounds of training, recording included", ylabel="Fréchet distance to the digits", yscale="log")
    axes.legend(frameon=False)
    figure.savefig(folder / "convergence.png", dpi=150)

    loss, images = next(iter(runs)), {"the digits": digits()}
    images |= {f"one step, {name}": samples[name] for name in (loss, "disback")}
    figure = Figure(figsize=(3 * len(images), 3.3), layout="constrained")
    for axes, (title, batch) in zip(figure.subplots(1, len(images)), images.items(), strict=True):
        framed = F.pad(batch[:36].reshape(6, 6, 8, 8), (1, 1, 1, 1), value=-1.0)
        axes.imshow(framed.permute(0, 2, 1, 3).reshape(60, 60).numpy(), cmap="gray", vmin=-1, vmax=1)
        axes.set_title(title, fontsize=10)
        axes.set_axis_off()
    figure.savefig(folder / "samples.png", dpi=150)


def demo(*, seeds: int, student: str, network: str, schedule: str, loss: str, out: Path) -> dict[str, Any]:
    """Distil one-step generators of digits with and without DisBack, and write figures, path, logs and result.

    Args:
        seeds: Number of seeds, 0 to seeds - 1, >= 1.
        student: "scratch", "teacher" or "far".
        network: "mlp" or "conv".
        schedule: Of DisBack, as `schedules.parse` reads it.
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
    began, parsed, regime = time.perf_counter(), parse(schedule), regime_of(network, student, loss)
    out.mkdir(parents=True, exist_ok=True)
    study = Study(regime, range(seeds), out)
    runs = study.distil_all(parsed)
    draw(runs, study.samples, out)
    result = asdict(regime) | {
        "schedule": schedule,
        "seeds": seeds,
        "runs": {name: summarise(run, runs[loss]) for name, run in runs.items()},
        "seconds": round(time.perf_counter() - began, 1),
    }
    (out / "result.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result
