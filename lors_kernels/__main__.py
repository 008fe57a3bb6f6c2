"""`python -m lors_kernels`: which backends run here, and on what; what is too old. Exit code 1 when something is broken or misconfigured."""

from __future__ import annotations

import argparse
import json
import platform
import sys
from importlib import metadata
from typing import Any

from . import available_backends, thread_count

PACKAGES = ("lors-merging", "torch", "numpy", "ml_dtypes", "triton", "transformers", "safetensors")


def diagnosis() -> dict[str, Any]:
    """Everything a bug report needs. `broken` names what is there and does not work; `too_old` says what works badly, or
    not, for its age."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    backends = available_backends()
    broken = [name for name, status in backends.items() if status.broken]
    try:
        threads: int | str = thread_count()
    except ValueError as error:
        threads = str(error)
        broken.append("threads")
    return {
        "backends": {name: status._asdict() | {"state": status.state} for name, status in backends.items()},
        "broken": broken,
        "too_old": _too_old(),
        "threads": threads,
        "processor": _processor(),
        "platform": platform.platform(),
        "versions": versions,
    }


def _too_old() -> list[str]:
    from .backends import built, cuda_module
    from .gpu_software import installed, too_old

    try:
        return too_old(installed(cuda_module.library().runtime if built("_cuda") else None))
    except ImportError:  # torch, or the CUDA module: named as broken
        return []


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as info:
            return next(
                (line.split(":", 1)[1].strip() for line in info if line.startswith("model name")), platform.machine()
            )
    except OSError:
        return platform.processor() or platform.machine()


def print_diagnosis(*, as_json: bool = False) -> bool:
    """Prints it and returns whether nothing is broken."""
    found = diagnosis()
    if as_json:
        print(json.dumps(found, indent=2))
        return not found["broken"]
    for name, status in found["backends"].items():
        print(f"{name:10} {status['state']}: {status['reason']}")
    for line in found["too_old"]:
        print(f"too old    {line}")
    for key in ("threads", "processor", "platform"):
        print(f"{key:10} {found[key]}")
    print("versions   " + ", ".join(f"{package} {version}" for package, version in found["versions"].items()))
    return not found["broken"]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m lors_kernels", description=__doc__)
    parser.add_argument("--json", action="store_true")
    sys.exit(0 if print_diagnosis(as_json=parser.parse_args().json) else 1)
