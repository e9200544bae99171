"""Atomic files: safetensors and JSON are written under a temporary name, flushed to disk and renamed."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from disback_plugin.errors import COPY_AGAIN, PathError

__all__ = [
    "copy", "damaged", "digest", "from_json", "holds", "is_leftover", "is_path_file", "map_tensors", "node_file",
    "read_json", "spool", "stamp", "to_json", "training_file", "unwritable", "visible", "write_json",
    "write_tensors", "write_text"
]  # fmt: skip

T = TypeVar("T")
_HINTS: dict[type[Any], dict[str, Any]] = {}
LARGEST_JSON = 1 << 26
# The key of our text in a safetensors file's metadata.
METADATA = "disback"
# Smaller tensors, in bytes, stay in memory.
SMALL = 1 << 16


def damaged(found: str, expected: str) -> PathError:
    """Return the error for a file that is not as it was recorded."""
    return PathError(found, expected=expected, cure=COPY_AGAIN)


def node_file(index: int) -> str:
    """Return the file name of node `index` >= 1.

    Example:
        >>> node_file(7)
        'node-007.safetensors'
    """
    return f"node-{index:03d}.safetensors"


def training_file(index: int) -> str:
    """Return the name of the file that an unfinished recording resumes from after node `index`.

    Example:
        >>> training_file(7)
        'training-007.safetensors'
    """
    return f"training-{index:03d}.safetensors"


def is_path_file(name: str) -> bool:
    """Return whether a recording writes files of this name.

    Example:
        >>> is_path_file("node-007.safetensors"), is_path_file("model.safetensors")
        (True, False)
    """
    return re.fullmatch(r"teacher\.safetensors|(node|training)-\d{3,}\.safetensors", name) is not None


def unwritable(folder: Path, error: Exception) -> PathError:
    """Return the error for a folder that could not be written, as on a full disk."""
    return PathError(
        f"a folder that cannot be written, {folder} ({error})",
        expected="free space and permission to write",
        cure="make room, or pass another path=",
    )


def write_tensors(file: Path, tensors: Mapping[str, Tensor], *, metadata: str) -> dict[str, Any]:
    """Write tensors that share no memory as safetensors, and a text beside them.

    Returns:
        Name, SHA-256 and size of the file, as a manifest lists them.
    """
    # One key only: safetensors writes several in random order, and equal nodes must be equal files.
    _replace(file, lambda temporary: save_file(dict(tensors), temporary, metadata={METADATA: metadata}))
    return {"file": file.name, "sha256": digest(file), "bytes": file.stat().st_size}


def map_tensors(file: Path, *, size: int) -> tuple[dict[str, Tensor], str]:
    """Return the tensors that `write_tensors` wrote, mapped from the file and never to be changed, and the text.

    Raises:
        PathError: If the file is missing, is no regular file, is not `size` bytes long, or is no safetensors file.
    """
    _require_size(file, size)
    try:
        with safe_open(file, framework="pt", device="cpu") as handle:
            tensors: dict[str, Tensor] = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
            return tensors, (handle.metadata() or {})[METADATA]
    except (SafetensorError, KeyError, ValueError, OverflowError) as error:
        what = f"{file} that cannot be read ({type(error).__name__}: {error})"
        raise damaged(what, "a safetensors file of a path") from error


def spool(tensor: Tensor, folder: Path) -> Tensor:
    """Copy a tensor into a mapped file that has no name any more, so that the copy takes no memory.

    Args:
        tensor: On the CPU and contiguous.
        folder: On the disk that has room for it.

    Example:
        >>> spool(torch.arange(3), Path(tempfile.gettempdir()))
        tensor([0, 1, 2])
    """
    if tensor.nbytes < SMALL:
        return tensor
    with tempfile.NamedTemporaryFile(prefix=".", suffix=".tmp", dir=folder) as file:
        mapped = torch.from_file(file.name, shared=True, size=tensor.numel(), dtype=tensor.dtype)
    return mapped.view(tensor.shape).copy_(tensor)


def _require_size(file: Path, size: int | None) -> None:
    """Raise PathError unless a file is a regular one of this size; None: of any."""
    try:
        found = file.stat().st_size if file.is_file() else None
    except OSError:  # a link to itself
        found = None
    if found is None or size not in (None, found):
        what = "missing, or no regular file" if found is None else f"of {found} bytes"
        raise damaged(f"{file} {what}", "a file" if size is None else f"{size} bytes")


def stamp(file: Path) -> tuple[int, int, int] | None:
    """Return inode, size and time of the last change of a file, to notice when it is written; None if it is missing."""
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
        if not file.is_file():  # to read a pipe would wait for its writer
            raise FileNotFoundError(file)
        if file.stat().st_size > LARGEST_JSON:
            raise ValueError(f"{file.stat().st_size} bytes")
        content = json.loads(file.read_text(encoding="utf-8"), parse_float=_finite, parse_constant=_finite)
    except (OSError, ValueError, RecursionError) as error:
        raise PathError(
            f"no readable {file} ({type(error).__name__})",
            expected="the manifest of a degradation path",
            cure="pass the folder of a recorded path",
        ) from error
    if not isinstance(content, dict):
        raise damaged(f"a JSON {type(content).__name__} in {file}", "a JSON object")
    return content


def _finite(text: str) -> float:
    """Return a number that JSON can hold again; raise ValueError for NaN, infinities and numbers that overflow."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:20]}")
    return value


def from_json(kind: type[T], content: Mapping[str, Any]) -> T:
    """Return a dataclass made from JSON; raise TypeError unless each value has the type that its field declares.

    Keys that the dataclass does not know are kept in its field `extra`, or refused where it has none.
    """
    hints = _type_hints(kind)
    known = {name: _checked(value, hints[name]) for name, value in content.items() if name in hints and name != "extra"}
    unknown = {name: value for name, value in content.items() if name not in known}
    return kind(**known, **({"extra": unknown} if "extra" in hints else unknown))


def _type_hints(kind: type[Any]) -> dict[str, Any]:
    if kind not in _HINTS:
        _HINTS[kind] = get_type_hints(kind)
    return _HINTS[kind]


def _checked(value: Any, kind: Any) -> Any:
    """Return a value as the type that a field declares; raise TypeError if it has another one."""
    if isinstance(kind, type) and is_dataclass(kind):
        return from_json(kind, value)
    if get_origin(kind) is tuple:
        return tuple(_checked(entry, get_args(kind)[0]) for entry in _checked(value, list))
    if kind is float and type(value) is int:
        value = float(value)
    odd = (isinstance(value, bool) and kind is not bool) or (isinstance(value, float) and not math.isfinite(value))
    if odd or not isinstance(value, kind):
        raise TypeError(f"{value!r:.80} where {getattr(kind, '__name__', kind)} was expected")
    return value


def to_json(value: Any) -> Any:
    """Return a dataclass as a JSON value, its `extra` keys among the others."""
    if isinstance(value, tuple):
        return [to_json(entry) for entry in value]
    if not is_dataclass(value):
        return value
    known = {f.name: to_json(getattr(value, f.name)) for f in fields(value) if f.name != "extra"}
    return getattr(value, "extra", {}) | known


def write_text(file: Path, text: str) -> None:
    """Write a text file atomically."""
    _replace(file, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def copy(source: Path, file: Path) -> None:
    """Copy a file atomically, unless it is copied onto itself."""
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
        raise damaged(f"no readable {file} ({type(error).__name__})", "a file of the path") from error
    return value.hexdigest()


def holds(folder: Path, name: str) -> bool:
    """Return whether a folder holds a file of this name.

    Raises:
        PathError: If it holds other files only, or is no folder.
    """
    if (folder / name).is_file():
        return True
    held = [str(folder)] if folder.is_file() else visible(folder) if folder.is_dir() else []
    if held:
        raise PathError(
            f"{folder} without a {name} but with {sorted(held)[:3]}",
            expected="a degradation path, an empty folder or none",
            cure="pass another path=; nothing there was touched",
        )
    return False


def visible(folder: Path) -> list[str]:
    """Return the names in a folder, without the temporary files that a crash left."""
    return [entry.name for entry in folder.iterdir() if not is_leftover(entry.name)]


def is_leftover(name: str) -> bool:
    """Return whether a name is that of a temporary file, of this module or of safetensors.

    Example:
        >>> is_leftover(".config.json.tmp"), is_leftover(".tmpfUgSsb"), is_leftover("config.json")
        (True, True, False)
    """
    return re.fullmatch(r"\..+\.tmp|\.tmp\w{6}", name) is not None


def _replace(file: Path, write: Callable[[Path], object]) -> None:
    temporary = file.with_name(f".{file.name}.tmp")
    try:
        # An older file of that name goes first: nothing is written through a link.
        temporary.unlink(missing_ok=True)
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        # safetensors makes its files private; a path is as readable as any other file of the user.
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
