"""Compute the score-difference step as the public trainers do, from their formulas, in our own words.

Each function takes the trainer's tensors and ends with the gradient in `x.grad`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def dmd2(x, real, fake, *, x_t, alpha_bar, t, **_):
    """DMD2 on latents (main/sd_guidance.py): x_0 in float64, and the values it logs."""
    with torch.no_grad():
        schedule = alpha_bar.double()
        a = schedule[t].reshape(-1, 1, 1, 1)
        d_fake = (x_t.double() - (1 - a).sqrt() * fake.double()) / a.sqrt()
        d_real = (x_t.double() - (1 - a).sqrt() * real.double()) / a.sqrt()
        p_real, p_fake = x - d_real, x - d_fake
        g = torch.nan_to_num((p_real - p_fake) / p_real.abs().mean(dim=[1, 2, 3], keepdim=True))
    loss = 0.5 * F.mse_loss(x.float(), (x - g).detach().float())
    log = [x_t.float(), d_real.float(), d_fake.float(), g.float(), torch.norm(g).item()]
    loss.backward()
    return log


def dmd2_edm(x, real, fake, **_):
    """DMD2 on EDM networks (main/edm/edm_guidance.py): the networks predict x_0; the norm is logged."""
    with torch.no_grad():
        p_real, p_fake = x - real, x - fake
        g = torch.nan_to_num((p_real - p_fake) / p_real.abs().mean(dim=[1, 2, 3], keepdim=True))
    loss = 0.5 * F.mse_loss(x, (x - g).detach())
    log = torch.norm(g).item()
    loss.backward()
    return log


def fastgen(x, real, fake, **_):
    """FastGen (methods/common_loss.py:63-103): x_0-predictions, the normaliser in float32, no log."""
    with torch.no_grad():
        weight = 1 / ((x.float() - real.float()).abs().mean(dim=[1, 2, 3], keepdim=True) + 1e-6)
        wanted = x - (fake - real) * weight.to(x.dtype)
    (0.5 * F.mse_loss(x, wanted)).backward()


def sid(x, real, fake, *, alpha_sid=1.2, **_):
    """SiD (training/sid_loss.py): masks by NaN, gradients through both networks' outputs."""
    broken = torch.zeros(len(x), dtype=torch.bool)
    for tensor in (x, real, fake):
        broken = broken | torch.isnan(tensor).flatten(1).any(1)
    if broken.any():
        x, real, fake = x[~broken], real[~broken], fake[~broken]
    with torch.no_grad():
        weight = (x - real).abs().float().mean(dim=[1, 2, 3], keepdim=True).clip(min=1e-5)
    d = real - fake
    (d * ((real - x) - alpha_sid * d) / weight).sum().mul(1 / len(x)).backward()
