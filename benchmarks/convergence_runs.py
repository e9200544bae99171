"""Train all seeds of all methods of `bench_convergence` side by side in one module.

Therefore the optimizer, whose members have their own rates and may be held still, and the end of the recording are
repeated here; `tests/benchmarks/test_convergence_bench.py` shows that `attach` gives the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from convergence_methods import LAST, LONGEST, Method, Regime
from convergence_worlds import P_STD, State, World, denoising, seeded
from torch import Tensor

from disback_plugin.convergence import EVERY, fitted_after
from disback_plugin.recorder import FEWEST_ITERATIONS, LEARNING_RATE_FACTOR
from disback_plugin.weights.marks import SAMPLE

__all__ = ["RECORDING", "TRAINING", "Distillation"]

EMA = 0.99
SAMPLES = 1_000
# Updates between two evaluations.
EVALUATE_EVERY = 20
# Updates at which the windows of the effective step end; the last is the run's end.
WINDOWS = (10, 30, 90)
# Purposes of a seed's noise.
TRAINING, RECORDING, EVALUATION = 1, 2, 3


class Adam:
    """Adam without momentum, betas (0, 0.999), whose members have their own rates and may be held still."""

    def __init__(self, weights: list[Tensor], rates: Tensor) -> None:
        self.weights, self.rates = weights, rates
        self.second = [torch.zeros_like(weight) for weight in weights]
        self.updates = torch.zeros(len(rates))

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor], moving: Tensor, capped: Tensor | None = None) -> Tensor | None:
        """Update the members for which `moving`, shape (E,), is 1, and not those for which it is 0.

        With `capped`, return each member's effective step, the RMS of its step over its rate, which is at most 1 for
        the members for which `capped` is 1.
        """
        self.updates += moving
        correction, steps, lengths = (1 - 0.999 ** self.updates.clamp(min=1)).sqrt(), [], None
        for weight, g, second in zip(self.weights, gradients, self.second, strict=True):
            second.lerp_(g * g, along(0.001 * moving, weight))
            # With v^ = second / correction^2: rate g / (sqrt(v^) + 1e-8).
            denominator = second.sqrt().add_(along(1e-8 * correction, weight))
            steps.append(denominator.reciprocal_().mul_(g))
        scale = self.rates * moving * correction
        if capped is not None:
            squares = sum(step.flatten(1).square().sum(1) for step in steps)
            lengths = correction * (squares / sum(step[0].numel() for step in steps)).sqrt()
            factor = torch.where((capped > 0) & (lengths > 1), 1 / lengths, 1.0)
            scale, lengths = scale * factor, lengths * factor
        for weight, step in zip(self.weights, steps, strict=True):
            weight.sub_(step.mul_(along(scale, weight)))
        return lengths

    def forget(self, members: Tensor) -> None:
        """Reset the state of the members for which `members` is 1."""
        self.updates *= 1 - members
        for second in self.second:
            second *= 1 - along(members, second)


def along(members: Tensor, weight: Tensor) -> Tensor:
    """Reshape one number a member to broadcast against a weight of shape (E, ...)."""
    return members.view(-1, *[1] * (weight.ndim - 1))


class Distillation:
    """All seeds of all methods side by side: member m * len(seeds) + s is seed s under method m.

    Args:
        world: Data and networks.
        regime: Loss, noise scale and batch.
        methods: Methods to compare.
        rates: Learning rate of each method, of both networks.
        seeds: Seeds of the noise.
        teacher: Weights of each seed's teacher, (len(seeds), ...).
        student: Weights of each seed's first student.
    """

    def __init__(
        self,
        world: World,
        regime: Regime,
        methods: Sequence[Method],
        rates: Sequence[float],
        seeds: Sequence[int],
        teacher: State,
        student: State,
    ) -> None:
        self.world, self.regime = world, regime
        self.methods = [method for method in methods for _ in seeds]
        self._seed_of = torch.arange(len(seeds)).repeat(len(methods))
        self._streams = {
            purpose: [seeded(1_000_003 * purpose + seed) for seed in seeds]
            for purpose in (TRAINING, RECORDING, EVALUATION)
        }
        self.target, self.fake, self.generator = (world.build(len(self.methods)) for _ in range(3))
        for network, state in ((self.target, teacher), (self.fake, teacher), (self.generator, student)):
            network.load_state_dict({name: weight[self._seed_of] for name, weight in state.items()})
        self.fake.requires_grad_(True)
        self.generator.requires_grad_(True)
        pairs = zip(methods, rates, strict=True)
        each = torch.tensor([rate * method.times for method, rate in pairs for _ in seeds])
        self._fake_adam = Adam(list(self.fake.parameters()), each)
        self._generator_adam = Adam(list(self.generator.parameters()), each)
        self.average = [weight.detach().clone() for weight in self.generator.parameters()]
        self._z = self._noise(EVALUATION, SAMPLES, world.size * (2 if regime.second else 1))
        self.recorded = [0] * len(self.methods)
        self.fitted = [0] * len(self.methods)

    def record(self) -> None:
        """Fit s_phi to the generator, which is held still (Algorithm 1), each member as long as its method says."""
        planned = [LONGEST if method.record is None else method.record for method in self.methods]
        last, columns = None, [[] for _ in self.methods]
        rates = self._fake_adam.rates
        factor = torch.tensor([float(LEARNING_RATE_FACTOR if method.record is None else 1) for method in self.methods])
        for done in range(1, max(planned) + 1):
            moving = torch.tensor([float(done <= count) for count in planned])
            if not moving.any():
                break
            self._fake_adam.rates = rates * factor
            gradient = sampled(self.fake_step(RECORDING, moving))
            if last is not None:
                cosines = torch.cosine_similarity(gradient, last, dim=1).tolist()
                columns = [[*column, cosine] for column, cosine in zip(columns, cosines, strict=True)]
            last = gradient
            for member, method in enumerate(self.methods):
                if method.record is None and done <= planned[member] and done % EVERY == 0:
                    if not self.fitted[member] and (fitted := fitted_after(columns[member])):
                        self.fitted[member], factor[member] = LEARNING_RATE_FACTOR * fitted, 1
                    if self.fitted[member] and done >= FEWEST_ITERATIONS:
                        planned[member] = done
        self.recorded, self._fake_adam.rates = planned, rates

    def clock(self, member: int) -> int:
        """Return F of a member, or, if it was never fitted, its updates counted at the plain learning rate."""
        hastened = self.methods[member].record is None
        return self.fitted[member] or (LEARNING_RATE_FACTOR if hastened else 1) * self.recorded[member]

    def train(
        self,
        updates: int,
        tick: Callable[[], object] = lambda: None,
        *,
        curves: bool = True,
        steps: bool = False,
    ) -> dict[str, list]:
        """Run Algorithm 2; return distances of the averaged generator.

        Without `curves` only the last evaluations of the average are made. With `steps` the generator's effective steps
        are returned too, averaged in `WINDOWS`, and the capped methods are capped.
        """
        lengths: list[Tensor] = []
        origin, end = (
            [weight.detach().clone() for weight in network.parameters()] for network in (self.target, self.fake)
        )
        cold = torch.tensor([float(not method.warm) for method in self.methods])
        with torch.no_grad():
            for weight, start in zip(self.fake.parameters(), origin, strict=True):
                weight.lerp_(start, along(cold, weight))
        self._fake_adam.forget(cold)
        schedules = [
            method.schedule.settle(self.clock(i)) if method.schedule.until_fitted else method.schedule
            for i, method in enumerate(self.methods)
        ]
        everyone, current = torch.ones(len(self.methods)), torch.zeros(len(self.methods))
        found: dict[str, list] = {"updates": [], "ema": []}
        if curves:
            found["updates"].append(0)
            found["ema"].append(self._distances(self.average))
        for update in range(updates):
            for _ in range(self.regime.ratio):
                self.fake_step(TRAINING, everyone)
            aims = [schedule(update, method.nodes) for schedule, method in zip(schedules, self.methods, strict=True)]
            position = torch.tensor(
                [aim.position / method.nodes for aim, method in zip(aims, self.methods, strict=True)]
            )
            if not torch.equal(position, current):
                current = position
                with torch.no_grad():
                    for weight, a, b in zip(self.target.parameters(), origin, end, strict=True):
                        torch.lerp(a, b, along(position, a), out=weight)
            capped = None
            if steps:
                ends = [10 * self.clock(i) if method.capped else 0 for i, method in enumerate(self.methods)]
                capped = torch.tensor([float(update < end) for end in ends])
            length = self._generator_step(torch.tensor([aim.gradient for aim in aims]), everyone, capped)
            if length is not None:
                lengths.append(length)
            last = update >= updates - LAST * EVALUATE_EVERY
            if (update + 1) % EVALUATE_EVERY == 0 and (curves or last):
                found["updates"].append(update + 1)
                found["ema"].append(self._distances(self.average))
            tick()
        if steps:
            ends = (*WINDOWS, updates)
            parts = [torch.stack(lengths[a:b]).mean(0) for a, b in zip((0, *ends), ends, strict=False)]
            found["steps"] = torch.stack(parts, 1).tolist()
        return found

    def fake_step(self, purpose: int, moving: Tensor) -> tuple[Tensor, ...]:
        """Update s_phi by the denoising loss on the generator's samples; return the gradients."""
        z, log_sigma, eps = self._draws(purpose)
        with torch.no_grad():
            x_0 = self._generate(z)
        loss = denoising(self.fake, x_0, eps, log_sigma, self.world.p_mean)
        gradients = torch.autograd.grad(loss.sum(), list(self.fake.parameters()))
        self._fake_adam.step(gradients, moving)
        return gradients

    def _generator_step(self, factor: Tensor, everyone: Tensor, capped: Tensor | None) -> Tensor | None:
        z, log_sigma, eps = self._draws(TRAINING)
        sigma = (self.world.p_mean + P_STD * log_sigma).exp()[..., None]
        x = self._generate(z)
        gradients = LOSSES[self.regime.loss](x, eps, sigma, self.target, self.fake, list(self.generator.parameters()))
        length = self._generator_adam.step([g * along(factor, g) for g in gradients], everyone, capped)
        with torch.no_grad():
            torch._foreach_lerp_(self.average, [w.detach() for w in self.generator.parameters()], 1 - EMA)
        return length

    def _generate(self, z: Tensor, generator: Callable[..., Tensor] | None = None, last: bool = False) -> Tensor:
        """Return samples, of a two-step student half of them of its first step, or with `last` all of its second."""
        generator = generator or self.generator
        first, *more = z.split(self.world.size, -1)
        x = generator(self.regime.sigma_init * first, torch.tensor(self.regime.sigma_init))
        if not more:
            return x
        # As in DMD2, the second step's input is the student's own sample under noise, without a gradient.
        begun, sigma = x.detach() + self.regime.second * more[0], torch.tensor(self.regime.second)
        if last:
            return generator(begun, sigma)
        half = x.shape[1] // 2
        return torch.cat([x[:, :half], generator(begun[:, half:], sigma)], 1)

    def _draws(self, purpose: int) -> tuple[Tensor, Tensor, Tensor]:
        batch, size = self.regime.batch, self.world.size
        latent = size * (2 if self.regime.second else 1)
        z, log_sigma, eps = (self._noise(purpose, *shape) for shape in ((batch, latent), (batch,), (batch, size)))
        return z, log_sigma, eps

    def _noise(self, purpose: int, *shape: int) -> Tensor:
        return torch.stack([torch.randn(shape, generator=stream) for stream in self._streams[purpose]])[self._seed_of]

    @torch.no_grad()
    def _distances(self, weights: list[Tensor]) -> list[float]:
        """Return each member's distance with these weights of the generator instead of its own."""
        named = dict(zip(self.generator.state_dict(), weights, strict=True))

        def averaged(*arguments: Tensor) -> Tensor:
            return torch.func.functional_call(self.generator, named, arguments)

        return self.world.distance(self._generate(self._z, averaged, last=True))


def sampled(gradients: Sequence[Tensor]) -> Tensor:
    """Return every k-th number of each member's gradient, as `disback_plugin.convergence` does."""
    flat = torch.cat([gradient.flatten(1) for gradient in gradients], 1)
    return flat[:, :: -(-flat.shape[1] // SAMPLE)]


# The losses as gradients of each member alone: those of `disback_plugin.losses` are means over all members, whose
# rounding differs, and Adam makes a difference of 1e-7 grow.
def score_difference(x, eps, sigma, target, fake, weights, normalised=False):
    with torch.no_grad():
        x_t = x + sigma * eps
        real = target(x_t, sigma[..., 0])
        g = fake(x_t, sigma[..., 0]) - real
        if normalised:
            g = g / (x - real).abs().mean(-1, keepdim=True)
    return torch.autograd.grad(x, weights, grad_outputs=g / x.shape[1])


def dmd(*arguments):
    return score_difference(*arguments, normalised=True)


def sid(x, eps, sigma, target, fake, weights, alpha=1.2):
    x_t = x + sigma * eps
    real, unreal = target(x_t, sigma[..., 0]), fake(x_t, sigma[..., 0])
    weight = (x - real).abs().mean(-1, keepdim=True).clamp(min=1e-5).detach()
    loss = ((real - unreal) * ((real - x) - alpha * (real - unreal)) / weight).sum(-1).mean(-1).sum()
    return torch.autograd.grad(loss, weights)


LOSSES = {"diff-instruct": score_difference, "dmd": dmd, "sid": sid}
