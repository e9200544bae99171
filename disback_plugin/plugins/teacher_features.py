"""Features of the original teacher for a discriminator during backtracking, from a second, frozen copy of s'_0.

The input of a discriminator that reads the teacher's features (DMD2 in FastGen, f-distill, LADD) would change at each
move of the teacher. This plug-in computes the features with s'_0 instead, at the cost of one more copy of the teacher
in memory while the position is above 0.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import nn

from disback_plugin.errors import RoleError
from disback_plugin.plugins.hookspecs import hookimpl
from disback_plugin.weights.network import ScoreNetwork

if TYPE_CHECKING:
    from disback_plugin.scheduler import TrajectoryScheduler


class OriginalFeatures:
    """A plug-in that gives every forward of the teacher access to the active node and to s'_0.

    Args:
        teacher: The teacher's module, plain or in DDP; neither sharded nor compiled in place.
        forward: `forward(active, original, *args, **kwargs)` replaces the teacher's forward while the position is above
            0, and returns the same kind of output. `active` is the teacher's own forward, `original` is s'_0, through
            which gradients reach the arguments.

    Raises:
        RoleError: If the teacher is sharded or compiled in place, so that it can be neither copied nor redirected.

    Example:
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
                expected="a teacher that can be copied",
                cure='pass plugins=("no:teacher_features",): the discriminator then sees features of the active node',
            )
        self._teacher, self._forward = teacher, forward
        self._attributes: dict[str, Any] | None = None  # the instance's own forward, if it has one, while replaced

    @hookimpl
    def disback_after_node_swapped(self, scheduler: TrajectoryScheduler, position: float) -> None:
        """Replace the forward while `position` is above 0; s'_0 is read from the path of `scheduler`."""
        if position and self._attributes is None and scheduler.path is not None:
            original = copy.deepcopy(self._teacher).requires_grad_(False)
            ScoreNetwork(original).write(scheduler.path.teacher_source())
            self._replace_forward(original)
        elif not position and self._attributes is not None:
            del self._teacher.forward
            vars(self._teacher).update(self._attributes)
            self._attributes = None

    def _replace_forward(self, original: nn.Module) -> None:
        teacher, active, forward = self._teacher, self._teacher.forward, self._forward

        def both(*args: Any, **kwargs: Any) -> Any:
            if original.training is not teacher.training:
                original.train(teacher.training)
            return forward(active, original, *args, **kwargs)

        self._attributes = {name: value for name, value in vars(teacher).items() if name == "forward"}
        teacher.forward = both
