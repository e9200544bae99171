"""The two stages on one loop: Algorithm 1 (degradation recording), then Algorithm 2 (distribution backtracking).

The optimizer hooks call the session before and after each step. While recording, each fake-score update goes to the
recorder and the generator is held still; the generator's first step after the last node begins backtracking, and from
then on each generator update goes to the scheduler.
"""

from __future__ import annotations

import logging
import os
from contextlib import ExitStack, nullcontext
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.optim import Optimizer

from disback_plugin import distributed
from disback_plugin.loop.lr_schedulers import Restorable, RestorableObjects
from disback_plugin.loop.optimizer_hooks import OptimizerHooks, UpdateCounter
from disback_plugin.loop.optimizers import groups_of, parameters, unwrap
from disback_plugin.loop.roles import check_roles, find_networks
from disback_plugin.loop.watches import ForwardWatch, UnseenUpdates, WrittenWeights
from disback_plugin.path.degradation_path import DegradationPath
from disback_plugin.plugins.hookspecs import Adapter
from disback_plugin.plugins.manager import PluginManager
from disback_plugin.plugins.run_log import RunLog
from disback_plugin.progress import Phase, Progress
from disback_plugin.recorder import Recorder
from disback_plugin.schedule_base import Schedule
from disback_plugin.session_measures import Evaluate, Measures
from disback_plugin.weights.network import ScoreNetwork

if TYPE_CHECKING:
    from disback_plugin.scheduler import TrajectoryScheduler

logger = logging.getLogger(__name__)

# Steps of a generator alone before a warning.
ALONE = 100


class Session:
    """One run on the networks and optimizers of a trainer.

    Args:
        given: The four roles. Of the fake score's optimizers, those that do not step s_phi are left alone.
        schedule, plugins, restore, evaluate, evaluate_every: As in `attach`, resolved.
        folder: Folder of the path; None for none.
        monitors: Whether to say if s_phi follows the student although there is no path.

    Attributes:
        progress: The phase and the counters, which the recorder and the scheduler share.
        detached: Whether the run has ended with `detach`.
        path: The path, or None with record=0.
        recorder: The recorder while recording, else None.
        scheduler: The scheduler after recording, else None.
        log: The run's log on the main process, unless there is none.
        separate: Whether teacher and fake score differ in architecture, so that nodes are the teacher's alone.
        roles: Teacher, fake score and the optimizers of generator and fake score.
        signal: The value that `disback_should_advance` is given.
        measures: What is measured after each update of the generator.
        restorable: The objects that a recording advances, with their states before it until they are restored.
        warning: A text to be logged at the first generator step, unless a state is loaded before.

    Raises:
        RoleError: If a network or an optimizer does not fit its role.
        MismatchError: If teacher and fake score differ in keys or shapes.
        OptionError: If `restore` holds an object that cannot be restored.
    """

    def __init__(
        self,
        given: Adapter,
        schedule: Schedule,
        *,
        plugins: PluginManager,
        restore: Restorable,
        folder: str | os.PathLike[str] | None = None,
        monitors: bool = False,
        evaluate: Evaluate | None = None,
        evaluate_every: int = 1,
    ) -> None:
        self.generator_optimizers = unwrap(given.generator_optimizer, role="generator_optimizer")
        self._stand_in: Any = given.stand_in() if given.stand_in and folder is not None else nullcontext()
        fake_score: Any = getattr(self._stand_in, "fake_score", given.fake_score)
        optimizer = getattr(self._stand_in, "optimizer", given.fake_score_optimizer)
        trained = [] if optimizer is None else unwrap(optimizer, role="fake_score_optimizer")
        self._samples = given.sample, given.loss
        if fake_score is None:  # with record=0 nothing needs one
            teacher = ScoreNetwork.of(given.teacher, role="teacher")
            self.teacher, self.fake_score, self.separate = teacher, teacher, False
        else:
            found = find_networks(given.teacher, fake_score, parameters(trained), folder, sampled=given.sample)
            self.teacher, self.fake_score, self.separate = found
            check_roles(self.teacher, self.fake_score, self.generator_optimizers, trained)
        weights = [tensor for _, tensor in self.fake_score.named_tensors()]
        self.fake_score_optimizers = [optimizer for optimizer in trained if groups_of(optimizer, weights)]
        self.roles = self.teacher, self.fake_score, self.generator_optimizers, self.fake_score_optimizers
        self.schedule, self.plugins, self.monitors = schedule, plugins, monitors
        self.progress, self.detached = Progress(), False
        self.path: DegradationPath | None = None
        self.recorder: Recorder | None = None
        self.scheduler: TrajectoryScheduler | None = None
        self.log: RunLog | None = None
        self.signal: Any = None
        self.warning = ""
        self._generator_steps = 0
        self._student_alone = False  # the fake score has not stepped yet, and the generator has
        self._first = ""  # the role that steps first in a round of the loop
        self._fake_score_waits = False  # at s'_N for the generator's first update
        self.restorable = RestorableObjects(restore, (*self.generator_optimizers, *self.fake_score_optimizers))
        moved = None if folder is None else self.teacher
        self.hooks = OptimizerHooks(self.generator_optimizers, self.fake_score_optimizers, self.fake_score, self, moved)
        self.measures = Measures(self, evaluate, evaluate_every)
        self._written = WrittenWeights(self.fake_score, self.fake_score_optimizers)
        self._until_recorded = ExitStack()
        self._unseen: list[UnseenUpdates] = []
        self._forwards: ForwardWatch | None = None  # until it is known whether the teacher runs

    @property
    def position(self) -> float:
        """The teacher's position in [0, N]; 0.0 is the teacher itself."""
        return 0.0 if self.scheduler is None else self.scheduler.position

    @property
    def recorded(self) -> int | None:
        """Recording iterations while recording, else None, as the log wants them."""
        return None if self.recorder is None else self.progress.recorded

    def __repr__(self) -> str:
        from disback_plugin.handle import describe

        return describe(self)

    # -- the loop, as OptimizerHooks calls it -------------------------------------------------------------------------

    def before_step(self, optimizer: Optimizer) -> None:
        """Capture the learning-rate schedulers before recording advances them, and restore them afterwards."""
        trains = optimizer in self.fake_score_optimizers
        self._first = self._first or ("fake_score" if trains else "generator")
        if optimizer in self.generator_optimizers:
            self.measures.before_generator_step()
        if trains:
            self._written.before_update()
        if self.progress.phase is not Phase.RECORDING:
            if self.restorable.states:
                self.restorable.restore(optimizer)
        elif self._student_alone and not trains:
            self.restorable.restore()
        else:
            self.restorable.capture(optimizer)

    def gradient_factor(self) -> float | None:
        """Return the factor on the generator's gradient; None while recording, which holds the generator still.

        A student that trains before the fake score does, as in a warm-up of its own, is not held still. Its first step
        is all the same: in most loops the generator steps first, and s_phi in the same iteration.
        """
        if self.scheduler is None:
            return 1.0 if self._student_alone else None
        return self.scheduler.gradient_factor

    def learning_rate_factor(self) -> int | None:
        """Return the factor on the learning rate of s_phi; None where the generator is to be updated before it."""
        if self._fake_score_waits:
            return None
        return 1 if self.recorder is None else self.recorder.learning_rate_factor

    def after_fake_score_step(self, updated: bool, idle: set[int]) -> None:
        """Count an update of s_phi, which may make a node."""
        if not updated:
            return
        self._written.after_update()
        self._student_alone = False
        self.progress.fake_score_updates += 1
        if self.recorder is not None:
            self.recorder.observe_gradients(idle)
            self.recorder.update()
        elif self.measures.monitor is not None:
            self.measures.monitor.observe(idle)

    def after_generator_step(self, updated: bool) -> None:
        """Move the teacher after a generator update, or begin backtracking after the last node."""
        self._generator_steps += 1
        if self.warning:
            logger.warning("%s", self.warning)
            self.warning = ""
        if self.scheduler is not None and updated:
            self._fake_score_waits = False
            try:
                self.scheduler.step(self.signal)
                self.measures.read_monitor(self.scheduler)
            except distributed.AbsentRankError as error:
                self._end_early(error.found)
            self.measures.after_update()
            if self._forwards is not None and self._forwards.check(self.position):
                self._forwards = None
        if self.scheduler is not None:
            return
        if self.recorder is not None and self.recorder.done:
            # A teacher in train mode may have changed its running statistics meanwhile.
            distributed.on_every_rank(self._restore_teacher, "read node 0")
            self._backtrack()
            self._fake_score_waits = self._first == "generator" and not self.separate
            logger.info("%r", self)
        elif not self.progress.fake_score_updates and not self.progress.recorded:
            self._student_alone = True
            if self._generator_steps == ALONE:
                logger.warning(
                    "%d generator steps and none of the fake score: the student trains alone, with the original "
                    "teacher, and recording begins with the fake score's first step. If the loop does train the fake "
                    "score, pass the network and the optimizer that it uses",
                    ALONE,
                )

    def _report_unseen(self, counter: UpdateCounter) -> None:
        """End backtracking, since updates of the generator are not seen; raise TrainingError while recording."""
        recording = self.progress.phase is Phase.RECORDING
        if recording or (self.position and counter is self.hooks.generator):
            error = counter.unseen()
            distributed.leave(error.found)  # ranks that go on must not wait for this one
            if recording:
                raise error
            self._end_early(error.found)

    def _end_early(self, found: str) -> None:
        logger.warning("found %s: backtracking ends here, and the teacher is s'_0 again", found)
        self._restore_teacher()

    # -- begin and end ------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Record if the path is unfinished; backtrack if it is complete, or there is none."""
        if self.path is None or (self.path.complete and not self.separate):
            self._backtrack()
        else:
            with self._written.writing():
                self._record(self.path).start()

    def install(self) -> None:
        """Install the hooks and the watches."""
        if self.recorder is not None:
            self._until_recorded.enter_context(self._stand_in)  # its updates come before the generator's step
        self.hooks.install()
        self.teacher.install()
        if self.path is not None:
            counters = self.hooks.generator, self.hooks.fake_score
            self._unseen = [UnseenUpdates(counter, self._report_unseen) for counter in counters]

    def _record(self, path: DegradationPath) -> Recorder:
        rates = [group.get("lr") for each in self.fake_score_optimizers for group in each.param_groups]
        scales = all(rate.numel() == 1 if isinstance(rate, Tensor) else rate is not None for rate in rates)
        options: dict[str, Any] = {"until_fitted": self.schedule.until_fitted, "plugins": self.plugins}
        self.scheduler = self.measures.monitor = None
        if self.separate:
            from disback_plugin.teacher_fit import TeacherRecorder

            self.recorder = TeacherRecorder(path, self.teacher, self.progress, *self._samples, **options)
        else:
            self.recorder = Recorder(path, self.fake_score, self.progress, scales_rate=scales, **options)
        return self.recorder

    def _backtrack(self, saved: Progress | None = None) -> None:
        """Start the scheduler, or let it resume: s_phi becomes s'_N, and the teacher moves to its position."""
        from disback_plugin.scheduler import TrajectoryScheduler

        # What was just recorded is s'_N, unless s_phi was updated since: the decoded node would differ from it.
        is_last_node = self.separate or saved is not None or (self.recorder is not None and not self.recorder.went_on)
        fake_score = None if is_last_node else self.fake_score
        (saved or self.progress).recorded = 0 if self.path is None else self.path.manifest.iterations
        scheduler = self.scheduler or TrajectoryScheduler(
            self.path, self.teacher, fake_score, self.schedule, plugins=self.plugins, progress=self.progress
        )
        try:
            if saved is None:
                with self._written.writing():
                    scheduler.start()
            else:
                scheduler.resume(saved)
        finally:
            if scheduler.started:  # even if a plug-in raised when it was called
                self._until_recorded.close()
                self.scheduler, self.recorder = scheduler, None
                if scheduler.plan.nodes and not scheduler.done:
                    self._forwards = self._forwards or ForwardWatch(self.teacher)
                self.measures.begin(scheduler, resumes=saved is not None)

    def _restore_teacher(self) -> None:
        if self.scheduler is not None:
            self.scheduler.restore_teacher()
        elif self.path is not None:
            self.teacher.write(self.path.teacher_source())

    def detach(self, *, failed: bool = False) -> None:
        """Remove every hook, and restore teacher and learning-rate schedulers, once; the loop may have `failed`."""
        if self.detached:
            return
        self.detached = True
        if not failed and not self.progress.fake_score_updates and not self._generator_steps:
            logger.warning("no optimizer step was seen: the loop stepped other optimizers than those attached to")
        with ExitStack() as rest:  # all of it, the last first, whatever raises
            rest.callback(self._restore_teacher)
            rest.callback(self.teacher.remove)
            if self.path is not None:
                rest.callback(self.path.lock.release)
            rest.callback(self.restorable.restore)
            for watch in (*self._unseen, *([self._forwards] if self._forwards else ())):
                rest.callback(watch.remove)
            rest.callback(self._until_recorded.close)
            rest.callback(self.hooks.remove)

    # -- resume -------------------------------------------------------------------------------------------------------

    def continue_at(self, progress: Progress, fit: str, restore: str) -> None:
        """Continue at a validated progress: set the counters and write the teacher from the path, whatever it holds.

        `fit` is what s_phi's gradients have shown so far, and `restore` what is restored after the recording, as text.
        """
        recording = progress.phase is Phase.RECORDING
        if self.log is not None and self.hooks.installed:
            self.log.resume(update=progress.generator_updates, recording=progress.recorded if recording else None)
        self.warning, self._fake_score_waits = "", False
        self.restorable.load(restore)
        self._written.left = 0
        if self.scheduler is None:
            distributed.on_every_rank(self._restore_teacher, "read node 0")
        if self.path is None or not recording:
            # Without a scheduler, the crash came before this loop saw the end of its recording.
            self._backtrack(progress)
            if self.measures.monitor is not None:
                self.measures.monitor.load(fit)
            return
        if self.scheduler is not None:
            self.scheduler.restore_teacher()
        self.progress.commit(progress)
        recorder = self._record(self.path)
        recorder.load_fit(fit)
        recorder.go_back(progress.recorded)
