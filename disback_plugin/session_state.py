"""A session in words and as plain scalars: `repr(handle)`, what `Handle.state_dict` returns, and how it is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from disback_plugin import distributed
from disback_plugin._text_table import aligned
from disback_plugin.convergence import DivergenceMonitor, FitDetector
from disback_plugin.errors import StateError
from disback_plugin.loop.roles import describe_roles
from disback_plugin.progress import VERSION, Phase, Progress, timeline, validate_form, validate_state
from disback_plugin.schedule_base import Plan, to_config, validate_config

if TYPE_CHECKING:
    from disback_plugin.session import Session


def describe(session: Session) -> str:
    """Return where a session stands, its networks, and the events of its run, for people."""
    progress, schedule, stages = session.progress, session.schedule, []
    manifest = None if session.path is None else session.path.manifest
    if session.scheduler is not None:
        schedule, stages = session.scheduler.plan.schedule, session.scheduler.timeline()
    elif manifest is not None and not schedule.until_fitted:  # else the recording decides
        stages = Plan(schedule, manifest.last_node).timeline(progress)
    nodes = "no path" if session.path is None else f"N = {session.path.manifest.last_node}, {session.path.folder}"
    return (
        f"<disback {progress.phase.value}: position {session.position:g} ({nodes}), {schedule!r}, "
        f"{progress.generator_updates} generator updates, {progress.fake_score_updates} fake-score updates>\n"
        f"{aligned([*describe_roles(*session.roles).items()])}\n{aligned(timeline(progress, stages, manifest))}"
    )


def state_of(session: Session) -> dict[str, Any]:
    """Return the progress of a session, and all that identifies its run, as plain scalars."""
    path = session.path
    seen = session.monitor if session.recorder is None else session.recorder.fit
    return {
        "version": VERSION,
        "path": "" if path is None else path.identity,
        "nodes": "" if path is None else path.nodes_digest(session.recorded),
        "schedule": to_config(session.schedule),
        **session.progress.to_state(),
        "fit": "" if seen is None else seen.to_text(),
        "restore": session.to_restore,
        "fake_score": session.fake_score.local_checksum(),
    }


def load(session: Session, state: object) -> None:
    """Let a session continue from a state.

    Raises:
        StateError: If the state does not fit this path, schedule and fake score. Then nothing is written.
        RankError: If the state fits here but not on another rank, or if that rank was given another state.
    """
    saved = distributed.on_every_rank(lambda: validate_form(state), "be given a state")
    # A rank that saved its own state names its own shard.
    holds = session.fake_score.matches_checksum(distributed.on_main_process(lambda: str(saved["fake_score"])))
    facts = {name: saved[name] for name in ("phase", "recorded", "generator_updates")}
    progress = distributed.on_every_rank(
        lambda: _validate(session, saved, holds), "be given the state that fits it", facts
    )
    session.continue_at(progress, saved["fit"], saved["restore"])


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
