"""Define the methods and the regimes of `bench_convergence`.

| method        | recording       | teacher                           | generator's gradient      |
|---------------|-----------------|-----------------------------------|---------------------------|
| diff-instruct | none            | s'_0                              | as it is                  |
| warm          | 25              | s'_0                              | as it is                  |
| grad-ramp     | none            | s'_0                              | 1 - 0.99 (1 - u / 100)+   |
| plain-ramp    | 25              | moves back in 50 updates          | as it is                  |
| fixed         | 50              | 3/4, 2/4, 1/4: 20, 60, 60 updates | as it is                  |
| auto          | until fitted    | moves back in F updates           | whole after 3F            |

A recording until fitted has twice the learning rate until s' is fitted. Candidates for the default beside "auto", and
the controls that they have to beat:

| method             | recording    | teacher           | generator's gradient                                 |
|--------------------|--------------|-------------------|------------------------------------------------------|
| warm, fitted       | until fitted | s'_0              | as it is                                             |
| walk               | until fitted | back in F updates | as it is                                             |
| walk, divided      | until fitted | back in F updates | 1 / (1 - position / N)                               |
| walk, capped       | until fitted | back in F updates | as it is; a step's RMS is at most the rate for 10F   |
| ramp 3F            | not charged  | s'_0              | auto's, with F of auto's recording: a control        |
| diff-instruct 1.25 | none         | s'_0              | as it is; 1.25 times the rate of both networks       |

The path has one node: the straight line from s'_0 to s'_N. "fixed" has its positions on quarters of that line,
not on recorded nodes between.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from disback_plugin.schedules import Auto, Fixed, GradientRamp, Ramp, Schedule, Target, WarmStart

__all__ = [
    "BASELINE",
    "CANDIDATES",
    "COMPARISON",
    "METHODS",
    "NEW_REGIMES",
    "REGIMES",
    "Method",
    "Regime",
    "SingleAuto",
]


# In forward passes: an update of s_phi is the generator's samples, and a pass forwards and back.
COST_OF_FAKE_STEP = 4
# A final distance is the mean of this number of evaluations.
LAST = 3
# A recording in which s' is never fitted ends after this number of updates.
LONGEST = 200


@dataclass(frozen=True)
class Method:
    """Add a recording (None: until s' is fitted) and a schedule on a path of N nodes to Diff-Instruct.

    Without `warm`, s_phi and its optimizer still start from the teacher.

    Attributes:
        times: Multiple of the regime's rate.
        capped: Whether a step's RMS is at most the rate for the first 10F updates.
    """

    name: str
    schedule: Schedule
    record: int | None = 0
    nodes: int = 1
    warm: bool = True
    times: float = 1.0
    capped: bool = False


@dataclass(frozen=True)
class SingleAuto(Auto):
    """`Auto` with the factor on the gradient that it had once: 1 - 0.9 (1 - u / 3F)+.

    In single precision, as the kept results were computed: Adam makes a difference of 1e-7 grow.
    """

    def __call__(self, updates: int, nodes: int) -> Target:
        """Return the target after `updates` generator updates."""
        if not nodes or self.fitted is None:
            return Target(0.0)
        position, shrunk = (
            0.9 * (1 - updates / torch.tensor(float(end))).clamp(min=0) for end in (self.fitted, 3 * self.fitted)
        )
        return Target(nodes * float(position), float(1 - shrunk))


@dataclass(frozen=True)
class Altered(SingleAuto):
    """Keep its position ("walk", "divided"), gradient ("ramp") or recording ("warm") alone."""

    kept: str = "walk"

    def __call__(self, updates: int, nodes: int) -> Target:
        """Return the target after `updates` generator updates."""
        position, gradient = super().__call__(updates, nodes)
        if self.kept == "ramp":
            return Target(0.0, gradient)
        if self.kept == "warm" or not position:
            return Target(0.0)
        return Target(position, 1 / (1 - position / nodes) if self.kept == "divided" else 1.0)


BASELINE = Method("diff-instruct", WarmStart())
METHODS = (
    BASELINE,
    Method("warm", WarmStart(), 25),
    Method("grad-ramp", GradientRamp(100)),
    Method("plain-ramp", Ramp(50, amplitude=False), 25),
    Method("fixed", Fixed(20, 60, 60), 50, nodes=4),
    Method("auto", SingleAuto(), None),
)


# From the simplest on, as the rule for the default prefers them (EVIDENCE.md).
CANDIDATES = (
    Method("warm, fitted", Altered(kept="warm"), None),
    Method("walk", Altered(), None),
    Method("walk, divided", Altered(kept="divided"), None),
    METHODS[-1],
)
COMPARISON = (
    BASELINE,
    Method("diff-instruct 1.25", WarmStart(), times=1.25),
    Method("ramp 3F", Altered(kept="ramp"), None, warm=False),
    *CANDIDATES,
    Method("walk, capped", Altered(), None, capped=True),
)


@dataclass(frozen=True)
class Regime:
    """Describe one comparison: a world, the first student, and the distillation.

    Attributes:
        sigma_init: Noise scale of the generator's input.
        updates: Generator updates.
        loss: "diff-instruct", "dmd" or "sid".
        ratio: Updates of s_phi in a round.
        rate: Learning rate of all methods; None: to be searched.
        second: Noise scale of a two-step student's second step; None: one step.
    """

    world: str
    student: str
    sigma_init: float
    updates: int
    loss: str = "diff-instruct"
    ratio: int = 1
    rate: float | None = None
    second: float | None = None

    @property
    def batch(self) -> int:
        return {"digits-conv": 32, "mnist-conv": 32, "shapes-conv": 16}.get(self.world, 64)

    @property
    def cost(self) -> int:
        """Return the cost of a round in forward passes of one network, a backward pass being two."""
        one = COST_OF_FAKE_STEP * self.ratio + (7 if self.loss == "sid" else 5)
        return one + (self.ratio + 1 if self.second else 0)

    def seeds(self, part: str) -> list[int]:
        planar = self.world.endswith("2d")
        if part == "compared":
            return list(range(210, 222) if planar else range(10, 12))
        if part == "shown":
            return list(range(200, 300) if planar else range(10, 20))
        return list(range(100, 140 if planar else 103))


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
    "shapes teacher": Regime("shapes-conv", "teacher", 2.5, 260),
    "gauss scratch": Regime("gauss10-2d", "scratch", 10.0, 400),
    "gauss teacher": Regime("gauss10-2d", "teacher", 10.0, 400),
    "gauss far": Regime("gauss10-2d", "far", 10.0, 400),
    "ring scratch": Regime("ring-2d", "scratch", 10.0, 400),
    "ring teacher": Regime("ring-2d", "teacher", 10.0, 400),
    "mlp scratch dmd": Regime("digits-mlp", "scratch", 80.0, 300, "dmd"),
    "mlp scratch sid": Regime("digits-mlp", "scratch", 80.0, 300, "sid"),
    "conv teacher five to one": Regime("digits-conv", "teacher", 20.0, 150, ratio=5),
    "mlp teacher slow": Regime("digits-mlp", "teacher", 2.5, 1_000, rate=1e-4),
    "mlp teacher slower": Regime("digits-mlp", "teacher", 2.5, 4_000, rate=1e-5),
}
# Judged once, and no part of any choice: not of auto's constants either.
NEW_REGIMES = {
    "mnist teacher": Regime("mnist-conv", "teacher", 2.5, 260),
    "gauss two steps": Regime("gauss10-2d", "teacher", 10.0, 400, second=0.8),
    "mlp two steps": Regime("digits-mlp", "teacher", 80.0, 300, second=2.0),
}
