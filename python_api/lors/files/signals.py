"""Signals: what ends a command lets it clean up, within a few seconds."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

__all__ = ["Terminated", "terminate_cleanly"]

GRACE = 4.0  # seconds for cleaning up

_SIGNALS = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)


class Terminated(SystemExit):
    """SIGTERM or SIGHUP as an exception; left alone, the process ends with the status a shell expects, 128 + signal."""

    def __init__(self, signum: int) -> None:
        super().__init__(128 + signum)
        self.signum, self.name = signum, signal.Signals(signum).name


@contextlib.contextmanager
def terminate_cleanly() -> Iterator[None]:
    """Within the block, SIGTERM and SIGHUP raise Terminated in the main thread, so that what is temporary is removed.

    Only the first signal raises, SIGINT as well: one more in the midst of cleaning up would end that. What a library makes of
    that exception, an error of its own perhaps, is the same end.
    A process that has not left the block GRACE seconds after one of these or SIGINT is ended as it is: its main thread may
    be in a library that does not come back, and an exception may be lost in one. The next run removes what it leaves.

    Signals that are ignored (nohup) stay ignored. Outside the main thread, which alone may set handlers, nothing
    changes.
    """

    seen: list[int] = []

    def handler(signum: int, frame: FrameType | None) -> None:
        seen.append(signum)
        if len(seen) == 1:
            raise _ending(signum)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {signum: signal.getsignal(signum) for signum in _SIGNALS}
    with _deadline():
        try:
            for signum, previous in before.items():
                if previous is not signal.SIG_IGN:
                    signal.signal(signum, handler)
            yield
        except Exception as error:
            if not seen:
                raise
            raise _ending(seen[0]) from error
        finally:
            for signum, previous in before.items():
                signal.signal(signum, previous)


def _ending(signum: int) -> BaseException:
    return KeyboardInterrupt() if signum == signal.SIGINT else Terminated(signum)


@contextlib.contextmanager
def _deadline() -> Iterator[None]:
    """Signals are told to a thread by the C handler, which runs whatever Python does."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    thread = threading.Thread(target=_watch, args=(reader,), name="lors-signals", daemon=True)
    thread.start()
    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    _wakeup.append(writer)
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        _wakeup.remove(writer)
        os.write(writer, b"\0")
        thread.join()
        os.close(writer)
        os.close(reader)


def _watch(reader: int) -> None:
    """Ends the process GRACE seconds after the first signal, unless a zero comes before."""
    ending, deadline = 0, 0.0
    while True:
        left = max(0.0, deadline - time.monotonic()) if ending else None
        if not select.select([reader], [], [], left)[0]:
            name = signal.Signals(ending).name
            os.write(
                2, f"error: ended by {name}, {GRACE:g} s after it came; the next run removes what is left\n".encode()
            )
            os._exit(128 + ending)
        signum = os.read(reader, 1)[0]
        if signum == 0:
            return
        if not ending and signum in _SIGNALS:
            ending, deadline = signum, time.monotonic() + GRACE


_wakeup: list[int] = []


def _forked() -> None:
    """A signal that a child gets is not its parent's."""
    if _wakeup:
        signal.set_wakeup_fd(-1)


os.register_at_fork(after_in_child=_forked)
