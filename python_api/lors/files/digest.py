"""SHA-256 of weight files: streamed, several files at a time, and remembered from run to run.

A digest is remembered under the file's identity (real path, size, mtime, ctime, inode), in one small file per entry in
``$XDG_CACHE_HOME/lors/digests`` (``~/.cache`` without the variable). ``LORS_DIGEST_CACHE=0`` turns remembering off.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import secrets
import threading
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import BinaryIO

from ..errors import LorsError
from ..tasks import run_all

__all__ = ["sha256_file", "sha256_files"]

_CHUNK = 1 << 20  # stays in the cache between the read that fills it and the hash that takes it
_HEX = re.compile(r"[0-9a-f]{64}")

# File times tick (up to 10 ms on Linux, 2 s on some file systems): a file changed just now may change again under the
# same times. Such a file is hashed, but not remembered.
_SETTLED_NS = 2_000_000_000


class _Cancelled(Exception):
    """Another file's hash failed or the user interrupted: stop."""


def sha256_file(path: Path, cancel: threading.Event | None = None) -> str:
    """SHA-256 of a file's content, lower-case hexadecimal; LorsError when it cannot be read.

    What a file is called tells nothing: a blob in the hub's cache, which is named by its digest, may be damaged too.
    ``cancel`` ends the work early (with an exception) when it is set by another thread. The interpreter lock is free while
    reading and hashing.
    """
    real = Path(os.path.realpath(path))
    try:
        with real.open("rb", buffering=0) as stream:
            entry = _entry(real, os.fstat(stream.fileno()))
            if entry is not None and (known := _recall(entry)) is not None:
                return known
            begun = time.time_ns()
            digest = _digest(stream, cancel)
            after = os.fstat(stream.fileno())
    except OSError as error:
        raise LorsError(f"cannot read {path}: {error.strerror or error}") from error
    settled = begun - max(after.st_mtime_ns, after.st_ctime_ns) > _SETTLED_NS
    if entry is not None and settled and _entry(real, after) == entry:
        _remember(entry, digest)
    return digest


def sha256_files(paths: Sequence[Path], threads: int | None = None) -> dict[Path, str]:
    """SHA-256 of several files, `threads` at a time (default: one per core). The first error or Ctrl-C stops all."""
    cancel = threading.Event()
    workers = max(1, min(threads or os.cpu_count() or 1, len(paths)))
    files = list(dict.fromkeys(paths))
    digests = run_all([partial(sha256_file, path, cancel) for path in files], workers, "lors-sha256", cancel)
    return dict(zip(files, digests, strict=True))


def _digest(stream: BinaryIO, cancel: threading.Event | None) -> str:
    # hashlib.file_digest is Python 3.11 and cannot be stopped
    digest = hashlib.sha256()
    buffer = bytearray(_CHUNK)
    view = memoryview(buffer)
    while count := stream.readinto(buffer):  # type: ignore[attr-defined]
        if cancel is not None and cancel.is_set():
            raise _Cancelled
        digest.update(view[:count])
    return digest.hexdigest()


def _entry(real: Path, stat: os.stat_result) -> Path | None:
    """The cache file for this state of this file; None when the cache is off."""
    if os.environ.get("LORS_DIGEST_CACHE") == "0":
        return None
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    key = (str(real), stat.st_size, stat.st_mtime_ns, stat.st_ino, stat.st_ctime_ns)
    name = hashlib.sha256(repr(key).encode("utf-8", "surrogateescape")).hexdigest()
    return Path(home, "lors", "digests", name)


def _recall(entry: Path) -> str | None:
    """The remembered digest; None when there is none or the entry is damaged (then it is computed and written anew)."""
    try:
        text = entry.read_text("ascii").strip()
    except (OSError, ValueError):
        return None
    return text if _HEX.fullmatch(text) else None


def _remember(entry: Path, digest: str) -> None:
    # A cache that cannot be written (no home, read-only, full) only costs time: the digest itself is good.
    temporary = entry.with_name(f"{entry.name}.{secrets.token_hex(4)}.tmp")
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(f"{digest}\n", "ascii")
        os.replace(temporary, entry)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink()
