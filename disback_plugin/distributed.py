"""Several processes: all of them agree, or all of them stop with an error that names the one that did not.

What is said goes through the store that the processes met at (`torch.distributed`), not through their process group: a
rank that does not come cannot be mistaken for one that is about to reduce gradients, and is named when the timeout that
the group was made with is over.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from itertools import count
from types import MappingProxyType
from typing import Any, TypeVar

import torch.distributed as dist

from disback_plugin.errors import RankError
from disback_plugin.weights.full_state import FullState

__all__ = ["agree", "gather", "is_main_process", "on_every_rank", "on_rank_zero", "several"]

T = TypeVar("T")

# Whether this is rank 0, at work while the others wait.
_ALONE: ContextVar[bool] = ContextVar("_ALONE", default=False)
# Of each exchange. The ranks of a run come to the same ones in the same order, or they are told that they do not.
_NUMBERS = count()


def several() -> bool:
    """Return whether there are other ranks to agree with.

    Example:
        >>> several()
        False
    """
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1 and not _ALONE.get()


def is_main_process() -> bool:
    """Return whether this process is rank 0, or the run is not distributed.

    Example:
        >>> is_main_process()
        True
    """
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0


def gather(value: Any) -> list[Any]:
    """Return the value that each rank passed, in the order of the ranks. Collective.

    Args:
        value: Plain JSON: None, a bool, a number, a string, or a list or dict of those.

    Raises:
        RankError: If a rank does not call this function within the timeout of the process group.

    Example:
        >>> gather(True)
        [True]
    """
    return [answer["value"] for answer in _exchange({"value": value})] if several() else [value]


def on_rank_zero(action: Callable[[], T], state: FullState | None = None) -> T:
    """Run `action` on rank 0 only, and return its result on every rank; all raise if it failed there.

    The result travels with the go-ahead, for what a rank reads from disk may be older or newer than what rank 0 saw.
    Inside an action, which only rank 0 runs, further actions run at once.

    Args:
        action: What to do.
        state: Weights that it reads; where they are sharded, the other ranks send theirs.

    Raises:
        RankError: On the other ranks, if it failed on rank 0.
    """
    if not several():
        return action()
    error: Exception | None = None
    outcome: list[Any] = [None, None]
    sharded = state if state is not None and state.sharded else None
    if dist.get_rank() == 0:
        token = _ALONE.set(True)
        try:
            outcome[0] = action()
        except Exception as caught:
            error = caught
            outcome[1] = _said(error)
        finally:
            _ALONE.reset(token)
        if sharded is not None:
            sharded.close()
    elif sharded is not None:
        sharded.serve()
    dist.broadcast_object_list(outcome, src=0)
    if error is not None:
        raise error
    if outcome[1] is not None:
        raise RankError(
            f"rank 0 failed ({outcome[1]})", expected="the path to be ready", cure="see the error of rank 0"
        )
    result: T = outcome[0]
    return result


def on_every_rank(action: Callable[[], T], about: str, facts: Mapping[str, Any] = MappingProxyType({})) -> T:
    """Run `action` on every rank; all raise if it failed on one, or if one sees something else than the others.

    Args:
        action: What to do, without communication.
        about: What every rank was expected to do, for the error.
        facts: What this rank sees, as JSON values by name; all have to see the same.

    Raises:
        RankError: On the ranks where it did not fail; it names one where it did, or the first that differs from rank 0.
    """
    if not several():
        return action()
    try:
        result = action()
    except Exception as error:
        _exchange({"failure": _said(error), "facts": dict(facts)})
        raise
    said = _exchange({"failure": None, "facts": dict(facts)})
    for rank, answer in enumerate(said):
        if answer["failure"] is not None:
            raise RankError(
                f"rank {rank} failed ({answer['failure']})",
                expected=f"every rank to {about}",
                cure=f"see the error of rank {rank}; files have to be in a folder that all ranks share",
            )
    first = said[0]["facts"]
    for rank, answer in enumerate(said):
        other = answer["facts"]
        odd = sorted(name for name in {*first, *other} if first.get(name) != other.get(name))
        if odd:
            raise RankError(
                f"{_listed(odd, other)} on rank {rank}",
                expected=f"{_listed(odd, first)} as on rank 0",
                cure="give every rank the same arguments, path and checkpoint, and let all of them step alike",
            )
    return result


def agree(facts: Mapping[str, Any]) -> None:
    """Raise RankError on all ranks unless all of them see the same (`on_every_rank`)."""
    on_every_rank(lambda: None, "see the same", facts)


def _listed(names: list[str], facts: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={facts.get(name)!r:.80}" for name in names[:3])


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _exchange(message: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Leave a message for the others and return those of all ranks, in their order."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    store = dist.distributed_c10d._get_default_store()
    number = next(_NUMBERS)
    keys = [f"disback/{number}/{other}" for other in range(ranks)]
    store.set(keys[rank], json.dumps(message))
    try:
        store.wait(keys)
        said = [json.loads(text) for text in store.multi_get(keys)]
    except RuntimeError as error:  # the time is over, or the store is gone with its host
        raise RankError(
            f"nothing from {_missing(store, keys)} within the timeout of the process group",
            expected=f"all {ranks} ranks to come to the same point",
            cure="see the first error of that rank; if it only takes longer, "
            "init_process_group(timeout=...) says how long the others wait",
        ) from error
    # Who leaves a message has read those of all before: nobody needs the one before the last any more.
    if number > 1:
        store.delete_key(f"disback/{number - 2}/{rank}")
    return said


def _missing(store: Any, keys: list[str]) -> str:
    """Return who left no message."""
    try:
        absent = [str(rank) for rank, key in enumerate(keys) if not store.check([key])]
    except RuntimeError:
        return "the store of the process group"
    return f"rank {', '.join(absent)}" if absent else "some rank"
