"""A fake score for diffusers' LCM scripts, which have none: a copy of the teacher, trained for the recording alone.

Just before each step of the student's optimizer, which DisBack holds still meanwhile, the copy takes one step of Eq. 7
on the student's one-step samples for the prompts of its last forward. When the path is complete, it is done.
Nothing is drawn from the script's random streams.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from diffusers import LCMScheduler

from disback_plugin import Prediction, hookimpl, losses, noise
from disback_plugin.errors import RoleError

__all__ = ["Recording"]

LEARNING_RATE = 1e-5  # of `disback.record`, and of the paper's EDM teachers (B.2)


class Recording:
    """What trains the copy, and a plug-in that hears when there is no more to do.

    Args:
        trainer: With `teacher_unet`, `unet`, `optimizer` and `noise_scheduler`.

    Attributes:
        fake_score: The copy.
        optimizer: Its own.
    """

    def __init__(self, trainer: Any) -> None:
        self.student = trainer.unet
        self.fake_score = copy.deepcopy(trainer.teacher_unet).requires_grad_(True)
        self.optimizer = torch.optim.Adam(self.fake_score.parameters(), lr=LEARNING_RATE)
        self.noise = noise.from_diffusers(trainer.noise_scheduler)
        self.prediction = Prediction.from_diffusers(trainer.noise_scheduler)
        self.scheduler = LCMScheduler.from_config(trainer.noise_scheduler.config)
        self.scheduler.set_timesteps(1)
        self.scheduler.set_begin_index(0)
        self._stream: torch.Generator | None = None
        self._done = False
        self._seen: tuple[torch.Tensor, dict[str, Any]] | None = None
        plain = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
        self._hooks = [
            trainer.unet.register_forward_pre_hook(self._see, with_kwargs=True),
            plain.register_step_pre_hook(self._fit),
        ]

    @hookimpl
    def disback_after_path_completed(self) -> None:
        """Train no more; hooks stay for now, for one of them may be what is running."""
        self._done, self._seen = True, None

    @hookimpl
    def disback_after_node_swapped(self) -> None:
        """Let go of the script: the walk has begun, perhaps on a path that was there already."""
        self._done = True
        while self._hooks:
            self._hooks.pop().remove()
        self.optimizer.state.clear()

    def _see(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if (
            torch.is_grad_enabled() and not self._done
        ):  # the script's own forward of a batch, not its target's, nor the one below
            self._seen = args[0].detach(), kwargs

    def _fit(self, *_: Any) -> None:
        if self._seen is None:
            return
        if torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1:
            raise RoleError(
                "a recording of an LCM script on several processes",
                expected="one, whose copy of the teacher nobody has to average",
                cure="record on one process, with --max_train_steps 1; then all processes use the path",
            )
        like, kwargs = self._seen
        if self._stream is None:
            self._stream = torch.Generator(like.device).manual_seed(0)
        draw = {"generator": self._stream, "device": like.device}
        with torch.no_grad():
            z = torch.randn(like.shape, **draw)
            start = self.scheduler.timesteps[0]
            output = self.student(z, start.expand(len(z)).to(z.device), **kwargs)[0].float()
            x = copy.copy(self.scheduler).step(output, start, z, return_dict=False)[0]
        t = torch.randint(len(self.noise.alphas_cumprod), (len(x),), **draw)
        alpha, sigma = (noise.expand(value, x) for value in self.noise(t))
        eps = torch.randn(x.shape, **draw)
        x_t = noise.add_noise(x, eps, alpha=alpha, sigma=sigma).to(self.fake_score.dtype)
        conditions = {
            name: kwargs[name]
            for name in ("encoder_hidden_states", "added_cond_kwargs")
            if kwargs.get(name) is not None
        }
        with torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
            output = self.fake_score(x_t, t, **conditions)[0]
            loss = losses.denoising(output, x, eps, alpha=alpha, sigma=sigma, prediction=self.prediction)
            self.optimizer.zero_grad()
            loss.backward()
        self.optimizer.step()
