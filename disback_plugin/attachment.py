"""Both stages on a live training loop that nobody edits: recorder and scheduler ride on the optimizers' own hooks.

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

from disback_plugin import optimizers
from disback_plugin.errors import OptionError, RoleError, StateError, TrainingError
from disback_plugin.hooks import Adapter, find_adapter
from disback_plugin.manifest import Recording
from disback_plugin.recording import PATIENCE, Network, Recorder, open_or_create
from disback_plugin.roles import check_roles
from disback_plugin.scheduler import TrajectoryScheduler, check_state
from disback_plugin.schedules import Schedule, resolve
from disback_plugin.trajectory import DegradationPath
from disback_plugin.weights import ScoreNetwork, fingerprint

__all__ = ["Handle", "attach"]

logger = logging.getLogger(__name__)

Optimizers = Optimizer | Sequence[Optimizer]
Args = tuple[Any, ...]
Kwargs = dict[str, Any]

# Optimizers that a handle rides on: two handles on one loop would fight for the teacher.
_ATTACHED: WeakSet[Optimizer] = WeakSet()


def attach(
    trainer: object = None,
    *,
    adapter: str | None = None,
    teacher: Network | None = None,
    fake_score: Network | None = None,
    generator_optimizer: Optimizers | None = None,
    fake_score_optimizer: Optimizers | None = None,
    path: str | os.PathLike[str] | None = None,
    record: int = 200,
    every: int = 50,
    schedule: Schedule | str = "auto",
    state: Mapping[str, Any] | None = None,
) -> Handle:
    """Add DisBack to a training loop; returns a handle whose `detach()` takes it out again without a trace.

    With a new `path` the first `record` updates of the fake score record it, while the generator is held still; then
    backtracking starts by itself. A finished path in the folder is reused, an unfinished one resumed, any other
    refused.

    To resume, attach when the trainer is built, load its checkpoint, and give `load_state_dict` the saved state. A
    trainer that loads its checkpoint while it is built is attached after that, with `state`.

    Args:
        trainer: A live trainer that an installed adapter understands; else pass the four roles.
        adapter: Name of the adapter to ask, an entry point of the group `disback.adapters`; None asks all.
        teacher: The teacher s_theta ("real score"): a module, plain, compiled or wrapped in DDP, or a `ScoreNetwork`.
        fake_score: s_phi, of the teacher's architecture. It is set to the teacher (new path), the last node so far
            (unfinished) or s'_N (finished path).
        generator_optimizer: Whatever steps the generator, all of it: one optimizer or several, plain or accelerate's.
        fake_score_optimizer: Whatever steps s_phi. It may step more, as a discriminator, but nothing of the generator.
        path: Folder of the path; None only with record=0.
        record: Recording iterations, in fake-score updates, >= 0; 200 in the paper. 0 changes nothing in a run, bit for
            bit, unless the schedule scales gradients without a path.
        every: Updates between two nodes, >= 1; 50 in the paper. The last node is saved after the last update.
        schedule: How the teacher walks back: an object of `schedules`, or its name as `schedules.parse` reads it.
        state: What `Handle.state_dict` returned at the moment whose checkpoint the trainer has loaded. The path is then
            taken as it is, s_phi is left alone, and the teacher is written, whatever it holds.

    Returns:
        The handle; also a context manager that detaches at its end.

    Raises:
        RoleError: If a role is no module, cannot be written, or an optimizer steps the wrong network or two of them.
        MismatchError: If teacher and fake score differ in keys or shapes.
        PathError: If the folder holds something else, or cannot be written.
        OptionError: If a count is out of its domain, or the schedule does not fit the path.
        StateError: If `state` is of another run or moment.

        Whatever is raised, no weight was written and no hook is left.

    Example:
        >>> import tempfile, torch
        >>> from torch import nn
        >>> teacher, fake, generator = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2)
        >>> opt_f, opt_g = (torch.optim.Adam(net.parameters(), lr=0.01) for net in (fake, generator))
        >>> with attach(
        ...     teacher=teacher,
        ...     fake_score=fake,
        ...     generator_optimizer=opt_g,
        ...     fake_score_optimizer=opt_f,
        ...     path=tempfile.mkdtemp(),
        ...     record=4,
        ...     every=2,
        ...     schedule="ramp:3",
        ... ) as handle:
        ...     for _ in range(8):  # the trainer's loop
        ...         x = generator(torch.randn(4, 2))
        ...         opt_f.zero_grad()
        ...         (fake(x.detach()) - x.detach()).square().mean().backward()
        ...         opt_f.step()
        ...         opt_g.zero_grad()
        ...         ((fake(x) - teacher(x)).detach() * x).sum().backward()
        ...         opt_g.step()
        ...         print(handle.phase, round(handle.position, 2))
        recording 0.0
        recording 0.0
        recording 0.0
        backtracking 1.8
        backtracking 1.2
        backtracking 0.6
        done 0.0
        done 0.0
    """
    given = {
        "teacher": teacher,
        "fake_score": fake_score,
        "generator_optimizer": generator_optimizer,
        "fake_score_optimizer": fake_score_optimizer,
    }
    roles = _roles(trainer, adapter, given)
    handle = Handle(
        teacher=ScoreNetwork.of(roles.teacher, role="teacher"),
        fake_score=ScoreNetwork.of(roles.fake_score, role="fake score"),
        generator_optimizers=optimizers.unwrap(roles.generator_optimizer, role="generator_optimizer"),
        fake_score_optimizers=optimizers.unwrap(roles.fake_score_optimizer, role="fake_score_optimizer"),
        schedule=resolve(schedule),
    )
    if record == 0 and not isinstance(record, bool):
        handle._begin_without_path(path)
    elif path is None or not str(path):
        raise OptionError("no path=", expected="a folder for the nodes", cure="pass path=..., or record=0 for no path")
    elif state is None:
        handle._begin(path, Recording(record, every))
    else:
        handle._continue(path, state)
    handle._install_hooks()
    return handle


def _roles(trainer: object, adapter: str | None, given: dict[str, Any]) -> Adapter:
    named = [name for name, value in given.items() if value is not None]
    if trainer is None and adapter is None and len(named) == len(given):
        return Adapter(**given)
    if trainer is not None and not named:
        return find_adapter(trainer, adapter)
    raise OptionError(
        f"attach({', '.join(['trainer'] * (trainer is not None) + ['adapter'] * (adapter is not None) + named)})",
        expected=f"a trainer and perhaps its adapter's name, or {', '.join(given)}",
        cure="pass one or the other, completely",
    )


class Handle:
    """What `attach` returns: where the run is, its state for a checkpoint, and the way out.

    Attributes:
        path: The path, or None with record=0.
        scheduler: The scheduler, or None while recording.
        fake_score_updates: Finished updates of s_phi since attaching, recording included.
    """

    def __init__(
        self,
        *,
        teacher: ScoreNetwork,
        fake_score: ScoreNetwork,
        generator_optimizers: list[Optimizer],
        fake_score_optimizers: list[Optimizer],
        schedule: Schedule,
    ) -> None:
        self._teacher, self._fake_score = teacher, fake_score
        self._generator_optimizers = generator_optimizers
        self._schedule = schedule
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
        self._recorder: Recorder | None = None
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
        nodes = "no path" if self.path is None else f"N = {self.path.manifest.recording.nodes}, {self.path.folder}"
        return (
            f"<disback {self.phase}: position {self.position:g} ({nodes}), {self._schedule!r}, "
            f"{self.generator_updates} generator updates, {self.fake_score_updates} fake-score updates>"
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
        _ATTACHED.difference_update((*self._generator_optimizers, *self._fake_score_optimizers))
        if self.scheduler is not None:
            self.scheduler.restore()

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
            "generator_updates": self.generator_updates,
            "fake_score_updates": self.fake_score_updates,
            "fake_score": self._fake_score.glimpse(),
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
        if state["fake_score"] != self._fake_score.glimpse():
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
        self._recorder = Recorder(self.path, self._fake_score)
        self._recorder.rewind(iteration)

    def _resume_backtracking(self, state: Mapping[str, Any]) -> None:
        if self.scheduler is None:  # the crash came after the recording, but before this handle saw its end
            self.scheduler, self._recorder = self._new_scheduler(), None
        ours = {"generator_updates": int(state["generator_updates"]), "started": True}
        self.scheduler.load_state_dict(self.scheduler.state_dict() | ours)

    # -- inside -------------------------------------------------------------------------------------------------------

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
        self._recorder = Recorder(self.path, self._fake_score)
        self._recorder.start()

    def _continue(self, folder: str | os.PathLike[str], state: Mapping[str, Any]) -> None:
        self.path = DegradationPath(folder)
        self.path.verify()
        self._check_state(state)
        self._teacher.load_state_dict(self.path[0])
        self._load(state)

    def _begin_backtracking(self) -> None:
        scheduler = self._new_scheduler()
        scheduler.start()
        self.scheduler, self._recorder = scheduler, None
        logger.info("%r", self)

    def _new_scheduler(self) -> TrajectoryScheduler:
        return TrajectoryScheduler(self.path, self._teacher, self._fake_score, schedule=self._schedule)

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
                self.scheduler.step()
        elif self._recorder is not None and self._recorder.done:
            # A teacher in train mode may have changed its running statistics meanwhile.
            self._teacher.load_state_dict(self._recorder.path[0])
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
                self._recorder.update()

    def _updated(self, optimizer: Optimizer) -> bool:
        return self._updates.pop(optimizer, False) and not optimizers.skipped_by_scaler(optimizer)


def _fingerprint_of(generator_optimizers: list[Optimizer]) -> str | None:
    """Return the fingerprint of what the optimizers step, or None if it is sharded and no rank sees all of it."""
    weights = optimizers.parameters(generator_optimizers)
    if any(hasattr(weight, "to_local") for weight in weights):
        return None
    return fingerprint({str(index): weight for index, weight in enumerate(weights)})
