"""Tasks on threads, of which the first error ends all."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from typing import TypeVar

__all__ = ["run_all"]

T = TypeVar("T")


def run_all(tasks: Sequence[Callable[[], T]], threads: int, name: str, stop: threading.Event | None = None) -> list[T]:
    """What the tasks return, in their order; they are begun in that order too. name: of the threads.

    An error, or Ctrl-C, sets `stop`, by which the tasks that are running know to end. It is raised when they have ended;
    those that still wait are given up.
    """
    with ThreadPoolExecutor(threads, thread_name_prefix=name) as pool:
        try:
            futures = [pool.submit(task) for task in tasks]
            for future in wait(futures, return_when=FIRST_EXCEPTION).done:
                future.result()
            return [future.result() for future in futures]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            if stop is not None:
                stop.set()  # after the others are given up: who is told to end makes room for none of them
            raise
