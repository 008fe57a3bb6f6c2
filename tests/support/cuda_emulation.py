"""Builds csrc/cuda for the emulation of tests/native/cuda_emulation, and puts it in the place of the CUDA module.

`build()` compiles with AddressSanitizer and UndefinedBehaviorSanitizer: they see reads and writes outside of tensors and
shared memory, and misaligned vectors. A process that loads the module needs `environment()`.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parent.parent.parent
SHIM = ROOT / "tests" / "native" / "cuda_emulation"
SOURCES = [*sorted((ROOT / "csrc/cuda").glob("*.cu")), SHIM / "emulation.cpp", ROOT / "csrc/bindings_cuda.cpp"]
HEADERS = [
    *SHIM.glob("*.h"),
    *(ROOT / "csrc/common").glob("*.h"),
    *(ROOT / "csrc/cuda").glob("*.*h"),
    ROOT / "csrc/bindings_cuda.h",
]
ARCHES = "no device: emulated"
FLAGS = [
    *("-std=c++17", "-O1", "-g1", "-fPIC", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"),
    *("-ffp-contract=off", "-fvisibility=hidden", f'-DLORS_CUDA_ARCHS="{ARCHES}"'),
    *("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"),
]


def compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "g++"))


def library(name: str) -> str:
    found = subprocess.run(
        [compiler() or "g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True
    )
    return found.stdout.strip()


def environment() -> dict[str, str]:
    """AddressSanitizer has to be loaded before everything else, and finds the C++ library only beside it."""
    preload = f"{library('libasan.so')}:{library('libstdc++.so.6')}"
    options = "detect_leaks=0:allocator_may_return_null=1"  # torch and Python leak at exit
    return {**os.environ, "LD_PRELOAD": preload, "ASAN_OPTIONS": options, "OMP_NUM_THREADS": "1"}


def build(folder: Path) -> Path:
    """The compiled module, kept in `folder` for as long as no source changes."""
    import pybind11

    common = hashlib.sha256(repr((FLAGS, sys.version)).encode())
    for path in sorted(HEADERS):
        common.update(path.read_bytes())

    def sum_of(*sources: Path) -> str:
        sums = common.copy()
        for path in sources:
            sums.update(path.read_bytes())
        return sums.hexdigest()[:16]

    home = folder / sum_of(*SOURCES)
    target = home / ("_cuda" + sysconfig.get_config_var("EXT_SUFFIX"))
    if target.exists():
        return target
    home.mkdir(parents=True, exist_ok=True)
    includes = [f"-I{path}" for path in (SHIM, ROOT / "csrc", pybind11.get_include(), sysconfig.get_path("include"))]

    def compile_one(source: Path) -> str:
        out = folder / f"{source.stem}-{sum_of(source)}.o"
        if not out.exists():
            half = out.with_suffix(f".{os.getpid()}")
            _run([compiler() or "g++", *FLAGS, *includes, "-x", "c++", "-c", str(source), "-o", str(half)])
            half.rename(out)
        return str(out)

    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        objects = list(pool.map(compile_one, SOURCES))
    half = target.with_suffix(".part")
    _run([compiler() or "g++", "-shared", "-fsanitize=address,undefined", *objects, "-o", str(half)])
    half.rename(target)
    return target


def install(path: str) -> ModuleType:
    """Makes `backend="cuda"` run the emulated kernels, on tensors in main memory."""
    import torch

    from lors_kernels import dispatch
    from lors_kernels.backends import cuda, cuda_module

    spec = importlib.util.spec_from_file_location("lors_kernels._cuda", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills what torch.empty returns with NaN
    cuda_module.library = lambda: module  # type: ignore[assignment]
    cuda.probe = lambda: (True, ARCHES)
    cuda.DEVICES = cuda_module.DEVICES = ("cpu",)  # type: ignore[assignment]
    cuda_module.stream = lambda device: (0, 0)
    cuda._processors = lambda device: 4
    dispatch.availability.cache_clear()
    if faults := os.environ.get("LORS_TEST_STAGE_FAULTS"):
        from faulty_stages import order

        order(faults)
    return module


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[-4:])}: {done.stderr[-3000:]}")
