r"""The notation of this package, declared once: x_t = alpha_t x_0 + sigma_t eps, with eps ~ N(0, I).

A noise schedule is a function from times t, shape (B,), to the signal scale alpha_t and the noise scale sigma_t. The
DisBack paper writes its equations for alpha_t = 1 (variance exploding); everything here holds for any alpha_t.

| schedule        | t                | alpha_t                | sigma_t                                    |
|-----------------|------------------|------------------------|--------------------------------------------|
| `Karras`        | [0, 1]           | 1                      | (a + t (b - a))^rho, from sigma_min to _max |
| `Discrete`      | 0, 1, ..., T - 1 | sqrt(alphas_cumprod_t) | sqrt(1 - alphas_cumprod_t)                 |
| `RectifiedFlow` | [0, 1]           | 1 - t                  | t                                          |

A time outside its domain raises an OptionError if it is a number or a tensor on the CPU. A tensor on another device is
not read, because that would wait for the device. `from_diffusers` reads the schedule of a diffusers scheduler.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from disback_plugin.errors import OptionError

__all__ = ["Discrete", "Karras", "RectifiedFlow", "add_noise", "expand", "from_diffusers", "lognormal_sigma"]


@dataclass(frozen=True)
class Karras:
    """The variance-exploding schedule of EDM (Karras et al., arXiv 2206.00364, Eq. 5): alpha_t = 1.

    Args:
        sigma_min: Noise scale at t = 0, in data units, > 0.
        sigma_max: Noise scale at t = 1, in data units, > sigma_min.
        rho: Curvature, > 0; 7 in EDM.

    Raises:
        OptionError: If not 0 < sigma_min < sigma_max, or rho <= 0.

    Example:
        >>> alpha_t, sigma_t = Karras()(torch.tensor([0.0, 1.0]))
        >>> alpha_t.tolist(), [round(s, 3) for s in sigma_t.tolist()]
        ([1.0, 1.0], [0.002, 80.0])
    """

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0

    def __post_init__(self) -> None:
        if not (0 < self.sigma_min < self.sigma_max and self.rho > 0):
            raise OptionError(repr(self), expected="0 < sigma_min < sigma_max, rho > 0", cure="correct the arguments")

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return alpha_t = 1 and sigma_t in float32 or better for times t in [0, 1], shape (B,)."""
        _validate_times(t, 1.0, self)
        t = t.to(torch.promote_types(t.dtype, torch.float32))
        low, high = self.sigma_min ** (1 / self.rho), self.sigma_max ** (1 / self.rho)
        return torch.ones_like(t), (low + t * (high - low)) ** self.rho


@dataclass(frozen=True)
class Discrete:
    """A variance-preserving schedule on a grid, as DDPM and Stable Diffusion use it: alpha_t^2 + sigma_t^2 = 1.

    Args:
        alphas_cumprod: alpha_t^2 for t = 0 ... T - 1, each in [0, 1), not increasing. Under a zero terminal
            signal-to-noise ratio the last is 0, and only X0, V and FLOW predictions make sense there.

    Raises:
        OptionError: If a value lies outside [0, 1) or the sequence increases.

    Example:
        >>> alpha_t, sigma_t = Discrete((0.81, 0.36))(torch.tensor([1]))
        >>> round(alpha_t.item(), 6), round(sigma_t.item(), 6)
        (0.6, 0.8)
    """

    alphas_cumprod: tuple[float, ...]

    def __init__(self, alphas_cumprod: Sequence[float] | Tensor) -> None:
        values = alphas_cumprod.tolist() if isinstance(alphas_cumprod, Tensor) else list(alphas_cumprod)
        if not (values and values[0] < 1 and all(a >= b for a, b in pairwise([*values, 0.0]))):
            raise OptionError(
                f"{len(values)} alphas_cumprod from {max(values, default=None)} to {min(values, default=None)}",
                expected="one or more values in [0, 1) that never increase",
                cure="pass scheduler.alphas_cumprod of the teacher's own noise schedule",
            )
        object.__setattr__(self, "alphas_cumprod", tuple(values))

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return alpha_t and sigma_t in float32 for integer times t in {0, ..., T - 1}, shape (B,)."""
        _validate_times(t, len(self.alphas_cumprod) - 1, self)
        # The difference is taken in float64, because 1 - alpha_t^2 cancels at small t, and rounded before the square
        # root, so that it equals diffusers' float32 difference of float32 values bit for bit.
        alpha_bar = torch.tensor(self.alphas_cumprod, dtype=torch.float64, device=t.device)[t]
        return alpha_bar.float().sqrt(), (1 - alpha_bar).float().sqrt()


@dataclass(frozen=True)
class RectifiedFlow:
    """The straight schedule of flow matching (arXiv 2209.03003): x_t = (1 - t) x_0 + t eps.

    Example:
        >>> [value.item() for value in RectifiedFlow()(torch.tensor([0.25]))]
        [0.75, 0.25]
    """

    def __call__(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return alpha_t = 1 - t and sigma_t = t for times t in [0, 1], shape (B,)."""
        _validate_times(t, 1.0, self)
        return 1 - t, t


def from_diffusers(scheduler: object) -> Discrete | RectifiedFlow:
    """Return the noise schedule that a network under a diffusers scheduler was trained with.

    Options for sampling alone (spacing, Karras sigmas, `shift`, dynamic shifting) change which times are visited, not
    x_t at a time, and are ignored: under flow matching sigma_t = t whatever the shift. In float32 `add_noise` with a
    `Discrete` equals that of DDPM, DDIM, LCM, PNDM and TCD bit for bit, that of DPM-Solver, UniPC and CogVideoX to
    7e-7. A scheduler that adds sigma eps alone (Euler) divides by sqrt(1 + sigma^2) before the network, which
    amounts to the same.

    Args:
        scheduler: The scheduler, or the content of its `scheduler_config.json` as a mapping.

    Returns:
        A `Discrete` (DDPM, DDIM, LCM, PNDM, Euler, DPM-Solver), or a `RectifiedFlow`, whose t is the scheduler's
        timestep / num_train_timesteps.

    Raises:
        OptionError: If the scheduler has another schedule (EDM, consistency models, TrigFlow ...), or if the config
            names no known class.

    Example:
        >>> from diffusers import FlowMatchEulerDiscreteScheduler
        >>> from_diffusers(FlowMatchEulerDiscreteScheduler(shift=3.0))
        RectifiedFlow()
    """
    scheduler = built(scheduler)
    name, config = type(scheduler).__name__, dict(getattr(scheduler, "config", {}))
    alphas_cumprod = getattr(scheduler, "alphas_cumprod", None)
    flows = any(kind.__name__.startswith("FlowMatch") for kind in type(scheduler).__mro__)
    if name.startswith("EDM") or config.get("timestep_type") == "continuous":
        reason = "which also scales what goes into the network and comes out of it"
    elif config.get("invert_sigmas"):
        reason = "whose time runs from noise to data under invert_sigmas=True"
    elif flows or config.get("use_flow_sigmas"):
        return RectifiedFlow()
    elif alphas_cumprod is not None:
        return Discrete(alphas_cumprod)
    else:
        reason = "which has no alphas_cumprod and is not of flow matching"
    raise OptionError(
        f"{name}, {reason}",
        expected="a schedule alone, of a DDPM or of a flow-matching model",
        cure="pass the scheduler of the teacher's own repository, or give the network as a function of x_t and sigma "
        "that does this scaling, under noise.Karras(sigma_min, sigma_max, rho) with Prediction.X0, or "
        "noise.RectifiedFlow() with t = sigma",
    )


def built(scheduler: object) -> Any:
    """Return the scheduler itself, or the one that diffusers builds from its config."""
    if not isinstance(scheduler, Mapping):
        return scheduler
    import diffusers

    kind = getattr(diffusers, str(scheduler.get("_class_name")), None)
    if kind is None or not hasattr(kind, "from_config"):
        raise OptionError(
            f"a scheduler's config with _class_name={scheduler.get('_class_name')!r}",
            expected="the name of a scheduler of diffusers",
            cure="pass the scheduler itself, or the whole content of scheduler_config.json",
        )
    return kind.from_config(dict(scheduler))


def _validate_times(t: Tensor | float, last: float, schedule: object) -> None:
    """Raise OptionError for a time outside [0, last]: for an integer `last`, of {0, ..., last}."""
    steps, times, found = isinstance(last, int), torch.as_tensor(t), ""
    fits = not steps or not (times.is_floating_point() or times.dtype == torch.bool)
    if fits and times.is_cpu and times.numel() and not torch.compiler.is_compiling():
        low, high = (float(end) for end in times.detach().aminmax())
        rounding = 4 * torch.finfo(times.dtype).eps if times.is_floating_point() else 0.0
        fits, found = -rounding <= low and high <= last + rounding, f" from {low:g} to {high:g}"  # NaN does not fit
    if not fits:
        raise OptionError(
            f"times t of {times.dtype}{found} for {type(schedule).__name__}",
            expected=f"integers in {{0, ..., {last}}}" if steps else "numbers in [0, 1]",
            cure="pass the timesteps as they are" if steps else "divide a timestep by the number of training timesteps",
        )


def expand(value: Tensor, like: Tensor) -> Tensor:
    """Append axes to one value a sample, shape (B,), so that it broadcasts against `like`, shape (B, ...).

    Example:
        >>> expand(torch.ones(2), like=torch.zeros(2, 3, 8, 8)).shape
        torch.Size([2, 1, 1, 1])
    """
    return value.reshape(value.shape + (1,) * (like.ndim - value.ndim))


def add_noise(x_0: Tensor, eps: Tensor, *, alpha: Tensor | float, sigma: Tensor | float) -> Tensor:
    """Return x_t = alpha_t x_0 + sigma_t eps, shape (B, ...).

    Args:
        x_0: Clean samples, shape (B, ...).
        eps: Unit Gaussian noise, shape (B, ...).
        alpha: Signal scale alpha_t >= 0, broadcast against x_0.
        sigma: Noise scale sigma_t >= 0 in data units, broadcast against x_0.

    Example:
        >>> add_noise(torch.ones(1, 2), torch.ones(1, 2), alpha=0.5, sigma=2.0).tolist()
        [[2.5, 2.5]]
    """
    return alpha * x_0 + sigma * eps


def lognormal_sigma(
    batch: int,
    *,
    mean: float = -1.2,
    std: float = 1.2,
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Draw noise scales with ln sigma ~ N(mean, std^2), shape (batch,): the training distribution of EDM (Table 1).

    Args:
        batch: Number of draws B.
        mean: P_mean of EDM.
        std: P_std of EDM, >= 0.
        generator: Source of randomness; the default one of torch if None.
        device: Where to draw.

    Example:
        >>> lognormal_sigma(3, generator=torch.Generator().manual_seed(0)).shape
        torch.Size([3])
    """
    return (mean + std * torch.randn(batch, generator=generator, device=device)).exp()
