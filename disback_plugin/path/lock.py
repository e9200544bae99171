"""The advisory lock of a folder: one run records at a time, and a crash leaves no lock behind."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from weakref import WeakSet, finalize

from disback_plugin.errors import PathError
from disback_plugin.path.files import say_once, stamp, writing

# The locks that this process has held.
_HELD: WeakSet[FolderLock] = WeakSet()


class FolderLock:
    """A lock until `release`, or the end of this object or the process. A system without locks is warned of once.

    Args:
        folder: The folder.

    Example:
        >>> import tempfile
        >>> one, other = (FolderLock(folder) for folder in [Path(tempfile.mkdtemp())] * 2)
        >>> one.acquire()
        >>> other.acquire()
        Traceback (most recent call last):
        disback_plugin.errors.PathError: found another run that records into ...
        >>> one.release()
        >>> other.acquire()
    """

    def __init__(self, folder: Path) -> None:
        self._folder, self._file = folder, folder / ".lock"
        self._release: finalize[..., FolderLock] | None = None

    def acquire(self, *, resumes: bool = False) -> None:
        """Take the lock, unless it is held already; raise PathError if another run holds it.

        Args:
            resumes: Whether the run continues from a state: then a run of this process that was left gives the lock up.
        """
        for other in [lock for lock in _HELD if resumes and lock is not self and lock._file == self._file]:
            other.release()
        if self._release is not None and self._release.alive:
            return
        with writing(self._folder):
            held = os.open(self._file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            import fcntl

            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if (stamp(self._file) or (0,))[0] != os.fstat(held).st_ino:  # the run before has just removed it
                os.close(held)
                return self.acquire()
        except BlockingIOError as error:
            os.close(held)
            raise PathError(
                f"another run that records into {self._folder}",
                expected="one at a time",
                cure="pass another path=, wait for its end, or call detach() of its handle",
            ) from error
        except (ImportError, OSError):  # fcntl is not on Windows
            say_once(self._folder, "lock files: let no two runs record into one folder")
        self._release = finalize(self, _remove, self._file, held)
        _HELD.add(self)

    def release(self) -> None:
        """Give the lock back, if it is held."""
        if self._release is not None:
            self._release()

    def __enter__(self) -> None:
        """Release the lock if an error leaves the block."""

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if kind is not None:
            self.release()


def _remove(file: Path, held: int) -> None:
    with suppress(OSError):
        file.unlink()
    os.close(held)


def _close_all() -> None:
    for lock in list(_HELD):
        if lock._release is not None and (found := lock._release.detach()) is not None:
            os.close(found[2][1])


if hasattr(os, "register_at_fork"):  # a worker that outlives a killed run must not keep its lock
    os.register_at_fork(after_in_child=_close_all)
