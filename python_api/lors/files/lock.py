"""Locks of files: one run at a time, the living told from the dead."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import time
from pathlib import Path
from typing import IO

from ..errors import LorsError

__all__ = ["Lock", "flock"]

_NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK}


def flock(file: int | IO[str], operation: int, path: Path) -> None:
    """fcntl.flock, which raises BlockingIOError when another has it; LorsError where `path` cannot be locked."""
    try:
        fcntl.flock(file, operation)
    except BlockingIOError:
        raise
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise LorsError(f"{path}: cannot be locked: {error.strerror}") from error
        raise LorsError(
            f"{path}: the file system there has no file locks (flock: {error.strerror}), which keep two runs apart; "
            "use a directory on another one"
        ) from error


class Lock:
    """A lock file that this process holds, gone after `release`.

    flock dies with its process, so a killed run holds nothing. Where the file system has none, a second file stands for the
    lock, made by whoever comes first; a killed run leaves it behind, and the user has to remove it (`taken`).
    """

    def __init__(self, path: Path, fd: int | None) -> None:
        self._path, self._fd = path, fd

    @staticmethod
    def taken(path: Path) -> Path:
        """The file that stands for the lock where there is no flock."""
        return path.with_suffix(".taken")

    @classmethod
    def acquire(cls, path: Path, patience: float = 0.0) -> Lock | None:
        """The lock; None when another process holds it for `patience` seconds."""
        deadline = time.monotonic() + patience
        while (lock := cls._attempt(path)) is None and time.monotonic() < deadline:
            time.sleep(0.02)
        return lock

    @classmethod
    def _attempt(cls, path: Path) -> Lock | None:
        while True:
            fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # The holder before may have removed the file between our open and our lock: then it locks nothing.
                if os.path.samestat(os.fstat(fd), os.stat(path)):
                    return cls(path, fd)
            except BlockingIOError:
                os.close(fd)
                return None
            except FileNotFoundError:
                pass
            except BaseException as error:
                os.close(fd)
                if isinstance(error, OSError) and error.errno in _NO_LOCKS:
                    return cls._without_flock(path)
                raise
            os.close(fd)

    @classmethod
    def _without_flock(cls, path: Path) -> Lock | None:
        try:
            os.close(os.open(cls.taken(path), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        except FileExistsError:
            return None
        return cls(path, None)

    def release(self) -> None:
        """Removes the lock file and lets go."""
        fd, self._fd = self._fd, None
        try:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._path)  # while it is still locked: nobody can hold the file that goes
        finally:
            if fd is not None:
                os.close(fd)
            else:
                self.taken(self._path).unlink(missing_ok=True)
