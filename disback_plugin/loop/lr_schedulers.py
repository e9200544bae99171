"""Learning-rate schedulers, restored after a recording during which the generator stood still.

Each optimizer's schedulers are restored just before its first step after the recording. This step then has the learning
rate that the trainer's own first step would have had, and a run that records equals one that reuses the path.
"""

from __future__ import annotations

import gc
import json
import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol, runtime_checkable

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.optimizer import register_optimizer_step_pre_hook

from disback_plugin.errors import OptionError, StateError
from disback_plugin.loop import optimizers

__all__ = ["Restorable", "SchedulerSnapshot", "Stateful", "restored"]

logger = logging.getLogger(__name__)

# Settings of a parameter group that schedulers write.
SCHEDULED = ("lr", "momentum", "betas")


@runtime_checkable
class Stateful(Protocol):
    """An object with a state of plain numbers: a scheduler, or the ramp of a moving average."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state."""

    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any:
        """Go back to a state."""


# The argument `restore` of `attach`.
Restorable = str | Stateful | Sequence[str | Stateful]


class _Found(NamedTuple):
    """An object to restore, and the index of the optimizer before whose step it is restored."""

    stateful: Stateful
    optimizer: int
    writes_groups: bool


class SchedulerSnapshot:
    """The states of learning-rate schedulers before the first step of a recording, to be restored at its end.

    Args:
        restore: "schedulers" for every `LRScheduler` of the optimizers, which are searched in memory; objects with
            `state_dict` and `load_state_dict`; or a sequence of these. An empty sequence restores nothing.
        optimizers: The generator's and the fake score's. Objects without an optimizer are restored with the first.

    Attributes:
        saved: The states still to be restored, by name; None before `capture`.

    Raises:
        OptionError: If an element of `restore` is neither, or its state is not made of plain numbers.

    Example:
        >>> import torch
        >>> sgd = torch.optim.SGD([torch.ones(1)], lr=1.0)
        >>> warmup = torch.optim.lr_scheduler.LambdaLR(sgd, lambda step: min(1.0, (step + 1) / 4))
        >>> snapshot = SchedulerSnapshot("schedulers", [sgd])
        >>> snapshot.capture()
        >>> for _ in range(3):
        ...     sgd.step()
        ...     warmup.step()
        >>> warmup.get_last_lr()
        [1.0]
        >>> snapshot.restore(sgd)
        >>> warmup.get_last_lr(), sgd.param_groups[0]["lr"]
        ([0.25], 0.25)
    """

    def __init__(self, restore: Restorable, optimizers: Sequence[Optimizer]) -> None:
        given = [*restore] if isinstance(restore, Sequence) and not isinstance(restore, str) else [restore]
        self._objects = [item for item in given if isinstance(item, Stateful)]
        self._searches = "schedulers" in [item for item in given if isinstance(item, str)]
        self._optimizers = optimizers
        self.saved: dict[str, Any] | None = None
        wrong = [item for item in given if item not in self._objects and item != "schedulers"]
        wrong += [item for item in self._objects if _to_json(item.state_dict()) is None]
        if wrong:
            raise OptionError(
                f"restore={wrong[0]!r:.80}",
                expected='"schedulers", or objects whose state_dict() holds plain numbers',
                cure='omit restore=, pass () for nothing, or ("schedulers", ramp) for more',
            )

    def capture(self) -> None:
        """Save the states, the first time that it is called; call it before each step of a recording."""
        if self.saved is not None:
            return
        self.saved = {}
        for name, found in self._found().items():
            stateful, index, writes_groups = found[0]
            state = _to_json(stateful.state_dict())
            if state is None or len(found) > 1:
                reason = "its state is not made of numbers" if state is None else "pass restore=(first, second, ...)"
                logger.warning("%s is advanced by the recording and not restored: %s", name, reason)
                continue
            groups = self._optimizers[index].param_groups if writes_groups else []
            settings = [{key: group[key] for key in SCHEDULED if key in group} for group in groups]
            plain = json.loads(_to_json(settings) or "[]")
            self.saved[name] = {"owner": index, "state": json.loads(state), "groups": plain}
        if self.saved:
            logger.info("to be restored after the recording: %s", ", ".join(self.saved))

    def restore(self, optimizer: Optimizer | None = None) -> None:
        """Restore the saved states that belong to one optimizer, or, with None, all of them; each once."""
        if not self.saved:
            return
        due = [name for name, saved in self.saved.items() if optimizer in (None, self._optimizers[saved["owner"]])]
        present = self._found() if due else {}
        for name in due:
            saved = self.saved.pop(name)
            for stateful, _, _ in present.get(name, ()):  # none if the trainer has dropped the scheduler
                stateful.load_state_dict(_merged(stateful.state_dict(), saved["state"]))
                for group, settings in zip(
                    self._optimizers[saved["owner"]].param_groups, saved["groups"], strict=False
                ):
                    for setting, value in settings.items():
                        optimizers.set_in_group(group, setting, _merged(group[setting], value))

    def to_text(self) -> str:
        """Return the states still to be restored as JSON; "" before `capture`."""
        return "" if self.saved is None else json.dumps(self.saved)

    def validate_text(self, text: str) -> None:
        """Raise StateError unless each scheduler that a text restores exists here, once."""
        wanted = json.loads(text) if text else {}
        here = {name for name, found in self._found().items() if len(found) == 1} if wanted else set()
        if not wanted.keys() <= here:
            raise StateError(
                f"a state that restores the {min(wanted.keys() - here)}",
                expected=f"one of {sorted(here)}",
                cure="build the schedulers before the state is loaded, and pass the same restore= as in the saved run",
            )

    def load_text(self, text: str) -> None:
        """Continue from a text that `to_text` returned and `validate_text` accepted."""
        self.saved = json.loads(text) if text else None

    def _found(self) -> dict[str, list[_Found]]:
        """Return all objects to restore, by name. Several of one name cannot be told apart in another process."""
        found: dict[str, list[_Found]] = {}
        for scheduler in self._schedulers() if self._searches else ():
            index = self._index(scheduler) or 0
            name = f"{type(scheduler).__name__} of optimizer {index}"
            found.setdefault(name, []).append(_Found(scheduler, index, writes_groups=True))
        for position, item in enumerate(self._objects):
            owner = self._index(getattr(item, "scheduler", item))  # accelerate wraps schedulers
            name = f"{type(item).__name__} at restore[{position}]"
            found[name] = [_Found(item, owner or 0, writes_groups=owner is not None)]
        return found

    def _schedulers(self) -> list[LRScheduler]:
        """Return the schedulers of the optimizers; of a scheduler that drives others, only itself."""
        given = {id(inner) for item in self._objects for inner in (item, getattr(item, "scheduler", None))}
        schedulers = [
            item
            for item in gc.get_objects()  # an optimizer does not know its schedulers
            if issubclass(type(item), LRScheduler)  # isinstance would also accept a proxy
            and id(item) not in given
            and self._index(item) is not None
        ]
        driven = {id(inner) for item in schedulers for inner in getattr(item, "_schedulers", ())}
        return [item for item in schedulers if id(item) not in driven]

    def _index(self, scheduler: object) -> int | None:
        optimizer = optimizers.innermost(getattr(scheduler, "optimizer", None))
        return next((index for index, own in enumerate(self._optimizers) if own is optimizer), None)


@contextmanager
def restored(weights: Iterable[Tensor]) -> Iterator[None]:
    """Restore, at the end, the learning-rate schedulers of every optimizer that steps one of these weights inside.

    Example:
        >>> import torch
        >>> weight = torch.ones(1, requires_grad=True)
        >>> sgd = torch.optim.SGD([weight], lr=1.0)
        >>> warmup = torch.optim.lr_scheduler.LambdaLR(sgd, lambda step: min(1.0, (step + 1) / 4))
        >>> with restored([weight]):
        ...     sgd.step()
        ...     warmup.step()
        >>> warmup.get_last_lr(), sgd.param_groups[0]["lr"]
        ([0.25], 0.25)
    """
    own = [*weights]
    snapshots: dict[Optimizer, SchedulerSnapshot] = {}

    def before_step(optimizer: Optimizer, args: object, kwargs: object) -> None:
        if optimizer not in snapshots and optimizers.groups_of(optimizer, own):
            snapshots[optimizer] = SchedulerSnapshot("schedulers", [optimizer])
            snapshots[optimizer].capture()

    hook = register_optimizer_step_pre_hook(before_step)
    try:
        yield
    finally:
        hook.remove()
        for snapshot in snapshots.values():
            snapshot.restore()


def _to_json(state: Any) -> str | None:
    """Return a state as JSON, a tensor of one element as a number; None if the state holds anything else."""

    def number(value: Any) -> float:
        if isinstance(value, Tensor) and value.numel() == 1:
            return float(value)
        raise TypeError

    try:
        return json.dumps(state, default=number)
    except (TypeError, ValueError):
        return None


def _merged(now: Any, then: Any) -> Any:
    """Return `now` with the values of `then` where they differ; equal values keep the types that JSON would change."""
    if _to_json(now) == _to_json(then):
        return now
    if isinstance(now, dict) and isinstance(then, dict) and now.keys() == then.keys():
        return {key: _merged(now[key], then[key]) for key in now}
    if isinstance(now, (list, tuple)) and isinstance(then, list) and len(now) == len(then):
        return type(now)([_merged(*pair) for pair in zip(now, then, strict=True)])
    return then
