"""What the hardware lets pass: `python -m benchmarks.floor read FILE...` and `... write FILE BYTES [sync]`

Reading is pread into one small buffer per thread, so that it measures the way from the page cache and no page faults
of fresh memory. Imports nothing heavy: the process is timed as a whole, like the merges beside it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

CHUNK = 4 << 20


def read(paths: list[str], threads: int) -> None:
    """Read all files, chunks dealt out to `threads` threads."""

    def share(thread: int) -> None:
        buffer = bytearray(CHUNK)
        for path in paths:
            descriptor = os.open(path, os.O_RDONLY)
            for offset in range(thread * CHUNK, os.fstat(descriptor).st_size, threads * CHUNK):
                os.preadv(descriptor, [buffer], offset)
            os.close(descriptor)

    run_threads(share, threads)


def write(path: str, size: int, threads: int, sync: bool) -> None:
    """Write one file of `size` bytes, chunks dealt out to `threads` threads; `sync` waits until the disk has it."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)

    def share(thread: int) -> None:
        buffer = bytes(CHUNK)
        for offset in range(thread * CHUNK, size, threads * CHUNK):
            os.pwrite(descriptor, memoryview(buffer)[: size - offset], offset)

    run_threads(share, threads)
    if sync:
        os.fsync(descriptor)
    os.close(descriptor)


def run_threads(share: Callable[[int], None], threads: int) -> None:
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(share, range(threads)))


def main(action: str, *arguments: str) -> None:
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    if action == "read":
        read(list(arguments), threads)
    else:
        write(arguments[0], int(arguments[1]), threads, "sync" in arguments[2:])


if __name__ == "__main__":
    main(*sys.argv[1:])
