"""The losses as their authors write them, in float64 and in x_0 form, which the residual form has to equal; batches."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from disback_plugin.noise import add_noise
from disback_plugin.prediction import Prediction, convert

LOSSES = ["diff_instruct", "vsd", "dmd", "sid", "denoising"]
# The generator losses that read the noise: their normaliser compares the teacher with the target.
READ_EPS = ("dmd", "sid")


def noise_of(name, eps):
    """The argument `eps` for the losses that read it."""
    return {"eps": eps} if name in READ_EPS else {}


def predictions(kind, x, eps, real, fake, alpha, sigma):
    """The two x_0-predictions in float64, computed from the very outputs that the loss sees."""
    x, eps, real, fake, alpha, sigma = (torch.as_tensor(t).double() for t in (x, eps, real, fake, alpha, sigma))
    scales = {"x_t": alpha * x + sigma * eps, "alpha": alpha, "sigma": sigma}
    return (convert(output, kind, Prediction.X0, **scales) for output in (real, fake))


def per_sample(t):
    return t.flatten(1).mean(1).reshape(-1, *[1] * (t.ndim - 1))


def dmd_gradient(kind, x, eps, real, fake, alpha, sigma):
    """DMD2's: ((x - D_real) - (x - D_fake)) / mean|x - D_real|, over all elements."""
    d_real, d_fake = predictions(kind, x, eps, real, fake, alpha, sigma)
    x = x.double()
    return ((x - d_real) - (x - d_fake)) / per_sample((x - d_real).abs()) / x.numel()


def guided(network, scale):
    """The network under guidance by hand, from its output on both halves of the doubled batch; None is no guidance."""

    def output(x_t):
        if scale is None:
            return network(x_t)
        unconditional, conditional = network(torch.cat([x_t, x_t])).chunk(2)
        return unconditional + scale * (conditional - unconditional)

    return output


def sid_loss(kind, x, eps, networks, alpha, sigma, alpha_sid):
    """SiD's, with the graph through both networks and both direct paths of x; float64."""
    x_t = alpha * x + sigma * eps
    d_real, d_fake = (convert(net(x_t), kind, Prediction.X0, x_t=x_t, alpha=alpha, sigma=sigma) for net in networks)
    weight = per_sample((x - d_real).detach().abs()).clamp(min=1e-5)
    loss = (d_real - d_fake) * ((d_real - x) - alpha_sid * (d_real - d_fake)) / weight
    return loss.sum() / len(x)


@st.composite
def batches(draw):
    """x, x_t, eps, alpha, sigma and two random outputs, all float64."""
    shape = [draw(st.integers(1, 5)), *draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))]
    stream = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    x, eps, real, fake = (torch.randn(shape, generator=stream, dtype=torch.float64) for _ in range(4))
    column = [shape[0], *[1] * (len(shape) - 1)]
    angle = 0.1 + 1.3 * torch.rand(column, generator=stream, dtype=torch.float64)
    alpha, sigma = angle.cos(), angle.sin()
    return x, add_noise(x, eps, alpha=alpha, sigma=sigma), eps, alpha, sigma, real, fake


@st.composite
def frames(draw):
    """x, eps, alpha, sigma and two outputs as of a causal video trainer: a noise level a frame, in axis 1; float64."""
    batch, count, *rest = draw(st.lists(st.integers(1, 4), min_size=3, max_size=5))
    stream = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    x, eps, real, fake = (torch.randn(batch, count, *rest, generator=stream, dtype=torch.float64) for _ in range(4))
    angle = 0.1 + 1.3 * torch.rand(batch, count, *[1] * len(rest), generator=stream, dtype=torch.float64)
    return x, eps, angle.cos(), angle.sin(), real, fake


def relative_error(found, expected):
    return ((found.double() - expected).norm() / expected.norm()).item()


def value_and_gradients(loss, name, kind, batch, shape=(3, 8, 8), dtype=torch.float32, seed=0, **options):
    """Value and gradients of one call."""
    stream = torch.Generator().manual_seed(seed)
    x, real, fake, eps = (torch.randn(batch, *shape, generator=stream).to(dtype).requires_grad_() for _ in range(4))
    sigma = torch.rand(batch, 1, 1, 1, generator=stream) * 0.8 + 0.1
    options |= {"alpha": (1 - sigma**2).sqrt(), "sigma": sigma, "prediction": kind}
    if name == "denoising":
        value = loss(real, x, eps.detach(), **options)
    else:
        value = loss(x, real, fake, **noise_of(name, eps.detach()), **options)
    value.backward()
    return [value.detach(), *(t.grad for t in (x, real, fake) if t.grad is not None)]
