"""Learning-rate schedules that a recording consumed, put back: the generator stood still while its warm-up went by.

Each optimizer's schedulers are put back just before its first step after the recording, so that this step has the
learning rate that the trainer's own first step would have had, and a run that records equals one that reuses the path.
"""

from __future__ import annotations

import gc
import json
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from disback_plugin import optimizers
from disback_plugin.errors import OptionError, StateError

__all__ = ["Rewind", "Stateful"]

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


class Rewind:
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
        >>> rewind = Rewind("schedulers", [sgd], [])
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
        for name, (optimizer, stateful) in self._targets().items():
            state = _encoded(stateful.state_dict())
            if state is None:
                logger.warning("%s, which recording advances, cannot be put back: its state is not plain", name)
                continue
            groups = [{key: group[key] for key in SCHEDULED if key in group} for group in optimizer.param_groups]
            self._then[name] = {"state": json.loads(state), "groups": json.loads(_encoded(groups) or "[]")}
        if self._then:
            logger.info("put back after the recording: %s", ", ".join(self._then))

    def put_back(self, optimizer: Optimizer | None = None) -> None:
        """Put the states of one optimizer's schedulers back, or, with None, all; once."""
        if not self._then:
            return
        for name, (owner, stateful) in self._targets().items():
            if name in self._then and optimizer in (None, owner):
                then = self._then.pop(name)
                stateful.load_state_dict(_merged(stateful.state_dict(), then["state"]))
                if isinstance(stateful, LRScheduler):
                    _write_groups(owner, then["groups"])

    def check(self, state: str) -> None:
        """Raise unless all that a state wants put back is here, and can be told apart.

        Raises:
            StateError: If not.
        """
        wanted = json.loads(state) if state else {}
        missing = sorted(wanted.keys() - self._targets().keys())
        alike = [name for name in wanted if "#" in name]
        if missing or alike:
            raise StateError(
                f"a state that puts back {(missing or alike)[0]}",
                expected=f"one of {sorted(self._targets())}" if missing else "one scheduler of a class and optimizer",
                cure="build the schedulers before the state is loaded, and pass the same restore= as in the saved run"
                if missing
                else "name them: attach(..., restore=(first, second))",
            )

    def load(self, state: str) -> None:
        """Go on from a state that was checked."""
        self._then = json.loads(state) if state else None

    def _targets(self) -> dict[str, tuple[Optimizer, Stateful]]:
        found = list(self._schedulers()) if self._finds else []
        names: Counter[str] = Counter()
        targets: dict[str, tuple[Optimizer, Stateful]] = {}
        for scheduler, optimizer in found:
            name = f"{type(scheduler).__name__} of optimizer {self._optimizers.index(optimizer)}"
            names[name] += 1
            targets[name if names[name] == 1 else f"{name} #{names[name]}"] = optimizer, scheduler
        for index, item in enumerate(self._objects):
            owner = optimizers.innermost(getattr(item, "optimizer", None))
            owner = owner if owner in self._optimizers else self._optimizers[0]
            targets[f"restore[{index}], {type(item).__name__}"] = owner, item
        return targets

    def _schedulers(self) -> Iterator[tuple[LRScheduler, Optimizer]]:
        """Find the schedulers of our optimizers; one that drives others speaks for them."""
        given = {id(inner) for item in self._objects for inner in (item, getattr(item, "scheduler", None))}
        found = []
        for item in gc.get_objects():
            if issubclass(type(item), LRScheduler) and id(item) not in given:  # not isinstance: proxies answer to that
                optimizer = optimizers.innermost(getattr(item, "optimizer", None))
                if any(optimizer is ours for ours in self._optimizers):
                    found.append((item, optimizer))
        driven = {id(inner) for item, _ in found for inner in getattr(item, "_schedulers", ())}
        yield from ((item, optimizer) for item, optimizer in found if id(item) not in driven)


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
    for group, then in zip(optimizer.param_groups, groups, strict=False):
        for key, value in then.items():
            if isinstance(group[key], Tensor):  # the same tensor: a captured graph reads it
                group[key].fill_(value)
            else:
                group[key] = _merged(group[key], value)
