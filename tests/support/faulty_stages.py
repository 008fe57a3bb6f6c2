"""Stages that do what must cost nobody else anything: `faulty_stages.py DIRECTORY [--again] STAGE`.

`faulty_stages.py DIRECTORY --all` runs them as `benchmarks.gpu` runs its own, for ever at the one that hangs.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

from benchmarks.stages import Recorder, Rows, run_one, run_stages


def hangs(record: Recorder) -> None:
    """Two rows, then a third that never ends, in a process that does not want to end either, and with a child."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(30)", "stays behind", sys.argv[1]])
    for key in ("first", "second"):
        record.measure(key, lambda: {"seconds": 1.0})
    record.measure("third", lambda: time.sleep(600) or {})
    record.measure("fourth", lambda: {"seconds": 2.0})


def dies(record: Recorder) -> None:
    record.measure("before", lambda: {"seconds": 1.0})
    record.measure("now", lambda: os.kill(os.getpid(), signal.SIGSEGV) or {})
    record.measure("behind", lambda: {"seconds": 3.0})


def fails(record: Recorder) -> None:
    def refuse() -> dict[str, Any]:
        if os.path.exists(os.environ["LORS_TEST_MENDED"]):
            return {"seconds": 2.0}
        raise ValueError("no luck")

    record.measure("bad", refuse)
    record.measure("good", lambda: {"seconds": 1.0})


def poisoned(record: Recorder) -> None:
    """What a device does after an illegal access: every further call fails."""

    def broken() -> dict[str, Any]:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    record.measure("broken", broken)
    record.measure("never", lambda: {"seconds": 1.0})


def fine(record: Recorder) -> None:
    record.measure("only", lambda: {"seconds": 1.0})


def breaks(record: Recorder) -> None:
    raise ModuleNotFoundError("No module named 'pydantic'")


def order(faults: str) -> None:
    """Puts faults in the place of the stages of `benchmarks.gpu` in this process: "profile:dies,rivals:fails"."""
    from benchmarks import gpu_stages

    for stage, fault in (one.split(":") for one in faults.split(",")):
        setattr(gpu_stages, stage, lambda bench, record, fault=fault: STAGES[fault](record))


STAGES = {"hangs": hangs, "dies": dies, "fails": fails, "poisoned": poisoned, "breaks": breaks, "fine": fine}

if __name__ == "__main__":
    directory = Path(sys.argv[1])
    if sys.argv[2] == "--all":
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
        run_stages([sys.executable, __file__, sys.argv[1]], dict.fromkeys(STAGES, 300.0), STAGES, directory, 1000)
    else:
        recorder = Recorder(Rows(directory), sys.argv[-1], "--again" in sys.argv)
        sys.exit(run_one(STAGES[sys.argv[-1]], recorder))
