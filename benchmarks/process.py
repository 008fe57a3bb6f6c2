"""Measure whole commands: wall time, CPU time and peak memory of a process, interleaved repeats, ratios."""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .errors import BenchmarkError

LAUNCHER = Path(__file__).with_name("launch.py")


@dataclass(frozen=True)
class Run:
    """One finished command: seconds and bytes. `peak_rss` counts mapped files, `peak_anonymous` (sampled) does not."""

    wall_s: float
    user_s: float
    system_s: float
    peak_rss: int
    peak_anonymous: int


@dataclass(frozen=True)
class Case:
    """A command to measure. `prepare` runs before each repeat, untimed; `check` after it and may raise."""

    name: str
    command: Sequence[str]
    repeats: int = 1
    env: Mapping[str, str] = field(default_factory=dict)
    prepare: Callable[[], None] | None = None
    check: Callable[[], None] | None = None


def measure(command: Sequence[str], *, env: Mapping[str, str] | None = None, cwd: Path | None = None) -> Run:
    """Run `command` to its end. A non-zero exit raises BenchmarkError with the end of what it printed."""
    with tempfile.TemporaryDirectory() as scratch:
        report, log = Path(scratch, "report.json"), Path(scratch, "log")
        with log.open("wb") as output:
            launcher = subprocess.Popen(
                [sys.executable, "-I", "-S", str(LAUNCHER), str(report), *command],
                env={**os.environ, **(env or {})},
                cwd=cwd,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                launcher.wait()
            except BaseException:
                # Ctrl-C must not leave a merge running that would disturb the next measurement.
                os.killpg(launcher.pid, signal.SIGKILL)
                launcher.wait()
                raise
        text = log.read_text(errors="replace").strip()
        if not report.exists():
            raise BenchmarkError(f"could not start {command[0]}: {_tail(text)}")
        result = json.loads(report.read_text())
    code = result.pop("code")
    if code:
        raise BenchmarkError(f"{' '.join(command[:4])} ...: expected exit code 0, got {code}: {_tail(text)}")
    return Run(**result)


def _tail(text: str) -> str:
    return " | ".join(text.splitlines()[-5:]) or "(no output)"


def interleave(cases: Sequence[Case], warm: Sequence[Path], report: Callable[[str], None]) -> dict[str, dict[str, Any]]:
    """Measure all cases round by round, so that a change of the machine's speed meets all of them alike.

    A case takes part in the first `repeats` rounds. Before each run the files in `warm` are read once (page cache)
    and written-back data of the run before is flushed. A failing case is recorded as {"failed": reason} and left out
    of the later rounds; the others go on.
    """
    runs: dict[str, list[Run]] = {case.name: [] for case in cases}
    failed: dict[str, str] = {}
    for round_ in range(max(case.repeats for case in cases)):
        for case in cases:
            if round_ >= case.repeats or case.name in failed:
                continue
            if case.prepare:
                case.prepare()
            os.sync()
            warm_page_cache(warm)
            try:
                run = measure(case.command, env=case.env)
                if case.check:
                    case.check()
            except BenchmarkError as error:
                failed[case.name] = str(error)
                report(f"{case.name}: FAILED: {error}")
                continue
            runs[case.name].append(run)
            report(f"{case.name}: {run.wall_s:.2f} s, {run.peak_rss / 1e9:.2f} GB")
    return {
        name: {"failed": failed[name]} if name in failed else summarize(measured) for name, measured in runs.items()
    }


def warm_page_cache(files: Iterable[Path]) -> None:
    """Read every file once into a small buffer."""
    buffer = bytearray(8 << 20)
    for path in files:
        with path.open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass


def summarize(runs: Sequence[Run]) -> dict[str, Any]:
    """{"wall_s": {"median", "min", "max"}, ... for every field of Run, "repeats": number of runs}"""
    table = [asdict(run) for run in runs]
    summary: dict[str, Any] = {key: spread([row[key] for row in table]) for key in table[0]}
    return summary | {"repeats": len(runs)}


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def ratio(slow: Mapping[str, float], fast: Mapping[str, float]) -> dict[str, float]:
    """Quotient of two spreads: of the medians, and the least and the greatest that their ranges allow."""
    return {
        "median": slow["median"] / fast["median"],
        "min": slow["min"] / fast["max"],
        "max": slow["max"] / fast["min"],
    }
