"""What a run can expect of DisBack, from a short recording: what it costs, what `auto` would do, and plain advice.

A recording as `schedule="auto"` makes it, on borrowed networks and in a temporary folder; nothing of it stays.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from disback_plugin import distributed
from disback_plugin.errors import OptionError
from disback_plugin.loop.optimizers import has_rates
from disback_plugin.opening import open_or_create
from disback_plugin.path.manifest import Recording
from disback_plugin.plugins.manager import PluginManager
from disback_plugin.recorder import Recorder
from disback_plugin.recording import updated
from disback_plugin.schedule_cursor import Plan
from disback_plugin.schedules import Auto
from disback_plugin.snapshot import TrainingSnapshot, borrowed, copy_of, private_stream
from disback_plugin.weights.network import Network, ScoreNetwork

__all__ = ["Outlook", "advice", "preflight"]

# Batches that a loss is averaged over, before and after.
BATCHES = 8
# Below this excess loss of the teacher a student is near it.
NEAR = 1.0
# Regimes of benchmarks/EVIDENCE.md, and the least and the greatest of auto's final distances there at equal compute,
# over those of the trainer alone: medians over seeds. A table there has the sentence beside each regime. The one in
# which s' was not fitted is left out.
MEASURED = {"near": (6, 0.88, 1.15), "far": (14, 0.83, 1.65)}


@dataclass(frozen=True)
class Outlook:
    """What `preflight` found.

    Attributes:
        weights: Numbers in the teacher.
        excess_loss: L_teacher / L_s'N - 1 on the student's samples: 0 for a student that makes the teacher's data; None
            if `fake_step` returns no loss, or one that is not positive.
        recorded: Updates that the recording took.
        fitted: Updates at the trainer's learning rate in which s' is fitted, F (`fitting`): the recording had a higher
            one until then. None if it was not within the updates allowed.
        update_seconds: Time of one update of the recording.
        node_bytes: Size of a recorded node.
        teacher_bytes: Size of the teacher's weights, which the path holds as well unless `keep_teacher=False`.
        encode_seconds: Time to code and write a node.
        move_seconds: Time to move the teacher onto the node, checksum included.
        walk_updates: Generator updates in which `auto` walks back.
        whole_updates: Generator updates after which it lets go: the gradient is whole, the rest is the trainer's own.
        rounds: What the recording costs, in rounds of Diff-Instruct (4 forward passes an update, 9 a round).
        advice: What the evidence supports, in plain words.
    """

    weights: int
    excess_loss: float | None
    recorded: int
    fitted: int | None
    update_seconds: float
    node_bytes: int
    teacher_bytes: int
    encode_seconds: float
    move_seconds: float
    walk_updates: int
    whole_updates: int
    rounds: float
    advice: str

    def as_json(self) -> dict[str, Any]:
        """Return it as a mapping of plain values."""
        return asdict(self)


def advice(excess_loss: float | None, *, fitted: bool = True) -> str:
    """Return what the evidence supports saying beforehand; made true by `benchmarks/EVIDENCE.md`, regime by regime.

    Args:
        excess_loss: As in `Outlook`.
        fitted: Whether s' was fitted. In one regime it was not, which is too few to speak of.

    Example:
        >>> print(advice(0.4))
        It may help or harm: in the 6 regimes measured with an excess loss below 1, as here, auto ended at equal \
compute at 0.88 to 1.15 times the trainer's own distance. Nothing that a recording shows says where in between.
    """
    if not fitted:
        return (
            "Nothing can be said: s' was not fitted in these updates. Allow more of them, or take the learning rate of "
            "the training to come."
        )
    near = excess_loss is not None and excess_loss < NEAR
    if excess_loss is None:
        count = sum(regimes for regimes, _, _ in MEASURED.values())
        least = min(low for _, low, _ in MEASURED.values())
        most = max(high for _, _, high in MEASURED.values())
        where = f"{count} regimes measured"
    else:
        count, least, most = MEASURED["near" if near else "far"]
        where = f"{count} regimes measured with an excess loss {'below' if near else 'of at least'} {NEAR:g}, as here"
    return (
        f"It may help or harm: in the {where}, auto ended at equal compute at {least:.2f} to {most:.2f} times the "
        "trainer's own distance. Nothing that a recording shows says where in between."
    )


def preflight(
    teacher: Network,
    fake_score: Network | None = None,
    fake_step: Callable[[], object] | None = None,
    *,
    sample: Callable[[], Tensor] | None = None,
    loss: Callable[[nn.Module, Tensor], Tensor] | None = None,
    learning_rate: float = 1e-5,
    iterations: int = 200,
    codec: str = "int8",
    seed: int = 0,
) -> Outlook:
    """Record until s' is fitted, measure what that costs, put everything back, and say what to expect.

    Teacher, fake score, every optimizer that steps and the global random state are bit for bit as they were; only what
    the functions keep for themselves moved on, as the place in a data loader, or running statistics of a generator in
    train mode. Files go to a temporary folder.

    Args:
        teacher: As in `record`.
        fake_score: As in `record`.
        fake_step: As in `record`; if it returns its loss, a number or a tensor of shape (), the excess loss is known.
        sample: As in `record`.
        loss: As in `record`.
        learning_rate: As in `record`; that of the fake score in the training to come, or F is another one.
        iterations: The most updates that it may take, >= 5.
        codec: As in `record`.
        seed: As in `record`.

    Raises:
        OptionError: If neither pair was given, or a mixture, or the networks are sharded, or there are several
            processes.
        TrainingError: If `fake_step` does not move the fake score.

    Example:
        >>> teacher, generator = nn.Linear(2, 2), nn.Linear(2, 2)
        >>> def sample() -> Tensor:
        ...     return generator(torch.randn(64, 2)).detach()
        >>> def denoise(net: nn.Module, x_0: Tensor) -> Tensor:
        ...     return (net(x_0 + torch.randn_like(x_0)) - x_0).square().mean()
        >>> found = preflight(teacher, sample=sample, loss=denoise, learning_rate=1e-2)
        >>> found.weights, found.whole_updates == 3 * found.walk_updates
        (6, True)
    """
    target = ScoreNetwork.of(teacher, role="teacher")
    if distributed.several() or target.sharded:
        raise OptionError(
            "a preflight of several processes or sharded networks",
            expected="one process with whole networks",
            cure="run it on one device, before DDP or FSDP wrap the networks",
        )
    if type(iterations) is not int or iterations < 5:
        raise OptionError(f"iterations={iterations!r}", expected="a whole number >= 5", cure="leave it away for 200")
    in_loop = fake_score is not None and fake_step is not None and sample is None and loss is None
    alone = fake_score is None and fake_step is None and sample is not None and loss is not None
    if in_loop == alone:
        raise OptionError(
            "preflight(teacher, ...) without one of the two pairs",
            expected="fake_score and fake_step, or sample and loss",
            cure="pass what record() is given",
        )
    plan = Recording(iterations, iterations, codec, False)
    if in_loop:
        assert fake_score is not None
        assert fake_step is not None
        network = ScoreNetwork.of(fake_score, role="fake score")
        target.check_same_layout(network)
        with borrowed(target, network) as found:
            return _measured(target, network, _InLoop(network, fake_step, found), plan, found)
    assert sample is not None
    assert loss is not None
    with borrowed(target) as found:
        copied = _Copy(target, sample, loss, learning_rate)
        with private_stream(seed):
            return _measured(target, copied.network, copied, plan, found)


class _InLoop:
    """The trainer's own fake score and step."""

    def __init__(self, network: ScoreNetwork, step: Callable[[], object], found: TrainingSnapshot) -> None:
        self._network, self.step, self._found = network, step, found

    def steppers(self, found: TrainingSnapshot) -> list[Optimizer]:
        """Return the optimizers of the fake score, which has been stepped before."""
        return found.steppers(self._network)

    def losses(self) -> list[float]:
        """Return the losses of some batches at the present weights; nan where the step returns none."""
        here = {name: tensor.detach().clone() for name, tensor in self._network.state_dict().items()}
        found = []
        for _ in range(BATCHES):
            found.append(_number(self.step()))
            if math.isnan(found[-1]):  # one step more would say nothing either
                break
            self._network.load_state_dict(here)
        self._found.put_back()
        self._network.load_state_dict(here)
        return found


class _Copy:
    """A copy of the teacher, trained by Adam as `record` does."""

    def __init__(
        self,
        teacher: ScoreNetwork,
        sample: Callable[[], Tensor],
        loss: Callable[[nn.Module, Tensor], Tensor],
        learning_rate: float,
    ) -> None:
        self._module = copy_of(teacher)
        self._optimizer = torch.optim.Adam(self._module.parameters(), lr=learning_rate)
        self._sample, self._loss = sample, loss
        self.network = ScoreNetwork(self._module, role="recorded copy")

    def steppers(self, found: TrainingSnapshot) -> list[Optimizer]:
        """Return the copy's optimizer."""
        return [self._optimizer]

    def step(self) -> object:
        """Do one update."""
        with torch.enable_grad():
            self._optimizer.zero_grad()
            self._loss(self._module, self._sample()).backward()  # type: ignore[no-untyped-call]
            self._optimizer.step()
        return None

    def losses(self) -> list[float]:
        """Return the losses of some batches at the present weights: each time the same noise."""
        with private_stream(0), torch.no_grad():
            return [_number(self._loss(self._module, self._sample())) for _ in range(BATCHES)]


def _measured(
    target: ScoreNetwork, network: ScoreNetwork, trainer: _InLoop | _Copy, plan: Recording, found: TrainingSnapshot
) -> Outlook:
    with tempfile.TemporaryDirectory(prefix="disback-preflight-") as folder:
        path = open_or_create(f"{folder}/path", target, plan)
        recorder = Recorder(path, network, until_fitted=True, plugins=PluginManager(autoload=False))
        recorder.start()
        first, spent, encode = trainer.losses(), 0.0, 0.0
        steppers = trainer.steppers(found)
        recorder.hastens = bool(steppers) and all(has_rates(optimizer) for optimizer in steppers)
        with closing(recorder), found.hastened(network, lambda: recorder.haste):
            while not recorder.done:
                with _clock(network) as seconds:
                    updated(recorder, trainer.step)
                spent += seconds[0]
                with _clock(network) as seconds:
                    recorder.update()
                encode = seconds[0]  # the last one saves the node
        last = trainer.losses()
        with _clock(network) as moved:
            network.write(path.source(1))
        manifest = path.manifest
        plans = Plan(Auto(manifest.clock), 1)
        excess = _excess(sum(first), sum(last))
        tensors = dict(target.named_tensors())
        return Outlook(
            weights=sum(tensor.numel() for tensor in tensors.values()),
            excess_loss=excess,
            recorded=manifest.iterations,
            fitted=None if manifest.fitted is None else manifest.clock,
            update_seconds=spent / manifest.iterations,
            node_bytes=path.nodes[-1].bytes,
            teacher_bytes=sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()),
            encode_seconds=encode,
            move_seconds=moved[0],
            walk_updates=next(updates for updates, aim in plans.stages() if aim.position == 0),
            whole_updates=plans.horizon,
            rounds=4 * manifest.iterations / 9,
            advice=advice(excess, fitted=manifest.fitted is not None),
        )


def _excess(first: float, last: float) -> float | None:
    """Return L_teacher / L_s'N - 1; None where the ratio says nothing: of losses that may be negative."""
    return first / last - 1 if math.isfinite(first + last) and first > 0 and last > 0 else None


def _number(loss: object) -> float:
    """Return a loss as a number; nan if it is none."""
    if isinstance(loss, Tensor) and loss.numel() == 1:
        return float(loss.detach())
    return float(loss) if isinstance(loss, int | float) and not isinstance(loss, bool) else math.nan


@contextmanager
def _clock(network: ScoreNetwork) -> Iterator[list[float]]:
    """Yield a list that holds the seconds that the inside took, device work included."""
    seconds: list[float] = []
    start = time.perf_counter()
    yield seconds
    if any(tensor.is_cuda for _, tensor in network.named_tensors()):
        torch.cuda.synchronize()
    seconds.append(time.perf_counter() - start)
