"""The advisory lock of a folder: one run records at a time, and a crash leaves no lock behind."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from weakref import WeakKeyDictionary, finalize

from disback_plugin.errors import PathError
from disback_plugin.path.files import say_once, writing

# The file that is locked. It is removed at the end; one that a crash left is used again.
NAME = ".lock"

# The locks that this process holds, with their descriptors.
_HELD: WeakKeyDictionary[FolderLock, int] = WeakKeyDictionary()


class FolderLock:
    """A lock until `release`, or the end of this object or the process. A system without locks is warned of once.

    Args:
        folder: The folder, which need not exist yet.

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
        self._folder, self._file = folder, folder / NAME
        self._release: finalize[..., FolderLock] | None = None

    def acquire(self, *, resumes: bool = False) -> None:
        """Take the lock, unless it is held already; raise PathError if another run holds it.

        Args:
            resumes: Whether the run continues from a state: then a run of this process that was left gives the lock up.
        """
        try:
            import fcntl
        except ImportError:  # on Windows
            return
        for other in [lock for lock in _HELD if resumes and lock is not self and lock._file == self._file]:
            other.release()
        while self._release is None or not self._release.alive:
            with writing(self._folder):
                held = os.open(self._file, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.fstat(held).st_ino == self._file.stat().st_ino:  # else the run before has just removed it
                    self._release = finalize(self, _release, self._file, held)
                    _HELD[self] = held
                    return
            except FileNotFoundError:
                pass
            except BlockingIOError as error:
                raise PathError(
                    f"another run that records into {self._folder}",
                    expected="one at a time",
                    cure="pass another path=, wait for its end, or call detach() of its handle",
                ) from error
            except OSError:
                self._file.unlink(missing_ok=True)
                say_once(self._folder, "lock files: let no two runs record into one folder")
                return
            finally:
                if self._release is None or not self._release.alive:
                    os.close(held)

    def release(self) -> None:
        """Give the lock back, if it is held."""
        if self._release is not None:
            self._release()

    def __enter__(self) -> None:
        """Release the lock if an error leaves the block."""

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if kind is not None:
            self.release()


def _release(file: Path, held: int) -> None:
    with suppress(OSError):
        file.unlink()
    os.close(held)


def _close_all() -> None:
    for lock, held in list(_HELD.items()):
        if lock._release is not None and lock._release.detach() is not None:
            os.close(held)


if hasattr(os, "register_at_fork"):  # a worker that outlives a killed run must not keep its lock
    os.register_at_fork(after_in_child=_close_all)
