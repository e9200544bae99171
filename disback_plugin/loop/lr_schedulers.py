"""Learning-rate schedules that a recording consumed, put back: the generator stood still while its warm-up went by.

Each optimizer's schedulers are put back just before its first step after the recording, so that this step has the
learning rate that the trainer's own first step would have had, and a run that records has those of one that reuses the
path.
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

__all__ = ["SchedulerSnapshot", "Stateful", "rewound", "taken"]

logger = logging.getLogger(__name__)

# What schedulers write into an optimizer's groups.
SCHEDULED = ("lr", "momentum", "betas")


@runtime_checkable
class Stateful(Protocol):
    """Anything with a state of plain numbers: a scheduler, the ramp of an average."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state."""

    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any:
        """Go back to a state."""


class Target(NamedTuple):
    """Something with a state, the index of the optimizer it is put back with, and whether it writes its rates."""

    stateful: Stateful
    owner: int
    scheduled: bool


class SchedulerSnapshot:
    """States at the first step of a recording, to be put back at its end.

    Args:
        restore: "schedulers" for every `LRScheduler` of the optimizers, which are looked for in memory; objects with
            `state_dict` and `load_state_dict`; or a sequence of these. Empty for nothing.
        generator: The optimizers of the generator. Objects are put back together with the first.
        fake_score: Those of s_phi.

    Raises:
        OptionError: If something in `restore` is neither, or its state is not made of plain numbers.

    Example:
        >>> import torch
        >>> sgd = torch.optim.SGD([torch.ones(1)], lr=1.0)
        >>> warmup = torch.optim.lr_scheduler.LambdaLR(sgd, lambda step: min(1.0, (step + 1) / 4))
        >>> rewind = SchedulerSnapshot("schedulers", [sgd], [])
        >>> rewind.take()
        >>> for _ in range(3):
        ...     sgd.step()
        ...     warmup.step()
        >>> warmup.get_last_lr()
        [1.0]
        >>> rewind.put_back(sgd)
        >>> warmup.get_last_lr(), sgd.param_groups[0]["lr"]
        ([0.25], 0.25)
    """

    def __init__(
        self,
        restore: str | Stateful | Sequence[str | Stateful],
        generator: list[Optimizer],
        fake_score: list[Optimizer],
    ) -> None:
        several = isinstance(restore, Sequence) and not isinstance(restore, str)
        given: list[Any] = [*restore] if several else [restore]  # type: ignore[misc]
        self._objects = [item for item in given if isinstance(item, Stateful)]
        self._finds = any(isinstance(item, str) for item in given)
        self._optimizers = [*generator, *fake_score]
        self._then: dict[str, Any] | None = None  # what is still to be put back; None before it was looked at
        wrong = [item for item in given if item not in self._objects and item != "schedulers"]
        wrong += [item for item in self._objects if _encoded(item.state_dict()) is None]
        if wrong:
            raise OptionError(
                f"restore={wrong[0]!r:.80}",
                expected='"schedulers", or objects whose state_dict() holds plain numbers',
                cure='leave restore= alone, pass () for nothing, or ("schedulers", ramp) for more',
            )

    @property
    def state(self) -> str:
        """What is still to be put back, as JSON; "" before the first step."""
        return "" if self._then is None else json.dumps(self._then)

    def take(self) -> None:
        """Keep the states, if that was not done yet. Call it before each step of a recording."""
        if self._then is not None:
            return
        self._then = {}
        for name, targets in self._targets().items():
            state = _encoded(targets[0].stateful.state_dict())
            if state is None or len(targets) > 1:
                why = "its state is not made of numbers" if state is None else "pass restore=(first, second, ...)"
                logger.warning("%s is advanced by the recording, and not put back: %s", name, why)
                continue
            owner, scheduled = targets[0].owner, targets[0].scheduled
            groups = self._optimizers[owner].param_groups if scheduled else []
            kept = [{key: group[key] for key in SCHEDULED if key in group} for group in groups]
            self._then[name] = {
                "owner": owner,
                "state": json.loads(state),
                "groups": json.loads(_encoded(kept) or "[]"),
            }
        if self._then:
            logger.info("put back after the recording: %s", ", ".join(self._then))

    def put_back(self, optimizer: Optimizer | None = None) -> None:
        """Put the states of one optimizer's schedulers back, or, with None, all; once."""
        if not self._then:
            return
        due = [name for name in self._then if optimizer in (None, self._optimizers[self._then[name]["owner"]])]
        targets = self._targets() if due else {}
        for name in due:
            then = self._then.pop(name)
            for target in targets.get(name, ()):  # none if the trainer has dropped it
                target.stateful.load_state_dict(_merged(target.stateful.state_dict(), then["state"]))
                _write_groups(self._optimizers[then["owner"]], then["groups"])

    def check(self, state: str) -> None:
        """Raise unless all that a state wants put back is here.

        Raises:
            StateError: If not.
        """
        wanted = json.loads(state) if state else {}
        here = {name for name, targets in self._targets().items() if len(targets) == 1} if wanted else set()
        if not wanted.keys() <= here:
            raise StateError(
                f"a state that puts back the {min(wanted.keys() - here)}",
                expected=f"one of {sorted(here)}",
                cure="build the schedulers before the state is loaded, and pass the same restore= as in the saved run",
            )

    def load(self, state: str) -> None:
        """Go on from a state that was checked."""
        self._then = json.loads(state) if state else None

    def _targets(self) -> dict[str, list[Target]]:
        """Return what there is to put back, by name; several of one name cannot be told apart in another process."""
        targets: dict[str, list[Target]] = {}
        for scheduler in self._schedulers() if self._finds else ():
            target = self._target(scheduler)
            targets.setdefault(f"{type(scheduler).__name__} of optimizer {target.owner}", []).append(target)
        for index, item in enumerate(self._objects):
            targets[f"{type(item).__name__} at restore[{index}]"] = [self._target(item)]
        return targets

    def _target(self, stateful: Stateful) -> Target:
        owner = self._owner(getattr(stateful, "scheduler", stateful))  # accelerate's wrapper
        return Target(stateful, owner or 0, scheduled=owner is not None)

    def _owner(self, scheduler: object) -> int | None:
        optimizer = optimizers.innermost(getattr(scheduler, "optimizer", None))
        return next((index for index, ours in enumerate(self._optimizers) if ours is optimizer), None)

    def _schedulers(self) -> list[LRScheduler]:
        """Find the schedulers of our optimizers; one that drives others speaks for them."""
        given = {id(inner) for item in self._objects for inner in (item, getattr(item, "scheduler", None))}
        found = [
            item
            for item in gc.get_objects()
            if issubclass(type(item), LRScheduler)  # not isinstance: a proxy may answer to that
            and id(item) not in given
            and self._owner(item) is not None
        ]
        driven = {id(inner) for item in found for inner in getattr(item, "_schedulers", ())}
        return [item for item in found if id(item) not in driven]


def taken(optimizer: Optimizer) -> SchedulerSnapshot:
    """Return the present states of one optimizer's schedulers."""
    rewind = SchedulerSnapshot("schedulers", [], [optimizer])
    rewind.take()
    return rewind


@contextmanager
def rewound(weights: Iterable[Tensor]) -> Iterator[None]:
    """Put back, at the end, the learning-rate schedulers of every optimizer that steps one of these weights inside.

    Example:
        >>> import torch
        >>> weight = torch.ones(1, requires_grad=True)
        >>> sgd = torch.optim.SGD([weight], lr=1.0)
        >>> warmup = torch.optim.lr_scheduler.LambdaLR(sgd, lambda step: min(1.0, (step + 1) / 4))
        >>> with rewound([weight]):
        ...     sgd.step()
        ...     warmup.step()
        >>> warmup.get_last_lr(), sgd.param_groups[0]["lr"]
        ([0.25], 0.25)
    """
    own = [*weights]
    found: dict[Optimizer, SchedulerSnapshot] = {}

    def before_step(optimizer: Optimizer, args: object, kwargs: object) -> None:
        if optimizer not in found and optimizers.steppers([optimizer], own):
            found[optimizer] = taken(optimizer)

    hook = register_optimizer_step_pre_hook(before_step)
    try:
        yield
    finally:
        hook.remove()
        for rewind in found.values():
            rewind.put_back()


def _encoded(state: Any) -> str | None:
    """Return a state as JSON, a tensor of one element as a number; None if it is made of anything else."""

    def number(value: Any) -> float:
        if isinstance(value, Tensor) and value.numel() == 1:
            return float(value)
        raise TypeError

    try:
        return json.dumps(state, default=number)
    except (TypeError, ValueError):
        return None


def _merged(now: Any, then: Any) -> Any:
    """Return `now` with what differs from `then` as it was then; what JSON would change and did not move is kept."""
    if _encoded(now) == _encoded(then):
        return now
    if isinstance(now, dict) and isinstance(then, dict) and now.keys() == then.keys():
        return {key: _merged(now[key], then[key]) for key in now}
    if isinstance(now, (list, tuple)) and isinstance(then, list) and len(now) == len(then):
        return type(now)([_merged(*pair) for pair in zip(now, then, strict=True)])
    return then


def _write_groups(optimizer: Optimizer, groups: list[dict[str, Any]]) -> None:
    for group, then in zip(optimizer.param_groups[: len(groups)], groups, strict=True):
        for setting, value in then.items():
            optimizers.put(group, setting, _merged(group[setting], value))
