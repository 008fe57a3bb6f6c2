"""How many threads: one rule, whatever has been imported; and what happens where they cannot be had."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

import pytest
import torch

from helpers import require, require_backend
from lors_kernels import thread_count
from lors_kernels.threads import one_torch_thread

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, CORES),
        ({"OMP_NUM_THREADS": "3"}, 3),
        ({"OMP_NUM_THREADS": "3,2"}, 3),
        ({"OMP_NUM_THREADS": ""}, CORES),
        ({"LORS_THREADS": "5", "OMP_NUM_THREADS": "3"}, 5),
        ({"LORS_THREADS": "", "OMP_NUM_THREADS": "3"}, 3),
    ],
)
def test_what_is_imported_does_not_count(variables: dict[str, str], expected: int) -> None:
    code = "import lors_kernels as k; before = k.thread_count(); import torch; torch.set_num_threads(7); "
    code += "print(before, k.thread_count(), k.thread_count(2))"
    environment = {name: x for name, x in os.environ.items() if name not in ("LORS_THREADS", "OMP_NUM_THREADS")}
    done = subprocess.run(
        [sys.executable, "-c", code], env={**environment, **variables}, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [str(expected), str(expected), "2"]


@pytest.mark.parametrize("name", ["LORS_THREADS", "OMP_NUM_THREADS"])
@pytest.mark.parametrize("text", ["many", "0", "-1", "1.5", "99999999999"])
def test_a_number_that_is_none_is_refused(name: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LORS_THREADS", raising=False)
    monkeypatch.setenv(name, text)
    with pytest.raises(ValueError, match=f"{name}: expected a whole number from 1 to 32768, got '{text}'"):
        thread_count()


@pytest.mark.parametrize("threads", [0, -1, 2**15 + 1, 1.5, True, "4"])
def test_an_argument_that_is_none_is_refused(threads: object) -> None:
    with pytest.raises((TypeError, ValueError), match="threads: expected (1 to 32768|an integer), got"):
        thread_count(threads)  # type: ignore[arg-type]


def test_doctor_shows_the_number_once() -> None:
    environment = {**os.environ, "LORS_THREADS": "3"}
    command = [sys.executable, "-m", "lors_kernels"]
    shown = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert [line.split() for line in shown.splitlines() if "threads" in line] == [["threads", "3"]]


STARVED = """
import resource, threading, numpy as np, lors_kernels as k
x = np.ones((70_000, 16), np.float32)
k.merge_update(np.zeros_like(x), None, x, threads=1)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**28, used + 2**28))
out = np.zeros_like(x)
try:
    k.merge_update(out, None, x, threads=4000)
except (RuntimeError, MemoryError) as error:
    print(type(error).__name__, error)
print(int(out.any()), k.merge_update(out, None, x, threads=2).kept)
"""


def test_threads_that_cannot_be_started_are_one_line() -> None:
    """Nothing is written, and fewer threads work afterwards."""
    require_backend("cpu")
    require("linux", sys.platform == "linux", "memory is limited by setrlimit")
    done = subprocess.run([sys.executable, "-c", STARVED], capture_output=True, text=True)
    first, second = done.stdout.splitlines()
    assert first.startswith("RuntimeError threads: expected 4000, got "), done.stdout + done.stderr
    assert "Resource temporarily unavailable" in first
    assert second == f"0 {70_000 * 16}"


def test_blocks_of_one_torch_thread_end_with_what_there_was() -> None:
    """However they overlap, in threads that knew nothing of torch before as well."""
    torch.set_num_threads(2)
    inside, leave = threading.Event(), threading.Event()
    seen = []

    def other() -> None:
        with one_torch_thread():
            seen.append(torch.get_num_threads())
            inside.set()
            leave.wait(20)

    thread = threading.Thread(target=other)
    with one_torch_thread():
        thread.start()
        assert inside.wait(20) and torch.get_num_threads() == 1
    assert torch.get_num_threads() == 2
    leave.set()
    thread.join()
    later = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    later.start()
    later.join()
    assert seen == [1, 2] and torch.get_num_threads() == 2


def test_a_thread_keeps_its_own_while_another_ends_its_block() -> None:
    """What another thread is given back must not become the setting of one that has not worked with torch yet."""
    torch.set_num_threads(2)
    inside, left = threading.Event(), threading.Event()
    seen = []

    def first() -> None:
        with one_torch_thread():
            assert inside.wait(20)
        left.set()

    def second() -> None:
        with one_torch_thread():
            inside.set()
            assert left.wait(20)
            seen.append(torch.get_num_threads())

    threads = [threading.Thread(target=run) for run in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [1]
