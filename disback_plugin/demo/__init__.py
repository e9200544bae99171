"""Demonstrate DisBack: distil one-step generators of digits, or of Gaussians in the plane, with and without a path.

Five runs from the same seeds and first weights, on the same noise, in as many rounds of the trainer's loop:

| run                         | recording | s_phi starts from | teacher | generator's gradient  | rate |
|-----------------------------|-----------|-------------------|---------|-----------------------|------|
| Diff-Instruct               | no        | s'_0              | s'_0    | as it is              | 1    |
| DisBack                     | yes       | s'_N              | as the schedule says            || 1    |
| warm start                  | yes       | s'_N              | s'_0    | as it is              | 1    |
| gradient ramp, no path      | no        | s'_0              | s'_0    | 1 - 0.99 (1 - u / 100)+ | 1    |
| ... at 1.25 times the rate  | no        | s'_0              | s'_0    | as it is              | 1.25 |

DisBack is `disback.attach` as it is, with its default schedule. The last three runs are controls: each has a part of
what DisBack does.
"""

from __future__ import annotations

import copy
import inspect
import json
import math
import shutil
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

import disback_plugin as disback
from disback_plugin.demo.figures import GRID, Frame, draw
from disback_plugin.demo.trainer import Regime, Streams, Trainer, generate, regime_of
from disback_plugin.demo.worlds import DATA, distance_to, load_teacher
from disback_plugin.metrics import mismatch_degree
from disback_plugin.plugins.run_log import SUFFIX
from disback_plugin.prediction import Prediction
from disback_plugin.report.figures import crossing, load_matplotlib
from disback_plugin.schedules import GradientRamp, Schedule, WarmStart, parse

BASELINE = "Diff-Instruct"
RECORD = 25  # recording iterations, and between two nodes, of a schedule that does not end the recording itself
FASTER = 1.25
EVALUATE_EVERY, SAMPLES, EMA = 20, 1_000, 0.99
# Noise scales of the mismatch (Eq. 9), and the share of the samples on which it is measured; the others define the
# samples' own score. Below these noise scales the value measures little but the noise of that score.
SIGMAS, MEASURED = (2.0, 5.0), 0.2
# Parts of a run after which samples are shown. In the plane, the scores of both networks at this noise scale, too.
SHOWN, GRID_SIGMA = (0.0, 0.05, 0.15, 0.3, 1.0), 1.0
# Purposes of a seed's noise streams; the trainer's own is 1.
RECORDING, EVALUATION = 2, 3


@dataclass
class Run:
    """The result of one run.

    Attributes:
        recorded: Recording iterations, in rounds of the loop.
        rounds: Rounds of the loop at each evaluation, the recording included.
        distance: Distances of the averaged generators to the data: E values an evaluation.
        mismatch: Mismatch degrees (Eq. 9) of the pre-trained teacher on the same samples.
    """

    recorded: int = 0
    rounds: list[int] = field(default_factory=list)
    distance: list[list[float]] = field(default_factory=list)
    mismatch: list[list[float]] = field(default_factory=list)


@dataclass(frozen=True)
class Warm(WarmStart):
    """The control without backtracking, whose recording ends when that of the compared schedule does."""

    until_fitted: bool = False


class Study:
    """Distil E generators side by side, and measure their distance to the data.

    Args:
        regime: Everything that a run depends on, except its seeds.
        seeds: One seed for each generator.
        folder: Folder for the log of each run, NAME.log.jsonl, and for the path of DisBack.

    Attributes:
        data: The data, shape (n, d).
        teacher: The pre-trained teacher, once.
        frames: For each run, by rounds: samples of the first seed, and in the plane the direction of s_phi.
    """

    def __init__(self, regime: Regime, seeds: Sequence[int], folder: Path) -> None:
        self.regime, self.seeds, self.folder = regime, seeds, folder
        self.frames: dict[str, dict[int, Frame]] = {}
        self.data = DATA[regime.world]()
        self._distance = distance_to(self.data)
        self.teacher = load_teacher(regime.world, 1)
        self._z = Streams(seeds, EVALUATION).randn(SAMPLES, regime.size)
        self._shown = {EVALUATE_EVERY * round(part * regime.rounds / EVALUATE_EVERY) for part in SHOWN}

    def distil_all(self, schedule: Schedule, name: str) -> dict[str, Run]:
        """Distil with `schedule` as `name`, and its baseline and controls; return all runs. An old path is replaced."""
        path = self.folder / "path"
        if disback.DegradationPath.exists(path):
            shutil.rmtree(path)
        recording = {} if schedule.until_fitted else {"record": RECORD, "every": RECORD}
        runs = {
            BASELINE: self.distil(BASELINE, schedule=WarmStart(), record=0),
            name: self.distil(name, schedule=schedule, path=path, **recording),
        }
        if not isinstance(schedule, WarmStart):
            warm = Warm(until_fitted=schedule.until_fitted)
            with tempfile.TemporaryDirectory() as folder:
                runs["warm start"] = self.distil("warm start", schedule=warm, path=folder, **recording)
        ramp, faster = "gradient ramp, no path", f"{BASELINE} at {FASTER} times the rate"
        runs[ramp] = self.distil(ramp, schedule=GradientRamp(), record=0)
        runs[faster] = self.distil(faster, FASTER, schedule=WarmStart(), record=0)
        return runs

    def distil(self, name: str, faster: float = 1.0, **options: Any) -> Run:
        """Distil once, at `faster` times the rate, with `options` of `disback.attach`; the log has the run's name."""
        log = self.folder / f"{name}{SUFFIX}"
        log.unlink(missing_ok=True)
        trainer = Trainer(replace(self.regime, rate=faster * self.regime.rate), self.seeds)
        average = copy.deepcopy(trainer.generator).requires_grad_(False)
        run, losses, frames = Run(), {}, self.frames.setdefault(name, {})
        with disback.attach(
            teacher=trainer.teacher,
            fake_score=trainer.fake_score,
            generator_optimizer=trainer.generator_optimizer,
            fake_score_optimizer=trainer.fake_score_optimizer,
            log=log,
            **options,
        ) as handle:
            training, recording = trainer.streams, Streams(self.seeds, RECORDING)
            for done in tqdm(range(self.regime.rounds + 1), desc=name, unit="round", mininterval=0.5):
                if done:
                    # All runs train on the same noise.
                    trainer.streams = recording if handle.phase == "recording" else training
                    run.recorded += handle.phase == "recording"
                    losses = dict(zip(("loss of s_phi", "loss of the generator"), trainer.step(), strict=True))
                    torch._foreach_lerp_([*average.parameters()], [*trainer.generator.parameters()], 1 - EMA)
                if done in self._shown:
                    frames[done] = self._generate(trainer.generator)[0], self.directions(trainer.fake_score)
                if done % EVALUATE_EVERY == 0 or done == self.regime.rounds:
                    run.rounds.append(done)
                    samples = self._generate(average)
                    run.distance.append([*map(self._distance, samples)])
                    run.mismatch.append([*map(self.mismatch, samples)])
                    measured = {"distance": median(run.distance[-1]), "mismatch": median(run.mismatch[-1])}
                    handle.log(losses if handle.phase == "recording" else losses | measured)
        return run

    def floor(self) -> float:
        """Return the mismatch of the pre-trained teacher on data, which a student's comes down to."""
        order = torch.randperm(len(self.data), generator=torch.Generator().manual_seed(0))
        return self.mismatch(self.data[order[:SAMPLES]])

    def mismatch(self, samples: Tensor) -> float:
        """Return how far the pre-trained teacher's scores are from those of some samples, shape (n, d) (Eq. 9)."""
        count = int(MEASURED * len(samples))
        return mismatch_degree(
            lambda x_t, sigma: self.teacher(x_t[None], sigma.T)[0],
            samples[:count],
            samples[count:],
            SIGMAS,
            prediction=Prediction.X0,
            batch_size=count,
        )["total"]

    @torch.no_grad()
    def directions(self, network: nn.Module) -> Tensor:
        """Return sigma^2 s(x_t, sigma) = D(x_t, sigma) - x_t of the first member, on a grid in the plane (Fig. 9).

        Of images, return none.
        """
        if self.regime.size != 2:
            return torch.empty(0, 2)
        grid = GRID.expand(len(next(network.parameters())), -1, -1)
        directions: Tensor = (network(grid, torch.tensor(GRID_SIGMA)) - grid)[0]
        return directions

    def summarise(self, runs: dict[str, Run]) -> dict[str, dict[str, Any]]:
        """Return the runs as plain numbers: for each, medians over the seeds of what was found seed by seed.

        "final" is the distance at the end, and "ratio" its ratio to the first run's, with its "range". "rounds_ratio"
        is that of the rounds until a run is as low as the first run's end, None if the median seed never is.
        """
        baseline, found = runs[BASELINE], {}
        goals = baseline.distance[-1]
        for name, run in runs.items():
            ratios = [a / b for a, b in zip(run.distance[-1], goals, strict=True)]
            rounds = median(a / b for a, b in zip(rounds_to(goals, run), rounds_to(goals, baseline), strict=True))
            found[name] = asdict(run) | {
                "final": median(run.distance[-1]),
                "ratio": median(ratios),
                "range": [min(ratios), max(ratios)],
                "rounds_ratio": rounds if math.isfinite(rounds) else None,
            }
        return found

    @torch.no_grad()
    def _generate(self, generator: nn.Module) -> Tensor:
        return generate(generator, self._z, self.regime)


def rounds_to(goals: Sequence[float], run: Run) -> list[float]:
    """Return for each seed the rounds until its distance is as low as its goal, at least 1; inf if it never is."""
    curves = (list(zip(run.rounds, distances, strict=True)) for distances in zip(*run.distance, strict=True))
    reached = map(crossing, curves, goals)
    return [math.inf if rounds is None else max(rounds, 1.0) for rounds in reached]


def demo(*, seeds: int, world: str, student: str, schedule: str | None, out: Path) -> dict[str, Any]:
    """Distil one-step generators with and without DisBack, and write figures, path, logs and result.

    Args:
        seeds: Number of seeds, 0 to seeds - 1, >= 1.
        world: "digits", or "gaussians" in the plane.
        student: "scratch", "teacher" or "far".
        schedule: Of DisBack, as `schedules.parse` reads it; None is the default of `disback.attach`.
        out: Folder for the figures (`figures.draw`), result.json, path/, and the log of each run.

    Returns:
        The content of result.json.

    Raises:
        OptionError: If scikit-learn or matplotlib is not installed.
        PathError: If `out` holds something else at `path/`.
    """
    began = time.perf_counter()
    load_matplotlib()  # if it is missing, the error comes before the training
    schedule = schedule or inspect.signature(disback.attach).parameters["schedule"].default
    parsed, regime = parse(schedule), regime_of(world, student)
    out.mkdir(parents=True, exist_ok=True)
    with suppress(OSError, ValueError, KeyError):  # the logs of an earlier run, whose names may be others
        for name in json.loads((out / "result.json").read_text(encoding="utf-8"))["runs"]:
            (out / f"{name}{SUFFIX}").unlink(missing_ok=True)
    study = Study(regime, range(seeds), out)
    runs = study.distil_all(parsed, f"DisBack ({schedule})")
    draw(study, runs)
    result = asdict(regime) | {
        "schedule": schedule,
        "seeds": seeds,
        "runs": study.summarise(runs),
        "seconds": round(time.perf_counter() - began, 1),
    }
    (out / "result.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result
