"""What a number was measured on. No host name, user name or path: results are published."""

from __future__ import annotations

import datetime
import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

from lors_kernels.testing.peaks import cache_sizes

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "numpy", "transformers", "safetensors", "mergekit", "ml_dtypes")


def describe_machine() -> dict[str, Any]:
    """CPU, cache, memory, system, versions, commit and date, as JSON-ready values (sizes in bytes)."""
    commit, dirty = git_state()
    return {
        "cpu": cpu_model(),
        "cores": usable_cores(),
        "vector": vector_units(),
        "cache": cache_sizes(),
        "memory": memory_size(),
        "os": f"{platform.system()} {platform.release().split('-')[0]} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES},
        "load_average": os.getloadavg()[0],
        "commit": commit,
        "dirty": dirty,
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }


def usable_cores() -> int:
    """Cores this process may run on, which in a container is fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)


def cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        match = re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE)
        if match:
            return match.group(1).strip()
    return platform.processor() or platform.machine()


def vector_units() -> list[str]:
    """The vector extensions that decide which code path the kernels take."""
    info = Path("/proc/cpuinfo")
    flags = set(re.findall(r"\S+", info.read_text())) if info.exists() else set()
    return [name for name in ("avx2", "fma", "avx512f", "avx512_bf16", "asimd") if name in flags]


def memory_size() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def git_state() -> tuple[str | None, bool | None]:
    """(commit, whether files differ from it). Results themselves do not count: they are written by the run."""
    try:
        commit = _git("rev-parse", "HEAD")
    except (OSError, subprocess.CalledProcessError):
        return None, None
    return commit, bool(_git("status", "--porcelain", "--", ".", ":(exclude)benchmarks/results"))


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
