"""The two updates of a round: s_phi's denoising loss, Eq. 7, and the generator's, Eq. 8. Neither knows of DisBack.

Gradients are averaged over processes here and not by DDP, which knows nothing of several roles in one network.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator
from disback_adapters.lcm_lora.networks import Cast, Role
from disback_adapters.lcm_lora.options import LOSSES, Options
from disback_adapters.lcm_lora.prompts import Embeddings
from torch import Tensor, nn

from disback_plugin import kernels, noise

__all__ = ["Updates"]

CLIP = 10.0  # of a gradient's norm, as in DMD2 (main/train_sd.py:366-380)
# Where the two scores are compared, as a share of the longest time: as in DMD2 (main/sd_guidance.py:179).
COMPARED = (0.02, 0.98)


class Updates:
    """What is drawn, and what the two optimizers step.

    Args:
        options: The user's.
        accelerator: Of the run.
        cast: The three roles.
        embeddings: The conditions of the prompts.
        size: Height and width of x.
    """

    def __init__(
        self, options: Options, accelerator: Accelerator, cast: Cast, embeddings: Embeddings, size: int
    ) -> None:
        self.options, self.accelerator, self.cast, self.embeddings = options, accelerator, cast, embeddings
        self.denoiser = cast.teacher.denoiser
        self.shape = (options.batch_size, self.denoiser.channels, size, size)
        self.weights, self.fake_score_weights = cast.student.role.trainable(), cast.fake_score.trainable()
        self.optimizer, self.fake_score_optimizer = accelerator.prepare(
            torch.optim.Adam(self.weights, lr=options.learning_rate),
            torch.optim.Adam(self.fake_score_weights, lr=options.fake_score_learning_rate),
        )

    def update_fake_score(self) -> Tensor:
        """Fit s_phi to samples of the student as it stands; return the loss, shape ()."""
        conditions = self._conditions()
        with torch.no_grad():
            x = self._generate(conditions)
        t = self._times(0.0, 1.0)
        x_t, eps, alpha, sigma = self._noised(x, t)
        with self.accelerator.autocast():
            output = self.cast.fake_score(x_t, t, conditions)
        loss = kernels.denoising(output, x, eps, alpha=alpha, sigma=sigma, prediction=self.denoiser.prediction)
        self._step(loss, self.cast.fake_score, self.fake_score_optimizer, self.fake_score_weights)
        return loss.detach()

    def update_generator(self) -> Tensor:
        """Move the student along the score difference; return the loss, shape (), which measures no progress."""
        conditions = self._conditions()
        x = self._generate(conditions)
        t = self._times(*COMPARED)
        x_t, _, alpha, sigma = self._noised(x.detach(), t)
        with torch.no_grad(), self.accelerator.autocast():
            fake = self.cast.fake_score(x_t, t, conditions)
            real = self._real(x_t, t, conditions)
        loss = getattr(kernels, self.options.loss)(
            x,
            real,
            fake,
            alpha=alpha,
            sigma=sigma,
            prediction=self.denoiser.prediction,
            weight=LOSSES[self.options.loss](alpha, sigma),
            guidance=self.options.guidance if self._guided else None,
        )
        self._step(loss, self.cast.student.role, self.optimizer, self.weights)
        return loss.detach()

    def step_nothing(self) -> None:
        """Take the generator's turn without gradients: while DisBack records, they would be computed in vain."""
        self.optimizer.step()

    @property
    def _guided(self) -> bool:
        return self.options.guidance != 1

    def _real(self, x_t: Tensor, t: Tensor, conditions: Mapping[str, Tensor]) -> Tensor:
        """Return the teacher's output; with guidance both branches, in one batch, that of no prompt first."""
        if not self._guided:
            return self.cast.teacher(x_t, t, conditions)
        null = self.embeddings.null
        both = {name: torch.cat([null[name].to(own).expand_as(own), own]) for name, own in conditions.items()}
        return self.cast.teacher(torch.cat([x_t, x_t]), torch.cat([t, t]), both)

    def _step(self, loss: Tensor, role: Role, optimizer: Any, weights: list[nn.Parameter]) -> None:
        optimizer.zero_grad()
        with role.running():  # gradient checkpointing runs its forward again
            self.accelerator.backward(loss)
        if self.accelerator.num_processes > 1:
            for weight in weights:
                if weight.grad is not None:
                    weight.grad = self.accelerator.reduce(weight.grad, reduction="mean")
        self.accelerator.clip_grad_norm_(weights, CLIP)
        optimizer.step()

    # -- draws, all from the global streams, which a checkpoint holds -------------------------------------------------

    def _conditions(self) -> dict[str, Tensor]:
        rows = torch.randint(self.embeddings.count, self.shape[:1]).tolist()
        device = self.accelerator.device
        return {name: value.to(device, non_blocking=True) for name, value in self.embeddings.rows(rows).items()}

    def _generate(self, conditions: Mapping[str, Tensor]) -> Tensor:
        with self.accelerator.autocast():
            return self.cast.student(torch.randn(self.shape, device=self.accelerator.device), conditions)

    def _times(self, low: float, high: float) -> Tensor:
        """Draw times of the noise schedule, uniform between two shares of its length, shape (B,)."""
        size, device = self.shape[:1], self.accelerator.device
        schedule = self.denoiser.noise
        if isinstance(schedule, noise.RectifiedFlow):
            return low + (high - low) * torch.rand(size, device=device)
        steps = len(schedule.alphas_cumprod)
        return torch.randint(int(low * steps), int(high * steps), size, device=device)

    def _noised(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        alpha, sigma = (noise.expand(value, x) for value in self.denoiser.noise(t))
        eps = torch.randn_like(x)
        return noise.add_noise(x, eps, alpha=alpha, sigma=sigma), eps, alpha, sigma
