"""Algorithm 1, then Algorithm 2, on one pair of networks: begun, handed over, and resumed where a run stood."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch.optim import Optimizer

from disback_plugin import distributed, startup_warnings
from disback_plugin.convergence import DivergenceMonitor, FitDetector
from disback_plugin.errors import OptionError, PluginError, StateError
from disback_plugin.loop.lr_schedulers import SchedulerSnapshot
from disback_plugin.opening import open_or_create
from disback_plugin.path.degradation_path import DegradationPath
from disback_plugin.path.manifest import Manifest, Recording
from disback_plugin.plugins.manager import PluginManager
from disback_plugin.progress import Phase, Progress, validate_state
from disback_plugin.recorder import Recorder
from disback_plugin.scheduler import TrajectoryScheduler
from disback_plugin.schedules import Schedule, validate_config
from disback_plugin.weights.network import ScoreNetwork

__all__ = ["Session"]

logger = logging.getLogger(__name__)

# Counters of a state, and their names in the scheduler's progress.
COUNTS = {"generator_updates": "generator_updates", "plan_updates": "schedule_step", "node_since": "node_since"}
# Signs of a run that goes wrong (`monitoring`), and what is said of them.
SIGNS = {
    "stalled": "the fake score does not follow the student, its gradients at updates in a row agree: give it a higher "
    "learning rate or more updates per generator update, unless its rate is still warming up",
    "diverged": "the fake score's gradients have grown thirtyfold or are not finite: the student runs away from it; "
    "lower the generator's learning rate",
}
# Of a state. What another version wrote is loaded as well: whoever raises this translates in `_check`.
VERSION = 1


class Session:
    """The recorder while recording, and then the scheduler.

    Attributes:
        path: The path, or None with record=0.
        recorder: The recorder while recording; then None.
        scheduler: The scheduler once recording is over; until then None.
        fake_score_updates: Finished updates of s_phi, recording included.
    """

    def __init__(
        self,
        teacher: ScoreNetwork,
        fake_score: ScoreNetwork,
        *,
        schedule: Schedule,
        prefetch: bool | None,
        plugins: PluginManager,
        rewind: SchedulerSnapshot,
        hastens: bool,
    ) -> None:
        self.teacher, self.fake_score = teacher, fake_score
        self.schedule, self._prefetch, self._plugins = schedule, prefetch, plugins
        self._rewind, self._hastens = rewind, hastens
        self.path: DegradationPath | None = None
        self.recorder: Recorder | None = None
        self.scheduler: TrajectoryScheduler | None = None
        self.fake_score_updates = 0
        self._monitor: DivergenceMonitor | None = None  # while the teacher walks
        self._went_on = False  # s_phi was updated after it was saved as s'_N

    @property
    def phase(self) -> str:
        """ "recording", "backtracking" or "done"."""
        if self.scheduler is None:
            return "recording"
        return "done" if self.scheduler.done else "backtracking"

    # -- the loop -----------------------------------------------------------------------------------------------------

    def before_step(self, optimizer: Optimizer) -> None:
        """Look at the learning rates before a recording advances them, and put them back after it."""
        if self.scheduler is None:
            self._rewind.take()
        else:
            self._rewind.put_back(optimizer)

    def haste(self) -> int:
        """Return the factor on the learning rate of s_phi for its next step."""
        return 1 if self.recorder is None else self.recorder.haste

    def fake_score_updated(self) -> None:
        """Count an update of s_phi; it may be a node."""
        self.fake_score_updates += 1
        if self.recorder is not None:
            self._went_on = self.recorder.done
            self.recorder.update()
        elif self._monitor is not None:
            self._monitor.observe()

    def generator_stepped(self, updated: bool, signal: Any) -> None:
        """Move the teacher after an update of the generator, or hand over after a step that was held still."""
        if self.scheduler is not None:
            if updated:
                self.scheduler.step(signal)
                self._see_how_it_goes(self.scheduler)
        elif self.recorder is not None and self.recorder.done:
            # A teacher in train mode may have changed its running statistics meanwhile.
            original = self.recorder.path.teacher_source
            distributed.on_every_rank(lambda: self.teacher.write(original()), "read node 0")
            self._begin_backtracking()

    def _see_how_it_goes(self, scheduler: TrajectoryScheduler) -> None:
        """Draw what there is to be drawn from a window of s_phi's gradients: say it once, wait, let go of the path."""
        monitor = self._monitor
        if monitor is None or scheduler.done:
            self._monitor = None
            return
        signs = monitor.new_signs()
        gives_up = monitor.diverged and self.schedule.until_fitted
        for sign in signs:
            self._warn(sign, SIGNS[sign], scheduler, gives_up)
        if gives_up:
            scheduler.end_backtracking()
            self._monitor = None

    def _warn(self, sign: str, warning: str, scheduler: TrajectoryScheduler, gives_up: bool) -> None:
        if not distributed.is_main_process():
            return
        ending = "; the teacher is back at itself for good" if sign == "diverged" and gives_up else ""
        logger.warning("update %d, position %g: %s%s", scheduler.generator_updates, scheduler.position, warning, ending)
        if self._plugins.listens("disback_log"):
            self._plugins.call("disback_log", values={f"disback/{sign}": 1.0}, step=scheduler.generator_updates)

    def close(self) -> None:
        """Put s'_0 back into the teacher, bit for bit, and what a recording advanced."""
        self._rewind.put_back()
        if self.scheduler is not None:
            self.scheduler.restore_teacher()
        elif self.path is not None:  # in train mode it may have changed its running statistics
            self.teacher.write(self.path.teacher_source())

    # -- the start ----------------------------------------------------------------------------------------------------

    def open(
        self,
        folder: str | os.PathLike[str] | None,
        *,
        record: int,
        every: int,
        codec: str,
        keep_teacher: bool,
        generator: Callable[[], str | None],
        state: Mapping[str, Any] | None,
    ) -> None:
        """Open or begin the path, and go to where the run stands.

        Args:
            folder: As `path` of `attach`.
            record: As in `attach`.
            every: As in `attach`.
            codec: As in `attach`.
            keep_teacher: As in `attach`.
            generator: Returns the generator's fingerprint; None if it is not known.
            state: As in `attach`.

        Raises:
            DisbackError: As `attach` says.
        """
        where = None if folder is None else str(Path(folder).absolute())
        distributed.agree(
            {"path": where, "record": record, "every": every, "codec": codec, "keep_teacher": keep_teacher}
            | {"schedule": repr(self.schedule), "resumes": state is not None}
        )
        if state is not None:
            distributed.on_every_rank(lambda: self._check_form(state), "be given a state")
        try:
            if record == 0 and not isinstance(record, bool):
                self._begin_without_path(folder)
                if state is not None:
                    self.check(state)
                    self.load(state)
            elif folder is None or not str(folder):
                raise OptionError(
                    "no path=", expected="a folder for the nodes", cure="pass path=..., or record=0 for none"
                )
            elif state is None:
                self._begin(folder, Recording(record, every, codec, keep_teacher), generator)
            else:
                self._continue(folder, state)
        except PluginError:  # it heard of the start, and raised
            if self.scheduler is not None:
                self.scheduler.restore_teacher()
            raise

    def _begin_without_path(self, folder: str | os.PathLike[str] | None) -> None:
        if folder is not None and DegradationPath.exists(folder):
            raise OptionError(
                f"record=0 and a path in {folder}",
                expected="one or the other",
                cure="pass path=None for a run without DisBack, or leave record= alone: a finished path is reused",
            )
        self._begin_backtracking()

    def _begin(self, folder: str | os.PathLike[str], recording: Recording, generator: Callable[[], str | None]) -> None:
        self.path = open_or_create(folder, self.teacher, recording, generator=generator(), check=self.schedule.validate)
        startup_warnings.of_other_weights(self.teacher, self.fake_score, self.path)
        if self.path.complete:
            self._begin_backtracking()
            return
        self.recorder = self._new_recorder(self.path)
        self.recorder.start()

    def _continue(self, folder: str | os.PathLike[str], state: Mapping[str, Any]) -> None:
        def prepare() -> Manifest:
            path = DegradationPath(folder)
            path.remove_leftovers()
            path.verify()
            return path.manifest

        self.path = DegradationPath(folder, distributed.on_main_process(prepare))
        self.check(state)
        if not self.path.manifest.recording.keep_teacher:
            self.path.verify_teacher(self.teacher.full_state())
        source = self.path.source
        distributed.on_every_rank(lambda: self.teacher.write(source(0)), "read node 0")
        self.load(state)

    def _begin_backtracking(self) -> None:
        # What was recorded here is s'_N already, unless it went on: to write it, decoded, would change it for nothing.
        is_there = self.recorder is not None and not self._went_on
        scheduler = self._new_scheduler(None if is_there else self.fake_score)
        try:
            scheduler.start()
        finally:
            if scheduler.started:  # though a plug-in raised when it heard of it
                self.scheduler, self.recorder = scheduler, None
                self._watch(scheduler)

    def _watch(self, scheduler: TrajectoryScheduler) -> None:
        walks = not scheduler.done and scheduler.last_node
        self._monitor = DivergenceMonitor(self.fake_score, scheduler.horizon) if walks else None

    def _new_recorder(self, path: DegradationPath) -> Recorder:
        until_fitted = self.schedule.until_fitted
        return Recorder(path, self.fake_score, until_fitted=until_fitted, hastens=self._hastens, plugins=self._plugins)

    def _new_scheduler(self, fake_score: ScoreNetwork | None) -> TrajectoryScheduler:
        return TrajectoryScheduler(
            self.path,
            self.teacher,
            fake_score,
            schedule=self.schedule,
            prefetch=self._prefetch,
            together=True,
            plugins=self._plugins,
        )

    # -- resume -------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain scalars."""
        iteration = None if self.recorder is None else self.recorder.iteration
        return {
            "version": VERSION,
            "path": "" if self.path is None else self.path.identity,
            "nodes": "" if self.path is None else self.path.nodes_digest(iteration),
            "schedule": repr(self.schedule),
            "phase": self.phase,
            "recording_iteration": 0 if iteration is None else iteration,
            **(dict.fromkeys(COUNTS, 0) if self.scheduler is None else _counts(self.scheduler.progress)),
            "fake_score_updates": self.fake_score_updates,
            "fit": self._seen(),
            "restore": self._rewind.state,
            "fake_score": self.fake_score.local_checksum(),
        }

    def _seen(self) -> str:
        """Return what was seen of s_phi's gradients: by the recorder, or the monitor; empty if nobody looks."""
        if self.recorder is not None:
            return self.recorder.fit.to_text()
        return "" if self._monitor is None else self._monitor.to_text()

    def check(self, state: Mapping[str, Any]) -> None:
        """Raise unless a state is of this path and schedule, and of the moment whose weights s_phi holds.

        Raises:
            StateError: If not.
            RankError: If so, but not on another rank, or if that was given another state.
        """
        distributed.on_every_rank(lambda: self._check_form(state), "be given a state")
        holds = self.fake_score.matches_checksum(str(state.get("fake_score", "")))  # all ranks look together
        counts = {name: state.get(name) for name in ("phase", "recording_iteration", "generator_updates")}
        distributed.on_every_rank(lambda: self._check(state, holds), "be given the state that fits it", counts)

    def _check_form(self, state: object) -> None:
        """Raise unless this is a state, of whatever run."""
        if not isinstance(state, Mapping):
            raise StateError(
                f"a state that is {state!r:.60}",
                expected="what handle.state_dict() returned",
                cure="save it beside the trainer's checkpoint; of a checkpoint from before DisBack there is none",
            )
        version = state.get("version")
        if type(version) is int and version > VERSION:
            raise StateError(
                f"a state of version {version}", expected=f"at most {VERSION}", cure="upgrade disback-plugin"
            )
        validate_state(state, like=self.state_dict(), fixed=("version",))

    def _check(self, state: Mapping[str, Any], holds: bool) -> None:
        validate_state(state, like=self.state_dict(), fixed=("path",))
        validate_config(self.schedule, state["schedule"])
        if not holds:
            raise StateError(
                "a fake score whose weights are not those of the saved moment",
                expected="the trainer's checkpoint in it",
                cure="call attach() first, then load the trainer's checkpoint, then handle.load_state_dict(state); "
                "or load it before, and call attach(..., state=state)",
            )
        self._rewind.check(state["restore"])
        recording = state["phase"] == "recording"
        (FitDetector if recording else DivergenceMonitor).validate_text(state["fit"])
        if self.path is None:
            return
        if state["nodes"] != self.path.nodes_digest(state["recording_iteration"] if recording else None):
            raise StateError(
                f"other nodes in {self.path.folder} than at the saved moment",
                expected="the path that the state was saved with",
                cure="restore the folder, or start again in an empty one",
            )

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from a state that was checked: counters are set, and the teacher is written from the path."""
        if state["phase"] == "recording":
            self._resume_recording(int(state["recording_iteration"]), state["fit"])
        else:
            self._resume_backtracking(state)
        self.fake_score_updates = int(state["fake_score_updates"])
        self._rewind.load(state["restore"])

    def _resume_recording(self, iteration: int, fit: str) -> None:
        assert self.path is not None
        if self.scheduler is not None:
            self.scheduler.restore_teacher()
            self.scheduler = None
        self._monitor = None
        self.recorder = self._new_recorder(self.path)
        self.recorder.fit.load_text(fit)
        self.recorder.rewind(iteration)
        # After node N the saved s_phi may have gone on, or not: the scheduler looks, and writes only if it has.
        self._went_on = self.recorder.done

    def _resume_backtracking(self, state: Mapping[str, Any]) -> None:
        if self.scheduler is None:  # the crash came after the recording, but before this handle saw its end
            self.scheduler, self.recorder = self._new_scheduler(None), None
        counts = {name: state[key] for key, name in COUNTS.items()}
        self.scheduler.resume(Progress(Phase.BACKTRACKING, **counts))
        self._watch(self.scheduler)
        if self._monitor is not None:
            self._monitor.load_text(state["fit"])


def _counts(progress: Progress) -> dict[str, int]:
    return {key: getattr(progress, name) for key, name in COUNTS.items()}
