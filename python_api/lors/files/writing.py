"""Errors of writing, in one line that says which limit was met."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import resource
import secrets
from collections.abc import Iterator
from pathlib import Path

from ..errors import LorsError

__all__ = ["PARTIAL", "replacing", "require_space", "sync", "writing"]

PARTIAL = re.compile(r"\.(?P<name>.+)\.\d+-[0-9a-f]{8}\.tmp")  # what a killed `replacing` leaves


@contextlib.contextmanager
def writing(path: Path, needed: int | None = None) -> Iterator[None]:
    """Turns an OSError of the block into a LorsError that says which limit was met. `needed` is in bytes."""
    try:
        yield
    except OSError as error:
        raise LorsError(_explain(error, path, needed)) from error


@contextlib.contextmanager
def replacing(path: Path, *, durable: bool = False) -> Iterator[Path]:
    """Yields the name of a file beside `path`, to be written in the block, that then takes its place in one step.

    Where the block fails, `path` is as it was and the file beside it gone; a run that is killed leaves the latter (PARTIAL).
    durable: survives a power failure.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        yield partial
        if durable:
            sync(partial)
        os.replace(partial, path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


def sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _explain(error: OSError, path: Path, needed: int | None) -> str:
    need = f"{_size(needed)} needed, " if needed is not None else ""
    if error.errno == errno.ENOSPC:
        found = _file_system(path)
        if found is not None and found.f_files and not found.f_favail:
            return f"cannot write {path}: the file system has no room for another file: all {found.f_files} inodes are used"
        free = "" if found is None else f"{_size(found.f_bavail * found.f_frsize)} free"
        return f"cannot write {path}: the disk is full{': ' if need or free else ''}{need}{free}".removesuffix(", ")
    if error.errno == errno.EDQUOT:
        return f"cannot write {path}: the disk quota is used up{need and f': {need[:-2]}'}"
    if error.errno == errno.EFBIG:
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
        allowed = (
            "more than the file system allows"
            if limit == resource.RLIM_INFINITY
            else f"{_size(limit)} allowed (ulimit -f)"
        )
        return f"cannot write {path}: the file is too large: {need}{allowed}"
    if error.errno == errno.EROFS:
        return f"cannot write {path}: the file system is read-only"
    return f"cannot write {path}: {error.strerror or error}"


def _file_system(path: Path) -> os.statvfs_result | None:
    """That of `path` or of its nearest existing parent; None where it cannot tell."""
    while not os.path.exists(path) and path != path.parent:
        path = path.parent
    try:
        found = os.statvfs(path)
    except OSError:
        return None
    return found if found.f_blocks else None


def _size(count: int) -> str:
    for unit, scale in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= scale:
            return f"{count / scale:.2f} {unit}"
    return f"{count} bytes"


def require_space(path: Path, needed: int) -> None:
    """LorsError unless `needed` bytes are free where `path` is, or will be; where nobody can tell, writing will."""
    found = _file_system(path)
    if found is not None and (free := found.f_bavail * found.f_frsize) < needed:
        raise LorsError(f"cannot write {path}: the disk is too full: {_size(needed)} needed, {_size(free)} free")
