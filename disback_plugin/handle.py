"""The handle of an attached loop: the two stages, riding on the loop's optimizers."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any

from torch.optim import Optimizer

from disback_plugin import distributed, startup_warnings
from disback_plugin._text_table import aligned
from disback_plugin.errors import StateError, TrainingError
from disback_plugin.loop import optimizers
from disback_plugin.loop.lr_schedulers import SchedulerSnapshot, Stateful
from disback_plugin.loop.optimizer_hooks import OptimizerHooks
from disback_plugin.loop.roles import check_roles
from disback_plugin.path.degradation_path import DegradationPath
from disback_plugin.plugins.manager import PluginManager
from disback_plugin.plugins.run_log import RunLog, numbers_and_pictures
from disback_plugin.recording import PATIENCE
from disback_plugin.schedule_base import Plan
from disback_plugin.scheduler import TrajectoryScheduler
from disback_plugin.schedules import Schedule
from disback_plugin.session import Session
from disback_plugin.summary import agenda, cast, described
from disback_plugin.weights.checksum import fingerprint
from disback_plugin.weights.network import ScoreNetwork
from disback_plugin.weights.sharding import FullState

__all__ = ["Handle"]

logger = logging.getLogger(__name__)


class Handle:
    """What `attach` returns: where the run is, its state for a checkpoint, and the way out.

    Args:
        teacher: s_theta.
        fake_score: s_phi.
        generator_optimizers: Those that step the generator.
        fake_score_optimizers: Those that step s_phi; others are left alone.
        schedule: As in `attach`, resolved.
        prefetch: As in `attach`.
        plugins: As in `attach`.
        restore: As in `attach`.

    Attributes:
        signal: What a plug-in that decides when to leave a node is told (`disback_should_advance`), as a measure of
            convergence; the loop may set it whenever it knows better.

    Example:
        >>> import tempfile, torch
        >>> from torch import nn
        >>> from disback_plugin import attach
        >>> teacher, fake, generator = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)
        >>> opt_f, opt_g = (torch.optim.Adam(net.parameters()) for net in (fake, generator))
        >>> roles = dict(teacher=teacher, fake_score=fake, generator_optimizer=opt_g, fake_score_optimizer=opt_f)
        >>> handle = attach(**roles, path=tempfile.mkdtemp(), record=100)
        >>> handle.phase, handle.position, handle.generator_updates
        ('recording', 0.0, 0)
        >>> state = handle.state_dict()  # plain scalars, for the trainer's checkpoint
        >>> handle.load_state_dict(state)
        >>> handle.detach()
    """

    def __init__(
        self,
        *,
        teacher: ScoreNetwork,
        fake_score: ScoreNetwork,
        generator_optimizers: list[Optimizer],
        fake_score_optimizers: list[Optimizer],
        schedule: Schedule,
        prefetch: bool | None = None,
        plugins: PluginManager | Sequence[object] = (),
        restore: str | Stateful | Sequence[str | Stateful] = "schedulers",
    ) -> None:
        check_roles(teacher, fake_score, generator_optimizers, fake_score_optimizers)
        self._generator_optimizers = generator_optimizers
        # Others, as a discriminator's, may step when they like.
        weights = (tensor for _, tensor in fake_score.named_tensors())
        self._fake_score_optimizers = optimizers.steppers(fake_score_optimizers, weights)
        self._plugins = PluginManager.of(plugins)
        self._log: RunLog | None = None
        self._stages = Session(
            teacher,
            fake_score,
            schedule=schedule,
            prefetch=prefetch,
            plugins=self._plugins,
            rewind=SchedulerSnapshot(restore, generator_optimizers, self._fake_score_optimizers),
            hastens=all(optimizers.has_rates(optimizer) for optimizer in self._fake_score_optimizers),
        )
        self._ride = OptimizerHooks(
            generator_optimizers,
            self._fake_score_optimizers,
            before_step=self._stages.before_step,
            factor=self._gradient_factor,
            haste=optimizers.LearningRateScale(self._stages.haste, lambda: (w for _, w in fake_score.named_tensors())),
            after_generator=self._after_generator_round,
            after_fake_score=self._after_fake_score_round,
        )
        self._generator_steps = 0
        self._caution = ""  # said at the first step, unless a state is loaded before it
        self.signal: Any = None

    # -- where we are -------------------------------------------------------------------------------------------------

    @property
    def path(self) -> DegradationPath | None:
        """The path, or None with record=0."""
        return self._stages.path

    @property
    def scheduler(self) -> TrajectoryScheduler | None:
        """The scheduler, or None while recording."""
        return self._stages.scheduler

    @property
    def fake_score_updates(self) -> int:
        """Finished updates of s_phi since attaching, recording included."""
        return self._stages.fake_score_updates

    @property
    def phase(self) -> str:
        """ "recording", "backtracking" or "done"; done means that the teacher is s'_0 for good."""
        return self._stages.phase

    @property
    def position(self) -> float:
        """Where the teacher stands, in [0, N]; 0.0 is the teacher itself."""
        return 0.0 if self.scheduler is None else self.scheduler.position

    @property
    def generator_updates(self) -> int:
        """Finished generator updates; those while recording do not count, for they change nothing."""
        return 0 if self.scheduler is None else self.scheduler.generator_updates

    @contextmanager
    def original_teacher(self) -> Iterator[None]:
        """Hold the teacher at s'_0 inside, as for an evaluation, and at the active position again after."""
        if self.scheduler is None:
            yield
        else:
            with self.scheduler.original_teacher():
                yield

    def __repr__(self) -> str:
        stages, path = self._stages, self.path
        manifest = None if path is None else path.manifest
        nodes = "no path" if path is None else f"N = {path.manifest.last_node}, {path.folder}"
        recorded = None if stages.recorder is None else stages.recorder.iteration
        if self.scheduler is None:
            waits = stages.schedule.until_fitted
            ahead = [] if waits else Plan(stages.schedule, 0 if manifest is None else manifest.last_node).timeline()
        else:
            ahead = self.scheduler.timeline()
        who = cast(
            stages.teacher,
            stages.fake_score,
            self._generator_optimizers,
            self._fake_score_optimizers,
            walks=path is not None,
        )
        schedule = stages.schedule if self.scheduler is None else self.scheduler.settled
        return (
            f"<disback {self.phase}: position {self.position:g} ({nodes}), {schedule!r}, "
            f"{self.generator_updates} generator updates, {self.fake_score_updates} fake-score updates>\n"
            f"{aligned(who)}\n{aligned(agenda(manifest, recorded, ahead, self.generator_updates))}"
        )

    # -- the way in and out -------------------------------------------------------------------------------------------

    def begin(
        self,
        path: str | os.PathLike[str] | None,
        *,
        state: Mapping[str, Any] | None,
        log: str | os.PathLike[str] | None = None,
        **recording: Any,
    ) -> None:
        """Open or begin the path, go to where the run stands, and install the hooks. `attach` calls it, once.

        Args:
            path: As in `attach`.
            state: As in `attach`.
            log: As in `attach`.
            recording: `record`, `every`, `codec` and `keep_teacher`, as in `attach`.

        Raises:
            DisbackError: As `attach` says. Then no hook is left.
        """
        if distributed.is_main_process():
            self._log = self._plugins.add_run_log(log, path)
        self._stages.open(path, generator=lambda: _fingerprint_of(self._generator_optimizers), state=state, **recording)
        if self.path is not None and self.scheduler is not None and state is None and distributed.is_main_process():
            stages = self._stages
            startup_warnings.of_another_rate(self.path, stages.schedule, stages.fake_score, self._fake_score_optimizers)
            self._caution = startup_warnings.of_an_earlier_walk(self._log, self.path)
        self._begin_log(recording, resumed=state is not None)
        self._announce()
        self._ride.begin()

    def detach(self) -> None:
        """Put s'_0 back into the teacher, bit for bit, and remove every hook. A second call changes nothing.

        Raises:
            PathError: If node 0 cannot be read any more. The hooks are gone all the same.
        """
        if not self._ride:
            return
        if not self.fake_score_updates and not self._generator_steps:
            logger.warning("no optimizer step was seen: the loop stepped other optimizers than those attached to")
        self._ride.end()
        self._stages.close()

    def __enter__(self) -> Handle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    # -- resume -------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain scalars, to be saved beside the trainer's checkpoint."""
        return self._stages.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state` was saved. Call it after the trainer's checkpoint was loaded.

        Counters are set, and the teacher is written from the path, whatever the checkpoint held.

        Raises:
            StateError: If `state` is of another version, path or schedule, if the fake score does not hold the weights
                of that moment, or if the path does not hold the nodes of that moment. Then nothing changes.
        """
        if not self._ride:
            raise StateError("a detached handle", expected="an attached one", cure="call attach() again")
        self._stages.check(state)
        if self._log is not None:
            recording = int(state["recording_iteration"]) if state["phase"] == "recording" else None
            self._log.resume(update=int(state["generator_updates"]), recording=recording)
        self._stages.load(state)
        self._caution = ""

    # -- the log ------------------------------------------------------------------------------------------------------

    def log(self, values: Mapping[str, Any]) -> None:
        """Add numbers and pictures of the loop's own to the run's log, under the present update; numbers also go to
        `disback_log`, as "disback/NAME".

        `disback report` draws each of them. Of names that begin with "distance" or "mismatch", the lower the better,
        it compares runs. Any rank may call it, the first one writes.

        Args:
            values: By name: numbers, tensors of one element, or the `pathlib.Path` of a PNG file. A tensor is read,
                which waits for its device: log now and then, not at each update.

        Raises:
            OptionError: If a name is taken, or a value is something else.

        Example:
            >>> def after_a_while(handle: Handle, loss: Any) -> None:
            ...     handle.log({"loss": loss, "distance": 3.2, "samples": Path("samples/000100.png")})
        """
        if not distributed.is_main_process():
            return
        numbers, pictures = numbers_and_pictures(values)
        recorder = self._stages.recorder
        now: dict[str, float] = {} if recorder is None else {"disback/recording": recorder.iteration}
        if numbers:
            told = {f"disback/{name.removeprefix('disback/')}": value for name, value in numbers.items()}
            self._plugins.call("disback_log", values=now | told, step=self.generator_updates)
        if pictures and self._log is not None:
            at = None if recorder is None else recorder.iteration
            self._log.log(pictures, self.generator_updates, recording=at)

    def _begin_log(self, recording: Mapping[str, Any], *, resumed: bool) -> None:
        if self._log is None:
            return
        stages, recorder = self._stages, self._stages.recorder
        at = None if recorder is None else recorder.iteration
        self._log.begin(
            "attach",
            update=self.generator_updates,
            recording=at,
            resumed=resumed or bool(at),
            **({} if self.path is None else self.path.log_fields()),
            settings={"schedule": repr(stages.schedule), **recording},
            **described(stages.teacher, stages.fake_score, self._generator_optimizers, self._fake_score_optimizers),
        )

    # -- the loop -----------------------------------------------------------------------------------------------------

    def _gradient_factor(self) -> float | None:
        return None if self.scheduler is None else self.scheduler.gradient_factor

    def _after_generator_round(self, updated: bool) -> None:
        self._generator_steps += 1
        if self._caution:
            logger.warning("%s", self._caution)
            self._caution = ""
        if self.path is not None and not self.fake_score_updates and self._generator_steps > PATIENCE:
            raise TrainingError(
                f"{self._generator_steps} generator steps and none of the fake score",
                expected="a loop that trains both",
                cure="pass the optimizer that the loop steps for the fake score, and check the trainer's update ratio",
            )
        was_recording = self.scheduler is None
        self._stages.generator_stepped(updated, self.signal)
        if was_recording:
            self._announce()

    def _after_fake_score_round(self, updated: bool) -> None:
        if updated:
            self._stages.fake_score_updated()

    def _announce(self) -> None:
        if self.scheduler is not None:
            logger.info("%r", self)


def _fingerprint_of(generator_optimizers: list[Optimizer]) -> str:
    """Return the fingerprint of what the optimizers step; all ranks must call if it is sharded."""
    weights = optimizers.parameters(generator_optimizers)
    state = FullState({str(index): weight for index, weight in enumerate(weights)})
    return distributed.on_main_process(lambda: fingerprint(state), state) if state.sharded else fingerprint(state)
