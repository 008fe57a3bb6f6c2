"""Processes that tests start, and whether anything is left of them."""

from __future__ import annotations

import os
import random
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

LORS = [sys.executable, "-c", "from lors.cli import main; main()"]
VARIABLE = "LORS_TEST_TOKEN"


class Marked:
    """A command in a session of its own whose processes, all of them, carry a token in their environment."""

    def __init__(self, command: Sequence[str], log: Path) -> None:
        self.token = secrets.token_hex(16)
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), VARIABLE: self.token}
        with log.open("wb") as stream:
            self.process = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream, start_new_session=True,
                preexec_fn=heed_ctrl_c,
            )  # fmt: skip

    def alive(self) -> list[int]:
        """Processes of it that have not ended."""
        mark = f"{VARIABLE}={self.token}".encode()
        return [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if _carries(pid, mark)]

    def end(self, *signals: int, pause: float = 0.05) -> float:
        """Sends signals to the command itself; seconds until it has ended."""
        begun = time.monotonic()
        for number, signum in enumerate(signals):
            time.sleep(pause if number else 0)
            self.process.send_signal(signum)
        self.process.wait(60)
        return time.monotonic() - begun


def heed_ctrl_c() -> None:
    """SIGINT is ignored in what a shell starts in the background, as it may have started these tests."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _carries(pid: int, mark: bytes) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0]
        return state not in (b"Z", b"X") and mark in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return False


@contextmanager
def marked(command: Sequence[str], log: Path) -> Iterator[Marked]:
    """Kills what is left, so that a failing test leaves nothing."""
    found = Marked(command, log)
    try:
        yield found
    finally:
        while left := found.alive():
            for pid in left:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        found.process.wait()


def unlucky(rng: random.Random) -> tuple[tuple[int, ...], float]:
    """Signals that end a command, one or two, and the seconds between them."""
    usual = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    first = rng.choice((*usual, signal.SIGKILL))
    again = rng.random() < 0.3 and first != signal.SIGKILL
    return (first, rng.choice((*usual, signal.SIGKILL))) if again else (first,), rng.uniform(0, 0.3)


def with_argument(argument: str) -> list[int]:
    """Processes with exactly this word in their command line."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            if argument.encode() in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
    return found


def wait_until(true: Callable[[], bool], seconds: float = 5.0) -> bool:
    """Whether it is true, at the latest after so many seconds."""
    deadline = time.monotonic() + seconds
    while not true():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def wait_for(path: Path, seconds: float = 60) -> None:
    assert wait_until(path.exists, seconds), f"{path} has not come"


def gone(found: Marked, seconds: float = 5.0) -> bool:
    """Whether nothing is alive, at the latest after so many seconds."""
    return wait_until(lambda: not found.alive(), seconds)
