"""The text that a handle shows: the roles, the schedule and the timeline of the run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from disback_plugin._text_table import aligned
from disback_plugin.loop.roles import describe_roles
from disback_plugin.path.manifest import Manifest
from disback_plugin.progress import Phase, Progress
from disback_plugin.schedules import Target

if TYPE_CHECKING:
    from disback_plugin.session import Session

__all__ = ["describe_session", "timeline"]

# A longer timeline is shown by its beginning, its end and the present row.
ROWS = 12

Row = tuple[str, str, str]


def describe_session(session: Session) -> str:
    """Return one line about the run's progress, a table of the roles and the timeline."""
    progress, path = session.progress, session.path
    nodes = "no path" if path is None else f"N = {path.manifest.last_node}, {path.folder}"
    return (
        f"<disback {progress.phase.value}: position {session.position:g} ({nodes}), {session.active_schedule!r}, "
        f"{progress.generator_updates} generator updates, {progress.fake_score_updates} fake-score updates>\n"
        f"{aligned(_roles(session))}\n"
        f"{aligned(timeline(progress, session.timeline(), None if path is None else path.manifest))}"
    )


def _roles(session: Session) -> list[Row]:
    steppers = {"generator": session.generator_optimizers, "fake score": session.fake_score_optimizers}
    networks = describe_roles((session.teacher, session.fake_score), steppers)["networks"]
    names = {role: ", ".join(type(optimizer).__name__ for optimizer in own) for role, own in steppers.items()}
    real, fake, still = (
        ("", "", "")
        if session.path is None
        else ("moves along the path, ", "ends the recording as s'_N, ", "held still while recording, ")
    )
    return [
        ("teacher", networks["teacher"], f"s_theta, the real score: {real}is never trained"),
        ("fake score", networks["fake score"], f"s_phi: {fake}trained by {names['fake score']}"),
        ("generator", networks["generator"], f"{still}trained by {names['generator']}"),
    ]


def timeline(progress: Progress, stages: Sequence[tuple[int, Target]], manifest: Manifest | None) -> list[Row]:
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
        ('', 'recorded', "4 fake-score updates, nodes s'_1 to s'_2")
        ('->', 'generator update 0', 'teacher at position 1')
        ('', 'generator update 30', 'teacher at position 0: s_theta for good')
    """
    rows: list[Row] = []
    recording = progress.phase is Phase.RECORDING and manifest is not None and not manifest.complete
    if manifest is not None:
        total, nodes = manifest.iterations, f"nodes s'_1 to s'_{manifest.last_node}"
        every = manifest.recording.every
        following = min(total, (progress.recorded // every + 1) * every)
        done = f"{progress.recorded} of {'' if stages else 'at most '}{total} fake-score updates, {nodes}"
        rows.append(
            ("->", "recording", f"{done}, the next one at {following}")
            if recording
            else ("", "recorded", f"{total} fake-score updates, {nodes}")
        )
    if not stages:
        rows.append(("", "then", "back along the path, in the F generator updates that s_phi needs to be fitted"))
    started = [start for start, _ in stages if start <= progress.generator_updates and not recording]
    now, last = max(started, default=None), len(stages) - 1
    for index, (start, target) in enumerate(stages):
        if len(stages) <= ROWS or index < ROWS // 2 or index > last - ROWS // 2 or start == now:
            rows.append(("->" if start == now else "", f"generator update {start}", _text(target, index == last)))
        elif index == ROWS // 2:
            rows.append(("", "...", f"{len(stages) - ROWS} more"))
    return rows


def _text(target: Target, last: bool) -> str:
    position = "0: s_theta for good" if last else f"{target.position:.4g}"
    scaled = "" if target.gradient == 1 else f", the generator's gradient times {target.gradient:.4g}"
    return f"teacher at position {position}{scaled}"
