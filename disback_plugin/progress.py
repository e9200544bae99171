"""Where a run stands: its phase and every counter, in one value that the session owns and a checkpoint saves.

The recorder and the scheduler are given this object, read it and change it; nothing else counts. A
`TrajectoryScheduler` that is used without `attach` makes one of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from enum import Enum
from typing import Any

from disback_plugin.errors import StateError

# Version of a state; `upgrade_state` translates the earlier ones.
VERSION = 2
# Version 1 had other names for two counters.
RENAMED = {"recording_iteration": "recorded", "plan_updates": "schedule_step"}


class Phase(str, Enum):
    """The phase of a run. DONE means that the teacher is s'_0 for good and the generator's gradient is unchanged.

    Example:
        >>> Phase("done") is Phase.DONE, Phase.DONE == "done"
        (True, True)
    """

    RECORDING = "recording"
    BACKTRACKING = "backtracking"
    DONE = "done"


@dataclass
class Progress:
    """The phase and the counters of one run.

    Attributes:
        phase: The phase; RECORDING until `TrajectoryScheduler.start`.
        recorded: Recording iterations, in updates of s'.
        generator_updates: Finished generator updates since backtracking began.
        fake_score_updates: Finished updates of s_phi, recording included.
        schedule_step: Update of the schedule that holds now, >= 0. It differs from `generator_updates` where a plug-in
            has kept or ended a node.
        node_since: `generator_updates` at which the teacher came to its present position.

    Example:
        >>> from dataclasses import replace
        >>> progress = Progress(Phase.BACKTRACKING, generator_updates=3, schedule_step=3)
        >>> following = replace(progress, generator_updates=4, schedule_step=4)
        >>> progress.commit(following)  # after the teacher has moved
        >>> progress.to_state()["generator_updates"], Progress.from_state(progress.to_state()) == progress
        (4, True)
    """

    phase: Phase = Phase.RECORDING
    recorded: int = 0
    generator_updates: int = 0
    fake_score_updates: int = 0
    schedule_step: int = 0
    node_since: int = 0

    def commit(self, other: Progress) -> None:
        """Take over every field of another `Progress`, in place: the recorder and the scheduler share this object."""
        for field in fields(self):
            setattr(self, field.name, getattr(other, field.name))

    def to_state(self) -> dict[str, Any]:
        """Return the fields as plain scalars."""
        return asdict(self) | {"phase": self.phase.value}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Progress:
        """Return the progress that a validated state holds.

        Raises:
            StateError: If its phase is unknown, or a counter is negative or contradicts another one.
        """
        values = {field.name: state[field.name] for field in fields(cls)}
        counts = {name: count for name, count in values.items() if name != "phase"}
        wrong = [name for name, count in counts.items() if count < 0]
        wrong += ["phase"] * (values["phase"] not in [phase.value for phase in Phase])
        wrong += ["node_since"] * (values["node_since"] > values["generator_updates"])
        if wrong:
            raise _edited(wrong[0], values[wrong[0]], "a phase of a run, and counts that fit each other")
        return cls(Phase(values["phase"]), **counts)


def upgrade_state(state: object) -> dict[str, Any]:
    """Return a state of any released version under the keys of the present one.

    Raises:
        StateError: If it is no state, or of a later version.

    Example:
        >>> upgrade_state({"version": 1, "plan_updates": 7})
        {'version': 2, 'schedule_step': 7}
    """
    if not isinstance(state, Mapping):
        raise StateError(
            f"a state that is {state!r:.60}",
            expected="what state_dict() returned",
            cure="save it beside the trainer's checkpoint; a checkpoint from before DisBack has none",
        )
    version = state.get("version", 1)
    if type(version) is int and version > VERSION:
        raise StateError(f"a state of version {version}", expected=f"at most {VERSION}", cure="upgrade disback-plugin")
    if version != 1:
        return dict(state)
    present = {RENAMED.get(str(key), str(key)): value for key, value in state.items()} | {"version": VERSION}
    if "started" in present:  # a scheduler's own state
        phase = Phase.BACKTRACKING if present["started"] else Phase.RECORDING
        return Progress().to_state() | {"phase": phase.value} | present
    return present


def validate_form(state: object) -> dict[str, Any]:
    """Return the state of any attached run under the keys of the present version; its values are not compared.

    Raises:
        StateError: If it is no state of an attached run, or of a later version.
    """
    present = upgrade_state(state)
    texts = dict.fromkeys(("path", "nodes", "schedule", "fit", "restore", "fake_score"), "")
    validate_state(present, like=texts | Progress().to_state() | {"version": VERSION}, fixed=("version",))
    return present


def validate_state(state: Mapping[str, Any], *, like: Mapping[str, Any], fixed: tuple[str, ...] = ()) -> None:
    """Raise unless a state has every key of `like` with a value of the same type. Further keys are ignored.

    Args:
        state: The state, as `upgrade_state` returns it.
        like: The state of the object that is to continue from it.
        fixed: Keys whose values must be those of `like`.

    Raises:
        StateError: If a key is missing, or a value differs in type, or is fixed and differs.
    """
    missing = sorted(like.keys() - state.keys())
    if missing:
        raise StateError(
            f"a state with keys {sorted(state)}",
            expected=f"one that also has {', '.join(missing)}",
            cure="pass what state_dict() of the same kind of object returned",
        )
    for key, value in like.items():
        if type(state[key]) is not type(value):
            raise _edited(key, state[key], f"a {type(value).__name__}")
        if key in fixed and state[key] != value:
            raise StateError(
                f"a state of another {key} ({str(state[key])[:100]!r})",
                expected=f"{str(value)[:100]!r}",
                cure=f"attach with the {key} that the state was saved under",
            )


def _edited(key: str, value: object, expected: str) -> StateError:
    return StateError(f"{key}={value!r} in a state", expected=expected, cure="pass an unedited state")
