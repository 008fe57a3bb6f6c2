"""Processes that do not outlive this one, however it ends, and leave nothing behind that they have started.

    with running(["sh", "score.sh"], stdout=subprocess.PIPE) as process:
        ...                                                      # at the end of the block all of it is gone

Between us and the command stands a keeper: this file, run as a program of its own. It ends all that is below it when the
command has ended, when it is told to, and when we are gone: then its standard input, a pipe whose other end only we
hold, is at its end, and not even SIGKILL can keep that from it. On Linux the keeper is also the process that orphans are
given to, so that what ignores signals, starts a session of its own or is forked twice stays below it. On other systems it
ends the command's process group.

Not promised: a process of another user stays (sudo), and so does what was handed to a service (a container, a batch
job). A command that kills its own keeper is killed with it, but not what it has started.
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

__all__ = ["end", "python", "running"]

PATIENCE = 3.0  # seconds until all is gone; SIGKILL takes longer only where a process hangs in the kernel

_PDEATHSIG, _CHILD_SUBREAPER = 1, 36  # of prctl(2)


@contextmanager
def running(command: Sequence[str], **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """Runs a command for the time of the block; its exit code is the process's, 128 + n after signal n, 127 when it
    cannot be started (the reason is on stderr).

    options: of subprocess.Popen; the command's standard input is empty. LorsError: no process can be started at all.
    """
    from .errors import LorsError  # not to be had in the keeper

    try:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", __file__, *command], stdin=subprocess.PIPE, start_new_session=True, **options
        )
    except OSError as error:
        raise LorsError(f"cannot start {command[0]}: {error.strerror or error}") from error
    try:
        yield process
    finally:
        end(process)
        for stream in (process.stdout, process.stderr):
            if stream is not None:
                stream.close()


def end(process: subprocess.Popen[bytes]) -> None:
    """Ends what `running` runs, and all that it started; returns when it is gone."""
    assert process.stdin is not None
    process.stdin.close()
    try:
        process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        pass  # the keeper stays with it


def python(function: str, *arguments: str) -> list[str]:
    """The command that calls module:function with strings in a new interpreter, which finds the modules that we find."""
    module, name = function.split(":")
    code = f"import sys; sys.path[:] = {sys.path!r}; from {module} import {name}; {name}(*sys.argv[1:])"
    return [sys.executable, "-c", code, *arguments]


# --- the keeper: only the standard library is there


def _keep(command: list[str]) -> int:
    """Runs the command to its end or to ours; the exit code."""
    notice = _noticed(signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    if sys.platform == "linux":
        _prctl(_CHILD_SUBREAPER, 1)
    leader = _start(command)
    ended: dict[int, int] = {}  # pid -> how it ended
    while leader not in ended:
        ready, _, _ = select.select([0, notice], [], [])
        told = notice in ready and set(os.read(notice, 512)) - {signal.SIGCHLD}
        _reap(ended)
        if 0 in ready or told:
            break
    _end_all(leader, ended)
    code = os.waitstatus_to_exitcode(ended.get(leader, signal.SIGKILL))
    return code if code >= 0 else 128 - code


def _noticed(*signals: int) -> int:
    """A descriptor from which these signals can be read."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write)
    for signum in signals:
        signal.signal(signum, lambda *_: None)
    return read


def _start(command: list[str]) -> int:
    keeper = os.getpid()
    if pid := os.fork():
        return pid
    try:
        os.setsid()
        if sys.platform == "linux":
            _prctl(_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != keeper:
            os._exit(1)
        for signum in (signal.SIGPIPE, signal.SIGXFSZ):  # which Python ignores, and the command would too
            signal.signal(signum, signal.SIG_DFL)
        os.dup2(os.open(os.devnull, os.O_RDWR), 0)
        os.execvp(command[0], command)
    except OSError as error:
        os.write(2, f"{command[0]}: {error.strerror}\n".encode("utf-8", "surrogateescape"))
    finally:
        os._exit(127)


def _reap(ended: dict[int, int]) -> None:
    """Takes note of all that have ended, our own and orphans that were given to us."""
    try:
        while found := os.waitpid(-1, os.WNOHANG):
            if not found[0]:
                return
            ended[found[0]] = found[1]
    except ChildProcessError:
        return


def _end_all(leader: int, ended: dict[int, int]) -> None:
    """Kills our children; theirs become ours, until there are none.

    Only children of ours that were not waited for are killed, and their groups, so nobody else can have their number.
    """
    while killed := _kill_children(leader, ended):
        for pid in killed:
            ended[pid] = os.waitpid(pid, 0)[1]


def _kill_children(leader: int, ended: dict[int, int]) -> list[int]:
    if sys.platform != "linux":
        if leader in ended:
            return []
        os.killpg(leader, signal.SIGKILL)
        return [leader]
    killed = []
    # The youngest first, each as soon as it is seen: one that forks and ends, over and over, must not stay ahead.
    for pid in sorted(map(int, filter(str.isdigit, os.listdir("/proc"))), reverse=True):
        try:
            with open(f"/proc/{pid}/stat", "rb") as stream:
                _, parent, group, *_ = stream.read().rpartition(b")")[2].split()
            if int(parent) == os.getpid():
                if int(group) != os.getpgrp():  # is ours for a moment after the fork
                    with suppress(ProcessLookupError):  # it may have left the group meanwhile, as its last
                        os.killpg(int(group), signal.SIGKILL)
                os.kill(pid, signal.SIGKILL)
                killed.append(pid)
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            pass  # ended meanwhile, or is another user's
    return killed


def _prctl(option: int, value: int) -> None:
    import ctypes

    ctypes.CDLL(None).prctl(option, ctypes.c_ulong(value), 0, 0, 0)


if __name__ == "__main__":
    sys.exit(_keep(sys.argv[1:]))
