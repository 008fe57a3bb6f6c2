"""How many threads a CPU operation uses."""

from __future__ import annotations

import os

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
