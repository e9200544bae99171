"""Distil one-step students of a small trained text-to-image teacher, with DisBack and without.

    python benchmarks/bench_text_to_image.py --out DIR      # 20 minutes of one core; resumes after a stop
    ... --out SLOW --seeds 1 2 3 --set learning_rate=2e-4 steps=200
    ... --table DIR SLOW                                    # into text_to_image.md

The teacher (`digits_pipeline`) is distilled by `disback_adapters.lcm_lora` with the timestep of the paper's SDXL
recipe, t = 399, where one step from pure noise is far from the teacher's samples. Settings were chosen on seed 0, which
is not among the seeds of the table.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
import textwrap
import time
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging
from digits_pipeline import PROMPTS, classifier, digits, train_teacher
from disback_adapters.lcm_lora.roles import Options
from disback_adapters.lcm_lora.training import Trainer

import disback_plugin as disback

PAGE = Path(__file__).parent / "text_to_image.md"
MARKERS = ("<!-- text to image: made by bench_text_to_image.py -->", "<!-- end of text to image -->")
SETTING = {
    "prompts": PROMPTS,
    "rank": 8,
    "fake_score_layers": "all",
    "timestep": 399,
    "guidance": 1.0,
    "batch_size": 32,
    "steps": 100,
    "learning_rate": 1e-3,
    "fake_score_learning_rate": 1e-3,
    "ema_decay": 0.9,
}
ARMS = {
    "without DisBack": {"record": 0},
    "DisBack, auto": {"record": 100, "every": 25},
    "warm start only": {"record": 100, "every": 25, "schedule": "warm"},
}
SHOWN = ("learning_rate", "fake_score_learning_rate")
AT = (0, 25, 50, 75, 100, 150, 200, 300)
COUNT = 50  # samples of each digit


class Measured(Trainer):
    """A trainer that measures its student's samples now and then, with its own random numbers."""

    def run(self):
        self.answer, _ = classifier()
        self.curve = {0: self.measure()}
        super().run()

    def after_update(self, handle, values):
        super().after_update(handle, values)
        if handle.generator_updates in AT:
            self.curve[handle.generator_updates] = self.measure()

    def measure(self):
        z = torch.randn(10 * COUNT, 1, 8, 8, generator=torch.Generator().manual_seed(12345))
        with torch.no_grad(), self.averaged():
            x = self.student.generate(z, self.embeddings.rows(list(range(10)) * COUNT))
        return measures(x, self.answer)


def measures(x, answer):
    """Return the share of samples that are of their prompt's class, and the Frechet distance to the data's pixels."""
    right = (answer(x) == torch.arange(10).repeat(len(x) // 10)).double().mean().item()
    return {
        "accuracy": right,
        "distance": float(disback.metrics.frechet_distance(x.flatten(1), digits()[0].flatten(1))),
    }


def distil(teacher, seed, arm, **more):
    """Distil once; return the curve."""
    began = time.process_time()
    with tempfile.TemporaryDirectory() as output:
        trainer = Measured(
            Options(**{**SETTING, "teacher": teacher, "output": output, "seed": seed, **ARMS[arm], **more})
        )
        trainer.run()
    return {"seed": seed, "arm": arm, "curve": trainer.curve, "cpu_s": time.process_time() - began}


def main(out, seeds, **more):
    logging.set_verbosity_error()
    out.mkdir(parents=True, exist_ok=True)
    teacher, file = str(out / "teacher"), out / "runs.jsonl"
    if not (out / "teacher" / "model_index.json").exists():
        train_teacher(teacher)
    if not (out / "teacher.json").exists():
        (out / "teacher.json").write_text(json.dumps(of_teacher(teacher)))
    (out / "set.json").write_text(json.dumps(more))
    done = {(run["seed"], run["arm"]) for run in read(file)}
    for seed in seeds:
        for arm in ARMS:
            if (seed, arm) not in done:
                with file.open("a") as log:
                    print(json.dumps(distil(teacher, seed, arm, **more)), file=log)


def of_teacher(folder):
    pipeline, (answer, held_out) = DiffusionPipeline.from_pretrained(folder), classifier()
    pipeline.set_progress_bar_config(disable=True)
    stream = torch.Generator().manual_seed(12345)
    options = {"num_inference_steps": 50, "guidance_scale": SETTING["guidance"], "output_type": "latent"}
    return measures(pipeline(PROMPTS * COUNT, generator=stream, **options).images, answer) | {"classifier": held_out}


def read(file):
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


@pytest.mark.slow
def bench_a_student_of_a_teacher_that_has_learned_little_still_learns(tmp_path):
    train_teacher(tmp_path / "teacher", steps=100)
    curve = distil(str(tmp_path / "teacher"), 0, "DisBack, auto", steps=25)["curve"]
    assert set(curve) == {0, 25}


# -- the table --------------------------------------------------------------------------------------------------------


def section(outs):
    """Return the text of text_to_image.md, made from the numbers alone; the first folder's setting is the standard."""
    teacher = json.loads((outs[0] / "teacher.json").read_text())
    lines = [MARKERS[0], "", *setting(teacher), ""]
    for out in outs:
        lines += [*tables(out), ""]
    return "\n".join([*lines, *textwrap.wrap(LIMITS, 120), "", MARKERS[1]])


def tables(out):
    """Return the tables of one setting, and pairwise comparisons of the methods."""
    of = {(run["seed"], run["arm"]): run["curve"] for run in read(out / "runs.jsonl")}
    seeds = sorted({seed for seed, _ in of if all((seed, arm) in of for arm in ARMS)})
    times = [at for at in AT if all(str(at) in curve for curve in of.values())]
    shown = ", ".join(f"{name} = {value:g}" for name, value in (SETTING | known(out)).items() if name in SHOWN)
    lines = [f"**{shown}**, {len(seeds)} seeds:", ""]
    for name, form in (("accuracy", "{:.1%}"), ("distance", "{:.2f}")):
        title = "of the prompt's class" if name == "accuracy" else "Frechet distance"
        lines += [f"| {title} | {' | '.join(map(str, times))} |", "|---" * (1 + len(times)) + "|"]
        for arm in ARMS:
            columns = [[of[seed, arm][str(at)][name] for seed in seeds] for at in times]
            middles = [form.format(statistics.median(column)) for column in columns]
            ranges = [f"{form.format(min(column))} to {form.format(max(column))}" for column in columns]
            cells = [f"{middle} ({span})" for middle, span in zip(middles, ranges, strict=True)]
            lines.append(f"| {arm} | {' | '.join(cells)} |")
        lines.append("")
    return lines + [sentence(of, seeds, str(times[-1]), *pair) for pair in itertools.combinations(reversed(ARMS), 2)]


def known(out):
    """Return the settings that differ in a folder's runs."""
    return json.loads((out / "set.json").read_text()) if (out / "set.json").exists() else {}


# Limits that the tables do not show.
LIMITS = (
    "The setting, t = 399 without guidance, was chosen on seed 0, because there one step begins far from the data: at "
    "t = 999 an untrained student is of its prompt's class on 98 % of samples already, and with guidance every arm is "
    "soon. Auto's walk takes about 75 of the first 100 updates, and its gradient is whole some 150 later. **At the "
    "rate of 0.001 nothing settles**: left on to 300 updates, on one seed, without DisBack 73.6 % are of their class, "
    "with auto 59.8 %, with the warm start 95.4 %. "
    "These runs were made before auto's recording had twice the learning rate."
)


def setting(teacher):
    """Describe the setting in lines of Markdown."""
    first = ARMS["DisBack, auto"]["record"]
    text = (
        'Teacher: a latent diffusion of scikit-learn\'s digits with prompts as "the digit seven". In 50 steps '
        f"{teacher['accuracy']:.1%} of its samples are of their prompt's class (by a classifier that is right on "
        f"{teacher['classifier']:.1%} of held-out digits), at a Frechet distance of {teacher['distance']:.2f} to the "
        "data, in pixels. The trainer of `disback_adapters.lcm_lora`: student and s_phi are LoRA of rank "
        f"{SETTING['rank']} on one base; one step of LCMScheduler at t = {SETTING['timestep']}; batch "
        f"{SETTING['batch_size']}; Adam, one update of each a round, and no guidance. Recording takes "
        f"at most {first} updates of s_phi first, which runs without DisBack do not have; a warm start is DisBack "
        "without the walk. Medians over seeds, with the range, after so many updates of the student:"
    )
    return textwrap.wrap(text, 120)


def sentence(of, seeds, last, arm, against):
    """Return how often one arm ends better than another, seed by seed."""
    better = sum(of[seed, arm][last]["accuracy"] > of[seed, against][last]["accuracy"] for seed in seeds)
    worse = sum(of[seed, arm][last]["accuracy"] < of[seed, against][last]["accuracy"] for seed in seeds)
    nearer = sum(of[seed, arm][last]["distance"] < of[seed, against][last]["distance"] for seed in seeds)
    return (
        f"* {arm}, against {against}, after {last} updates: of {len(seeds)} seeds more samples of their class on "
        f"{better}, fewer on {worse}; nearer to the data on {nearer}."
    )


def write(outs):
    text = PAGE.read_text()
    before, _, rest = text.partition(MARKERS[0])
    after = rest.partition(MARKERS[1])[2]
    PAGE.write_text(f"{before.rstrip()}\n\n{section(outs)}\n{after.lstrip()}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path)
    parser.add_argument("--table", type=Path, nargs="+")
    parser.add_argument("--seeds", type=int, nargs="+", default=range(1, 11))
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="of SETTING, in a DIR of its own")
    options = parser.parse_args()
    more = {name: json.loads(value) for name, _, value in (each.partition("=") for each in options.set)}
    write(options.table) if options.table else main(options.out, options.seeds, **more)
