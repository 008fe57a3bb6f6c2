"""Carrying files over from an old directory to the new one that takes its place, without copying them."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
from collections.abc import Collection, Iterator
from pathlib import Path

from ..errors import LorsError

__all__ = ["Seen", "carry", "dress", "unseen"]

_NO_LINKS = {errno.EPERM, errno.EMLINK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP}

LINKED = (0,)
Seen = dict[str, tuple[int, ...]]  # relative path -> () for a directory, LINKED, or the state of a file that was copied


def carry(source: Path, target: Path, leave: Collection[str]) -> Seen:
    """Puts everything in `source`, but its files named in `leave`, at the same places in `target`.

    A file gets a second name there: it stays one file, with all its other names, its owner, times and attributes. So do
    symbolic links and pipes. Directories are made, with mode, owner and times of the old ones. Where the file system has no
    hard links, files are copied. LorsError for what can be neither, such as another file system that is mounted there.
    """
    try:
        return _carry(source, target, leave)
    except OSError as error:
        raise LorsError(f"{error.filename or source}: cannot be carried over: {error.strerror or error}") from error


def _carry(source: Path, target: Path, leave: Collection[str]) -> Seen:
    device, seen = source.stat().st_dev, Seen()
    for name, status in _tree(source, leave):
        if status.st_dev != device:
            raise LorsError(f"{source / name}: is on another file system than {source}, and cannot be carried over")
        if stat.S_ISDIR(status.st_mode):
            (target / name).mkdir()
            seen[name] = ()
        else:
            seen[name] = _link(source / name, target / name, status)
    for name in reversed([name for name, told in seen.items() if not told]):
        dress(target / name, source / name)  # last: a directory may be read-only, and its times are of its entries
    return seen


def unseen(old: Path, new: Path, seen: Seen, leave: Collection[str]) -> str | None:
    """The first entry of `old` that is not in `new` as `carry` has seen it; whole directories named in `leave` are."""
    for name, status in _tree(old, leave):
        if name.partition("/")[0] in leave:
            continue
        told = seen.get(name)
        if told is None or stat.S_ISDIR(status.st_mode) != (told == ()):
            return name
        if told == LINKED:
            if not os.path.lexists(new / name) or not os.path.samestat((new / name).lstat(), status):
                return name
        elif told and told != _state(status):
            return name
    return None


def dress(directory: Path, like: Path) -> None:
    """Gives a directory the owner, mode, times and attributes of another one."""
    status = like.stat()
    with contextlib.suppress(PermissionError):  # only root gives files away
        os.chown(directory, status.st_uid, status.st_gid)
    shutil.copystat(like, directory)


def _tree(source: Path, leave: Collection[str]) -> Iterator[tuple[str, os.stat_result]]:
    """Relative paths, each directory before what is in it."""
    waiting = [""]
    while waiting:
        at = waiting.pop()
        with os.scandir(source / at) as found:
            for entry in found:
                inner = entry.is_dir(follow_symlinks=False)
                if not at and not inner and entry.name in leave:
                    continue
                name = f"{at}{entry.name}"
                yield name, entry.stat(follow_symlinks=False)
                if inner:
                    waiting.append(f"{name}/")


def _link(source: Path, target: Path, status: os.stat_result) -> tuple[int, ...]:
    try:
        os.link(source, target, follow_symlinks=False)
        return LINKED
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        if status.st_nlink > 1:
            raise LorsError(
                f"{source}: has {status.st_nlink} names (hard links), and cannot keep them here: {error.strerror}"
            ) from error
    if not stat.S_ISREG(status.st_mode) and not stat.S_ISLNK(status.st_mode):
        raise LorsError(f"{source}: is neither a file nor a link, and cannot be carried over on this file system")
    shutil.copy2(source, target, follow_symlinks=False)
    return _state(status)


def _state(status: os.stat_result) -> tuple[int, ...]:
    return status.st_ino, status.st_size, status.st_mtime_ns
