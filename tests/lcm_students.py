"""Short runs of the trainer of LCM-LoRA students on tiny pipelines."""

from __future__ import annotations

import torch
from disback_adapters.lcm_lora.roles import Options
from disback_adapters.lcm_lora.training import Trainer

PROMPTS = ("the digit seven", "the digit one", "a red cube")
# Options of a short run that records, backtracks and ends.
SHORT = {
    "rank": 4, "steps": 4, "batch_size": 2, "learning_rate": 1e-2, "fake_score_learning_rate": 1e-3,
    "record": 2, "every": 1, "schedule": "fixed:2",
}  # fmt: skip


def options(teacher, output, **more):
    return Options(teacher=teacher, prompts=PROMPTS, output=str(output), **{**SHORT, **more})


def train(options):
    trainer = Trainer(options)
    trainer.run()
    return trainer


def student_of(trainer):
    return {name: weight.clone() for name, weight in trainer.student.weights.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
