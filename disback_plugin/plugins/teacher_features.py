"""Features of the original teacher for a discriminator, while the teacher walks: a second, frozen copy of s'_0.

A discriminator that reads the teacher's features (DMD2 in FastGen, f-distill, LADD) would see its input change at each
move. This plug-in lends it s'_0 instead: one more copy of the teacher in memory, only while the position is above 0.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import nn

from disback_plugin.errors import RoleError, StateError
from disback_plugin.plugins.hookspecs import hookimpl
from disback_plugin.weights.network import ScoreNetwork

if TYPE_CHECKING:
    from disback_plugin.scheduler import TrajectoryScheduler

__all__ = ["OriginalFeatures"]


class OriginalFeatures:
    """A plug-in that sends a teacher's forwards through both the active node and s'_0, as `forward` decides.

    Args:
        teacher: The teacher's module, plain or in DDP; neither sharded nor compiled in place.
        forward: `forward(active, original, *args, **kwargs)` is called in place of the teacher's forward while the
            position is above 0, and returns what that would. `active` is the teacher's own forward, `original` that of
            s'_0, through which gradients reach the arguments.

    Raises:
        RoleError: If the teacher is sharded or compiled in place, where neither can be copied nor redirected.

    Example:
        >>> import disback_plugin as disback
        >>> def forward(active, original, x, *, features=False):
        ...     return original(x, features=True) if features else active(x)
        >>> teacher = nn.Linear(2, 2)
        >>> plugins = (OriginalFeatures(teacher, forward),)  # of attach(...)
    """

    def __init__(self, teacher: nn.Module, forward: Callable[..., Any]) -> None:
        sharded = ScoreNetwork.of(teacher, role="teacher").sharded
        if sharded or getattr(teacher, "_compiled_call_impl", None) is not None:
            raise RoleError(
                f"a {'sharded' if sharded else 'compiled'} teacher whose features a discriminator reads",
                expected="one that a second copy can be made of",
                cure='pass plugins=("no:teacher_features",): the discriminator then sees features of the active node',
            )
        self._teacher, self._forward = teacher, forward
        self._before: Any = None  # the instance's own forward, where somebody set one
        self._copy: nn.Module | None = None

    @hookimpl
    def disback_after_node_swapped(self, scheduler: TrajectoryScheduler, position: float) -> None:
        """Lend s'_0 while the teacher holds another `position`; `scheduler` has the path it is read from."""
        if position and self._copy is None:
            self._begin(scheduler)
        elif not position and self._copy is not None:
            self._end()

    def _begin(self, scheduler: TrajectoryScheduler) -> None:
        if scheduler.path is None:
            raise StateError("a position without a path", expected="a path", cure="report this")
        active, original = self._teacher.forward, copy.deepcopy(self._teacher).requires_grad_(False)
        ScoreNetwork(original).write(scheduler.path.teacher_source())
        self._before = vars(self._teacher).get("forward")
        forward, teacher = self._forward, self._teacher

        def both(*args: Any, **kwargs: Any) -> Any:
            if original.training is not teacher.training:
                original.train(teacher.training)
            return forward(active, original, *args, **kwargs)

        self._copy = original
        self._teacher.forward = both

    def _end(self) -> None:
        if self._before is None:
            del self._teacher.forward
        else:
            self._teacher.forward = self._before
        self._copy = self._before = None
