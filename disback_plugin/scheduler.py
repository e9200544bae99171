"""Algorithm 2, distribution backtracking: the usual distillation while the teacher walks back from s'_{N-1} to s'_0.

s_phi starts as s'_N; the target of the generator's loss stands at schedule(updates). Nothing here computes a loss or
owns an optimizer: the scheduler writes weights into the trainer's own teacher, in place, after a generator update.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from math import ceil
from typing import Any, ParamSpec, TypeVar

from disback_plugin import distributed, kernels
from disback_plugin._text_table import aligned
from disback_plugin.errors import PathError, StateError
from disback_plugin.path.degradation_path import DegradationPath
from disback_plugin.plugins.manager import PluginManager
from disback_plugin.plugins.nonfinite_counter import MaskedSamples
from disback_plugin.progress import Phase, Progress
from disback_plugin.schedule_cursor import Plan, length
from disback_plugin.schedules import Schedule, Settling, Target, resolve
from disback_plugin.summary import agenda
from disback_plugin.teacher import MovingTeacher
from disback_plugin.weights.network import Network, ScoreNetwork

__all__ = ["TrajectoryScheduler"]

logger = logging.getLogger(__name__)

# A braked walk goes on at every fourth update.
BRAKED = 4

P = ParamSpec("P")
R = TypeVar("R")


class TrajectoryScheduler:
    """Holds the teacher at the right place of the path, one generator update after the other.

    Args:
        path: A complete path, its folder or hub id, or None: then the position is always 0.0 and nothing is written.
        teacher: The trainer's teacher s_theta. Its weights must be the path's node 0.
        fake_score: The trainer's s_phi; `start` sets it to s'_N. None leaves it alone.
        schedule: An object of `schedules`, or its name as `schedules.parse` reads it.
        prefetch: Whether to decode the next position in a thread, one update ahead, into host memory of a node's size;
            then a move is a copy. None: where the teacher is on another device than the host.
        together: Whether all ranks of the process group walk: then they agree at each move, or all of them stop. None:
            where the teacher is sharded; `attach` does so always.
        plugins: Who hears of the walk, and may overrule it: a `hooks.Plugins`, or names and objects for one.
        progress: The phase and the counters of the run, which `attach` shares with the recorder; None for new ones.

    Attributes:
        behind: Whether s_phi is behind the student, for a schedule that then waits (`Adaptive`); `attach` sets it.

    Raises:
        PathError: If the path is unfinished, or the teacher is not its node 0.
        MismatchError: If the two networks differ in keys or shapes.
        OptionError: If the schedule does not fit the path, or `plugins` names what is not installed.
        PluginError: If a plug-in that `plugins` asks for by name is broken.

    Example:
        >>> import tempfile, torch
        >>> from torch import nn
        >>> from disback_plugin.recording import record
        >>> from disback_plugin.schedules import Fixed
        >>> teacher, fake, x = nn.Linear(1, 1), nn.Linear(1, 1), torch.ones(4, 1)
        >>> optimizer = torch.optim.Adam(fake.parameters())
        >>> def fake_step() -> None:
        ...     optimizer.zero_grad()
        ...     (fake(x) - x).square().mean().backward()
        ...     optimizer.step()
        >>> path = record(teacher, fake, fake_step, path=tempfile.mkdtemp(), iterations=3, every=1)
        >>> scheduler = TrajectoryScheduler(path, teacher, fake, schedule=Fixed(1, 2))
        >>> scheduler.start()
        >>> positions = []
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
        *,
        schedule: Schedule | str = "auto",
        prefetch: bool | None = None,
        together: bool | None = None,
        plugins: PluginManager | Sequence[object] = (),
        progress: Progress | None = None,
    ) -> None:
        if path is not None and not isinstance(path, DegradationPath):
            path = DegradationPath.from_pretrained(path)
        self.path = path
        self.schedule = resolve(schedule)
        network = ScoreNetwork.of(teacher, role="teacher")
        self._fake_score = None if fake_score is None else ScoreNetwork.of(fake_score, role="fake score")
        self._plugins = PluginManager.of(plugins)
        self.progress = Progress() if progress is None else progress
        self.behind = False
        self._told, self._told_gradient = 0.0, 1.0  # what the plug-ins know of
        self._away = False
        self._masked = MaskedSamples(plugins=self._plugins)
        if self.path is not None:
            self._check(self.path, network)
        self._plan = Plan(self._settled(), self.last_node)
        self._teacher = MovingTeacher(network, self.path, prefetch=prefetch, together=together)
        self._teacher.warn_if_swallowed()

    # -- where we are -------------------------------------------------------------------------------------------------

    @property
    def last_node(self) -> int:
        """N; 0 without a path."""
        return 0 if self.path is None else len(self.path) - 1

    @property
    def position(self) -> float:
        """Where the teacher stands, in [0, N]; 0.0 is the teacher itself."""
        return self._teacher.position

    @property
    def generator_updates(self) -> int:
        """Finished generator updates."""
        return self.progress.generator_updates

    @property
    def started(self) -> bool:
        """Whether `start` was called, or a state of a started scheduler loaded."""
        return self.progress.phase is not Phase.RECORDING

    @property
    def gradient_factor(self) -> float:
        """Factor on the gradient of the coming generator update, in [0, 1]."""
        return self._plan.target.gradient if self.started else 1.0

    @property
    def done(self) -> bool:
        """Whether the teacher is back at s'_0 for good, and the gradient unchanged."""
        return self.started and self._plan.finished

    @property
    def settled(self) -> Schedule:
        """The schedule of this walk: as given, or as the recording settled it (`schedules.Settling`)."""
        return self._plan.schedule

    @property
    def horizon(self) -> int:
        """Generator updates of the whole walk, as planned."""
        return self._plan.horizon

    @property
    def updates_in_node(self) -> int:
        """Generator updates since the walk came to its present node."""
        return self.generator_updates - self._plan.node_since

    def stages(self) -> list[tuple[int, Target]]:
        """Return what happens when: generator updates, and what the walk aims at from there on (`Plan.ahead`)."""
        return self._plan.ahead(self.generator_updates)

    def __repr__(self) -> str:
        nodes = "no path" if self.path is None else f"N = {self.last_node}, {self.path.folder}"
        state = "done" if self.done else "started" if self.started else "not started"
        rows = agenda(None if self.path is None else self.path.manifest, None, self.stages(), self.generator_updates)
        return (
            f"<TrajectoryScheduler {state}: position {self.position:g} ({nodes}), {self._plan.schedule!r}, "
            f"{self.generator_updates} generator updates>\n{aligned(rows)}"
        )

    # -- the walk -----------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin Algorithm 2: s_phi <- s'_N, teacher <- first target. A path with only the teacher writes nothing.

        One that has started, or was resumed by `load_state_dict`, is left as it is.
        """
        if self.started:
            return
        self._plan.go_to(self._plan.updates, now=self.generator_updates)
        self._place()
        if self.path is not None and self.last_node and self._fake_score is not None:
            last = self.path.nodes[-1]
            # Where recording was the trainer's own, s_phi is s'_N already; a write might cut a graph in two.
            if self._fake_score.checksum() not in (last.recorded, last.checksum):
                fake_score, source = self._fake_score, self.path.source
                self._teacher.all(lambda: fake_score.write(source(self.last_node)), "read the last node")
        self._commit()
        self._tell()

    def step(self, signal: Any = None) -> None:
        """Count one finished generator update and move the teacher. Call it never between a forward and its backward.

        Args:
            signal: What `disback_should_advance` is told, as a measure of convergence; anything, None for nothing.

        Raises:
            StateError: Before `start`, or if somebody else wrote the teacher's weights.
            PluginError: If a plug-in that was asked for raised. The step is counted, and the teacher where it belongs.
        """
        self._require_start()
        self._teacher.check_untouched(self.generator_updates)
        plan = self._plan
        before, target = replace(self.progress), plan.target
        self.progress.generator_updates += 1
        try:
            if not (plan.finished or (self._waits and self.generator_updates % BRAKED)):
                self._walk(signal)
        except BaseException:
            if self._teacher.failed:  # the teacher could not be moved: as if the update had not ended
                self.progress.commit(before)
                plan.updates, plan.node_since, plan.target = before.schedule_step, before.node_since, target
            raise
        finally:
            self._masked.step()

    def wrap(self, loss: Callable[P, R], *, fuse: bool = False) -> Callable[P, R]:
        """Return `loss` with the same signature; when it runs, the right node is in the teacher, or it raises.

        Samples that the losses of `disback_plugin.losses` mask inside it are reported every 50 updates, and by
        `restore_teacher` (`masking.MaskedSamples`).

        Args:
            loss: Any callable that evaluates the teacher, or is given its output.
            fuse: Run the losses of `disback_plugin.losses` inside it in their fused form (`kernels.fuse`).

        Raises:
            StateError: When called before `start`, or after somebody else wrote the teacher's weights.
        """
        inner = self._masked.watch(kernels.fuse(loss) if fuse else loss)

        @functools.wraps(loss)
        def on_the_path(*args: P.args, **kwargs: P.kwargs) -> R:
            self._require_start()
            self._teacher.check_untouched(self.generator_updates)
            return inner(*args, **kwargs)

        return on_the_path

    @contextmanager
    def original_teacher(self) -> Iterator[None]:
        """Hold the teacher at s'_0 inside, as for an evaluation, and at the active position again after."""
        if not self.position or self._away:
            yield
            return
        self._teacher.go_to(0.0)
        self._away = True
        try:
            yield
        finally:
            self._away = False
            self._place(together=False)  # one rank may have looked at the teacher on its own
            self._tell()

    def end_backtracking(self) -> None:
        """End the walk here: the teacher is s'_0 and the gradient whole, as if it had come to its end.

        Raises:
            StateError: Before `start`.
        """
        self._require_start()
        self._plan.go_to(self._plan.horizon, now=self.generator_updates)
        self._commit()
        self._place()
        self._tell()

    def restore_teacher(self) -> None:
        """Write s'_0 into the teacher, bit for bit, whatever it holds now, and leave it there for good."""
        self._teacher.put_back()
        self._plan.stop()
        if self.started:
            self.progress.phase = Phase.DONE
        self._tell()
        self._masked.report()

    # -- resume -------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain scalars; the weights are on the path."""
        return {
            "path": "" if self.path is None else self.path.identity,
            "nodes": "" if self.path is None else self.path.nodes_digest(),
            "schedule": repr(self.schedule),
            "generator_updates": self.generator_updates,
            "plan_updates": self._plan.updates,
            "node_since": self._plan.node_since,
            "started": self.started,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state` was saved: counters are set and the teacher is written from the path.

        s_phi is left alone: it comes from the trainer's checkpoint.

        Raises:
            StateError: If `state` has other keys, or is of another path or schedule. Then nothing changes.
        """
        check_state(state, like=self.state_dict(), fixed=("path", "nodes", "schedule"))
        for key in ("generator_updates", "plan_updates", "node_since"):
            if state[key] < 0 or (key == "node_since" and state[key] > state["generator_updates"]):
                raise StateError(f"{key} of {state[key]} updates", expected="a count", cure="pass an unedited state")
        names = {"generator_updates": "generator_updates", "schedule_step": "plan_updates", "node_since": "node_since"}
        phase = Phase.BACKTRACKING if state["started"] else Phase.RECORDING
        self.resume(replace(self.progress, phase=phase, **{name: state[key] for name, key in names.items()}))

    def resume(self, progress: Progress) -> None:
        """Continue at `progress`: take over its counters and write the teacher from the path, whatever it holds."""
        self.progress.commit(progress)
        self._plan.go_to(progress.schedule_step, now=progress.generator_updates)
        self._plan.node_since = progress.node_since
        if self.started:
            self._commit()
        self._masked.steps = self.generator_updates
        if self.path is not None and self.last_node:
            if self.started:
                self._place(anew=True)  # whatever the trainer's checkpoint held
            else:
                self._teacher.go_to(0.0)
        self._tell()

    # -- inside -------------------------------------------------------------------------------------------------------

    def _commit(self) -> None:
        """Bring the shared progress to where the plan is."""
        self.progress.schedule_step, self.progress.node_since = self._plan.updates, self._plan.node_since
        self.progress.phase = Phase.DONE if self._plan.finished else Phase.BACKTRACKING

    @property
    def _waits(self) -> bool:
        return self.behind and bool(getattr(self.schedule, "braked", False))

    def _check(self, path: DegradationPath, teacher: ScoreNetwork) -> None:
        if not path.complete:
            raise PathError(
                f"an unfinished path ({path})", expected="a complete one", cure="record it to its end first"
            )
        if self._fake_score is not None:
            teacher.check_same_layout(self._fake_score)
        path.verify_teacher(teacher.whole())
        if self.last_node:
            self.schedule.check(self.last_node)

    def _settled(self) -> Schedule:
        """Return the schedule, settled by what the recording says if it wants to be."""
        if self.path is None or not self.last_node or not isinstance(self.schedule, Settling):
            return self.schedule
        manifest = self.path.manifest
        settled = self.schedule.settle(manifest.clock)
        plan = Plan(settled, self.last_node)
        logger.info(
            "%s: s_phi %s %d updates at its learning rate; from its last node the teacher walks back in %d, and the "
            "gradient grows to its full size in %d",
            type(settled).__name__.lower(),
            "is fitted in" if manifest.fitted else "was not fitted in",
            manifest.clock,
            next(updates for updates, target in plan.stages() if target.position == 0),
            plan.horizon,
        )
        return settled

    def _walk(self, signal: Any) -> None:
        """Go on by one update of the plan, unless a plug-in keeps or ends the node; as planned if it raises."""
        following = self._plan.following()
        try:
            following = self._plan.following(self._overruled(signal))
        finally:
            self._plan.go_to(following, now=self.generator_updates)
            self._commit()
            self._place()
            self._tell()

    def _overruled(self, signal: Any) -> bool | None:
        """Ask the plug-ins whether to leave the node; None if there is none, or nobody to ask."""
        if not (self._plan.on_node and self._plugins.listens("disback_should_advance")):
            return None
        return self._plugins.should_advance(self, self._plan.target.position, self.updates_in_node, signal)

    def _tell(self) -> None:
        """Call the plug-ins if the teacher holds another position than they know of, or the gradient's factor moved."""
        position, previous = self.position, self._told
        gradient, moved = self.gradient_factor, position != previous
        if self._away or (not moved and gradient == self._told_gradient):
            return
        self._told, self._told_gradient = position, gradient
        values = {"disback/position": position, "disback/node": ceil(position), "disback/gradient": gradient}
        if moved:
            self._plugins.node_swapped(self, position, previous, self.generator_updates)
            norms = [] if self.path is None else [node.delta_norm for node in self.path.nodes]
            values["disback/swap_ms"] = self._teacher.swap_ms
            values["disback/delta_norm"] = length(norms, previous, position)
        if not distributed.is_main_process():
            return
        self._plugins.log(values, self.generator_updates)
        if moved and not self._plugins.listens("disback_log"):
            # A ramp moves at each update: between two nodes that is a detail.
            level = logging.INFO if position == int(position) else logging.DEBUG
            logger.log(level, "update %d: %s", self.generator_updates, values)

    def _place(self, *, anew: bool = False, together: bool = True) -> None:
        """Bring the teacher to where the plan is; `anew` writes it though it should be there."""
        if self._away:
            return
        position = self._plan.target.position
        if anew or position != self.position:
            self._teacher.go_to(position, updates=self.generator_updates if together else None)
        if self._teacher.looks_ahead:
            self._teacher.look_ahead(self._plan.at(self._plan.following()).position)

    def _require_start(self) -> None:
        if self._teacher.failed:
            raise StateError(
                "a scheduler whose last move failed",
                expected="a teacher at the right place",
                cure="mend what that error said, and go on from the last saved state: load_state_dict(state)",
            )
        if not self.started:
            raise StateError(
                "a scheduler that has not started", expected="a started one", cure="call scheduler.start() first"
            )


def check_state(state: Mapping[str, Any], *, like: Mapping[str, Any], fixed: tuple[str, ...]) -> None:
    """Raise StateError unless `state` has the keys and types of `like`, and its values at the keys `fixed`."""
    if state.keys() != like.keys():
        raise StateError(
            f"a state with keys {sorted(state)}",
            expected=f"keys {sorted(like)}",
            cure="pass what state_dict() of the same kind of object returned",
        )
    for key, value in like.items():
        if type(state[key]) is not type(value):
            raise StateError(
                f"{key}={state[key]!r}", expected=f"a {type(value).__name__}", cure="pass an unedited state"
            )
        if key in fixed and state[key] != value:
            raise StateError(
                f"a state of another {key} ({str(state[key])[:100]!r})",
                expected=f"{str(value)[:100]!r}",
                cure=f"attach with the {key} that the state was saved under",
            )
