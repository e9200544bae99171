"""Algorithm 2, distribution backtracking: the usual distillation while the teacher moves from s'_{N-1} back to s'_0.

s_phi starts as s'_N, and the teacher in the generator's loss holds the position schedule(updates). After a generator
update the scheduler writes weights into the trainer's teacher, in place. It computes no loss and owns no optimizer.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import ceil
from typing import Any, ParamSpec, TypeVar

from disback_plugin import distributed
from disback_plugin.errors import PathError, StateError
from disback_plugin.loop.roles import networks_of
from disback_plugin.path.degradation_path import DegradationPath
from disback_plugin.plugins.builtin import MaskedSamples
from disback_plugin.plugins.manager import PluginManager
from disback_plugin.progress import VERSION, Phase, Progress, upgrade_state, validate_state
from disback_plugin.schedule_base import Plan, Schedule, Target, to_config, validate_config
from disback_plugin.schedules import parse
from disback_plugin.teacher import TeacherWriter
from disback_plugin.weights.network import Network, ScoreNetwork

logger = logging.getLogger(__name__)

P = ParamSpec("P")
R = TypeVar("R")


class TrajectoryScheduler:
    """Moves the teacher along the path, one generator update after the other.

    In a distributed run all ranks agree at each move, or all raise.

    Args:
        path: A complete path, its folder or hub id, or None: then the position is always 0.0 and nothing is written.
        teacher: The trainer's teacher s_theta. Its weights must be the path's node 0.
        fake_score: The trainer's s_phi, which `start` sets to s'_N; None to leave it alone.
        schedule: An object of `schedules`, or its name as `schedules.parse` reads it.
        plugins: The plug-ins that are notified, and may keep or end a node: a manager, or names and objects.
        progress: The phase and the counters of the run, which `attach` shares with the recorder; None for new ones.

    Attributes:
        plan: The schedule on this path, with its length `plan.horizon` and N, `plan.nodes`.

    Raises:
        PathError: If the path is unfinished, or the teacher is not its node 0.
        MismatchError: If the two networks differ in keys or shapes.
        OptionError: If the schedule does not fit the path, or a plug-in is not installed.
        PluginError: If a plug-in that `plugins` asks for by name is broken.

    Example:
        >>> import tempfile, torch
        >>> from disback_plugin import record, schedules
        >>> net, x, folder = torch.nn.Linear(1, 1), torch.ones(4, 1), tempfile.mkdtemp()
        >>> loss = lambda s, x_0: (s(x_0) - x_0).square().mean()
        >>> path = record(net, sample=lambda: x, loss=loss, path=folder, iterations=3, every=1)
        >>> scheduler, positions = TrajectoryScheduler(path, net, schedule=schedules.Fixed(1, 2)), []
        >>> scheduler.start()
        >>> for _ in range(5):
        ...     positions.append(scheduler.position)
        ...     scheduler.step()
        >>> positions
        [2.0, 1.0, 1.0, 0.0, 0.0]
    """

    def __init__(
        self,
        path: DegradationPath | str | os.PathLike[str] | None,
        teacher: Network,
        fake_score: Network | None = None,
        schedule: Schedule | str = "auto",
        *,
        plugins: PluginManager | Sequence[object] = (),
        progress: Progress | None = None,
    ) -> None:
        if path is not None and not isinstance(path, DegradationPath):
            path = DegradationPath.from_pretrained(path)
        self.path, self.schedule = path, parse(schedule)
        self.progress = Progress() if progress is None else progress
        network, self._fake_score = ScoreNetwork.of(teacher, role="teacher"), None
        if fake_score is not None:
            network, self._fake_score = networks_of(network, fake_score)
        self._plugins = PluginManager.of(plugins)
        self._notified, self._suspended = Target(0.0), False  # what the plug-ins know; inside original_teacher
        self._masked: MaskedSamples | None = None
        self._logs = distributed.is_main_process()
        if path is not None:
            if not path.complete:
                raise PathError(f"an unfinished path ({path})", expected="a complete one", cure="finish its recording")
            if self._fake_score is not None:
                network.check_same_layout(self._fake_score)
            path.verify_teacher(network.full_state())
            network.check_original()
        self.plan = Plan.on_path(self.schedule, None if path is None else path.manifest)
        self._teacher = TeacherWriter(network, path)

    # -- the present state --------------------------------------------------------------------------------------------

    @property
    def position(self) -> float:
        """The position that the teacher holds, in [0, N]; 0.0 is s'_0."""
        return self._teacher.position

    @property
    def generator_updates(self) -> int:
        """Finished generator updates."""
        return self.progress.generator_updates

    @property
    def started(self) -> bool:
        """Whether `start` was called, or a state of a started scheduler was loaded."""
        return self.progress.phase is not Phase.RECORDING

    @property
    def done(self) -> bool:
        """Whether the teacher is s'_0 for good, and the gradient unchanged."""
        return self.progress.phase is Phase.DONE

    @property
    def gradient_factor(self) -> float:
        """Factor on the gradient of the coming generator update, in [0, 1]."""
        return self._target().gradient

    def timeline(self) -> list[tuple[int, Target]]:
        """Return the generator updates at which the teacher reaches a node, with their targets."""
        return self.plan.timeline(self.progress)

    def __repr__(self) -> str:
        nodes = "no path" if self.path is None else f"N = {self.plan.nodes}, {self.path.folder}"
        return (
            f"<TrajectoryScheduler {self.progress.phase.value if self.started else 'not started'}: position "
            f"{self.position:g} ({nodes}), {self.plan.schedule!r}, {self.generator_updates} generator updates>"
        )

    # -- backtracking -------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin Algorithm 2: s_phi <- s'_N, teacher <- first target. A path with only the teacher writes nothing.

        A scheduler that has started, or was resumed by `load_state_dict`, is left as it is.
        """
        if self.started:
            return
        path, fake_score, step = self.path, self._fake_score, self.progress.schedule_step
        self._move_to(self.plan.target(step).position)
        if path is not None and path.nodes and fake_score is not None:
            last = path.nodes[-1]
            # After a recording in the trainer s_phi is s'_N already; a write might cut an autograd graph in two.
            if fake_score.checksum() not in (last.recorded, last.checksum):
                distributed.on_every_rank(lambda: fake_score.write(path.source(last.index)), "read the last node")
        self._commit(step)

    def step(self, signal: Any = None) -> None:
        """Count a finished generator update and move the teacher. Never call it between a forward and its backward.

        Args:
            signal: A measure of convergence, passed on to `disback_should_advance`; any object, None for none.

        Raises:
            StateError: Before `start`, or if someone else wrote the teacher's weights.
            PathError: If the path cannot be read. Then the update is not counted.
            PluginError: If a plug-in that was asked for raised. The update is counted, and the teacher has moved.
        """
        self._validate()
        self.progress.generator_updates += 1
        try:
            if not self.done:
                self._advance(signal)
        except BaseException as error:
            if self._teacher.failed and not isinstance(error, distributed.AbsentRankError):
                self.progress.generator_updates -= 1
            raise
        if self._masked is not None:
            self._masked.steps = self.generator_updates - 1
            self._masked.step()

    def wrap(self, loss: Callable[P, R]) -> Callable[P, R]:
        """Return `loss` with the same signature; a call raises unless the teacher holds the right position.

        The samples that losses mask inside it are reported every 50 updates, and by `restore_teacher`.

        Args:
            loss: Any callable that evaluates the teacher, or takes its output.

        Raises:
            StateError: When called before `start`, or after someone else wrote the teacher's weights.
        """
        self._masked = self._masked or MaskedSamples(plugins=self._plugins)
        inner = self._masked.watch(loss)

        @functools.wraps(loss)
        def validated(*args: P.args, **kwargs: P.kwargs) -> R:
            self._validate()
            return inner(*args, **kwargs)

        return validated

    @contextmanager
    def original_teacher(self) -> Iterator[None]:
        """Hold the teacher at s'_0 inside, as for an evaluation, and at the active position again after."""
        if not self.position or self._suspended:
            yield
            return
        self._teacher.move_to(0.0)
        self._suspended = True
        try:
            yield
        finally:
            self._suspended = False
            self._teacher.move_to(self._target().position)  # one rank may have evaluated on its own
            self._notify()

    def end_backtracking(self) -> None:
        """End backtracking now, after `start`: the teacher is s'_0 and the gradient whole for good."""
        self._validate()
        self._commit(self.plan.horizon)

    def restore_teacher(self) -> None:
        """Write s'_0 into the teacher, bit for bit, whatever the teacher holds now, and leave it there for good."""
        self._teacher.restore_teacher()
        self._teacher.failed = False
        early = self.started and not self.done
        if early:
            self.progress.phase, self.progress.node_since = Phase.DONE, self.generator_updates
        self._notify(early=early)
        if self._masked is not None:
            self._masked.steps = self.progress.generator_updates
            self._masked.report()

    # -- resume -------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain scalars; the weights are on the path."""
        return {
            "version": VERSION,
            "path": "" if self.path is None else self.path.identity,
            "nodes": "" if self.path is None else self.path.nodes_digest(),
            "schedule": to_config(self.schedule),
            **self.progress.to_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a saved state: set the counters and write the teacher; s_phi comes from the checkpoint.

        Raises StateError, and changes nothing, if keys are missing, or the state is of another path or schedule.
        """
        state = upgrade_state(state)
        validate_state(state, like=self.state_dict(), fixed=("path", "nodes"))
        validate_config(self.schedule, state["schedule"])
        self.resume(Progress.from_state(state))

    def resume(self, progress: Progress) -> None:
        """Continue at `progress`: take over its counters and write the teacher from the path, whatever it holds."""
        self.progress.commit(progress)
        self._move_to(self._target().position, rewrite=True)
        if self.started:
            self._commit(progress.schedule_step)
        self._notify()

    def _target(self) -> Target:
        backtracking = self.progress.phase is Phase.BACKTRACKING
        return self.plan.target(self.progress.schedule_step) if backtracking else Target(0.0)

    def _advance(self, signal: Any) -> None:
        """Move on by one schedule step, unless a plug-in keeps or ends the node; as planned if the plug-in raises."""
        step, leave = self.progress.schedule_step, None
        try:
            if self.plan.may_be_overruled(step):
                updates = self.progress.generator_updates - self.progress.node_since
                asked = {"position": self.plan.target(step).position, "updates_in_node": updates, "signal": signal}
                leave = self._plugins.should_advance(scheduler=self, **asked)
        finally:
            self._commit(self.plan.next_step(step, leave))

    def _commit(self, step: int) -> None:
        """Move the teacher to the target of a schedule step, and only then let `progress` say so."""
        position, previous = self.plan.target(step).position, self._target().position
        self._move_to(position)
        if position != previous:
            self.progress.node_since = self.generator_updates
        self.progress.schedule_step = step
        self.progress.phase = Phase.DONE if step >= self.plan.horizon else Phase.BACKTRACKING
        self._notify()

    def _move_to(self, position: float, *, rewrite: bool = False) -> None:
        if not self._suspended and (rewrite or position != self.position):
            self._teacher.move_to(position, updates=self.generator_updates)

    def _notify(self, *, early: bool = False) -> None:
        """Call the plug-ins if the position or the gradient's factor changed, perhaps before backtracking has ended."""
        now, previous = Target(self.position, self.gradient_factor), self._notified
        if self._suspended or now == previous:
            return
        self._notified, position, updates = now, now.position, self.generator_updates
        shown = previous if early else now  # of a run that stops, the log says how far it came
        values = {
            "disback/position": shown.position,
            "disback/node": ceil(shown.position),
            "disback/gradient": shown.gradient,
        }
        moved = position != previous.position
        if moved:
            swapped = {"position": position, "previous": previous.position, "update": updates}
            self._plugins.call("disback_after_node_swapped", scheduler=self, **swapped)
        if early:
            values["disback/detached"] = 1.0
        elif moved:
            values["disback/swap_ms"] = self._teacher.swap_ms
            values["disback/delta_norm"] = self._teacher.distance(previous.position, position)
        if self._logs:
            self._plugins.call("disback_log", values=values, step=updates)
            if moved and not self._plugins.listens("disback_log"):
                # A ramp moves at each update: a position between two nodes is a detail.
                level = logging.INFO if position % 1 == 0 else logging.DEBUG
                what = ", detached before backtracking has ended" * early
                logger.log(level, "update %d%s: %s", updates, what, values)

    def _validate(self) -> None:
        if not self.started:
            raise StateError("a scheduler that has not started", expected="one that has", cure="call scheduler.start()")
        self._teacher.validate(self.generator_updates)
