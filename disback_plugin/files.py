"""Files that are whole or not there: safetensors and JSON, written under a temporary name, flushed and renamed."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from disback_plugin.errors import COPY_AGAIN, PathError

__all__ = [
    "copy",
    "digest",
    "is_leftover",
    "map_tensors",
    "on_every_rank",
    "on_rank_zero",
    "read_json",
    "stamp",
    "visible",
    "without_aliases",
    "write_json",
    "write_tensors",
    "write_text",
]

T = TypeVar("T")

LARGEST_JSON = 1 << 26
# The key of the text in a file's metadata.
ABOUT = "disback"

_ALONE: ContextVar[bool] = ContextVar("_ALONE", default=False)


def write_tensors(file: Path, tensors: Mapping[str, Tensor], *, about: str) -> dict[str, Any]:
    """Write tensors that share no memory as safetensors, and a text beside them.

    Returns:
        Name, SHA-256 and size of the file, as a manifest lists them.
    """
    # One key only: safetensors writes several in random order, and equal nodes must be equal files.
    _replace(file, lambda temporary: save_file(dict(tensors), temporary, metadata={ABOUT: about}))
    return {"file": file.name, "sha256": digest(file), "bytes": file.stat().st_size}


def map_tensors(file: Path, *, size: int) -> tuple[dict[str, Tensor], str]:
    """Return tensors written by `write_tensors`, mapped from the file and never to be written, and the text.

    Raises:
        PathError: If the file is missing, is no regular file, is not `size` bytes long, or is no safetensors file.
    """
    _require_size(file, size)
    try:
        with safe_open(file, framework="pt", device="cpu") as handle:
            tensors: dict[str, Tensor] = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
            return tensors, (handle.metadata() or {})[ABOUT]
    except (SafetensorError, KeyError, ValueError, OverflowError) as error:
        raise PathError(
            f"{file} that does not read ({type(error).__name__}: {error})",
            expected="a safetensors file of a path",
            cure=COPY_AGAIN,
        ) from error


def _require_size(file: Path, size: int | None) -> None:
    """Raise PathError unless a file is a regular one of this size; None: of any."""
    try:
        found = file.stat().st_size if file.is_file() else None
    except OSError:  # a link to itself
        found = None
    if found is None or size not in (None, found):
        raise PathError(
            f"{file} {'missing, or no regular file' if found is None else f'of {found} bytes'}",
            expected="a file" if size is None else f"{size} bytes",
            cure=COPY_AGAIN,
        )


def stamp(file: Path) -> tuple[int, int, int] | None:
    """Return what tells whether a file was written since: inode, size and time of its last change; None if missing."""
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


def write_json(file: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON object, keys sorted, so that equal content gives equal bytes."""
    write_text(file, json.dumps(content, indent=2, sort_keys=True, allow_nan=False) + "\n")


def read_json(file: Path) -> dict[str, Any]:
    """Return a JSON object.

    Raises:
        PathError: If the file is missing or holds no JSON object.
    """
    try:
        if not file.is_file():  # a pipe would be waited for
            raise FileNotFoundError(file)
        if file.stat().st_size > LARGEST_JSON:
            raise ValueError(f"{file.stat().st_size} bytes")
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise PathError(
            f"no readable {file} ({type(error).__name__})",
            expected="the manifest of a degradation path",
            cure="pass the folder of a recorded path",
        ) from error
    if not isinstance(content, dict):
        raise PathError(f"a JSON {type(content).__name__} in {file}", expected="a JSON object", cure=COPY_AGAIN)
    return content


def write_text(file: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    _replace(file, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def copy(source: Path, file: Path) -> None:
    """Copy a file, whole or not at all."""
    if source.resolve() != file.resolve():
        _replace(file, lambda temporary: shutil.copyfile(source, temporary))


def digest(file: Path, *, size: int | None = None) -> str:
    """Return the SHA-256 of a file: 64 hexadecimal digits.

    Raises:
        PathError: If it is missing, is no regular file, or is not `size` bytes long.
    """
    _require_size(file, size)
    value = sha256()
    try:
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 22):
                value.update(chunk)
    except OSError as error:
        raise PathError(
            f"no readable {file} ({type(error).__name__})", expected="a file of the path", cure=COPY_AGAIN
        ) from error
    return value.hexdigest()


def visible(folder: Path) -> list[str]:
    """Return the names in a folder, without what a crash left of a file that was being written."""
    return [entry.name for entry in folder.iterdir() if not is_leftover(entry.name)]


def is_leftover(name: str) -> bool:
    """Return whether a name is that of a file being written: ours, or that of safetensors, which renames too.

    Example:
        >>> is_leftover(".config.json.tmp"), is_leftover(".tmpfUgSsb"), is_leftover("config.json")
        (True, True, False)
    """
    return re.fullmatch(r"\..+\.tmp|\.tmp\w{6}", name) is not None


def on_rank_zero(action: Callable[[], T]) -> T:
    """Run `action` on rank 0 only, and return its result on every rank; all raise if it failed there.

    The result travels with the go-ahead, for what a rank reads from disk may be older or newer than what rank 0 saw.
    Inside an action, which only rank 0 runs, further actions run at once.
    """
    if _ALONE.get() or not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return action()
    error: Exception | None = None
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        token = _ALONE.set(True)
        try:
            outcome[0] = action()
        except Exception as caught:
            error = caught
            outcome[1] = f"{type(error).__name__}: {error}"
        finally:
            _ALONE.reset(token)
    dist.broadcast_object_list(outcome, src=0)
    if error is not None:
        raise error
    if outcome[1] is not None:
        raise PathError(
            f"rank 0 failed ({outcome[1]})", expected="the path to be ready", cure="see the error of rank 0"
        )
    result: T = outcome[0]
    return result


def on_every_rank(action: Callable[[], None]) -> None:
    """Run `action` on every rank; all raise if it failed on one.

    Raises:
        PathError: On the ranks where it did not fail; it names one where it did.
    """
    if _ALONE.get() or not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        action()
        return
    error: Exception | None = None
    try:
        action()
    except Exception as caught:
        error = caught
    failures: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(failures, None if error is None else f"{type(error).__name__}: {error}")
    if error is not None:
        raise error
    failed = [rank for rank, failure in enumerate(failures) if failure is not None]
    if failed:
        raise PathError(
            f"rank {failed[0]} failed ({failures[failed[0]]})",
            expected="every rank to find the path and the same teacher",
            cure=f"see the error of rank {failed[0]}; the folder has to be one that all ranks share",
        )


def _replace(file: Path, write: Callable[[Path], object]) -> None:
    temporary = file.with_name(f".{file.name}.tmp")
    try:
        # Whatever stands there, a link perhaps, is not written into.
        temporary.unlink(missing_ok=True)
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        # safetensors makes its files private; those of a path are as readable as any other file of the user's.
        mode = temporary.stat().st_mode
        try:
            write(temporary)
        except SafetensorError as error:  # as of a full disk
            raise OSError(str(error)) from error
        temporary.chmod(mode)
        with temporary.open("rb+") as stream:
            os.fsync(stream.fileno())
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)
    # The rename itself must survive a power cut. Folders cannot be opened on Windows.
    if os.name == "posix":
        folder = os.open(file.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def without_aliases(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Split a state into tensors on the CPU that share no memory and {alias: name} of those that are the same tensor.

    Example:
        >>> from torch import zeros
        >>> w = zeros(2)
        >>> without_aliases({"left": w, "right": w})[1]
        {'right': 'left'}
    """
    unique: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[tuple[object, ...], str] = {}
    storages: set[int] = set()
    for name, tensor in state.items():
        same = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride()) if tensor.numel() else (name,)
        if same in first:
            aliases[name] = first[same]
            continue
        first[same] = name
        flat = tensor.detach().cpu().contiguous()
        # Views of one storage, as a slice that is a buffer of its own, are stored apart.
        unique[name] = flat.clone() if flat.untyped_storage().data_ptr() in storages else flat
        storages.add(unique[name].untyped_storage().data_ptr())
    return unique, aliases
