"""The two stages on one loop: Algorithm 1 (degradation recording), then Algorithm 2 (distribution backtracking).

The optimizer hooks call the session before and after each step. While recording, each fake-score update goes to the
recorder and the generator is held still; the generator's first step after the last node begins backtracking, and from
then on each generator update goes to the scheduler.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer

from disback_plugin import distributed
from disback_plugin.convergence import DivergenceMonitor, FitDetector
from disback_plugin.errors import StateError, TrainingError
from disback_plugin.loop import optimizers, roles
from disback_plugin.loop.lr_schedulers import Restorable, SchedulerSnapshot
from disback_plugin.loop.optimizer_hooks import OptimizerHooks
from disback_plugin.path.degradation_path import DegradationPath
from disback_plugin.plugins.manager import PluginManager
from disback_plugin.plugins.run_log import RunLog
from disback_plugin.progress import VERSION, Phase, Progress, validate_form, validate_state
from disback_plugin.recorder import PATIENCE, Recorder
from disback_plugin.schedule_base import Plan, to_config, validate_config
from disback_plugin.schedules import Schedule, Target
from disback_plugin.weights.network import ScoreNetwork

if TYPE_CHECKING:
    from disback_plugin.scheduler import TrajectoryScheduler

__all__ = ["Session"]

logger = logging.getLogger(__name__)

# Signs of a run that goes wrong (`convergence`), and the warnings.
SIGNS = {
    "stalled": "the fake score does not follow the student, its gradients at updates in a row agree: give it a higher "
    "learning rate or more updates per generator update, unless its rate is still warming up",
    "diverged": "the fake score's gradients have grown thirtyfold or are not finite: the student runs away from it; "
    "lower the generator's learning rate",
}


class Session:
    """One run on the networks and optimizers of a trainer.

    Args:
        teacher: s_theta.
        fake_score: s_phi.
        generator_optimizers: Optimizers that step the generator.
        fake_score_optimizers: Optimizers among which are those that step s_phi; the others are left alone.
        schedule: As in `attach`, resolved.
        prefetch: As in `attach`.
        plugins: As in `attach`.
        restore: As in `attach`.

    Attributes:
        progress: The phase and the counters, which the recorder and the scheduler share.
        path: The path, or None with record=0.
        recorder: The recorder while recording, else None.
        scheduler: The scheduler after recording, else None.
        log: The run's log on the main process, unless there is none.
        signal: The value that `disback_should_advance` is given.
        warning: A text to be logged at the first generator step, unless a state is loaded before.

    Raises:
        RoleError: If a network or an optimizer does not fit its role.
        MismatchError: If teacher and fake score differ in keys or shapes.
        OptionError: If `restore` holds an object that cannot be restored.
    """

    def __init__(
        self,
        teacher: ScoreNetwork,
        fake_score: ScoreNetwork,
        generator_optimizers: list[Optimizer],
        fake_score_optimizers: list[Optimizer],
        *,
        schedule: Schedule,
        prefetch: bool | None,
        plugins: PluginManager,
        restore: Restorable,
    ) -> None:
        roles.check_roles(teacher, fake_score, generator_optimizers, fake_score_optimizers)
        self.teacher, self.fake_score = teacher, fake_score
        self.schedule, self._prefetch, self.plugins = schedule, prefetch, plugins
        self.generator_optimizers = generator_optimizers
        weights = [tensor for _, tensor in fake_score.named_tensors()]
        self.fake_score_optimizers = optimizers.steppers(fake_score_optimizers, weights)
        self.progress = Progress()
        self.path: DegradationPath | None = None
        self.recorder: Recorder | None = None
        self.scheduler: TrajectoryScheduler | None = None
        self.log: RunLog | None = None
        self.signal: Any = None
        self._monitor: DivergenceMonitor | None = None  # while backtracking
        self._generator_steps = 0
        self.warning = ""
        stepped = (*generator_optimizers, *self.fake_score_optimizers)
        self._lr_schedulers = SchedulerSnapshot(restore, stepped)
        self.hooks = OptimizerHooks(generator_optimizers, self.fake_score_optimizers, fake_score, self)

    # -- queries ------------------------------------------------------------------------------------------------------

    @property
    def position(self) -> float:
        """The teacher's position in [0, N]; 0.0 is the teacher itself."""
        return 0.0 if self.scheduler is None else self.scheduler.position

    @property
    def active_schedule(self) -> Schedule:
        """The schedule; once backtracking has begun, with the length that it took from the recording."""
        return self.schedule if self.scheduler is None else self.scheduler.plan.schedule

    def timeline(self) -> list[tuple[int, Target]]:
        """Return generator updates with the target from there on; empty if the recording has yet to decide."""
        if self.scheduler is not None:
            return self.scheduler.timeline()
        if self.schedule.until_fitted:
            return []
        return Plan(self.schedule, 0 if self.path is None else self.path.manifest.last_node).timeline()

    def __repr__(self) -> str:
        from disback_plugin.summary import describe_session

        return describe_session(self)

    # -- the loop, as OptimizerHooks calls it -------------------------------------------------------------------------

    def before_step(self, optimizer: Optimizer) -> None:
        """Capture the learning-rate schedulers before recording advances them, and restore them afterwards."""
        if self.progress.phase is Phase.RECORDING:
            self._lr_schedulers.capture()
        elif self._lr_schedulers.saved:
            self._lr_schedulers.restore(optimizer)

    def gradient_factor(self) -> float | None:
        """Return the factor on the generator's gradient; None while recording, which holds the generator still."""
        return None if self.scheduler is None else self.scheduler.gradient_factor

    def learning_rate_factor(self) -> int:
        """Return the factor on the learning rate of s_phi."""
        return 1 if self.recorder is None else self.recorder.learning_rate_factor

    def after_fake_score_step(self, updated: bool) -> None:
        """Count an update of s_phi, which may make a node."""
        if not updated:
            return
        self.progress.fake_score_updates += 1
        if self.recorder is not None:
            self.recorder.update()
        elif self._monitor is not None:
            self._monitor.observe()

    def after_generator_step(self, updated: bool) -> None:
        """Move the teacher after a generator update, or begin backtracking after the last node."""
        self._generator_steps += 1
        if self.warning:
            logger.warning("%s", self.warning)
            self.warning = ""
        if self.path is not None and not self.progress.fake_score_updates and self._generator_steps > PATIENCE:
            raise TrainingError(
                f"{self._generator_steps} generator steps and none of the fake score",
                expected="a loop that trains both",
                cure="pass the optimizer that the loop steps for the fake score, and check the trainer's update ratio",
            )
        if self.scheduler is not None:
            if updated:
                self.scheduler.step(self.signal)
                self._read_monitor(self.scheduler)
        elif self.recorder is not None and self.recorder.done:
            # A teacher in train mode may have changed its running statistics meanwhile.
            original = self.recorder.path.teacher_source
            distributed.on_every_rank(lambda: self.teacher.write(original()), "read node 0")
            self.begin_backtracking()
            logger.info("%r", self)

    def _read_monitor(self, scheduler: TrajectoryScheduler) -> None:
        """Read a finished window of s_phi's gradients; warn once of each sign, and perhaps end backtracking."""
        monitor = self._monitor
        if monitor is None or scheduler.done:
            self._monitor = None
            return
        if not monitor.window_ended:
            return
        signs = monitor.new_signs()
        ends = monitor.diverged and self.schedule.until_fitted
        for sign in signs:
            if distributed.is_main_process():
                ending = "; the teacher is s'_0 for good" if sign == "diverged" and ends else ""
                update = self.progress.generator_updates
                logger.warning("update %d, position %g: %s%s", update, scheduler.position, SIGNS[sign], ending)
                if self.plugins.listens("disback_log"):
                    self.plugins.call("disback_log", values={f"disback/{sign}": 1.0}, step=update)
        if ends:
            scheduler.end_backtracking()
            self._monitor = None

    def begin_backtracking(self) -> None:
        """Start the scheduler: s_phi becomes s'_N unless it is s'_N already, and the teacher moves to its position."""
        # What was just recorded is s'_N, unless s_phi was updated since: the decoded node would differ from it.
        is_last_node = self.recorder is not None and not self.recorder.went_on
        scheduler = self._new_scheduler(None if is_last_node else self.fake_score)
        try:
            scheduler.start()
        finally:
            if scheduler.started:  # even if a plug-in raised when it was called
                self._set_scheduler(scheduler)

    def _set_scheduler(self, scheduler: TrajectoryScheduler) -> None:
        self.scheduler, self.recorder = scheduler, None
        monitored = not scheduler.done and scheduler.plan.nodes
        self._monitor = DivergenceMonitor(self.fake_score, scheduler.plan.horizon) if monitored else None

    def _new_scheduler(self, fake_score: ScoreNetwork | None) -> TrajectoryScheduler:
        from disback_plugin.scheduler import TrajectoryScheduler

        return TrajectoryScheduler(
            self.path,
            self.teacher,
            fake_score,
            schedule=self.schedule,
            prefetch=self._prefetch,
            together=True,
            plugins=self.plugins,
            progress=self.progress,
        )

    def _new_recorder(self, path: DegradationPath) -> Recorder:
        return Recorder(
            path,
            self.fake_score,
            self.progress,
            until_fitted=self.schedule.until_fitted,
            scales_rate=all(map(optimizers.has_learning_rates, self.fake_score_optimizers)),
            plugins=self.plugins,
        )

    # -- begin and end ------------------------------------------------------------------------------------------------

    def open(self, path: DegradationPath) -> None:
        """Begin on a path of this teacher: record if it is unfinished, else backtrack."""
        self.path = path
        if path.complete:
            self.progress.recorded = path.manifest.iterations
            self.begin_backtracking()
        else:
            self.recorder = self._new_recorder(path)
            self.recorder.start()

    def detach(self) -> None:
        """Remove every hook, and restore the teacher and the learning-rate schedulers. A second call does nothing.

        Raises:
            PathError: If node 0 cannot be read any more. The hooks are removed all the same.
        """
        if not self.hooks.installed:
            return
        if not self.progress.fake_score_updates and not self._generator_steps:
            logger.warning("no optimizer step was seen: the loop stepped other optimizers than those attached to")
        self.hooks.remove()
        self._lr_schedulers.restore()
        if self.scheduler is not None:
            self.scheduler.restore_teacher()
        elif self.path is not None:  # in train mode it may have changed its running statistics
            self.teacher.write(self.path.teacher_source())

    # -- resume -------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the progress, and all that identifies the run, as plain scalars."""
        recorded = None if self.recorder is None else self.progress.recorded
        seen = self._monitor if self.recorder is None else self.recorder.fit
        return {
            "version": VERSION,
            "path": "" if self.path is None else self.path.identity,
            "nodes": "" if self.path is None else self.path.nodes_digest(recorded),
            "schedule": to_config(self.schedule),
            **self.progress.to_state(),
            "fit": "" if seen is None else seen.to_text(),
            "restore": self._lr_schedulers.to_text(),
            "fake_score": self.fake_score.local_checksum(),
        }

    def validate_form(self, state: object) -> dict[str, Any]:
        """Return a state of any run under the keys of the present version; raise StateError if it is no state."""
        return distributed.on_every_rank(lambda: validate_form(state), "be given a state")

    def validate(self, state: Mapping[str, Any]) -> Progress:
        """Return the progress in a state, or raise unless the state is of this path, schedule and fake score.

        Raises:
            StateError: If the state does not fit.
            RankError: If the state fits here but not on another rank, or if that rank was given another state.
        """
        holds = self.fake_score.matches_checksum(state["fake_score"])  # collective
        facts = {name: state[name] for name in ("phase", "recorded", "generator_updates")}
        return distributed.on_every_rank(
            lambda: self._validate_here(state, holds), "be given the state that fits it", facts
        )

    def _validate_here(self, state: Mapping[str, Any], holds: bool) -> Progress:
        identity = "" if self.path is None else self.path.identity
        validate_state(state, like={"path": identity}, fixed=("path",))
        validate_config(self.schedule, state["schedule"])
        if not holds:
            raise StateError(
                "a fake score whose weights are not those of the saved moment",
                expected="the trainer's checkpoint in it",
                cure="call attach() first, then load the trainer's checkpoint, then handle.load_state_dict(state); "
                "or load it before, and call attach(..., state=state)",
            )
        progress = Progress.from_state(state)
        recording = progress.phase is Phase.RECORDING
        self._lr_schedulers.validate_text(state["restore"])
        (FitDetector if recording else DivergenceMonitor).validate_text(state["fit"])
        if self.path is not None and state["nodes"] != self.path.nodes_digest(progress.recorded if recording else None):
            raise StateError(
                f"other nodes in {self.path.folder} than at the saved moment",
                expected="the path that the state was saved with",
                cure="restore the folder, or start again in an empty one",
            )
        return progress

    def load(self, state: Mapping[str, Any], progress: Progress) -> None:
        """Continue from a validated state: set the counters and write the teacher from the path."""
        self._lr_schedulers.load_text(state["restore"])
        if progress.phase is Phase.RECORDING:
            assert self.path is not None
            if self.scheduler is not None:
                self.scheduler.restore_teacher()
            self.scheduler = self._monitor = None
            self.progress.commit(progress)
            self.recorder = self._new_recorder(self.path)
            self.recorder.load_fit(state["fit"])
            self.recorder.go_back(progress.recorded)
            return
        # Without a scheduler, the crash came before this loop saw the end of its recording.
        scheduler = self._new_scheduler(None) if self.scheduler is None else self.scheduler
        scheduler.resume(progress)
        self.progress.recorded = 0 if self.path is None else self.path.manifest.iterations
        self._set_scheduler(scheduler)
        if self._monitor is not None:
            self._monitor.load_text(state["fit"])
