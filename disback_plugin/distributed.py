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
from typing import TYPE_CHECKING, Any, TypeVar

from disback_plugin.errors import RankError

if TYPE_CHECKING:
    from disback_plugin.weights.sharding import FullState

T = TypeVar("T")

# Whether this is the main process in an action for which the other ranks wait.
_ALONE: ContextVar[bool] = ContextVar("_ALONE", default=False)
# The number of each exchange: the ranks of a run come to the same exchanges in the same order.
_NUMBERS = count()
# The keys that this rank has left in the store since the last exchange of all ranks.
_SENT: list[str] = []


class AbsentRankError(RankError):
    """A rank has said that it does not come to an exchange (`leave`)."""


class _Absence(str):
    """What a rank found that does not come, instead of its value."""


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


def on_main_process(action: Callable[[], T], shards: FullState | None = None) -> T:
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
    serving = shards is not None and shards.sharded
    answer: tuple[bytes, str | None] = b"", "KeyboardInterrupt or SystemExit"
    if not is_main_process():
        while serving and (name := broadcast(None)) is not None:
            shards.serve(name)
        message, failure = broadcast(answer)
        if failure is not None:
            raise RankError(f"rank 0 failed ({failure})", expected="rank 0 to succeed", cure="see the error of rank 0")
        return pickle.loads(message)  # type: ignore[no-any-return]
    token = _ALONE.set(True)
    try:
        result = action()
        answer = pickle.dumps(result), None
    except Exception as error:
        answer = b"", _text(error)
        raise
    finally:
        _ALONE.reset(token)
        if serving:
            broadcast(None)  # the other ranks stop serving
        broadcast(answer)
    return result


def on_every_rank(action: Callable[[], T], about: str, facts: Mapping[str, Any] | None = None) -> T:
    """Run `action` on every rank; all ranks raise if it failed on one of them, or if the ranks have different facts.

    Args:
        action: A function of no arguments, without communication.
        about: What every rank is expected to do, as an infinitive, for the error.
        facts: Values by name that have to be equal on all ranks.

    Raises:
        RankError: On the ranks where the action succeeded. The error names a rank where it failed, or the first rank
            whose facts differ from those of rank 0, or one that does not come (`leave`).
    """
    if not is_distributed():
        return action()
    try:
        result = action()
    except Exception as error:
        gather((_text(error), {}))
        raise
    answers: list[tuple[str | None, dict[str, Any]]] = gather((None, dict(facts or {})))
    first = answers[0][1]
    for rank, (failure, other) in enumerate(answers):
        if failure is not None:
            raise RankError(
                f"rank {rank} failed ({failure})",
                expected=f"every rank to {about}",
                cure=f"see the error of rank {rank}; files have to be in a folder that all ranks share",
            )
        different = sorted(name for name in {*first, *other} if first.get(name) != other.get(name))[:3]
        if different:
            raise RankError(
                f"{_listed(different, other)} on rank {rank}",
                expected=f"{_listed(different, first)} as on rank 0",
                cure="give every rank the same arguments, path and checkpoint, and let all of them step alike",
            )
    return result


def leave(found: str) -> None:
    """Say that this rank does not come to the next `gather`, without waiting: AbsentRankError for the ranks that do.

    Args:
        found: What was found on this rank.
    """
    if is_distributed():
        _send(next(_NUMBERS), _Absence(found))


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
    return _exchanged(value, _process_group().get_world_size()) if is_distributed() else [value]


def broadcast(value: T) -> T:
    """Return the value of rank 0 on every rank. All ranks must call; those other than rank 0 may pass anything.

    Args:
        value: An object that can be pickled.

    Raises:
        RankError: If rank 0 does not come within the timeout of the process group.
    """
    return _exchanged(value, 1)[0]


def _exchanged(value: T, senders: int) -> list[T]:
    """Return the values of the first ranks, as many as send one, on every rank."""
    store, rank, number = _store(), _process_group().get_rank(), next(_NUMBERS)
    keys = [f"disback/{number}/{sender}" for sender in range(senders)]
    if rank < senders:
        _send(number, value)
    if senders == 1 and rank == 0:
        return [value]
    try:
        store.wait(keys)
        values = [pickle.loads(message) for message in store.multi_get(keys)]
    except RuntimeError as error:  # the time is over, or the store is gone with its host
        raise RankError(
            f"nothing from {_missing(store, keys)} within the timeout of the process group",
            expected="all ranks to come to the same point",
            cure="see the first error of that rank; if it only takes longer, "
            "init_process_group(timeout=...) says how long the others wait",
        ) from error
    for sender, found in enumerate(values):
        if isinstance(found, _Absence):
            cure = f"see the log of rank {sender}"
            raise AbsentRankError(f"{found}, on rank {sender}", expected="all ranks to go on alike", cure=cure)
    if senders > 1:  # a rank that came here has read all earlier messages
        for key in _SENT[:-1]:
            store.delete_key(key)
        del _SENT[:-1]
    return values


def _send(number: int, value: object) -> None:
    """Leave this rank's value of an exchange in the store."""
    key = f"disback/{number}/{_process_group().get_rank()}"
    _store().set(key, pickle.dumps(value))
    _SENT.append(key)


def _store() -> Any:
    return _process_group().distributed_c10d._get_default_store()


def _process_group() -> Any:
    """Return `torch.distributed` if this process has a process group, and None if not."""
    dist = sys.modules.get("torch.distributed")
    return dist if dist is not None and dist.is_available() and dist.is_initialized() else None


def _missing(store: Any, keys: Sequence[str]) -> str:
    """Return the names of the ranks that left no message."""
    try:
        absent = [str(rank) for rank, key in enumerate(keys) if not store.check([key])]
    except RuntimeError:
        return "the store of the process group"
    return f"rank {', '.join(absent)}" if absent else "some rank"


def _listed(names: Sequence[str], facts: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={facts.get(name)!r:.80}" for name in names)


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
