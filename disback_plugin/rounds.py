"""One round of score distillation, s_phi's update and the generator's, and what the two may share.

The paper's Algorithm 2, Diff-Instruct and SiD draw everything anew for each update: two passes through the generator,
two through s_phi, one through the teacher. Each saving below is off unless asked for, because it changes the algorithm.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from disback_plugin import losses
from disback_plugin.noise import add_noise
from disback_plugin.prediction import Prediction
from disback_plugin.terms.batches import Number

__all__ = ["Draw", "play"]

Score: TypeAlias = Callable[[Tensor, Tensor], Tensor]


class Draw(NamedTuple):
    """What noises a batch: x_t = alpha x + sigma eps.

    Attributes:
        t: What the networks take beside x_t, shape (B,).
        eps: Unit Gaussian noise, shape (B, ...).
        alpha: Signal scale alpha_t > 0, broadcast against x.
        sigma: Noise scale sigma_t > 0 in data units, broadcast against x.

    Example:
        >>> x = torch.zeros(2, 3)
        >>> drawn = Draw(
        ...     t=torch.tensor([0.5, 2.0]), eps=torch.ones(2, 3), alpha=1.0, sigma=torch.tensor([[0.5], [2.0]])
        ... )
        >>> (drawn.alpha * x + drawn.sigma * drawn.eps)[:, 0]
        tensor([0.5000, 2.0000])
    """

    t: Tensor
    eps: Tensor
    alpha: Number
    sigma: Number


def play(
    generate: Callable[[], Tensor],
    teacher: Score,
    fake_score: Score,
    draw: Callable[[Tensor], Draw],
    *,
    prediction: Prediction,
    update_fake_score: Callable[[Tensor], object],
    update_generator: Callable[[Tensor], object],
    loss: Callable[..., Tensor] = losses.dmd,
    denoising: Callable[..., Tensor] = losses.denoising,
    share_sample: bool = False,
    share_forward: bool = False,
    teacher_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Play one round: s_phi's update, then the generator's.

    Args:
        generate: Draws z and returns x = G(z), shape (B, ...).
        teacher: s_theta as a function of x_t and t; evaluated without a graph.
        fake_score: s_phi as a function of x_t and t.
        draw: From x to its noise; called once for each pair of x and update that has one of its own.
        prediction: The kind of both networks' outputs.
        update_fake_score: Takes s_phi's loss: zero_grad, backward, step.
        update_generator: Takes the generator's loss: zero_grad, backward, step.
        loss: The generator's, of `losses` or `kernels`, or any with that signature. Not `sid`: its gradient flows
            through both networks, which have no graph here.
        denoising: That of `losses` or of `kernels`, or one with its weight set.
        share_sample: One x for both updates, as in DMD2. Changes: the two updates see the same z, not independent ones,
            and the generator's graph is kept over s_phi's update. Saves one pass through the generator.
        share_forward: One x, one t, one eps and one pass of s_phi for both updates. Changes: the same z, t and eps in
            both, and the generator sees s_phi as it was before its update, not after. Saves a pass through the
            generator and one through s_phi. Where s_phi has several updates a round, share the last.
        teacher_dtype: Evaluate the teacher under autocast in this dtype, as torch.bfloat16. Changes: its outputs are
            rounded, to 2^-8 in bfloat16, and so is every step between two nodes that is smaller; its weights stay as
            they are.

    Returns:
        The values of s_phi's and of the generator's loss, shape () each, without graph.

    Example:
        >>> w = torch.ones(1, requires_grad=True)
        >>> def generate() -> Tensor:
        ...     return w * torch.ones(2, 1)
        >>> def draw(x: Tensor) -> Draw:
        ...     return Draw(t=torch.ones(2), eps=torch.zeros(2, 1), alpha=1.0, sigma=1.0)
        >>> zero, one = lambda x_t, t: 0 * x_t, lambda x_t, t: 0 * x_t + 1
        >>> options = dict(prediction=Prediction.X0, update_fake_score=print, update_generator=Tensor.backward)
        >>> _ = play(generate, zero, one, draw, **options, share_forward=True)
        tensor(0.)
        >>> w.grad  # towards the teacher's 0, away from the fake score's 1
        tensor([1.])
    """
    with torch.set_grad_enabled(share_sample or share_forward):
        x = generate()
    drawn = draw(x.detach())
    x_t = _noised(x, drawn)
    output = fake_score(x_t, drawn.t)
    scales = {"alpha": drawn.alpha, "sigma": drawn.sigma, "prediction": prediction}
    fake_score_loss = denoising(output, x.detach(), drawn.eps, **scales)
    update_fake_score(fake_score_loss)

    if share_forward:
        fake = output.detach()
    else:
        x = x if share_sample else generate()
        drawn = draw(x.detach())
        x_t = _noised(x, drawn)
        with torch.no_grad():
            fake = fake_score(x_t, drawn.t)
    with torch.no_grad(), torch.autocast(x.device.type, teacher_dtype, enabled=teacher_dtype is not None):
        real = teacher(x_t, drawn.t)
    scales = {"alpha": drawn.alpha, "sigma": drawn.sigma, "prediction": prediction}
    generator_loss = loss(x, real, fake, eps=drawn.eps, **scales)
    update_generator(generator_loss)
    return fake_score_loss.detach(), generator_loss.detach()


def _noised(x: Tensor, drawn: Draw) -> Tensor:
    return add_noise(x.detach(), drawn.eps, alpha=drawn.alpha, sigma=drawn.sigma)
