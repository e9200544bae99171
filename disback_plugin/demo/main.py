"""`disback demo`: run the study and write what it found."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from disback_plugin.demo import pictures
from disback_plugin.demo.networks import PIXELS, load_teacher
from disback_plugin.demo.regimes import LOSSES, plan
from disback_plugin.demo.sampling import heun
from disback_plugin.demo.study import Study, summarise
from disback_plugin.errors import OptionError
from disback_plugin.schedules import parse

__all__ = ["CAVEAT", "demo"]

CAVEAT = (
    "Compare with the controls before crediting the path: the baseline has its best learning rate of three here, but a "
    "better tuned one narrows the gap, and other regimes gain less or lose (--student teacher, --network conv)."
)


def demo(
    *, seeds: int, student: str, network: str, schedule: str | None, out: Path, loss: str = "diff-instruct"
) -> dict[str, Any]:
    """Distil one-step generators of digits with and without DisBack, and write pictures, path and result.

    Args:
        seeds: Number of seeds, 0 to seeds - 1, >= 1.
        student: "scratch", "teacher" or "far".
        network: "mlp" or "conv".
        schedule: Of DisBack, as `schedules.parse` reads it; None for the regime's own.
        out: Folder for convergence.png, samples.png, result.json, path/, and the log of each run.
        loss: Of the generator: "diff-instruct", "dmd" or "sid".

    Returns:
        The content of result.json.

    Raises:
        OptionError: If a value is out of its domain.
        PathError: If `out` holds something else at `path/`.
    """
    if seeds < 1:
        raise OptionError(f"--seeds {seeds}", expected="a number >= 1", cure="leave it away for 5")
    if out.exists() and not out.is_dir():
        raise OptionError(f"--out {out}, a file", expected="a folder, or nothing there", cure="pass another --out")
    started = time.perf_counter()
    regime = plan(network, student, None if schedule is None else parse(schedule), loss)
    out.mkdir(parents=True, exist_ok=True)
    with tqdm(total=4 * regime.settings.updates, unit="update", disable=None) as bar:

        def progress(name: str) -> None:
            bar.set_description(name, refresh=False)
            bar.update()

        study = Study(regime, range(seeds), out, progress)
        runs = study.run_all()
    images = {
        "teacher, 35 evaluations": _teacher_samples(network),
        f"one step, {LOSSES[loss]}": runs[loss].samples,
        "one step, DisBack": runs["disback"].samples,
    }
    pictures.samples(images, out / "samples.png")
    pictures.convergence(runs, regime.thresholds, out / "convergence.png")
    result = summarise(regime, range(seeds), runs, time.perf_counter() - started)
    (out / "result.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result


def _teacher_samples(network: str) -> torch.Tensor:
    z = torch.randn(1, 64, PIXELS, generator=torch.Generator().manual_seed(0))
    return heun(load_teacher(network, 1), z)[0]
