"""Atomic files: safetensors and JSON are written under a temporary name, flushed to disk and renamed.

What a mounted folder does not know (modes, flushing a folder, renaming over a file, mapping, locks) is done without and
said once: without a rename a file is copied, and the complete temporary file is read where the copy was torn.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save_file
from torch import Tensor

from disback_plugin.errors import PathError

logger = logging.getLogger(__name__)

LARGEST_JSON = 1 << 26
# The key of our text in a safetensors file's metadata.
METADATA = "disback"
# The errors of a file system that does not know an operation.
UNKNOWN = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EPERM, errno.EACCES, errno.EEXIST}
UNKNOWN |= {errno.EXDEV, errno.ENOLCK, errno.EBADF}


def damaged(found: str, expected: str) -> PathError:
    """Return the error for a file that is not as it was recorded."""
    return PathError(found, expected=expected, cure="copy the path again, or record it again in an empty folder")


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


def is_leftover(file: Path) -> bool:
    """Return whether a crash left a temporary file of this module, or one that safetensors began or wrote for it.

    Example:
        >>> is_leftover(Path(".config.json.tmp")), is_leftover(Path(".thesis.tex.tmp"))
        (True, False)
    """
    if re.fullmatch(r"\.tmp\w{6}", file.name) and file.is_file():
        with file.open("rb") as stream:
            begin = stream.read(64)
        return not begin or f'{{"__metadata__":{{"{METADATA}"'.encode() in begin
    own = file.name.removeprefix(".").removesuffix(".tmp")
    return file.name == f".{own}.tmp" and (own in ("config.json", "README.md") or is_path_file(own))


def visible(folder: Path) -> list[str]:
    """Return the sorted names in a folder that are not hidden, as are temporary files that a crash left."""
    return sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))


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
        try:
            with safe_open(file, framework="pt", device="cpu") as handle:
                tensors: dict[str, Tensor] = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
                return tensors, (handle.metadata() or {})[METADATA]
        except (OSError, RuntimeError, SafetensorError):  # it may only be the map, or a name that is not in UTF-8
            content = file.read_bytes()
            header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
            mapped = load(content), header["__metadata__"][METADATA]
            say_once(file.parent, "map files: they are read into memory")
            return mapped
    except (SafetensorError, KeyError, TypeError, ValueError, OverflowError, OSError) as error:
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
    """Return a JSON object; that of a complete temporary file, where a crash tore a file that could not be renamed.

    Raises:
        PathError: If the file is missing or holds no JSON object.
    """
    try:
        return _read_json(file)
    except PathError:
        with suppress(PathError):
            return _read_json(_temporary(file))
        raise


def _read_json(file: Path) -> dict[str, Any]:
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


def write_text(file: Path, text: str) -> None:
    """Write a text file atomically."""
    _replace(file, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def copy(source: Path, file: Path) -> None:
    """Copy a file atomically."""
    _replace(file, lambda temporary: shutil.copyfile(source, temporary))


def _replace(file: Path, write: Callable[[Path], object]) -> None:
    temporary = _temporary(file)
    try:
        # An older file of that name goes first: nothing is written through a link.
        temporary.unlink(missing_ok=True)
        temporary.touch(exist_ok=False)
        # safetensors makes its files private; a path is as readable as any other file of the user.
        mode = temporary.stat().st_mode
        write(temporary)
        with _if_known(file.parent, "change the mode of files"):
            temporary.chmod(mode)
        _flush(temporary)
        try:
            temporary.replace(file)
        except OSError as error:
            if error.errno not in UNKNOWN or not temporary.exists():
                raise
            shutil.copyfile(temporary, file)
            _flush(file)
            say_once(file.parent, "rename files: they are copied")
    finally:
        temporary.unlink(missing_ok=True)
    # The rename itself must survive a power cut. Folders cannot be opened on Windows.
    if os.name == "posix":
        _flush(file.parent)


def _temporary(file: Path) -> Path:
    return file.with_name(f".{file.name[:50]}.tmp")  # a long name could not become longer


def _flush(file: Path) -> None:
    """Flush a file or a folder to the disk."""
    is_folder = file.is_dir()
    with _if_known(file if is_folder else file.parent, f"flush {'folders' if is_folder else 'files'} to the disk"):
        descriptor = os.open(file, os.O_RDONLY if is_folder else os.O_RDWR)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def _if_known(folder: Path, what: str) -> Iterator[None]:
    """Go on without an operation that the file system does not know."""
    try:
        yield
    except OSError as error:
        if error.errno not in UNKNOWN:
            raise
        say_once(folder, what)


@cache
def say_once(folder: Path, what: str) -> None:
    """Warn, once, that a folder cannot do something."""
    logger.warning("%s is in a file system that cannot %s", folder, what)
