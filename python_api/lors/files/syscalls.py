"""The three system calls Python has no name for. Each says whether it could be done; doing without is only slower."""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import sys
from pathlib import Path
from typing import Any

__all__ = ["exchange", "preallocate", "start_writeback"]

_UNSUPPORTED = {errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}
_AT_FDCWD, _RENAME_EXCHANGE, _RENAME_SWAP, _SYNC_FILE_RANGE_WRITE = -100, 2, 2, 2


@functools.cache
def _function(name: str, *argtypes: Any) -> Any:
    """A function of the C library, None where it has none of that name (or off_t is not 64 bits)."""
    if ctypes.sizeof(ctypes.c_void_p) < 8:
        return None
    function = getattr(ctypes.CDLL(None, use_errno=True), name, None)
    if function is not None:
        function.argtypes, function.restype = argtypes, ctypes.c_int
    return function


def _call(function: Any, *arguments: Any) -> bool:
    """True when the call succeeded, False when this system or file system has no such thing; OSError otherwise."""
    if function is None:
        return False
    while function(*arguments) != 0:
        code = ctypes.get_errno()
        if code in _UNSUPPORTED:
            return False
        if code != errno.EINTR:
            raise OSError(code, os.strerror(code))
    return True


def exchange(first: Path, second: Path) -> bool:
    """Swaps the names of two existing files or directories in one atomic step."""
    paths = os.fsencode(first), os.fsencode(second)
    if sys.platform == "darwin":
        swap = _function("renamex_np", ctypes.c_char_p, ctypes.c_char_p, ctypes.c_uint)
        return _call(swap, *paths, _RENAME_SWAP)
    text, number = ctypes.c_char_p, ctypes.c_int
    renameat2 = _function("renameat2", number, text, number, text, ctypes.c_uint)
    return _call(renameat2, _AT_FDCWD, paths[0], _AT_FDCWD, paths[1], _RENAME_EXCHANGE)


def preallocate(fd: int, size: int) -> None:
    """Makes the file `size` bytes long and, where the file system can, owns the space: a full disk shows here.

    posix_fallocate would write every block itself on file systems that cannot; this leaves them alone.
    """
    fallocate = _function("fallocate", ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
    if size == 0 or not _call(fallocate, fd, 0, 0, size):
        os.ftruncate(fd, size)


def start_writeback(fd: int, offset: int, size: int) -> bool:
    """Starts writing a range of the page cache to the disk without waiting for it."""
    function = _function("sync_file_range", ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    return _call(function, fd, offset, size, _SYNC_FILE_RANGE_WRITE)
