"""The formulas of the losses, with the arguments that the losses call them with."""

from __future__ import annotations

from typing import Any

import torch

from disback_plugin import _loss_formulas as formulas
from disback_plugin import losses
from disback_plugin.prediction import Prediction


def formula(
    loss: str,
    shape: tuple[int, ...],
    dtype: str = "float32",
    prediction: str = "EPS",
    guided: bool = False,
    nan_in_sample: int | None = None,
    **options: Any,
) -> tuple[formulas.Formula, tuple[Any, ...]]:
    """Return the formula and the inputs of one call of a loss: outputs of networks in `dtype`, samples in float32."""
    calls = []

    def record(formula: formulas.Formula, *inputs: Any) -> tuple[torch.Tensor, ...]:
        calls.append((formula, inputs))
        return formula(*inputs)

    stream = torch.Generator().manual_seed(0)
    batch, *image = shape
    x, eps, fake, real = (torch.randn(n * batch, *image, generator=stream) for n in (1, 1, 1, 1 + guided))
    fake = fake + x  # else sum((f - r) x) would cancel, and its relative error say nothing
    fake, real = (output.to(getattr(torch, dtype)) for output in (fake, real))
    if nan_in_sample is not None:
        fake[nan_in_sample].view(-1)[0] = torch.nan
    sigma = torch.rand(batch, 1, 1, 1, generator=stream) * 0.8 + 0.1
    options |= {"alpha": (1 - sigma**2).sqrt(), "sigma": sigma, "prediction": Prediction[prediction]}
    if guided:
        options["guidance"] = 7.5
    arguments = (real, x, eps) if loss == "denoising" else (x, real, fake)
    if loss in ("dmd", "sid"):
        options["eps"] = eps
    token = formulas.RUNNER.set(record)
    try:
        getattr(losses, loss)(*arguments, **options)
    finally:
        formulas.RUNNER.reset(token)
    (call,) = calls
    return call
