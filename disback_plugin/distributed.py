"""Several ranks: all of them agree, or all of them stop with an error that names the rank that differs.

Messages go through the store at which the ranks met (`torch.distributed`), not through their process group. A rank that
does not come to an exchange therefore cannot be mistaken for one that is about to reduce gradients, and the error names
it once the timeout of the process group is over. No device is needed. This module does not import torch: a process that
has other ranks has imported it.
"""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from itertools import count
from typing import Any, Protocol, TypeVar

from disback_plugin.errors import RankError

__all__ = ["agree", "broadcast", "gather", "is_distributed", "is_main_process", "on_every_rank", "on_main_process"]

T = TypeVar("T")

# Whether this is the main process in an action for which the other ranks wait.
_ALONE: ContextVar[bool] = ContextVar("_ALONE", default=False)
# The number of each exchange: the ranks of a run come to the same exchanges in the same order.
_NUMBERS = count()
# The keys that this rank has left in the store since the last exchange of all ranks.
_SENT: list[str] = []


class ShardServer(Protocol):
    """Weights of which the main process can read everything while the other ranks send their parts."""

    sharded: bool

    def serve(self, name: str) -> None:
        """Send this rank's part of what the main process has asked for with `broadcast(name)`."""
        ...


def is_main_process() -> bool:
    """Return whether this process is rank 0; before a process group exists, the launcher's variable RANK decides.

    Example:
        >>> is_main_process()
        True
    """
    group = _process_group()
    return os.environ.get("RANK", "0") == "0" if group is None else bool(group.get_rank() == 0)


def is_distributed() -> bool:
    """Return whether there are other ranks to agree with; False inside `on_main_process`.

    Example:
        >>> is_distributed()
        False
    """
    group = _process_group()
    return group is not None and group.get_world_size() > 1 and not _ALONE.get()


def on_main_process(action: Callable[[], T], shards: ShardServer | None = None) -> T:
    """Run `action` on rank 0 only, and return its result on every rank; all ranks raise if it failed there.

    The result is sent along, because a rank that reads the disk itself may see an older or newer state than rank 0.
    Inside an action, further calls of this function run their action at once.

    Args:
        action: A function of no arguments, whose result can be pickled.
        shards: The weights that it reads; where they are sharded, the other ranks send theirs meanwhile.

    Raises:
        RankError: On the other ranks, if the action failed on rank 0.
    """
    if not is_distributed():
        return action()
    sharded = shards is not None and shards.sharded
    if not is_main_process():
        while sharded and (name := broadcast(None)) is not None:
            shards.serve(name)
        answer: Any = broadcast(None)
        result, failure = answer
        if failure is not None:
            raise RankError(f"rank 0 failed ({failure})", expected="rank 0 to succeed", cure="see the error of rank 0")
        return result  # type: ignore[no-any-return]
    error: Exception | None = None
    token = _ALONE.set(True)
    try:
        result = action()
    except Exception as caught:
        result, error = None, caught
    finally:
        _ALONE.reset(token)
    if sharded:
        broadcast(None)  # the other ranks stop serving
    broadcast((result, None if error is None else _text(error)))
    if error is not None:
        raise error
    return result  # type: ignore[no-any-return]


def on_every_rank(action: Callable[[], T], about: str, facts: Mapping[str, Any] | None = None) -> T:
    """Run `action` on every rank; all ranks raise if it failed on one of them, or if the ranks have different facts.

    Args:
        action: A function of no arguments, without communication.
        about: What every rank is expected to do, as an infinitive, for the error.
        facts: Values by name that have to be equal on all ranks.

    Raises:
        RankError: On the ranks where the action succeeded. The error names a rank where it failed, or the first rank
            whose facts differ from those of rank 0.
    """
    if not is_distributed():
        return action()
    try:
        result = action()
    except Exception as error:
        gather((_text(error), {}))
        raise
    answers: list[tuple[str | None, dict[str, Any]]] = gather((None, dict(facts or {})))
    for rank, (failure, _) in enumerate(answers):
        if failure is not None:
            raise RankError(
                f"rank {rank} failed ({failure})",
                expected=f"every rank to {about}",
                cure=f"see the error of rank {rank}; files have to be in a folder that all ranks share",
            )
    first = answers[0][1]
    for rank, (_, other) in enumerate(answers):
        different = sorted(name for name in {*first, *other} if first.get(name) != other.get(name))
        if different:
            raise RankError(
                f"{_listed(different, other)} on rank {rank}",
                expected=f"{_listed(different, first)} as on rank 0",
                cure="give every rank the same arguments, path and checkpoint, and let all of them step alike",
            )
    return result


def agree(facts: Mapping[str, Any]) -> None:
    """Raise RankError on all ranks unless all of them have the same facts (`on_every_rank`)."""
    on_every_rank(lambda: None, "see the same", facts)


def gather(value: T) -> list[T]:
    """Return the values of all ranks, in the order of the ranks. All ranks must call.

    Args:
        value: An object that can be pickled.

    Raises:
        RankError: If a rank does not come within the timeout of the process group.

    Example:
        >>> gather("alone")
        ['alone']
    """
    if not is_distributed():
        return [value]
    group, number = sys.modules["torch.distributed"], next(_NUMBERS)
    keys = [f"disback/{number}/gather/{rank}" for rank in range(group.get_world_size())]
    own = keys[group.get_rank()]
    store = _store()
    store.set(own, pickle.dumps(value))
    values = _received(store, keys)
    # A rank that came here has read all earlier messages.
    for key in _SENT:
        store.delete_key(key)
    _SENT[:] = [own]
    return values


def broadcast(value: T) -> T:
    """Return the value of rank 0 on every rank. All ranks must call; those other than rank 0 may pass anything.

    Args:
        value: An object that can be pickled.

    Raises:
        RankError: If rank 0 does not come within the timeout of the process group.
    """
    key = f"disback/{next(_NUMBERS)}/broadcast/0"
    if not is_main_process():
        received: T = _received(_store(), [key])[0]
        return received
    _store().set(key, pickle.dumps(value))
    _SENT.append(key)
    return value


def _process_group() -> Any:
    """Return `torch.distributed` if this process has a process group, and None if not."""
    dist = sys.modules.get("torch.distributed")
    return dist if dist is not None and dist.is_available() and dist.is_initialized() else None


def _store() -> Any:
    return sys.modules["torch.distributed"].distributed_c10d._get_default_store()


def _received(store: Any, keys: Sequence[str]) -> list[Any]:
    """Return the messages under the keys, waiting for them."""
    try:
        store.wait(keys)
        return [pickle.loads(message) for message in store.multi_get(keys)]
    except RuntimeError as error:  # the time is over, or the store is gone with its host
        raise RankError(
            f"nothing from {_missing(store, keys)} within the timeout of the process group",
            expected="all ranks to come to the same point",
            cure="see the first error of that rank; if it only takes longer, "
            "init_process_group(timeout=...) says how long the others wait",
        ) from error


def _missing(store: Any, keys: Sequence[str]) -> str:
    """Return the names of the ranks that left no message."""
    try:
        absent = [key.rpartition("/")[2] for key in keys if not store.check([key])]
    except RuntimeError:
        return "the store of the process group"
    return f"rank {', '.join(absent)}" if absent else "some rank"


def _listed(names: Sequence[str], facts: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={facts.get(name)!r:.80}" for name in names[:3])


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
