"""Builds the native modules; everything else is declared in pyproject.toml.

The CPU source is compiled once per instruction set into separate modules (`_cpu_avx512`, `_cpu_avx2`, `_cpu_portable`);
lors_kernels picks one when it first needs it. Separate modules, because inline functions of the standard library
compiled for AVX-512 must never be merged by the linker into code that an older processor runs.
"""

from __future__ import annotations

import os
import platform
from glob import glob

from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import setup

X86_FLAGS = {
    "avx512": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma", "-mf16c", "-mpopcnt", "-mprefer-vector-width=512", "-Wno-uninitialized", "-Wno-maybe-uninitialized"],
    "avx2": ["-mavx2", "-mfma", "-mf16c", "-mpopcnt"],
    "portable": [],
}
FLAGS = X86_FLAGS if platform.machine().lower() in {"x86_64", "amd64"} else {"portable": []}
COMMON = ["-O3", "-Wall", "-Wextra", "-fno-math-errno", *os.environ.get("LORS_CXXFLAGS", "").split()]
LINK = os.environ.get("LORS_LDFLAGS", "").split()

ParallelCompile("LORS_BUILD_JOBS", default=os.cpu_count() or 1).install()


class BuildExt(build_ext):
    """Gives each module its own folder of object files: they share sources but not flags."""

    def build_extension(self, ext):
        shared = self.build_temp
        self.build_temp = str(Path(shared) / ext.name)
        try:
            super().build_extension(ext)
        finally:
            self.build_temp = shared


setup(
    cmdclass={"build_ext": BuildExt},
    ext_modules=[
        Pybind11Extension(
            f"lors_kernels._cpu_{isa}",
            sorted(["csrc/bindings.cpp", *glob("csrc/lors/*.cpp"), *glob("csrc/cpu/*.cpp")]),
            depends=sorted(glob("csrc/**/*.h", recursive=True)),
            define_macros=[("LORS_MODULE", f"_cpu_{isa}")],
            extra_compile_args=[*COMMON, *flags],
            extra_link_args=["-pthread", *LINK],
            cxx_std=17,
        )
        for isa, flags in FLAGS.items()
    ],
)
