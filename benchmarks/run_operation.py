"""Run one kernel operation's benchmark under pytest and file what pytest-benchmark measured."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .bench_merge import python_path
from .errors import BenchmarkError
from .machine import ROOT, usable_cores
from .results import Results

OPERATIONS = (
    "gram_apply",
    "residual_threshold",
    "merge_update",
    "truncated_svd",
    "apply_update",
    "ties_update",
    "sparse_part",
    "sparse_update",
    "topk_mask",
    "lors_delta",
)


def run(results: Results, operation: str) -> None:
    """One piece per combination of parameters, and the machine's peaks, measured first; a failed check fails the part after
    the rest is saved."""
    from lors_kernels.testing.peaks import cpu_peaks

    results.data["peaks"] = {str(threads): asdict(cpu_peaks(threads)) for threads in {1, usable_cores()}}
    with tempfile.TemporaryDirectory() as scratch:
        report = Path(scratch, "report.json")
        options = [f"--benchmark-json={report}", "--benchmark-disable-gc", "--benchmark-quiet", "-q", "--no-header"]
        options += ["-p", "no:cacheprovider", "-o", "python_files=bench_*.py", "-o", "addopts="]
        options += ["--quick"] if results.quick else []
        command = [sys.executable, "-m", "pytest", str(ROOT / "benchmarks" / f"bench_{operation}.py"), *options]
        code = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": python_path()}).returncode
        if not report.exists() or not report.stat().st_size:
            raise BenchmarkError(f"bench_{operation}.py: expected a report, got none (pytest exited with {code})")
        measured = json.loads(report.read_text())["benchmarks"]
    for entry in measured:
        results.pieces[key(entry["params"])] = convert(entry)
    results.save()
    print("\n".join(lines(results.pieces)), flush=True)
    if code:
        raise BenchmarkError(f"bench_{operation}.py: expected every check to pass, got pytest exit code {code}")


def key(params: dict[str, Any]) -> str:
    order = ("shape", "dtype", "cache", "deltas", "rank", "impl")
    return ", ".join(f"rank {params[name]}" if name == "rank" else params[name] for name in order if name in params)


def convert(entry: dict[str, Any]) -> dict[str, Any]:
    """{"ms": spread, "GB/s", "bytes", "rounds", ...}: GB/s is the counted bytes over the median time."""
    stats, facts = entry["stats"], dict(entry["extra_info"])
    milliseconds = {name: stats[name] * 1e3 for name in ("median", "min", "max")}
    return {"ms": milliseconds, "GB/s": facts["bytes"] / stats["median"] / 1e9, "rounds": stats["rounds"], **facts}


def lines(pieces: dict[str, dict[str, Any]]) -> list[str]:
    """A printed row per piece: time, GB/s, counted bytes, and how much slower a rival is than ours beside it."""
    table = [f"{'':50s} {'ms':>10s} {'GB/s':>8s} {'MB':>8s} {'x ours':>8s}"]
    for name, piece in pieces.items():
        mine = pieces.get(name.rsplit(", ", 1)[0] + ", cpu")
        slower = f"{piece['ms']['median'] / mine['ms']['median']:8.1f}" if mine else ""
        error = f"  error {piece['error']:.1e}" if "error" in piece else ""
        table.append(
            f"{name:50s} {piece['ms']['median']:10.3f} {piece['GB/s']:8.1f} {piece['bytes'] / 1e6:8.1f} {slower}{error}"
        )
    return table
