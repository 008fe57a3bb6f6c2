"""`python -m lors_kernels`: which backends run here, and on what."""

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
    """Everything a bug report needs."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "backends": {name: status._asdict() for name, status in available_backends().items()},
        "threads": thread_count(),
        "vector_unit": _vector_unit(),
        "processor": _processor(),
        "platform": platform.platform(),
        "versions": versions,
    }


def _vector_unit() -> str:
    from .backends.cpu import library

    try:
        return library().isa
    except (ImportError, ValueError) as error:
        return str(error)


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as info:
            return next(
                (line.split(":", 1)[1].strip() for line in info if line.startswith("model name")), platform.machine()
            )
    except OSError:
        return platform.processor() or platform.machine()


def print_diagnosis(*, as_json: bool = False) -> None:
    found = diagnosis()
    if as_json:
        print(json.dumps(found, indent=2))
        return
    for name, status in found["backends"].items():
        print(f"{name:10} {'available' if status['ok'] else 'not available'}: {status['reason']}")
    for key in ("threads", "vector_unit", "processor", "platform"):
        print(f"{key.replace('_', ' '):12} {found[key]}")
    print("versions     " + ", ".join(f"{package} {version}" for package, version in found["versions"].items()))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m lors_kernels", description=__doc__)
    parser.add_argument("--json", action="store_true")
    print_diagnosis(as_json=parser.parse_args(sys.argv[1:]).json)
