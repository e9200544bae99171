"""The handle of an attached loop."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import TYPE_CHECKING, Any

from disback_plugin.errors import StateError
from disback_plugin.path.degradation_path import DegradationPath
from disback_plugin.session import Session
from disback_plugin.session_measures import log_values

if TYPE_CHECKING:
    from disback_plugin.scheduler import TrajectoryScheduler


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

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._session.detach(failed=isinstance(error, Exception))

    # -- resume -------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain scalars, to be saved beside the trainer's checkpoint.

        All ranks of sharded networks must call, because what FSDP has gathered is freed.
        """
        from disback_plugin import session_state

        return session_state.state_of(self._session)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state` was saved. Call it after the trainer's checkpoint was loaded.

        Counters are set, and the teacher is written from the path, whatever the checkpoint held.

        Raises:
            StateError: If `state` is of a later version or another path or schedule, if the fake score does not hold
                the weights of that moment, or if the path does not hold its nodes. Then nothing changes.
        """
        if not self._session.hooks.installed:
            raise StateError("a detached handle", expected="an attached one", cure="call attach() again")
        from disback_plugin import session_state

        session_state.load(self._session, state)

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
