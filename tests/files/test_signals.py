"""Signals end a command within seconds, whatever its main thread is doing, and no other process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import tiny
from lors.files import signals
from lors.files.signals import Terminated, terminate_cleanly


def test_handlers_are_put_back() -> None:
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGHUP)
    with pytest.raises(Terminated) as caught, terminate_cleanly():
        signal.raise_signal(signal.SIGTERM)
    assert caught.value.code == 143
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGHUP)) == before
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with terminate_cleanly():
            signal.raise_signal(signal.SIGHUP)  # nohup stays in force
    finally:
        signal.signal(signal.SIGHUP, previous)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(lambda: terminate_cleanly().__enter__()).result()


@pytest.mark.parametrize(("signum", "ending"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, Terminated)])
def test_an_ending_that_a_library_takes_for_an_error_is_one(
    signum: signal.Signals, ending: type[BaseException]
) -> None:
    with pytest.raises(ending) as caught, terminate_cleanly():
        try:
            signal.raise_signal(signum)
        except BaseException:
            raise ValueError("error building a validator") from None
    assert isinstance(caught.value.__cause__, ValueError)
    with pytest.raises(ValueError, match="a real one"), terminate_cleanly():
        raise ValueError("a real one")


BUSY = {
    # native code that does not come back for half a minute; Python's handlers do not run meanwhile
    "native": "hashlib.pbkdf2_hmac('sha256', b'', b'', 10**8)",
    # what is raised in a destructor is printed and forgotten
    "destructor": "Lazy(); time.sleep(30)",
    # somebody's own idea of an error
    "swallowed": "swallow()",
}
PROGRAM = """
import contextlib, hashlib, sys, time
from lors.files.signals import terminate_cleanly

class Lazy:
    def __del__(self):
        time.sleep(1)

def swallow():
    while True:
        with contextlib.suppress(BaseException):
            time.sleep(30)

with terminate_cleanly():
    print("ready", flush=True)
    BUSY
"""


@pytest.mark.parametrize("busy", BUSY)
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_command_that_does_not_listen_ends_all_the_same(busy: str, signum: signal.Signals) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM.replace("BUSY", BUSY[busy])], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    time.sleep(0.2)
    begun = time.monotonic()
    for _ in range(1 if busy == "destructor" else 3):  # impatience does not help it to more time
        process.send_signal(signum)
        time.sleep(0.5)
    _, said = process.communicate(timeout=20)
    assert time.monotonic() - begun < 5.5
    assert process.returncode == 128 + signum
    assert said.splitlines()[-1].startswith(f"error: ended by {signum.name}")


def test_what_a_child_gets_does_not_end_its_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signals, "GRACE", 0.3)
    with terminate_cleanly():
        if not (child := os.fork()):
            try:
                time.sleep(20)
            finally:
                os._exit(3)
        time.sleep(0.2)
        os.kill(child, signal.SIGTERM)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
        time.sleep(1)


def test_a_command_that_cleans_up_has_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is left behind of a block: a signal after it is the program's own affair."""
    monkeypatch.setattr(signals, "GRACE", 0.3)
    with pytest.raises(Terminated), terminate_cleanly():
        signal.raise_signal(signal.SIGTERM)
    time.sleep(0.6)
    assert signal.set_wakeup_fd(-1) == -1


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_pattern_that_never_ends_is_ended(tmp_path: Path, signum: signal.Signals) -> None:
    """`target` takes any regular expression; one that tries every way to split a name is the user's to interrupt."""
    paths = tiny.family(tmp_path, ("ca",))
    recipe = tmp_path / "r.yml"
    recipe.write_text(
        f"merge_method: lors\nbase_model: {paths['base']}\nmodels:\n  - model: {paths['ca']}\n"
        "target: {include: ['(\\w+\\.?)+!']}\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "lors", "merge", str(recipe), str(tmp_path / "out")], stderr=subprocess.PIPE, text=True
    )
    time.sleep(4)
    assert process.poll() is None, "it runs"
    process.send_signal(signum)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 128 + signum and said.count("\n") == 1, said
    assert not (tmp_path / "out").exists()
