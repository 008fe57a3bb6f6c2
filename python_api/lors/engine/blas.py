"""numpy's BLAS brings a thread per core to every call, and the engine a worker per core: together cores times cores.

They spin for each other: small SVDs on two workers of a busy machine took 40 s instead of 0.8 s. So while workers run,
each has one BLAS thread, its own; the bits of a result do not depend on a number of BLAS threads then either.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from threadpoolctl import threadpool_limits

__all__ = ["one_thread_each"]

_lock = threading.Lock()
_blocks = 0  # how many are entered, by all threads: the limit is the process's, the first sets it and the last lifts it
_limits: threadpool_limits | None = None


@contextlib.contextmanager
def one_thread_each() -> Iterator[None]:
    """Within the block, BLAS works in the thread that calls it."""
    global _blocks, _limits
    with _lock:
        if not _blocks:
            _limits = threadpool_limits(1, user_api="blas")
        _blocks += 1
    try:
        yield
    finally:
        with _lock:
            _blocks -= 1
            if not _blocks and _limits is not None:
                _limits.restore_original_limits()
