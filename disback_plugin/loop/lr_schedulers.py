"""Learning-rate schedulers, restored after a recording during which the generator stood still.

Each optimizer's schedulers are restored just before its first step after the recording. This step then has the learning
rate that the trainer's own first step would have had, and a run that records equals one that reuses the path.
"""

from __future__ import annotations

import gc
import json
import logging
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable
from weakref import ref

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from disback_plugin.errors import OptionError, StateError
from disback_plugin.loop.optimizers import innermost, set_in_group

logger = logging.getLogger(__name__)

# Settings of a parameter group that schedulers write.
SCHEDULED = ("lr", "momentum", "betas", "weight_decay")
# Name, in a saved text, of the settings of an optimizer's groups.
SETTINGS = "settings of optimizer"


@runtime_checkable
class Stateful(Protocol):
    """An object with a state of plain numbers: a scheduler, or the ramp of a moving average."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state."""

    def load_state_dict(self, state_dict: dict[str, Any], /) -> Any:
        """Go back to a state."""


# The argument `restore` of `attach`.
Restorable = str | Stateful | Sequence[str | Stateful]


# Objects by name, each with the index of its optimizer, if it has one.
Found = dict[str, list[tuple[Stateful, int | None]]]


class RestorableObjects:
    """The learning-rate schedulers of some optimizers, and other objects that a recording advances.

    Args:
        restore: "schedulers" for every `LRScheduler` of the optimizers, which are searched in memory; objects with
            `state_dict` and `load_state_dict`; or a sequence of these. An empty sequence stands for nothing.
        optimizers: The generator's and the fake score's. Objects without an optimizer are restored with the first.

    Attributes:
        states: What was captured and is not restored yet, by the objects' names.

    Raises:
        OptionError: If an element of `restore` is neither, or its state is not made of plain numbers.

    Example:
        >>> import torch
        >>> sgd = torch.optim.SGD([torch.ones(1)], lr=1.0)
        >>> warmup = torch.optim.lr_scheduler.LambdaLR(sgd, lambda step: min(1.0, (step + 1) / 4))
        >>> objects = RestorableObjects("schedulers", [sgd])
        >>> objects.capture(sgd)
        >>> for _ in range(3):
        ...     sgd.step()
        ...     warmup.step()
        >>> warmup.get_last_lr()
        [1.0]
        >>> objects.restore()
        >>> warmup.get_last_lr(), sgd.param_groups[0]["lr"]
        ([0.25], 0.25)
    """

    def __init__(self, restore: Restorable, optimizers: Sequence[Optimizer]) -> None:
        given = [*restore] if isinstance(restore, Sequence) and not isinstance(restore, str) else [restore]
        objects = [item for item in given if not (isinstance(item, str) and item == "schedulers")]
        self._searches, self._optimizers = len(objects) < len(given), [*map(ref, optimizers)]
        self.states: dict[str, dict[str, Any]] = {}
        self._captured: set[int] = set()  # indices of the optimizers whose states were captured
        self._listed: Found | None = None  # what one search has found, until every optimizer's states are captured
        self._objects = [item for item in objects if isinstance(item, Stateful) and _to_json(item.state_dict())]
        wrong = [item for item in objects if all(item is not own for own in self._objects)]
        if wrong:
            raise OptionError(
                f"restore={wrong[0]!r:.80}",
                expected='"schedulers", or objects whose state_dict() holds plain numbers',
                cure='omit restore=, pass () for nothing, or ("schedulers", ramp) for more',
            )

    def to_text(self) -> str:
        """Return the captured states as JSON, by the objects' names; "" if there are none."""
        return json.dumps(self.states) if self.states else ""

    def load(self, text: str) -> None:
        """Take over the states that another process has captured."""
        self.states = json.loads(text or "{}")
        self._captured = {saved["owner"] for saved in self.states.values()}

    def validate(self, text: str) -> None:
        """Raise StateError unless each object that a text restores exists here, once."""
        wanted = {name for name in json.loads(text or "{}") if not name.startswith(SETTINGS)}
        here = {name for name, found in self._found().items() if len(found) == 1} if wanted else set()
        if not wanted <= here:
            raise StateError(
                f"a state that restores the {min(wanted - here)}",
                expected=f"one of {sorted(here)}",
                cure="build the schedulers before the state is loaded, and pass the same restore= as in the saved run",
            )

    def capture(self, optimizer: Optimizer) -> None:
        """Capture the present states that belong to an optimizer, once."""
        owner = self._index_of(optimizer)
        if owner is None or owner in self._captured:
            return
        self._captured.add(owner)
        found = self._owned(owner)
        if not found and hasattr(optimizer.step, "_wrapped_by_lr_sched"):  # a scheduler was built since the search
            self._listed = None
            found = self._owned(owner)
        if len(self._captured) == len(self._optimizers):
            self._listed = None
        captured = {}
        for name, own in found.items():
            state = _to_json(own[0][0].state_dict())
            if state is None or len(own) > 1:
                reason = "its state is not made of numbers" if state is None else "pass restore=(first, second, ...)"
                logger.warning("%s is advanced by the recording and not restored: %s", name, reason)
            else:
                captured[name] = {"owner": owner, "state": json.loads(state)}
        self.states |= captured
        if captured or (self._searches and not found):
            settings = [{key: group[key] for key in SCHEDULED if key in group} for group in optimizer.param_groups]
            self.states[f"{SETTINGS} {owner}"] = {"owner": owner, "groups": json.loads(_to_json(settings) or "[]")}
        if captured:
            logger.info("to be restored after the recording: %s", ", ".join(captured))

    def restore(self, optimizer: Optimizer | None = None) -> None:
        """Restore the captured states that belong to one optimizer, or, with None, all.

        A scheduler that the trainer has dropped meanwhile is skipped. If the settings of a group have changed and no
        scheduler of it is known, a warning says so.
        """
        if optimizer is None:
            self._captured.clear()
            self._listed = None
        owners = {saved["owner"]: self._optimizers[saved["owner"]]() for saved in self.states.values()}
        due = [name for name, saved in self.states.items() if optimizer in (None, owners[saved["owner"]])]
        # A search of all objects is slow: where no scheduler was captured, it waits until a setting has changed.
        present = self._found() if any(not name.startswith(SETTINGS) for name in due) else None
        for name in sorted(due, key=lambda name: name.startswith(SETTINGS)):  # groups after the schedulers
            saved = self.states.pop(name)
            for stateful, _ in (present or {}).get(name, ()):
                stateful.load_state_dict(_merged(stateful.state_dict(), saved["state"]))
            own, changed = owners[saved["owner"]], False
            for group, settings in zip(getattr(own, "param_groups", ()), saved.get("groups", ()), strict=False):
                for setting, value in settings.items():
                    changed |= _to_json(group[setting]) != _to_json(value)
                    set_in_group(group, setting, _merged(group[setting], value))
            if not changed:
                continue
            present = self._found() if present is None else present
            if all(index != saved["owner"] for known in present.values() for _, index in known):
                logger.warning(
                    "the learning rate, or another setting, of %s was changed by no LRScheduler during the recording. "
                    "It is restored once, but what the loop counts itself goes on, and a warm-up may be over. If an "
                    'object counts, pass restore=("schedulers", that object)',
                    type(own).__name__,
                )

    def _owned(self, owner: int) -> Found:
        """Return the objects of one optimizer by name; those without one belong to the first."""
        if self._listed is None:
            self._listed = self._found()
        return {name: own for name, own in self._listed.items() if (own[0][1] or 0) == owner}

    def _found(self) -> Found:
        """Return all objects by name, each with the index of its optimizer, if it has one.

        Several objects of one name cannot be told apart in another process.
        """
        found: Found = {}
        for scheduler in self._schedulers() if self._searches else ():
            index = self._index_of(scheduler.optimizer)
            found.setdefault(f"{type(scheduler).__name__} of optimizer {index}", []).append((scheduler, index))
        for position, item in enumerate(self._objects):
            inner = getattr(item, "scheduler", item)  # accelerate wraps schedulers
            owner = self._index_of(getattr(inner, "optimizer", None))
            found[f"{type(item).__name__} at restore[{position}]"] = [(item, owner)]
        return found

    def _schedulers(self) -> list[LRScheduler]:
        """Return the schedulers of the optimizers; of a scheduler that drives others, only itself."""
        given = {id(inner) for item in self._objects for inner in (item, getattr(item, "scheduler", None))}

        def search() -> list[LRScheduler]:
            return [
                item
                for item in gc.get_objects()  # an optimizer does not know its schedulers
                if issubclass(type(item), LRScheduler)  # isinstance would also accept a proxy
                and id(item) not in given
                and self._index_of(getattr(item, "optimizer", None)) is not None
            ]

        schedulers = search()
        patched = [each for each in self._optimizers if hasattr(getattr(each(), "step", None), "_wrapped_by_lr_sched")]
        if gc.get_freeze_count() and len(patched) > len({id(each.optimizer) for each in schedulers}):
            gc.unfreeze()  # the search does not see frozen objects
            gc.collect()  # what dies later, while it is frozen again, stays for ever
            try:
                schedulers = search()
            finally:
                gc.freeze()
        driven = {id(inner) for item in schedulers for inner in getattr(item, "_schedulers", ())}
        return [item for item in schedulers if id(item) not in driven]

    def _index_of(self, optimizer: object) -> int | None:
        inner = innermost(optimizer)
        return next((index for index, own in enumerate(self._optimizers) if inner is not None and own() is inner), None)


def _to_json(state: Any) -> str | None:
    """Return a state as JSON, a tensor of one element as a number; None if the state holds anything else."""
    try:
        return json.dumps(state, default=float)
    except (TypeError, ValueError, RuntimeError):  # the last of a larger tensor
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
