"""Measurements as stages, each a process of its own with a time limit, on a machine that may end at any minute.

A stage that fails, hangs, crashes or is killed costs only itself. What it prints goes to `log.txt` as it is printed; what it
measures goes to `rows.jsonl` row by row, and is there whatever happens next. Every line of that file is one JSON object:

    {"stage", "key", "commit", "found": {...}}     a measurement, or {"failed": reason} in its place
    {"stage", "commit", "outcome", "seconds"}      how a stage ended; "done" if it did

A later run over the same file goes on: rows that are there are not measured again, those that failed are. A row on which the
process hung or died is not tried again unless `again` is set: it would cost the same again.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from .errors import BenchmarkError
from .machine import git_state

GRACE = 5.0  # seconds between asking a process to end and killing it
FATAL = ("CUDA error", "illegal memory access", "earlier kernel", "device-side assert")  # nothing works behind these


class Rows:
    """`rows.jsonl` of a directory, appended to and never rewritten."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "rows.jsonl"
        self.commit = git_state()[0]
        directory.mkdir(parents=True, exist_ok=True)

    def append(self, stage: str, **row: Any) -> None:
        line = json.dumps({"stage": stage, "commit": self.commit, **row}) + "\n"
        with self.path.open("ab+") as file:
            if file.tell() and not self.path.read_bytes().endswith(b"\n"):
                file.write(b"\n")  # behind a line that was cut off
            file.write(line.encode())
            file.flush()
            os.fsync(file.fileno())

    def read(self) -> list[dict[str, Any]]:
        """All complete lines: the last one may have been cut off with the power."""
        found = []
        for line in self.path.read_text(errors="replace").splitlines() if self.path.exists() else ():
            with suppress(json.JSONDecodeError):
                found.append(json.loads(line))
        return found

    def results(self) -> dict[str, dict[str, Any]]:
        """stage -> key -> what was found last."""
        results: dict[str, dict[str, Any]] = {}
        for row in self.read():
            if "key" in row:
                results.setdefault(row["stage"], {})[row["key"]] = row["found"]
        return results

    def outcomes(self) -> dict[str, dict[str, Any]]:
        return {row["stage"]: row for row in self.read() if "outcome" in row}


class Recorder:
    """What a stage measures with, inside its own process."""

    def __init__(self, rows: Rows, stage: str, again: bool = False) -> None:
        self.rows, self.stage = rows, stage
        before = [row for row in rows.read() if row["stage"] == stage and "key" in row and row["commit"] == rows.commit]
        last = {row["key"]: row["found"] for row in before}
        lost = () if again else (key for key, found in last.items() if found.get("lost"))
        self.finished = {key for key, found in last.items() if "failed" not in found} | {*lost}
        self.failed = 0

    def measure(self, key: str, call: Callable[[], dict[str, Any]], always: bool = False) -> None:
        """Files call() under `key`, or why it failed; raises only where nothing more can work in this process."""
        if key in self.finished and not always:
            return
        print(f"{self.stage}: {key}", flush=True)
        (self.rows.path.parent / "now.txt").write_text(key)
        try:
            found = call()
        except Exception as error:  # noqa: BLE001 - filed; the other rows go on
            self.failed += 1
            reason = f"{type(error).__name__}: {error}"[:2000]
            print(f"  failed: {reason}", flush=True)
            self.rows.append(self.stage, key=key, found={"failed": reason})
            if any(word in reason for word in FATAL):
                raise
        else:
            self.rows.append(self.stage, key=key, found=found)
        finally:
            (self.rows.path.parent / "now.txt").unlink()


def run_stages(
    command: Sequence[str], limits: dict[str, float], chosen: Iterable[str], directory: Path, seconds: float
) -> list[str]:
    """Runs `command STAGE` for each, in `seconds` altogether; returns the stages that are still to be run."""
    rows, begun = Rows(directory), time.monotonic()
    chosen = list(chosen)
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    root = Path(__file__).resolve().parent.parent
    paths = [str(root), str(root / "python_api"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment["PYTHONPATH"] = os.pathsep.join(paths)  # nothing of this project is installed there
    for number, stage in enumerate(chosen):
        left = seconds - (time.monotonic() - begun)
        if left < min(limits[stage], 10.0):
            return chosen[number:]
        limit = min(limits[stage], left)
        (directory / "now.txt").unlink(missing_ok=True)
        started = time.monotonic()
        with (directory / "log.txt").open("a") as log:
            log.write(f"== {stage}\n")
            log.flush()
            outcome = _watch([*command, stage], limit, log, environment, root)
        _file_lost(rows, stage, outcome)
        took = time.monotonic() - started
        rows.append(stage, outcome=outcome, seconds=took)
        print(f"{stage}: {outcome}, {took:.1f} s", flush=True)
    return []


def _watch(command: list[str], limit: float, log: Any, environment: dict[str, str], cwd: Path) -> str:
    process = subprocess.Popen(
        command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=environment, cwd=cwd,
        start_new_session=True,
    )  # fmt: skip
    try:
        code = process.wait(limit)
    except subprocess.TimeoutExpired:
        return f"did not end in {limit:.0f} s"
    finally:
        _end(process)  # and whatever it started
    if code < 0:
        return f"died of {signal.Signals(-code).name}"
    return "done" if code == 0 else "rows failed" if code == 3 else f"failed with exit code {code}, see log.txt"


def _end(process: subprocess.Popen[bytes]) -> None:
    for number, patience in ((signal.SIGTERM, GRACE), (signal.SIGKILL, GRACE)):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        if process.poll() is None:
            with suppress(subprocess.TimeoutExpired):
                process.wait(patience)
        else:
            time.sleep(0.05)


def _file_lost(rows: Rows, stage: str, outcome: str) -> None:
    """The row that was being measured when the process was lost."""
    now = rows.path.parent / "now.txt"
    if now.exists():
        rows.append(stage, key=now.read_text(), found={"failed": f"the process {outcome}", "lost": True})
        now.unlink()


def run_one(stage: Callable[[Recorder], None], recorder: Recorder) -> int:
    """The body of a stage's process; its exit code."""
    die_with_parent()
    stage(recorder)
    return 3 if recorder.failed else 0


def die_with_parent() -> None:
    """A stage whose parent was killed must not hold the device."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def choose(text: str, known: Iterable[str]) -> list[str]:
    known = list(known)
    chosen = text.split(",") if text else known
    for name in chosen:
        if name not in known:
            raise BenchmarkError(f"--stages: expected some of {', '.join(known)}, got {name!r}")
    return chosen
