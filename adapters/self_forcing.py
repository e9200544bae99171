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
  Then `model.critic_loss` (:265) also fits a LoRA beside the teacher, to the generator's videos for the same prompts.
  Such a fake score, after a resume, is that of a new run. With `real_name: Wan2.1-T2V-1.3B` both have one size.
"""

from __future__ import annotations

import inspect
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
        sample=_batch,
        loss=lambda teacher, batch: _critic_loss(trainer, teacher, batch),
    )


def _batch() -> Any:
    """Return the prompts of the fake score's update, which are a variable of `train` while its optimizer steps."""
    return Watch(WATCH.call, frame="train", take="batch", knows=WATCH.knows).find_trainer(inspect.currentframe())


def _critic_loss(trainer: Any, teacher: Any, batch: Any) -> Any:
    """Return the trainer's own loss of the fake score for the teacher; the samples are the generator's."""
    model, prompts, shape = trainer.model, batch["prompts"], list(trainer.config.image_or_video_shape)
    image = None
    if trainer.config.i2v:
        image = batch["ode_latent"][:, -1][:, 0:1].to(device=trainer.device, dtype=trainer.dtype)
    if getattr(trainer.config, "gradient_checkpointing", False):  # of no effect in the loop, which takes no gradients
        teacher.enable_gradient_checkpointing()
    fake_score, conditions = model.fake_score, model.text_encoder(text_prompts=prompts)
    model.fake_score = teacher
    try:
        loss, _ = model.critic_loss(
            image_or_video_shape=[len(prompts), *shape[1:]],
            conditional_dict={name: value.detach() for name, value in conditions.items()},
            unconditional_dict=None,
            clean_latent=None,
            initial_latent=image,
        )
    finally:
        model.fake_score = fake_score
    return loss
