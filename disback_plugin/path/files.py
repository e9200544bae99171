"""Atomic files: safetensors and JSON are written under a temporary name, flushed to disk and renamed."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from disback_plugin.errors import COPY_AGAIN, PathError

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


def is_leftover(name: str) -> bool:
    """Return whether a name is that of a temporary file, of this module or of safetensors.

    Example:
        >>> is_leftover(".config.json.tmp"), is_leftover(".tmpfUgSsb"), is_leftover("config.json")
        (True, True, False)
    """
    return re.fullmatch(r"\..+\.tmp|\.tmp\w{6}", name) is not None


def visible(folder: Path) -> list[str]:
    """Return the sorted names in a folder, without the temporary files that a crash left."""
    return sorted(entry.name for entry in folder.iterdir() if not is_leftover(entry.name))


def stamp(file: Path) -> tuple[int, int, int] | None:
    """Return inode, size and time of the last change, to notice that a file is written; None if there is no file."""
    try:
        status = file.stat()
    except OSError:  # a link to itself, for one
        return None
    return (status.st_ino, status.st_size, status.st_mtime_ns) if stat.S_ISREG(status.st_mode) else None


def require_size(file: Path, size: int) -> None:
    """Raise PathError unless there is a regular file of this size: to open a pipe would wait for its writer."""
    found = stamp(file)
    if found is None or found[1] != size:
        what = "missing, or no regular file" if found is None else f"of {found[1]} bytes"
        raise damaged(f"{file} {what}", f"{size} bytes")


# -- read -------------------------------------------------------------------------------------------------------------


def map_tensors(file: Path, *, size: int) -> tuple[dict[str, Tensor], str]:
    """Return the tensors that `write_tensors` wrote, mapped from the file and never to be changed, and the text.

    Raises:
        PathError: If the file is missing, is no regular file, is not `size` bytes long, or is no safetensors file.
    """
    require_size(file, size)
    try:
        with safe_open(file, framework="pt", device="cpu") as handle:
            tensors: dict[str, Tensor] = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
            return tensors, (handle.metadata() or {})[METADATA]
    except (SafetensorError, KeyError, ValueError, OverflowError) as error:
        what = f"{file} that cannot be read ({type(error).__name__}: {error})"
        raise damaged(what, "a safetensors file of a path") from error


def digest(file: Path) -> str:
    """Return the SHA-256 of a file: 64 hexadecimal digits."""
    value = sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(1 << 22):
            value.update(chunk)
    return value.hexdigest()


def read_json(file: Path) -> dict[str, Any]:
    """Return a JSON object.

    Raises:
        PathError: If the file is missing or holds no JSON object.
    """
    try:
        found = stamp(file)
        if found is None or found[1] > LARGEST_JSON:
            raise ValueError("missing, or no regular file" if found is None else f"{found[1]} bytes")
        content = json.loads(file.read_text(encoding="utf-8"))
        json.dumps(content, allow_nan=False)  # raises for a number that JSON cannot hold again
        if not isinstance(content, dict):
            raise ValueError(f"a JSON {type(content).__name__}")
    except (OSError, ValueError, RecursionError) as error:
        raise PathError(
            f"no readable {file} ({error})",
            expected="the manifest of a degradation path",
            cure="pass the folder of a recorded path",
        ) from error
    return content


# -- write ------------------------------------------------------------------------------------------------------------


@contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn an error of the file system, as of a full disk, into a PathError that names the folder."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise PathError(
            f"a folder that cannot be written, {folder} ({error})",
            expected="free space and permission to write",
            cure="make room, or pass another path=",
        ) from error


def write_tensors(file: Path, tensors: Mapping[str, Tensor], *, metadata: str) -> dict[str, Any]:
    """Write tensors that share no memory as safetensors, and a text beside them.

    Returns:
        Name, SHA-256 and size of the file, as a manifest lists them.
    """
    # One key only: safetensors writes several in random order, and equal nodes must be equal files.
    _replace(file, lambda temporary: save_file(dict(tensors), temporary, metadata={METADATA: metadata}))
    return {"file": file.name, "sha256": digest(file), "bytes": file.stat().st_size}


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


def write_text(file: Path, text: str) -> None:
    """Write a text file atomically."""
    _replace(file, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def copy(source: Path, file: Path) -> None:
    """Copy a file atomically."""
    _replace(file, lambda temporary: shutil.copyfile(source, temporary))


def _replace(file: Path, write: Callable[[Path], object]) -> None:
    temporary = file.with_name(f".{file.name}.tmp")
    try:
        # An older file of that name goes first: nothing is written through a link.
        temporary.unlink(missing_ok=True)
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
        # safetensors makes its files private; a path is as readable as any other file of the user.
        mode = temporary.stat().st_mode
        write(temporary)
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
