"""The CUDA kernels without a GPU: compiled for the CPU under sanitizers, and run on the shared cases.

What this shows and what it does not stands in tests/native/cuda_emulation/emulation.h.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import cuda_emulation


def run(module: Path, *command: str, seed: int = 0) -> subprocess.CompletedProcess[str]:
    variables = {"LORS_TEST_CUDA_EMULATION": str(module), "CUDA_EMULATION_SEED": str(seed)}
    environment = {**cuda_emulation.environment(), **variables}
    environment.pop("LORS_REQUIRE", None)
    return subprocess.run(
        [sys.executable, *command],
        cwd=cuda_emulation.ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def suite(module: Path, *options: str, seed: int = 0) -> subprocess.CompletedProcess[str]:
    command = ("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "tests/support/gpu_suite.py", *options)
    return run(module, *command, seed=seed)


def test_shared_cases(emulated: Path) -> None:
    found = suite(emulated)
    assert found.returncode == 0, found.stdout[-3000:] + found.stderr[-3000:]
    assert "passed" in found.stdout and "skipped" not in found.stdout


def test_every_barrier_and_every_wait_is_needed(emulated: Path) -> None:
    """Without any one of them the results change: the emulation can see it, and no kernel waits for nothing."""
    found = run(emulated, "tests/support/broken_kernels.py", str(emulated))
    assert found.returncode == 0, found.stdout[-2000:] + found.stderr[-3000:]
    lines = found.stdout.splitlines()
    assert len(lines) > 10 and [line for line in lines if not line.endswith(" missed") or "NOT" in line] == []
