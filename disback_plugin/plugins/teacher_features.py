"""Features of the original teacher for a discriminator during backtracking, from a second, frozen copy of s'_0.

The input of a discriminator that reads the teacher's features (DMD2 in FastGen and DiffSynth-Studio, f-distill, LADD)
would change at each move of the teacher. This plug-in computes the features with s'_0 instead, at the cost of one more
copy of the teacher in memory, or of its shards, while the position is above 0.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from disback_plugin.errors import RoleError
from disback_plugin.plugins.hookspecs import hookimpl

if TYPE_CHECKING:
    from torch import nn

    from disback_plugin.scheduler import TrajectoryScheduler

logger = logging.getLogger(__name__)


class OriginalFeatures:
    """A plug-in that gives every call of the teacher access to the active node and to s'_0.

    Args:
        teacher: The teacher's module, plain, in DDP or sharded by FSDP2; not compiled in place.
        forward: `forward(active, original, *args, **kwargs)` replaces the teacher's forward while the position is above
            0, and returns the same kind of output. `active` is the teacher's own forward, `original` is a module with
            the weights s'_0, through which gradients reach the arguments.
        place: Object and attribute of another function to replace, of a trainer that calls the teacher's parts.

    Raises:
        RoleError: If the teacher is in FSDP1 or compiled in place, so that it can be neither copied nor redirected.

    Example:
        >>> def forward(active, original, x, *, features=False):
        ...     return original(x, features=True) if features else active(x)
        >>> from torch import nn
        >>> teacher = nn.Linear(2, 2)
        >>> plugins = (OriginalFeatures(teacher, forward),)  # of attach(...)
    """

    def __init__(
        self, teacher: nn.Module, forward: Callable[..., Any], *, place: tuple[object, str] | None = None
    ) -> None:
        kinds = {kind.__name__ for module in teacher.modules() for kind in type(module).__mro__}
        fsdp1 = "FullyShardedDataParallel" in kinds
        if fsdp1 or getattr(teacher, "_compiled_call_impl", None) is not None:
            raise RoleError(
                f"a teacher {'in FSDP1' if fsdp1 else 'compiled in place'} whose features a discriminator reads",
                expected="a teacher that can be copied: plain, in DDP or in FSDP2 (fully_shard)",
                cure="let the discriminator see the active node's features: disback run -p no:teacher_features ..., or "
                'attach(..., plugins=("no:teacher_features",))',
            )
        logger.info(
            "the discriminator keeps the features of the original teacher, of which a second copy is held during "
            "backtracking; no:teacher_features gives it those of the active node instead"
        )
        self._teacher, self._forward = teacher, forward
        self._owner, self._name = place or (teacher, "forward")
        self._attributes: dict[str, Any] | None = None  # the owner's own function, if it has one, while replaced

    @hookimpl
    def disback_after_node_swapped(self, scheduler: TrajectoryScheduler, position: float) -> None:
        """Replace the function while `position` is above 0; s'_0 is read from the path of `scheduler`."""
        if position and self._attributes is None and scheduler.path is not None:
            from disback_plugin.weights.modules import frozen_copy
            from disback_plugin.weights.network import ScoreNetwork

            original = frozen_copy(self._teacher)
            ScoreNetwork(original).write(scheduler.path.teacher_source())
            self._replace(original)
        elif not position and self._attributes is not None:
            delattr(self._owner, self._name)
            vars(self._owner).update(self._attributes)
            self._attributes = None

    def _replace(self, original: nn.Module) -> None:
        teacher, active, forward = self._teacher, getattr(self._owner, self._name), self._forward

        def both(*args: Any, **kwargs: Any) -> Any:
            if original.training is not teacher.training:
                original.train(teacher.training)
            return forward(active, original, *args, **kwargs)

        self._attributes = {name: value for name, value in vars(self._owner).items() if name == self._name}
        setattr(self._owner, self._name, both)
