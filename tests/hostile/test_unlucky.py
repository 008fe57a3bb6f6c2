"""Failing system calls, and signals at random moments, for every command that writes (`unlucky`).

LORS_FAULTS=N makes N system calls fail, LORS_SIGNALS=N sends N signals; asked for: 500 and 200.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from helpers import require

FAULTS = int(os.environ.get("LORS_FAULTS", "20"))
SIGNALS = int(os.environ.get("LORS_SIGNALS", "20"))
TESTS = Path(__file__).parent.parent

require("linux", sys.platform == "linux", "system calls of Linux")


def unlucky(mode: str, count: int, root: Path, **environment: str) -> dict[str, int]:
    """The tally of the runs; shown by `pytest -s`."""
    done = subprocess.run(
        [sys.executable, str(TESTS / "support" / "unlucky.py"), mode, str(count), str(root / "lab")], capture_output=True, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path), **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    print(result["tally"])
    assert not result["wrong"], "\n".join(result["wrong"])
    return dict(result["tally"])


@pytest.mark.timeout(max(300, 10 * FAULTS))
def test_failing_system_calls_leave_the_old_or_the_new(tmp_path: Path) -> None:
    library = tmp_path / "faults.so"
    command = [
        "cc",
        "-shared",
        "-fPIC",
        "-O1",
        "-Wall",
        "-Werror",
        "-o",
        library,
        TESTS / "native" / "faults.c",
        "-ldl",
    ]
    subprocess.run(command, check=True)
    tally = unlucky("faults", FAULTS, tmp_path, LD_PRELOAD=str(library))
    assert tally["old"] and tally["new"]


@pytest.mark.timeout(max(300, 10 * SIGNALS))
def test_signals_leave_the_old_or_the_new(tmp_path: Path) -> None:
    """Within five seconds, with one line and the exit code that shells expect."""
    tally = unlucky("signals", SIGNALS, tmp_path)
    assert tally["came before the end"] > SIGNALS // 4
