"""How many threads a CPU operation uses."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from .scalars import check_whole

MOST = 2**15  # far above what a machine has: more is a mistake


def thread_count(threads: int | None = None) -> int:
    """The argument, else LORS_THREADS, else OMP_NUM_THREADS (of a list its first number), else the cores this process may use.

    An empty variable counts as not set. What torch or numpy are set to in the process does not matter.
    """
    if threads is not None:
        return check_whole(threads, "threads", 1, MOST)
    for name in ("LORS_THREADS", "OMP_NUM_THREADS"):
        if text := os.environ.get(name):
            first = text.split(",")[0] if name == "OMP_NUM_THREADS" else text
            if not first.strip().isdecimal() or not 1 <= int(first) <= MOST:
                raise ValueError(f"{name}: expected a whole number from 1 to {MOST}, got {text!r}")
            return int(first)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


_lock = threading.Lock()
_visitors = 0
_before = 1


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """Within the block torch works in the thread that calls it: the bits of a product or a decomposition depend on how many
    work on it. The setting is the thread's, and what a thread without one starts from the process's; so concurrent blocks
    share what the first found, and each gives it back to its own thread."""
    import torch

    global _visitors, _before
    with _lock:
        # In every thread: with its first question torch sets the thread up, to what was set last anywhere, which may be what
        # another thread is given back meanwhile.
        here = torch.get_num_threads()
        if not _visitors:
            _before = here
        _visitors += 1
        torch.set_num_threads(1)
    try:
        yield
    finally:
        with _lock:
            _visitors -= 1
            torch.set_num_threads(_before)
