"""How many threads a CPU operation uses."""

from __future__ import annotations

import os
import sys


def thread_count(threads: int | None = None) -> int:
    """The argument, else LORS_THREADS, else torch's setting if torch is loaded, else the cores this process may use."""
    if threads is None:
        text = os.environ.get("LORS_THREADS")
        if text is not None:
            try:
                threads = int(text)
            except ValueError:
                raise ValueError(f"LORS_THREADS: expected a whole number of at least 1, got {text!r}") from None
            if threads < 1:
                raise ValueError(f"LORS_THREADS: expected a whole number of at least 1, got {text!r}")
            return threads
        if "torch" in sys.modules:
            return int(sys.modules["torch"].get_num_threads())
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    if threads < 1:
        raise ValueError(f"threads: expected at least 1, got {threads}")
    return threads
