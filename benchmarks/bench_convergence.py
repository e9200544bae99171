"""Does it converge faster, and where? Regimes x methods x seeds, from the same random numbers, paired.

    python benchmarks/bench_convergence.py REGIME... --out DIR     # resumable; without a regime: all of them, for hours
    python benchmarks/bench_convergence.py REGIME... --out DIR --own   # and each method at its own best rate
    python benchmarks/bench_convergence.py REGIME... --out DIR --halves    # and warm start and path of auto alone
    python benchmarks/bench_convergence.py --table DIR             # what is in DIR, as tables, into EVIDENCE.md
    python benchmarks/bench_convergence.py --figures DIR           # and as pictures, beside the results
    pytest -m slow benchmarks/bench_convergence.py                 # one tiny regime

In each regime the rate is Diff-Instruct's best of three, found on tuning seeds and teachers, and the same for every
method; with --own each method's own best of the three is found likewise, on more seeds if two are close, and those with
another one than Diff-Instruct's run at it too. What is shown are other seeds and other teachers. A regime's result
grows by one part after the other (`PARTS`), and what is there is not done again.

| method        | recording       | teacher                           | generator's gradient      |
|---------------|-----------------|-----------------------------------|---------------------------|
| diff-instruct | none            | s'_0                              | as it is                  |
| warm          | 25              | s'_0                              | as it is                  |
| grad-ramp     | none            | s'_0                              | 1 - 0.99 (1 - u / 100)+   |
| plain-ramp    | 25              | walks back in 50                  | as it is                  |
| fixed         | 50              | 3/4, 2/4, 1/4: 20, 60, 60 updates | as it is                  |
| auto          | until fitted    | walks back in F                   | whole after 3F            |

The path has one node: the straight line from s'_0 to s'_N. "fixed" stands on quarters of that line, not on recorded
nodes between. All seeds of all methods train side by side in one module, so the optimizer, whose members have rates of
their own and may stand still, and the recording's end are written here once more; `tests/test_convergence_bench.py`
shows that `attach` gives the same.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import convergence_tables as tables
import pytest
import torch
from convergence_worlds import P_MEAN, P_STD, RECIPES, State, World, denoising, seeded, students, world
from torch import Tensor
from tqdm import tqdm

from disback_plugin.degradation.fitting import EVERY, SAMPLE, fitted_after
from disback_plugin.recording import LEAST
from disback_plugin.schedules import Auto, Fixed, GradientRamp, Ramp, Schedule, Settling, Target, WarmStart

RATES = (5e-4, 1e-3, 2e-3)
# Within so much of the best score a rate may be the better one: three seeds do not tell.
CLOSE = 1.1
EMA = 0.99
SAMPLES = 1_000
EVALUATE_EVERY = 20
# A recording that never sees s' fitted ends here.
LONGEST = 200
# Purposes of a seed's noise.
TRAINING, RECORDING, EVALUATION = 1, 2, 3


@dataclass(frozen=True)
class Method:
    """What is added to Diff-Instruct: a recording (None: until s' is fitted) and a schedule on a path of N nodes.

    Without `warm`, s_phi and its optimizer begin at the teacher all the same.
    """

    name: str
    schedule: Schedule
    record: int | None = 0
    nodes: int = 1
    warm: bool = True


@dataclass(frozen=True)
class SingleAuto(Auto):
    """`Auto` in single precision, as the results in EVIDENCE.md were computed: Adam makes a difference of 1e-7 grow."""

    def __call__(self, updates: int, nodes: int) -> Target:
        position, shrunk = (
            0.9 * (1 - updates / torch.tensor(float(end))).clamp(min=0) for end in (self.fitted, 3 * self.fitted)
        )
        return Target(nodes * float(position), float(1 - shrunk))


BASELINE = Method("diff-instruct", WarmStart())
METHODS = (
    BASELINE,
    Method("warm", WarmStart(), 25),
    Method("grad-ramp", GradientRamp(100)),
    Method("plain-ramp", Ramp(50, amplitude=False), 25),
    Method("fixed", Fixed(20, 60, 60), 50, nodes=4),
    Method("auto", SingleAuto(), None),
)
# The two halves of auto, alone (the paper's Table 3), and where they were looked at.
HALVES = (Method("warm start only", WarmStart(), None), Method("path only", SingleAuto(), None, warm=False))
ABLATED = ("mlp scratch", "conv teacher 20", "conv rolled", "gauss far")


@dataclass(frozen=True)
class Regime:
    """A world, a first student, the noise scale that the generator is fed with, generator updates, and a loss."""

    world: str
    student: str
    sigma_init: float
    updates: int
    loss: str = "diff-instruct"

    @property
    def batch(self) -> int:
        return 32 if self.world == "digits-conv" else 64

    def seeds(self, part: str, *, more: bool = False) -> list[int]:
        """Return the seeds of a part; `more`: those of the tuning that close calls are decided on."""
        planar = self.world.endswith("2d")
        if part == "shown":
            return list(range(20 if planar else 10))
        return list(range(100, 110 if planar else 103)) if not more else list(range(103, 110))


REGIMES = {
    "mlp scratch": Regime("digits-mlp", "scratch", 80.0, 700),
    "mlp teacher": Regime("digits-mlp", "teacher", 2.5, 300),
    "mlp inverted": Regime("digits-mlp", "inverted", 2.5, 300),
    "conv teacher 2.5": Regime("digits-conv", "teacher", 2.5, 260),
    "conv teacher 20": Regime("digits-conv", "teacher", 20.0, 260),
    "conv teacher 80": Regime("digits-conv", "teacher", 80.0, 260),
    "conv scratch": Regime("digits-conv", "scratch", 80.0, 260),
    "conv inverted": Regime("digits-conv", "inverted", 2.5, 260),
    "conv rolled": Regime("digits-conv", "rolled", 2.5, 260),
    "conv one class": Regime("digits-conv", "one class", 2.5, 260),
    "gauss scratch": Regime("gauss10-2d", "scratch", 10.0, 400),
    "gauss teacher": Regime("gauss10-2d", "teacher", 10.0, 400),
    "gauss far": Regime("gauss10-2d", "far", 10.0, 400),
    "ring scratch": Regime("ring-2d", "scratch", 10.0, 400),
    "ring teacher": Regime("ring-2d", "teacher", 10.0, 400),
    "mlp scratch dmd": Regime("digits-mlp", "scratch", 80.0, 300, "dmd"),
    "mlp scratch sid": Regime("digits-mlp", "scratch", 80.0, 300, "sid"),
}


class Adam:
    """Adam without momentum, betas (0, 0.999), whose members have rates of their own and may stand still."""

    def __init__(self, weights: list[Tensor], rates: Tensor) -> None:
        self.weights, self.rates = weights, rates
        self.second = [torch.zeros_like(weight) for weight in weights]
        self.updates = torch.zeros(len(rates))

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor], moving: Tensor) -> None:
        """Update the members for which `moving`, shape (E,), is 1, and not those for which it is 0."""
        self.updates += moving
        corrected = 1 - 0.999 ** self.updates.clamp(min=1)
        for weight, g, second in zip(self.weights, gradients, self.second, strict=True):
            second.add_((g * g - second) * (0.001 * along(moving, weight)))
            denominator = (second / along(corrected, weight)).sqrt() + 1e-8
            weight.sub_(g / denominator * along(self.rates * moving, weight))

    def forget(self, members: Tensor) -> None:
        """Begin anew with the members for which it is 1."""
        self.updates *= 1 - members
        for second in self.second:
            second *= 1 - along(members, second)


def along(members: Tensor, weight: Tensor) -> Tensor:
    """One number a member, shaped to broadcast against a weight of shape (E, ...)."""
    return members.view(-1, *[1] * (weight.ndim - 1))


class Distillation:
    """All seeds of all methods side by side: member m * len(seeds) + s is seed s under method m.

    Args:
        world: Data and networks.
        regime: Loss, noise scale and batch.
        methods: What is compared.
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
        each = torch.tensor([rate for rate in rates for _ in seeds])
        self._fake_adam = Adam(list(self.fake.parameters()), each)
        self._generator_adam = Adam(list(self.generator.parameters()), each)
        self.average = [weight.detach().clone() for weight in self.generator.parameters()]
        self._z = self._noise(EVALUATION, SAMPLES, world.size)
        self.recorded = [0] * len(self.methods)
        self.fitted = [0] * len(self.methods)
        # Of those that are recorded until they are fitted: the mean of the first cosines.
        self.agreement = [math.nan] * len(self.methods)

    def record(self) -> None:
        """Algorithm 1: s_phi is fitted to the standing generator, each member for as long as its method says."""
        planned = [LONGEST if method.record is None else method.record for method in self.methods]
        last, columns = None, [[] for _ in self.methods]
        for done in range(1, max(planned) + 1):
            moving = torch.tensor([float(done <= count) for count in planned])
            if not moving.any():
                break
            gradient = sampled(self.fake_step(RECORDING, moving))
            if last is not None:
                cosines = torch.cosine_similarity(gradient, last, dim=1).tolist()
                columns = [[*column, cosine] for column, cosine in zip(columns, cosines, strict=True)]
            last = gradient
            for member, method in enumerate(self.methods):
                if method.record is None and done <= planned[member] and done % EVERY == 0:
                    self.fitted[member] = self.fitted[member] or fitted_after(columns[member]) or 0
                    if self.fitted[member] and done >= LEAST:
                        planned[member] = done
        self.recorded = planned
        self.agreement = [sum(c[:EVERY]) / EVERY if len(c) >= EVERY else math.nan for c in columns]

    @torch.no_grad()
    def excess(self) -> list[float]:
        """Each member's excess loss of the teacher over s_phi on the student's samples (`outlook.Outlook`)."""
        stream, shape = seeded(77), (256, self.world.size)
        z, log_sigma, eps = (torch.randn(s, generator=stream) for s in (shape, shape[:1], shape))
        z, log_sigma, eps = (t.expand(len(self.methods), *t.shape) for t in (z, log_sigma, eps))
        x_0 = self._generate(z)
        ours, fitted = (denoising(network, x_0, eps, log_sigma) for network in (self.target, self.fake))
        return (ours / fitted - 1).tolist()

    def train(self, updates: int, tick: Callable[[], object] = lambda: None) -> dict[str, list]:
        """Algorithm 2; returns distances at every evaluation: of the generator's average, and of itself."""
        origin, end = (
            [weight.detach().clone() for weight in network.parameters()] for network in (self.target, self.fake)
        )
        cold = torch.tensor([float(not method.warm) for method in self.methods])
        with torch.no_grad():
            for weight, start in zip(self.fake.parameters(), origin, strict=True):
                weight.lerp_(start, along(cold, weight))
        self._fake_adam.forget(cold)
        schedules = [
            method.schedule.settle(self.fitted[i] or self.recorded[i])
            if isinstance(method.schedule, Settling)
            else method.schedule
            for i, method in enumerate(self.methods)
        ]
        everyone = torch.ones(len(self.methods))
        found = {"updates": [0], "ema": [self._distances(self.average)], "raw": [self._distances()]}
        for update in range(updates):
            self.fake_step(TRAINING, everyone)
            aims = [schedule(update, method.nodes) for schedule, method in zip(schedules, self.methods, strict=True)]
            position = torch.tensor(
                [aim.position / method.nodes for aim, method in zip(aims, self.methods, strict=True)]
            )
            with torch.no_grad():
                for weight, a, b in zip(self.target.parameters(), origin, end, strict=True):
                    weight.copy_(torch.lerp(a, b, along(position, a)))
            self._generator_step(torch.tensor([aim.gradient for aim in aims]), everyone)
            if (update + 1) % EVALUATE_EVERY == 0:
                found["updates"].append(update + 1)
                found["ema"].append(self._distances(self.average))
                found["raw"].append(self._distances())
            tick()
        return found

    def fake_step(self, purpose: int, moving: Tensor) -> tuple[Tensor, ...]:
        """One update of s_phi by the denoising loss on the generator's samples; returns its gradients."""
        z, log_sigma, eps = self._draws(purpose)
        with torch.no_grad():
            x_0 = self._generate(z)
        loss = denoising(self.fake, x_0, eps, log_sigma)
        gradients = torch.autograd.grad(loss.sum(), list(self.fake.parameters()))
        self._fake_adam.step(gradients, moving)
        return gradients

    def _generator_step(self, factor: Tensor, everyone: Tensor) -> None:
        z, log_sigma, eps = self._draws(TRAINING)
        sigma = (P_MEAN + P_STD * log_sigma).exp()[..., None]
        x = self._generate(z)
        gradients = LOSSES[self.regime.loss](x, eps, sigma, self.target, self.fake, list(self.generator.parameters()))
        self._generator_adam.step([g * along(factor, g) for g in gradients], everyone)
        with torch.no_grad():
            torch._foreach_lerp_(self.average, [w.detach() for w in self.generator.parameters()], 1 - EMA)

    def _generate(self, z: Tensor) -> Tensor:
        return self.generator(self.regime.sigma_init * z, torch.tensor(self.regime.sigma_init))

    def _draws(self, purpose: int) -> tuple[Tensor, Tensor, Tensor]:
        batch, size = self.regime.batch, self.world.size
        z, log_sigma, eps = (self._noise(purpose, *shape) for shape in ((batch, size), (batch,), (batch, size)))
        return z, log_sigma, eps

    def _noise(self, purpose: int, *shape: int) -> Tensor:
        return torch.stack([torch.randn(shape, generator=stream) for stream in self._streams[purpose]])[self._seed_of]

    @torch.no_grad()
    def _distances(self, weights: list[Tensor] | None = None) -> list[float]:
        """Return each member's distance with these weights of the generator instead of its own."""
        if weights is None:
            return self.world.distance(self._generate(self._z))
        named = dict(zip(self.generator.state_dict(), weights, strict=True))
        scale = torch.tensor(self.regime.sigma_init)
        return self.world.distance(
            torch.func.functional_call(self.generator, named, (self.regime.sigma_init * self._z, scale))
        )


def sampled(gradients: Sequence[Tensor]) -> Tensor:
    """Every k-th number of each member's gradient, as `disback_plugin.degradation.fitting` takes them."""
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


def distil(regime, methods, rates, part, folder, title, *, more=False):
    """Run the methods of one regime; returns each method's curves and what its recordings were."""
    place, seeds = world(regime.world), regime.seeds(part, more=more)
    bank = students(place, "teacher", part, seeds, folder)
    student = students(place, regime.student, part, seeds, folder)
    runs = Distillation(place, regime, methods, rates, seeds, bank, student)
    runs.record()
    excess = runs.excess()
    with tqdm(total=regime.updates, desc=title, unit="update", leave=False) as bar:
        found = runs.train(regime.updates, bar.update)
    result = {}
    for i, method in enumerate(methods):
        mine = slice(i * len(seeds), (i + 1) * len(seeds))
        fitted = [f or r for f, r in zip(runs.fitted[mine], runs.recorded[mine], strict=True)]
        result[method.name] = {
            "updates": found["updates"],
            "ema": [values[mine] for values in found["ema"]],
            "raw": [values[mine] for values in found["raw"]],
            "recorded": [*zip(runs.recorded[mine], fitted, strict=True)],
            "excess": excess[mine],
            "agreement": runs.agreement[mine],
        }
    return result


def tuned(name, pairs, folder, *, more=False):
    """Each pair's final distance, of each tuning seed, by method and rate."""
    candidates = [replace(method, name=f"{method.name} {rate:g}") for method, rate in pairs]
    rates, title = [rate for _, rate in pairs], f"{name}: rates"
    runs = distil(REGIMES[name], candidates, rates, "tuning", folder, title, more=more)
    finals = {}
    for (method, rate), candidate in zip(pairs, candidates, strict=True):
        found = [tables.final(curve) for curve in tables.curves(runs[candidate.name]["ema"])]
        finals.setdefault(method.name, {})[f"{rate:g}"] = found
    return finals


def medians(finals):
    return {rate: median(x if math.isfinite(x) else math.inf for x in found) for rate, found in finals.items()}


def best(scores):
    return float(min(scores, key=scores.get))


def part_rate(name, folder, content):
    """Diff-Instruct's best rate."""
    scores = medians(tuned(name, [(BASELINE, rate) for rate in RATES], folder)[BASELINE.name])
    return {"name": name, "rate": best(scores), "tuning": scores}


def part_runs(name, folder, content):
    """All methods at that rate."""
    runs = distil(REGIMES[name], METHODS, [content["rate"]] * len(METHODS), "shown", folder, name)
    recorded, _ = [run.pop("recorded") for run in runs.values()][-1], [run.pop("agreement") for run in runs.values()]
    signs = [run.pop("excess") for run in runs.values()][-1]
    return {"R": {"auto": recorded}, "runs": runs, "excess": signs}


def part_own_rates(name, folder, content):
    """Each other method's best rate: of three seeds, and of ten where it is a close call."""
    finals = tuned(name, [(method, rate) for method in METHODS[1:] for rate in RATES], folder)
    if len(REGIMES[name].seeds("tuning")) < 10:
        close = [(m, r) for m in METHODS[1:] for r in close_rates(medians(finals[m.name]))]
        if close:
            for method, found in tuned(name, close, folder, more=True).items():
                finals[method] = {rate: finals[method][rate] + more for rate, more in found.items()}
    scores = {method: medians(found) for method, found in finals.items()}
    return {"own_tuning": scores, "own_rates": {method: best(score) for method, score in scores.items()}}


def close_rates(scores):
    """The rates within a tenth of the best, if there are several."""
    found = [float(rate) for rate, score in scores.items() if score <= CLOSE * min(scores.values())]
    return found if len(found) > 1 else []


def part_own_runs(name, folder, content):
    """Those methods again whose best rate is another one."""
    others = [(m, r) for m in METHODS[1:] if (r := content["own_rates"][m.name]) != content["rate"]]
    if not others:
        return {"own_runs": {}}
    runs = distil(REGIMES[name], [m for m, _ in others], [r for _, r in others], "shown", folder, f"{name}: own rates")
    return {"own_runs": runs}


def part_halves(name, folder, content):
    """The warm start alone and the path alone, at Diff-Instruct's rate."""
    if name not in ABLATED:
        return {"halves": {}}
    return {"halves": distil(REGIMES[name], HALVES, [content["rate"]] * 2, "shown", folder, f"{name}: halves")}


# Parts of a result, by a name that it has once the part is done.
PARTS = {"rate": part_rate, "runs": part_runs}
OWN = {"own_rates": part_own_rates, "own_runs": part_own_runs}
HALF = {"halves": part_halves}


def study(name: str, folder: Path, *, own: bool = False, halves: bool = False) -> None:
    """Do what of a regime's parts is not done yet; its JSON is written after each."""
    file = folder / tables.file_name(name)
    for key, part in (PARTS | (OWN if own else {}) | (HALF if halves else {})).items():
        content = json.loads(file.read_text()) if file.exists() else {}
        if key not in content:
            content |= part(name, folder, content)
            partial = file.with_suffix(".partial")
            partial.write_text(json.dumps(content))
            partial.rename(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("regimes", nargs="*", metavar="REGIME", help=f"of: {', '.join(REGIMES)}")
    parser.add_argument("--out", type=Path, help="where teachers and results go")
    parser.add_argument("--own", action="store_true", help="with --out: each method at its own best rate, too")
    parser.add_argument("--halves", action="store_true", help=f"with --out: auto's halves ({', '.join(ABLATED)})")
    parser.add_argument("--table", type=Path, help="where results are: their tables go into EVIDENCE.md")
    parser.add_argument("--figures", type=Path, help="where results are: pictures are written beside them")
    arguments = parser.parse_args()
    unknown = [name for name in arguments.regimes if name not in REGIMES]
    if unknown or sum(folder is not None for folder in (arguments.out, arguments.table, arguments.figures)) != 1:
        parser.error(f"no regime {unknown[0]!r}" if unknown else "one of --out, --table and --figures")
    torch.set_num_threads(1)
    if arguments.table:
        tables.write(arguments.table, REGIMES)
    elif arguments.figures:
        from convergence_figures import draw

        draw(arguments.figures, REGIMES, METHODS, Distillation)
    else:
        arguments.out.mkdir(parents=True, exist_ok=True)
        with tqdm(arguments.regimes or REGIMES, unit="regime") as bar:
            for name in bar:
                bar.set_description(name)
                study(name, arguments.out, own=arguments.own, halves=arguments.halves)


@pytest.mark.slow
def bench_a_small_regime_runs_to_its_table_and_is_not_run_twice(tmp_path, monkeypatch):
    monkeypatch.setitem(RECIPES, "planar", (100, 2e-3, 64))
    monkeypatch.setitem(REGIMES, "gauss teacher", Regime("gauss10-2d", "teacher", 10.0, 60))
    study("gauss teacher", tmp_path)
    (file,) = tmp_path.glob("*.json")
    before = file.stat()
    study("gauss teacher", tmp_path)
    assert file.stat() == before
    study("gauss teacher", tmp_path, own=True)
    content = json.loads(file.read_text())
    assert content["own_runs"].keys() == {m for m, r in content["own_rates"].items() if r != content["rate"]}
    text = tables.text(tmp_path, REGIMES)
    assert all(method.name in text for method in METHODS)
    assert "not measured" in text


if __name__ == "__main__":
    main()
