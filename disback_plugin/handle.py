"""The handle of an attached loop: where its session stands, in words and as plain scalars, and its end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from disback_plugin import distributed
from disback_plugin.convergence import DivergenceMonitor, FitDetector
from disback_plugin.errors import StateError
from disback_plugin.loop.optimizer_hooks import IN_USE
from disback_plugin.loop.roles import describe_roles
from disback_plugin.path.degradation_path import DegradationPath
from disback_plugin.path.manifest import Manifest
from disback_plugin.progress import VERSION, Phase, Progress, validate_form, validate_state
from disback_plugin.schedule_base import Plan, Target, to_config, validate_config
from disback_plugin.session_measures import log_values

if TYPE_CHECKING:
    from disback_plugin.scheduler import TrajectoryScheduler
    from disback_plugin.session import Session


class Handle:
    """The result of `attach`: where the run stands, its state for a checkpoint, and `detach`.

    Args:
        session: The session, begun.

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

    def __init__(self, session: Session) -> None:
        self._session = session

    @classmethod
    def attached(cls) -> list[Handle]:
        """Return a handle of each loop that is attached in this process, as where the result of `attach` was not kept.

        Example:
            >>> def detach_all() -> None:
            ...     for handle in Handle.attached():
            ...         handle.detach()
        """
        return [cls(session) for session in dict.fromkeys(IN_USE.values())]

    # -- where the run stands -----------------------------------------------------------------------------------------

    @property
    def phase(self) -> str:
        """ "recording", "backtracking" or "done"; done means that the teacher is s'_0 for good."""
        return self._session.progress.phase.value

    @property
    def position(self) -> float:
        """The teacher's position in [0, N]; 0.0 is the teacher itself."""
        return self._session.position

    @property
    def generator_updates(self) -> int:
        """Finished generator updates; steps while recording do not count, because they change nothing."""
        return self._session.progress.generator_updates

    @property
    def fake_score_updates(self) -> int:
        """Finished updates of s_phi since attaching, recording included."""
        return self._session.progress.fake_score_updates

    @property
    def path(self) -> DegradationPath | None:
        """The path, or None with record=0."""
        return self._session.path

    @property
    def scheduler(self) -> TrajectoryScheduler | None:
        """The scheduler, or None while recording."""
        return self._session.scheduler

    @property
    def signal(self) -> Any:
        """The value that a plug-in's `disback_should_advance` is given, as a measure of convergence.

        The loop may set it at any time.
        """
        return self._session.signal

    @signal.setter
    def signal(self, signal: Any) -> None:
        self._session.signal = signal

    def __repr__(self) -> str:
        return repr(self._session)

    def original_teacher(self) -> AbstractContextManager[None]:
        """Hold the teacher at s'_0 inside, as for an evaluation, and at the active position again after."""
        return nullcontext() if self.scheduler is None else self.scheduler.original_teacher()

    # -- the end ------------------------------------------------------------------------------------------------------

    def detach(self) -> None:
        """Restore the teacher to s'_0, bit for bit, and remove every hook. A second call does nothing.

        Raises:
            PathError: If node 0 cannot be read any more. The hooks are removed all the same.
        """
        self._session.detach()

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._session.detach(failed=isinstance(error, Exception))

    # -- resume -------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain scalars, to be saved beside the trainer's checkpoint.

        All ranks of sharded networks must call, because what FSDP has gathered is freed.
        """
        session, path = self._session, self._session.path
        seen = session.measures.monitor if session.recorder is None else session.recorder.fit
        return {
            "version": VERSION,
            "path": "" if path is None else path.identity,
            "nodes": "" if path is None else path.nodes_digest(session.recorded),
            "schedule": to_config(session.schedule),
            **session.progress.to_state(),
            "fit": "" if seen is None else seen.to_text(),
            "restore": session.restorable.to_text(),
            "fake_score": session.fake_score.local_checksum(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state` was saved. Call it after the trainer's checkpoint was loaded.

        Counters are set, and the teacher is written from the path, whatever the checkpoint held.

        Raises:
            StateError: If `state` is of a later version or another path or schedule, if the fake score does not hold
                the weights of that moment, or if the path does not hold its nodes. Then nothing changes.
            RankError: If the state fits here but not on another rank, or if that rank was given another state.
        """
        session = self._session
        if session.detached:
            raise StateError("a detached handle", expected="an attached one", cure="call attach() again")
        saved = distributed.on_every_rank(lambda: validate_form(state), "be given a state")
        # A rank that saved its own state names its own shard.
        holds = session.fake_score.matches_checksum(distributed.on_main_process(lambda: str(saved["fake_score"])))
        facts = {name: saved[name] for name in ("phase", "recorded", "generator_updates")}
        progress = distributed.on_every_rank(
            lambda: _validate(session, saved, holds), "be given the state that fits it", facts
        )
        session.continue_at(progress, saved["fit"], saved["restore"])

    # -- the log ------------------------------------------------------------------------------------------------------

    def log(self, values: Mapping[str, Any]) -> None:
        """Add the loop's own numbers and pictures to the run's log, under the present update.

        Numbers also go to the plug-ins' `disback_log`, as "disback/NAME". `disback report` draws each value; it
        compares runs by names that begin with "distance" or "mismatch", where lower is better. Any rank may call; rank
        0 writes.

        Args:
            values: By name: numbers, tensors of one element, or the `pathlib.Path` of a PNG file. Reading a tensor
                waits for its device: log now and then, not at each update.

        Raises:
            OptionError: If a name is taken, or a value is something else.

        Example:
            >>> def after_a_while(handle: Handle, loss: Any) -> None:
            ...     handle.log({"loss": loss, "distance": 3.2, "samples": Path("samples/000100.png")})
        """
        log_values(self._session, values)


def describe(session: Session) -> str:
    """Return where a session stands, its networks, and the events of its run, for people."""
    from disback_plugin._text_table import aligned  # attaching does without

    progress, schedule, stages = session.progress, session.schedule, []
    manifest = None if session.path is None else session.path.manifest
    if session.scheduler is not None:
        schedule, stages = session.scheduler.plan.schedule, session.scheduler.timeline()
    elif manifest is not None and not schedule.until_fitted:  # else the recording decides
        stages = Plan(schedule, manifest.last_node).timeline(progress)
    nodes = "no path" if session.path is None else f"N = {session.path.manifest.last_node}, {session.path.folder}"
    rows, phase = timeline(progress, stages, manifest), progress.phase.value
    if session.detached:
        rows, phase = [("", *row[1:]) for row in rows], f"{phase}, detached"
    return (
        f"<disback {phase}: position {session.position:g} ({nodes}), {schedule!r}, "
        f"{progress.generator_updates} generator updates, {progress.fake_score_updates} fake-score updates>\n"
        f"{aligned([*describe_roles(*session.roles).items()])}\n{aligned(rows)}"
    )


def timeline(
    progress: Progress, stages: Sequence[tuple[int, Target]], manifest: Manifest | None
) -> list[tuple[str, str, str]]:
    """Return a row for each event of a run: "->" at the present one, its time, and what happens.

    Args:
        progress: The phase and the counters.
        stages: Generator updates, and the target from there on; empty if the recording decides.
        manifest: The path's manifest; None without a path.

    Example:
        >>> from disback_plugin.path.manifest import Recording, Teacher
        >>> manifest = Manifest(Teacher("", ""), Recording(4, 2))
        >>> progress = Progress(Phase.BACKTRACKING, recorded=4, generator_updates=7)
        >>> for row in timeline(progress, [(0, Target(1.0)), (30, Target(0.0))], manifest):
        ...     print(row)
        ('', 'recording', "4 of 4 fake-score updates, nodes s'_1 to s'_2")
        ('->', 'generator update 0', 'teacher at position 1')
        ('', 'generator update 30', 'teacher at position 0')
    """
    rows: list[tuple[str, str, str]] = []
    recording = progress.phase is Phase.RECORDING and manifest is not None and not manifest.complete
    if manifest is not None:
        done = progress.recorded if recording else manifest.iterations
        total = f"{'' if stages else 'at most '}{manifest.iterations}"
        about = f"{done} of {total} fake-score updates, nodes s'_1 to s'_{manifest.last_node}"
        rows.append(("->" if recording else "", "recording", about))
    started = [start for start, _ in stages if start <= progress.generator_updates and not recording]
    for start, (position, gradient) in stages:
        scaled = "" if gradient == 1 else f", the generator's gradient times {gradient:.4g}"
        mark = "->" if start == max(started, default=None) else ""
        rows.append((mark, f"generator update {start}", f"teacher at position {position:.4g}{scaled}"))
    return rows


def _validate(session: Session, saved: dict[str, Any], holds: bool) -> Progress:
    """Return the progress in a state, or raise StateError unless the state fits here."""
    validate_state(saved, like={"path": "" if session.path is None else session.path.identity}, fixed=("path",))
    validate_config(session.schedule, saved["schedule"])
    if not holds:
        raise StateError(
            "a fake score whose weights are not those of the saved moment",
            expected="the trainer's checkpoint in it",
            cure="call attach() first, then load the trainer's checkpoint, then handle.load_state_dict(state); "
            "or load it before, and call attach(..., state=state)",
        )
    progress = Progress.from_state(saved)
    recording = progress.phase is Phase.RECORDING
    found = "a state in the phase 'recording', without a path" if session.path is None and recording else ""
    recorded = progress.recorded if recording else None
    if session.path is not None and saved["nodes"] != session.path.nodes_digest(recorded):
        found = f"other nodes in {session.path.folder} than at the saved moment"
    if found:
        raise StateError(
            found,
            expected="the path that the state was saved with",
            cure="restore the folder, or start again in an empty one",
        )
    session.restorable.validate(saved["restore"])
    (FitDetector if recording else DivergenceMonitor).validate(saved["fit"])
    return progress
