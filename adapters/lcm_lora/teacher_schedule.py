"""Fit a copy of the teacher as the fake score that diffusers' LCM scripts do not have, during the recording only.

Just before each step of the student's optimizer, which DisBack hides the gradients from meanwhile, the copy takes one
step of Eq. 7 on the student's one-step samples for the prompts of its last forward. The script's random streams are not
used.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from diffusers import LCMScheduler
from disback_adapters.lcm_lora.roles import noised

from disback_plugin import Prediction, losses, noise
from disback_plugin.errors import RoleError

LEARNING_RATE = 1e-5  # of `disback.record`, and of the paper's EDM teachers (B.2)


class StandIn:
    """A copy of the teacher that is trained, inside the context, from hooks on the script's student and optimizer.

    Args:
        trainer: An object with `teacher_unet`, `unet`, `optimizer` and `noise_scheduler`.

    Attributes:
        fake_score: The copy.
        optimizer: The copy's optimizer.
    """

    def __init__(self, trainer: Any) -> None:
        self.student, scheduler = trainer.unet, trainer.noise_scheduler
        self.fake_score = copy.deepcopy(trainer.teacher_unet).requires_grad_(True)
        self.optimizer = torch.optim.Adam(self.fake_score.parameters(), lr=LEARNING_RATE)
        self.noise, self.prediction = noise.from_diffusers(scheduler), Prediction.from_diffusers(scheduler)
        self.scheduler = LCMScheduler.from_config(scheduler.config)
        self.scheduler.set_timesteps(1)
        self.scheduler.set_begin_index(0)
        self._student_optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
        self._stream = torch.Generator(self.fake_score.device).manual_seed(0)
        self._batch: tuple[torch.Tensor, dict[str, Any]] | None = None
        self._hooks: list[Any] = []

    def __enter__(self) -> None:
        self._hooks = [
            self.student.register_forward_pre_hook(self._keep_batch, with_kwargs=True),
            self._student_optimizer.register_step_pre_hook(self._update),
        ]

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
        self._batch = None
        self.optimizer.state.clear()

    def _keep_batch(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        # The script's own forward has gradients; its target's has none, nor the one in `_update`.
        if torch.is_grad_enabled():
            self._batch = args[0].detach(), kwargs

    def _update(self, *_: Any) -> None:
        if self._batch is None:
            return
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            found = "a recording of an LCM script on several processes"
            cure = "record on one process, with --max_train_steps 1; then all processes use the path"
            raise RoleError(found, expected="one process, as no gradients are averaged here", cure=cure)
        like, kwargs = self._batch
        with torch.no_grad():
            z, start = torch.randn(like.shape, generator=self._stream, device=like.device), self.scheduler.timesteps[0]
            output = self.student(z, start.expand(len(z)).to(z.device), **kwargs)[0].float()
            x = copy.copy(self.scheduler).step(output, start, z, return_dict=False)[0]
        x_t, t, eps, at_t = noised(self.noise, x, generator=self._stream)
        names = ("encoder_hidden_states", "added_cond_kwargs")
        conditions = {name: kwargs[name] for name in names if kwargs.get(name) is not None}
        with torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
            output = self.fake_score(x_t.to(self.fake_score.dtype), t, **conditions)[0]
            loss = losses.denoising(output, x, eps, prediction=self.prediction, **at_t)
            self.optimizer.zero_grad()
            loss.backward()
        self.optimizer.step()
