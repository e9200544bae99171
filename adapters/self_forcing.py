"""Adapt Self-Forcing (arXiv 2506.08009): `train.py` of guandeh17/Self-Forcing, and the trainers made from it.

Everything is an attribute of the trainer of `trainer/distillation.py`: the generator, the teacher `real_score` and the
fake score `fake_score` of `model`, each in FSDP1 with `use_orig_params=True` (`trainer/distillation.py:73-92`,
`utils/distributed.py:63`), and their optimizers (:106-120). `train` is called once (`train.py:41`), after the weights
were loaded. The generator's update comes first, at step 0 and then every `dfake_gen_update_ratio` steps (:316).

Causal-Forcing (thu-ml), RollingForcing (TencentARC), LongLive (NVlabs), Reward-Forcing (JaydenLyh) and
Self-Forcing-Plus (GoatWu) keep these names. LongLive's fake score is LoRA layers in its published settings.

* `save` writes the generator and the fake score, without optimizers (:182), and the trainer loads the generator alone
  (:161, `generator_ckpt`), or its average (Causal-Forcing). A resumed run goes on at the position of the checkpoint,
  and its fake score, which the trainer begins as a copy of the teacher, begins as a copy of the active node.
* The published settings have a teacher of 14B parameters and a fake score of 1.3B (`configs/self_forcing_dmd.yaml:5`).
  With `real_name: Wan2.1-T2V-1.3B` both have one size.
"""

from __future__ import annotations

from typing import Any

from disback_plugin import Adapter, Watch, hookimpl

OPTIMIZERS = ("generator_optimizer", "critic_optimizer")

WATCH = Watch(
    "trainer.distillation:Trainer.train",
    frame="main",
    take="trainer",
    needs=("model.real_score", "model.fake_score", *OPTIMIZERS),
    knows="guandeh17/Self-Forcing at 33593df (September 2025) and the trainers made from it",
    saves=("trainer.distillation:Trainer.save",),
)


@hookimpl
def disback_adapter(trainer: Any) -> Adapter | None:
    """Return the roles of a Self-Forcing `Trainer`; None for anything else."""
    model = getattr(trainer, "model", None)
    if not hasattr(model, "real_score") or not all(hasattr(trainer, name) for name in OPTIMIZERS):
        return None
    return Adapter(
        teacher=model.real_score,
        fake_score=model.fake_score,
        generator_optimizer=trainer.generator_optimizer,
        fake_score_optimizer=trainer.critic_optimizer,
    )
