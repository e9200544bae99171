"""The handle of an attached loop: recorder and scheduler ride on the optimizers' own hooks.

generator's optimizer   pre-hook    recording: hide all gradients, so that the step changes nothing (Algorithm 1 wants
                                    the initial generator); afterwards: scale them by the schedule's factor
                        post-hook   count the update and move the teacher: no graph is pending there
fake score's optimizer  post-hook   recording: count, and save the nodes that are due
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any
from weakref import WeakSet

from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from disback_plugin import optimizers, ranks
from disback_plugin.errors import OptionError, PluginError, RoleError, StateError, TrainingError
from disback_plugin.fingerprints import fingerprint
from disback_plugin.hooks import Plugins
from disback_plugin.manifest import Manifest, Recording
from disback_plugin.opening import open_or_create
from disback_plugin.overview import agenda, aligned, cast
from disback_plugin.plan import Plan
from disback_plugin.recording import PATIENCE, Recorder
from disback_plugin.roles import check_roles
from disback_plugin.scheduler import TrajectoryScheduler, check_state
from disback_plugin.schedules import Schedule
from disback_plugin.trajectory import DegradationPath
from disback_plugin.weights import ScoreNetwork

__all__ = ["Handle"]

logger = logging.getLogger(__name__)

Args = tuple[Any, ...]
Kwargs = dict[str, Any]

# What a handle's state takes from its scheduler's.
COUNTS = ("generator_updates", "plan_updates", "node_since")

# Optimizers that a handle rides on: two handles on one loop would fight for the teacher.
_ATTACHED: WeakSet[Optimizer] = WeakSet()


class Handle:
    """What `attach` returns: where the run is, its state for a checkpoint, and the way out.

    Attributes:
        path: The path, or None with record=0.
        scheduler: The scheduler, or None while recording.
        fake_score_updates: Finished updates of s_phi since attaching, recording included.
        signal: What a plug-in that decides when to leave a node is told (`disback_should_advance`), as a measure of
            convergence; the loop may set it whenever it knows better.
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
        plugins: Plugins | Sequence[object] = (),
    ) -> None:
        self._teacher, self._fake_score = teacher, fake_score
        self._generator_optimizers = generator_optimizers
        self._schedule, self._prefetch = schedule, prefetch
        self._plugins = Plugins.of(plugins)
        check_roles(teacher, fake_score, generator_optimizers, fake_score_optimizers)
        if not _ATTACHED.isdisjoint((*generator_optimizers, *fake_score_optimizers)):
            raise RoleError(
                "an optimizer that a handle is attached to already",
                expected="one handle a loop",
                cure="call detach() of the other handle first, or leave its with block",
            )
        self.path: DegradationPath | None = None
        self.scheduler: TrajectoryScheduler | None = None
        self.fake_score_updates = 0
        self.signal: Any = None
        self._recorder: Recorder | None = None
        self._went_on = False  # s_phi was updated after it was saved as s'_N
        self._generator_steps = 0
        self._hidden: dict[Optimizer, list[tuple[Tensor, Tensor]]] = {}
        self._updates: dict[Optimizer, bool] = {}
        self._hooks: list[RemovableHandle] = []
        self._generator_rounds = optimizers.Rounds(generator_optimizers, self._after_generator_round)
        # Others, as a discriminator's, may step when they like.
        weights = {id(tensor) for _, tensor in fake_score.named_tensors()}
        self._fake_score_optimizers = [
            o for o in fake_score_optimizers if weights & {id(p) for p in optimizers.parameters([o])}
        ]
        self._fake_score_rounds = optimizers.Rounds(self._fake_score_optimizers, self._after_fake_score_round)

    # -- where we are -------------------------------------------------------------------------------------------------

    @property
    def phase(self) -> str:
        """ "recording", "backtracking" or "done"; done means that the teacher is s'_0 for good."""
        if self.scheduler is None:
            return "recording"
        return "done" if self.scheduler.done else "backtracking"

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
        recording = None if self.path is None else self.path.manifest.recording
        nodes = "no path" if self.path is None or recording is None else f"N = {recording.nodes}, {self.path.folder}"
        recorded = None if self._recorder is None else self._recorder.iteration
        if self.scheduler is None:
            stages = Plan(self._schedule, 0 if recording is None else recording.nodes).stages()
        else:
            stages = self.scheduler.stages()
        who = cast(
            self._teacher,
            self._fake_score,
            self._generator_optimizers,
            self._fake_score_optimizers,
            walks=self.path is not None,
        )
        return (
            f"<disback {self.phase}: position {self.position:g} ({nodes}), {self._schedule!r}, "
            f"{self.generator_updates} generator updates, {self.fake_score_updates} fake-score updates>\n"
            f"{aligned(who)}\n{aligned(agenda(recording, recorded, stages, self.generator_updates))}"
        )

    # -- the way out --------------------------------------------------------------------------------------------------

    def detach(self) -> None:
        """Put s'_0 back into the teacher, bit for bit, and remove every hook. A second call changes nothing.

        Raises:
            PathError: If node 0 cannot be read any more. The hooks are gone all the same.
        """
        if not self._hooks:
            return
        if not self.fake_score_updates and not self._generator_steps:
            logger.warning("no optimizer step was seen: the loop stepped other optimizers than those attached to")
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._hidden.clear()
        if self._recorder is not None:
            self._recorder.close()
        _ATTACHED.difference_update((*self._generator_optimizers, *self._fake_score_optimizers))
        if self.scheduler is not None:
            self.scheduler.restore()
        elif self.path is not None:  # in train mode it may have changed its running statistics
            self._teacher.write(self.path.original())

    def __enter__(self) -> Handle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()

    # -- resume -------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain scalars, to be saved beside the trainer's checkpoint."""
        iteration = None if self._recorder is None else self._recorder.iteration
        return {
            "version": 1,
            "path": "" if self.path is None else self.path.identity,
            "nodes": "" if self.path is None else self.path.digest(iteration),
            "schedule": repr(self._schedule),
            "phase": self.phase,
            "recording_iteration": 0 if iteration is None else iteration,
            **(dict.fromkeys(COUNTS, 0) if self.scheduler is None else _counts(self.scheduler.state_dict())),
            "fake_score_updates": self.fake_score_updates,
            "fake_score": self._fake_score.checksum(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state` was saved. Call it after the trainer's checkpoint was loaded.

        Counters are set, and the teacher is written from the path, whatever the checkpoint held.

        Raises:
            StateError: If `state` is of another version, path or schedule, if the fake score does not hold the weights
                of that moment, or if the path does not hold the nodes of that moment. Then nothing changes.
        """
        if not self._hooks:
            raise StateError("a detached handle", expected="an attached one", cure="call attach() again")
        self._check_state(state)
        self._load(state)

    def _check_state(self, state: Mapping[str, Any]) -> None:
        check_state(state, like=self.state_dict(), fixed=("version", "path", "schedule"))
        if state["fake_score"] != self._fake_score.checksum():
            raise StateError(
                "a fake score whose weights are not those of the saved moment",
                expected="the trainer's checkpoint in it",
                cure="call attach() first, then load the trainer's checkpoint, then handle.load_state_dict(state); "
                "or load it before, and call attach(..., state=state)",
            )
        recording = state["phase"] == "recording"
        if self.path is None:
            return
        if state["nodes"] != self.path.digest(state["recording_iteration"] if recording else None):
            raise StateError(
                f"other nodes in {self.path.folder} than at the saved moment",
                expected="the path that the state was saved with",
                cure="restore the folder, or start again in an empty one",
            )

    def _load(self, state: Mapping[str, Any]) -> None:
        if state["phase"] == "recording":
            self._resume_recording(int(state["recording_iteration"]))
        else:
            self._resume_backtracking(state)
        self.fake_score_updates = int(state["fake_score_updates"])

    def _resume_recording(self, iteration: int) -> None:
        assert self.path is not None
        if self.scheduler is not None:
            self.scheduler.restore()
            self.scheduler = None
        if self._recorder is not None:
            self._recorder.close()
        self._recorder = Recorder(self.path, self._fake_score, plugins=self._plugins)
        self._recorder.rewind(iteration)

    def _resume_backtracking(self, state: Mapping[str, Any]) -> None:
        if self.scheduler is None:  # the crash came after the recording, but before this handle saw its end
            self.scheduler, self._recorder = self._new_scheduler(None), None
        self.scheduler.load_state_dict(self.scheduler.state_dict() | _counts(state) | {"started": True})

    # -- inside -------------------------------------------------------------------------------------------------------

    def begin(
        self,
        path: str | os.PathLike[str] | None,
        *,
        record: int,
        every: int,
        codec: str,
        keep_teacher: bool,
        state: Mapping[str, Any] | None,
    ) -> None:
        """Open or begin the path, go to where the run stands, and install the hooks. `attach` calls it, once.

        Args:
            path: As in `attach`.
            record: As in `attach`.
            every: As in `attach`.
            codec: As in `attach`.
            keep_teacher: As in `attach`.
            state: As in `attach`.

        Raises:
            DisbackError: As `attach` says. Then no hook is left.
        """
        try:
            self._open(path, record, every, codec, keep_teacher, state)
        except PluginError:  # it heard of the start, and raised
            if self.scheduler is not None:
                self.scheduler.restore()
            raise
        self._install_hooks()

    def _open(
        self,
        path: str | os.PathLike[str] | None,
        record: int,
        every: int,
        codec: str,
        keep_teacher: bool,
        state: Mapping[str, Any] | None,
    ) -> None:
        if record == 0 and not isinstance(record, bool):
            self._begin_without_path(path)
            if state is not None:
                self._check_state(state)
                self._load(state)
        elif path is None or not str(path):
            raise OptionError("no path=", expected="a folder for the nodes", cure="pass path=..., or record=0 for none")
        elif state is None:
            self._begin(path, Recording(record, every, codec, keep_teacher))
        else:
            self._continue(path, state)

    def _begin_without_path(self, folder: str | os.PathLike[str] | None) -> None:
        if folder is not None and DegradationPath.exists(folder):
            raise OptionError(
                f"record=0 and a path in {folder}",
                expected="one or the other",
                cure="pass path=None for a run without DisBack, or leave record= alone: a finished path is reused",
            )
        self._begin_backtracking()

    def _begin(self, folder: str | os.PathLike[str], recording: Recording) -> None:
        self.path = open_or_create(
            folder,
            self._teacher,
            recording,
            generator=_fingerprint_of(self._generator_optimizers),
            check=self._schedule.check,
        )
        if self.path.complete:
            self._begin_backtracking()
            return
        self._recorder = Recorder(self.path, self._fake_score, plugins=self._plugins)
        self._recorder.start()

    def _continue(self, folder: str | os.PathLike[str], state: Mapping[str, Any]) -> None:
        def prepare() -> Manifest:
            path = DegradationPath(folder)
            path.tidy()
            path.verify()
            return path.manifest

        self.path = DegradationPath(folder, ranks.on_rank_zero(prepare))
        self._check_state(state)
        if not self.path.manifest.recording.keep_teacher:
            self.path.bind(self._teacher.whole())
        self._teacher.write(self.path.source(0))
        self._load(state)

    def _begin_backtracking(self) -> None:
        # What was recorded here is s'_N already, unless it went on: to write it, decoded, would change it for nothing.
        is_there = self._recorder is not None and not self._went_on
        scheduler = self._new_scheduler(None if is_there else self._fake_score)
        try:
            scheduler.start()
        finally:
            if scheduler.started:  # though a plug-in raised when it heard of it
                self.scheduler, self._recorder = scheduler, None
        logger.info("%r", self)

    def _new_scheduler(self, fake_score: ScoreNetwork | None) -> TrajectoryScheduler:
        return TrajectoryScheduler(
            self.path,
            self._teacher,
            fake_score,
            schedule=self._schedule,
            prefetch=self._prefetch,
            plugins=self._plugins,
        )

    def _install_hooks(self) -> None:
        for optimizer in self._generator_optimizers:
            self._hooks.append(optimizer.register_step_pre_hook(self._before_generator_step))
            self._hooks.append(optimizer.register_step_post_hook(self._after_generator_step))
        for optimizer in self._fake_score_optimizers:
            self._hooks.append(optimizer.register_step_pre_hook(self._before_fake_score_step))
            self._hooks.append(optimizer.register_step_post_hook(self._after_fake_score_step))
        _ATTACHED.update((*self._generator_optimizers, *self._fake_score_optimizers))

    def _before_generator_step(self, optimizer: Optimizer, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs] | None:
        # Decided before a round may end: these gradients belong to what was there when they were computed.
        factor = 0.0 if self.scheduler is None else self.scheduler.gradient_factor
        recording = self.scheduler is None
        self._generator_rounds.begin(optimizer)

        def settle() -> None:
            self._updates[optimizer] = optimizers.has_gradients(optimizer)
            if recording:
                self._hidden[optimizer] = optimizers.take_gradients(optimizer)
            elif factor != 1.0:
                optimizers.scale_gradients(optimizer, factor)

        return optimizers.before_step(args, kwargs, settle)

    def _after_generator_step(self, optimizer: Optimizer, args: Args, kwargs: Kwargs) -> None:
        # The trainer finds its gradients as it left them, for its logs and its own zero_grad().
        held_still = optimizer in self._hidden
        for parameter, gradient in self._hidden.pop(optimizer, []):
            parameter.grad = gradient
        self._generator_rounds.finish(optimizer, self._updated(optimizer) and not held_still)

    def _after_generator_round(self, updated: bool) -> None:
        self._generator_steps += 1
        if self.path is not None and not self.fake_score_updates and self._generator_steps > PATIENCE:
            raise TrainingError(
                f"{self._generator_steps} generator steps and none of the fake score",
                expected="a loop that trains both",
                cure="pass the optimizer that the loop steps for the fake score, and check the trainer's update ratio",
            )
        if self.scheduler is not None:
            if updated:
                self.scheduler.step(self.signal)
        elif self._recorder is not None and self._recorder.done:
            # A teacher in train mode may have changed its running statistics meanwhile.
            self._teacher.write(self._recorder.path.original())
            self._begin_backtracking()

    def _before_fake_score_step(self, optimizer: Optimizer, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs] | None:
        self._fake_score_rounds.begin(optimizer)

        def settle() -> None:
            self._updates[optimizer] = optimizers.has_gradients(optimizer)

        return optimizers.before_step(args, kwargs, settle)

    def _after_fake_score_step(self, optimizer: Optimizer, args: Args, kwargs: Kwargs) -> None:
        self._fake_score_rounds.finish(optimizer, self._updated(optimizer))

    def _after_fake_score_round(self, updated: bool) -> None:
        if updated:
            self.fake_score_updates += 1
            if self._recorder is not None:
                self._went_on = self._recorder.done
                self._recorder.update()

    def _updated(self, optimizer: Optimizer) -> bool:
        return self._updates.pop(optimizer, False) and not optimizers.skipped_by_scaler(optimizer)


def _counts(state: Mapping[str, Any]) -> dict[str, int]:
    return {name: state[name] for name in COUNTS}


def _fingerprint_of(generator_optimizers: list[Optimizer]) -> str | None:
    """Return the fingerprint of what the optimizers step, or None if it is sharded and no rank sees all of it."""
    weights = optimizers.parameters(generator_optimizers)
    if any(hasattr(weight, "to_local") for weight in weights):
        return None
    return fingerprint({str(index): weight for index, weight in enumerate(weights)})
