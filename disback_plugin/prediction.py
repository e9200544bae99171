r"""The kinds of output of a score network, and the conversions between them.

With x_t = alpha x_0 + sigma eps, every prediction is a linear combination a x_0 + b eps:

| kind  | predicts                    | a          | b            |
|-------|-----------------------------|------------|--------------|
| EPS   | eps                         | 0          | 1            |
| X0    | x_0                         | 1          | 0            |
| V     | alpha eps - sigma x_0       | -sigma     | alpha        |
| FLOW  | eps - x_0                   | -1         | 1            |
| SCORE | grad log q(x_t) = -eps/sigma| 0          | -1 / sigma   |

so that any of them is c_x x_t + c_o * (any other), with two coefficients a pair (`coefficients`). The paper's Eq. 5
and 18 to 20 are the SCORE row at alpha = 1; its appendix C.2 swaps the names of the EPS and the X0 row. The weights of
the denoising loss, `edm_weight` and `snr_weight`, are conversions of a squared error; they are public through `losses`.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum

import torch
from torch import Tensor

from disback_plugin.errors import OptionError


class Prediction(str, Enum):
    """The kind of output of a score network.

    Example:
        >>> Prediction("v") is Prediction.V
        True
    """

    EPS = "eps"
    X0 = "x0"
    V = "v"
    FLOW = "flow"
    SCORE = "score"

    @classmethod
    def _missing_(cls, value: object) -> None:
        raise OptionError(
            f"prediction={value!r}",
            expected=f"one of {', '.join(kind.value for kind in cls)}",
            cure="pass the kind of output that the networks were trained for",
        )

    @classmethod
    def from_diffusers(cls, scheduler: object) -> Prediction:
        """Return what a network under a diffusers scheduler predicts.

        Args:
            scheduler: The scheduler, or the content of its `scheduler_config.json` as a mapping.

        Raises:
            OptionError: If its prediction type is unknown, or does not fit its noise schedule (`noise.from_diffusers`).

        Example:
            >>> from diffusers import DDPMScheduler
            >>> Prediction.from_diffusers(DDPMScheduler(prediction_type="v_prediction"))
            <Prediction.V: 'v'>
        """
        from disback_plugin.noise import RectifiedFlow, built, from_diffusers  # `attach` needs no noise schedule

        scheduler = built(scheduler)
        flows = isinstance(from_diffusers(scheduler), RectifiedFlow)
        config = dict(getattr(scheduler, "config", {}))
        found = config.get("prediction_type", "flow_prediction" if flows else None)
        if found not in _OF_DIFFUSERS or (found == "flow_prediction" and not flows):
            raise OptionError(
                f"prediction_type={found!r} of {type(scheduler).__name__}",
                expected=f"one of {', '.join(_OF_DIFFUSERS)}, and flow_prediction under flow matching",
                cure="pass the scheduler that the network was trained with, or name the Prediction yourself",
            )
        return _OF_DIFFUSERS[found]


_OF_DIFFUSERS = {
    "epsilon": Prediction.EPS,
    "sample": Prediction.X0,
    "v_prediction": Prediction.V,
    "flow_prediction": Prediction.FLOW,
}


# Of each kind: (a, b) of the table above, and the determinant D = alpha b - sigma a.
_TABLE: dict[
    Prediction, tuple[Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], Callable[[Tensor, Tensor], Tensor]]
] = {
    Prediction.EPS: (lambda _, s: (torch.zeros_like(s), torch.ones_like(s)), lambda a, _: a),
    Prediction.X0: (lambda _, s: (torch.ones_like(s), torch.zeros_like(s)), lambda _, s: -s),
    Prediction.V: (lambda a, s: (-s, a), lambda a, s: a.square() + s.square()),
    Prediction.FLOW: (lambda _, s: (-torch.ones_like(s), torch.ones_like(s)), lambda a, s: a + s),
    Prediction.SCORE: (lambda _, s: (torch.zeros_like(s), -1 / s), lambda a, s: -a / s),
}


def mixture(kind: Prediction, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """Return a, b of the table above: the prediction is a x_0 + b eps.

    Args:
        kind: The kind of prediction.
        alpha: Signal scale alpha_t > 0, any shape, floating.
        sigma: Noise scale sigma_t > 0 in data units, same shape.

    Example:
        >>> a, b = mixture(Prediction.V, torch.tensor(0.75), torch.tensor(0.5))
        >>> a.item(), b.item()
        (-0.5, 0.75)
    """
    return _TABLE[Prediction(kind)][0](alpha, sigma)


def target(kind: Prediction, x_0: Tensor, eps: Tensor, *, alpha: Tensor | float, sigma: Tensor | float) -> Tensor:
    """Return what a perfect network of this kind would predict from x_t: a x_0 + b eps, shape (B, ...), in float32 or
    better.

    Args:
        kind: The kind of prediction.
        x_0: Clean samples, shape (B, ...).
        eps: The noise in x_t = alpha x_0 + sigma eps, shape (B, ...).
        alpha: Signal scale alpha_t > 0, broadcast against x_0.
        sigma: Noise scale sigma_t > 0 in data units, broadcast against x_0.

    Example:
        >>> target(Prediction.FLOW, torch.ones(1), torch.zeros(1), alpha=0.5, sigma=0.5).item()
        -1.0
    """
    a, b = mixture(kind, *factors(x_0, alpha, sigma))
    return a * x_0.to(a.dtype) + b * eps.to(a.dtype)


def coefficients(source: Prediction, to: Prediction, *, alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """Return c_x, c_o such that (prediction `to`) = c_x x_t + c_o (prediction `source`).

    Args:
        source: The kind at hand. EPS and SCORE need alpha > 0; X0 and SCORE need sigma > 0.
        to: The kind wanted. SCORE needs sigma > 0.
        alpha: Signal scale alpha_t, any shape, floating.
        sigma: Noise scale sigma_t in data units, same shape.

    Example:
        >>> c_x, c_o = coefficients(Prediction.EPS, Prediction.X0, alpha=torch.tensor(0.6), sigma=torch.tensor(0.8))
        >>> round(c_x.item(), 4), round(c_o.item(), 4)  # x_0 = (x_t - sigma eps) / alpha
        (1.6667, -1.3333)
    """
    a, b = mixture(source, alpha, sigma)
    a_to, b_to = mixture(to, alpha, sigma)
    # Solve  c_x (alpha, sigma) + c_o (a, b) = (a_to, b_to)  by Cramer's rule.
    determinant = alpha * b - sigma * a
    c_x = (a_to * b - b_to * a) / determinant
    c_o = (alpha * b_to - sigma * a_to) / determinant
    return c_x, c_o


def ratio(source: Prediction, to: Prediction, *, alpha: Tensor, sigma: Tensor) -> Tensor | float:
    """Return c_o of `coefficients` alone: what a difference of 1 between two outputs of kind `source` is in `to`.

    It is D(to) / D(source), with D = alpha b - sigma a of the table above; the number 1.0 where the kinds are the same.

    Args:
        source: As in `coefficients`.
        to: As in `coefficients`.
        alpha: As in `coefficients`.
        sigma: As in `coefficients`.

    Example:
        >>> ratio(Prediction.EPS, Prediction.X0, alpha=torch.tensor(0.5), sigma=torch.tensor(0.25)).item()
        -0.5
    """
    source, to = Prediction(source), Prediction(to)
    return 1.0 if source is to else _TABLE[to][1](alpha, sigma) / _TABLE[source][1](alpha, sigma)


def convert(
    output: Tensor, source: Prediction, to: Prediction, *, x_t: Tensor, alpha: Tensor | float, sigma: Tensor | float
) -> Tensor:
    """Convert a network's output from one kind of prediction to another.

    The rounding error of the result grows like exp(|ln(alpha / sigma)| / 2), so half precision is converted, and
    returned, in float32.

    Args:
        output: Network output, shape (B, ...).
        source: Its kind.
        to: The kind wanted.
        x_t: The noisy input that the network saw, shape (B, ...).
        alpha: Signal scale alpha_t, broadcast against x_t; domain as in `coefficients`.
        sigma: Noise scale sigma_t in data units, broadcast against x_t.

    Returns:
        The converted prediction, shape (B, ...), in float32 or better; `output` itself if the kinds are the same.

    Example:
        >>> x_t = torch.tensor([[1.0]])
        >>> convert(torch.tensor([[0.5]]), Prediction.EPS, Prediction.X0, x_t=x_t, alpha=1.0, sigma=0.4).item()
        0.800000011920929
    """
    if Prediction(source) is Prediction(to):
        return output
    dtype = torch.promote_types(torch.promote_types(output.dtype, x_t.dtype), torch.float32)
    alpha, sigma = factors(x_t, alpha, sigma)
    c_x, c_o = coefficients(source, to, alpha=alpha.to(dtype), sigma=sigma.to(dtype))
    return c_x * x_t.to(dtype) + c_o * output.to(dtype)


def factors(like: Tensor, *values: Tensor | float) -> list[Tensor]:
    """Return factors as tensors on the device of `like`, in float32 or better."""
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    # A fill is enqueued; `as_tensor` would copy from the host and wait for the copy.
    tensors = (e if isinstance(e, Tensor) else torch.full((), e, dtype=dtype, device=like.device) for e in values)
    return [tensor.to(like.device, dtype) for tensor in tensors]


def edm_weight(
    sigma: Tensor, *, sigma_data: float = 0.5, alpha: Tensor | float = 1.0, prediction: Prediction = Prediction.X0
) -> Tensor:
    """Return the weight of EDM (Table 1): (sigma^2 + sigma_data^2) / (sigma sigma_data)^2 on the squared error of x_0.

    Args:
        sigma: Noise scale sigma_t > 0 in data units, any shape.
        sigma_data: Standard deviation of the data, > 0.
        alpha: Signal scale alpha_t > 0, for other predictions than X0.
        prediction: The kind whose squared error is weighted; the loss is the same for each.

    Example:
        >>> edm_weight(torch.tensor(0.5), sigma_data=0.5).item()
        8.0
    """
    weight = (sigma**2 + sigma_data**2) / (sigma * sigma_data) ** 2
    return weight * _x_0_units(sigma, alpha, prediction)


def snr_weight(
    sigma: Tensor, *, alpha: Tensor | float, clip: float = float("inf"), prediction: Prediction = Prediction.X0
) -> Tensor:
    """Return the signal-to-noise ratio alpha^2 / sigma^2: on the error of x_0 it equals weight 1 on that of eps.

    Args:
        sigma: Noise scale sigma_t > 0 in data units, any shape.
        alpha: Signal scale alpha_t > 0.
        clip: Largest ratio; 5 in min-SNR weighting (arXiv 2303.09556).
        prediction: The kind whose squared error is weighted; the loss is the same for each.

    Example:
        >>> snr_weight(torch.tensor(0.5), alpha=1.0).item()
        4.0
        >>> snr_weight(torch.tensor(0.5), alpha=1.0, prediction=Prediction.EPS).item()
        1.0
    """
    return (alpha / sigma).square().clamp(max=clip) * _x_0_units(sigma, alpha, prediction)


def _x_0_units(sigma: Tensor, alpha: Tensor | float, prediction: Prediction) -> Tensor | float:
    """Return c^2, the squared error of x_0 that a squared error of 1 in `prediction` amounts to."""
    (alpha,) = factors(sigma, alpha)
    c = ratio(prediction, Prediction.X0, alpha=alpha, sigma=sigma)
    return c * c
