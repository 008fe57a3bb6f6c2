"""Builds the native modules; everything else is declared in pyproject.toml.

The CPU source is compiled once per instruction set into separate modules (`_cpu_avx512`, `_cpu_avx2`, `_cpu_portable`);
lors_kernels picks one when it first needs it. Separate modules, because inline functions of the standard library
compiled for AVX-512 must never be merged by the linker into code that an older processor runs. Everywhere but on x86-64
Linux there is one, `_cpu_portable`: with NEON on arm64, and on macOS without -m flags, because one compilation may be for
both of its processors. LORS_BUILD_ISA names the only one to build, for a machine that runs it.

The CUDA module (`_cuda`) is built where nvcc is found: LORS_BUILD_CUDA=auto (the default; where nvcc or the linking fails it
warns, and the rest is installed), 0 (never) or 1 (or fail).
LORS_CUDA_ARCHS lists the native architectures; PTX of the last one serves newer devices. The CUDA runtime is linked
statically, and no GPU is looked for: what is built does not depend on the machine that builds it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import find_packages, setup
from setuptools.errors import CompileError

AVX2 = ["-mavx2", "-mfma", "-mf16c", "-mpopcnt"]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mprefer-vector-width=512"]
PLATFORM = sysconfig.get_platform()  # what is built for, which is not always the machine that builds
if PLATFORM.startswith("win"):
    raise SystemExit(f"LoRS: expected Linux or macOS, got {PLATFORM}")
FLAGS: dict[str, list[str]] = {"portable": []}
if PLATFORM == "linux-x86_64":
    FLAGS |= {"avx2": AVX2, "avx512": AVX2 + AVX512}
if only := os.environ.get("LORS_BUILD_ISA"):
    if only not in FLAGS:
        raise SystemExit(f"LORS_BUILD_ISA: expected one of {', '.join(FLAGS)}, got {only!r}")
    FLAGS = {only: FLAGS[only]}
COMMON = ["-O3", "-Wall", "-Wextra", "-fno-math-errno", *os.environ.get("LORS_CXXFLAGS", "").split()]
LINK = os.environ.get("LORS_LDFLAGS", "").split()

CUDA_SOURCES = sorted(glob("csrc/cuda/*.cu"))
CUDA_ARCHS = os.environ.get("LORS_CUDA_ARCHS", "80,90").replace(" ", "").split(",")
CUDA_NAME = ", ".join(f"sm_{arch}" for arch in CUDA_ARCHS) + f" and PTX for newer than sm_{CUDA_ARCHS[-1]}"


def find_cuda() -> Path | None:
    """The toolkit's folder; None where the CUDA module is not to be built."""
    wanted = os.environ.get("LORS_BUILD_CUDA", "auto")
    if wanted not in ("auto", "0", "1"):
        raise SystemExit(f"LORS_BUILD_CUDA: expected auto, 0 or 1, got {wanted!r}")
    nvcc = None if wanted == "0" else shutil.which("nvcc")
    if nvcc is None:
        if wanted == "1":
            raise SystemExit("LORS_BUILD_CUDA=1: expected nvcc on the PATH, found none")
        return None
    # nvcc may be a link or a script: it says itself where it lives
    said = subprocess.run([nvcc, "--dryrun", "x.cu"], capture_output=True, text=True, check=False).stderr
    home = next((Path(line.split("TOP=")[1]).resolve() for line in said.splitlines() if "TOP=" in line), None)
    if home is None:
        problem = f"expected {nvcc} --dryrun to name its toolkit, got {' '.join(said.split())[:300]!r}"
        if wanted == "1":
            raise SystemExit(f"LORS_BUILD_CUDA=1: {problem}")
        print(f"warning: the CUDA module is not built: {problem}", file=sys.stderr)
    return home


def compile_cuda(folder: Path) -> list[str]:
    """nvcc on every .cu file that is newer than its object."""
    folder.mkdir(parents=True, exist_ok=True)
    newest = max(os.path.getmtime(path) for path in [__file__, *CUDA_SOURCES, *glob("csrc/**/*.*h", recursive=True)])
    codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in CUDA_ARCHS]
    codes.append(f"-gencode=arch=compute_{CUDA_ARCHS[-1]},code=compute_{CUDA_ARCHS[-1]}")
    flags = ["-std=c++17", "-O3", "--Werror=all-warnings", "-Xcompiler=-Wall,-Wextra,-fPIC", "-Xptxas=-v"]

    def one(source: str) -> str:
        target = folder / f"{Path(source).stem}.cu.o"
        if not target.exists() or target.stat().st_mtime < newest:
            command = ["nvcc", *flags, *codes, f'-DLORS_CUDA_ARCHS="{CUDA_NAME}"', "-c", source, "-o", str(target)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            (folder / f"{Path(source).stem}.resources.txt").write_text(done.stderr)
            if done.returncode:
                target.unlink(missing_ok=True)
                raise CompileError(f"nvcc failed on {source}:\n{done.stderr[-4000:]}")
        return str(target)

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        return list(pool.map(one, CUDA_SOURCES))


def cuda_extension() -> Pybind11Extension | None:
    home = find_cuda()
    if home is None:
        return None
    libraries = sorted({str(path.parent) for path in home.glob("**/libcudart_static.a")})
    return Pybind11Extension(
        "lors_kernels._cuda",
        ["csrc/bindings_cuda.cpp"],
        depends=[*CUDA_SOURCES, *sorted(glob("csrc/**/*.*h", recursive=True))],
        define_macros=[("LORS_CUDA_ARCHS", f'"{CUDA_NAME}"')],
        include_dirs=[str(home / "include")],
        library_dirs=libraries,
        libraries=["cudart_static", "dl", "rt", "pthread"],
        extra_compile_args=COMMON,
        cxx_std=17,
        optional=os.environ.get("LORS_BUILD_CUDA", "auto") == "auto",
    )


CUDA = cuda_extension()

ParallelCompile("LORS_BUILD_JOBS", default=os.cpu_count() or 1).install()


class BuildExt(build_ext):
    """Gives each module its own folder of object files: they share sources but not flags."""

    def build_extension(self, ext):
        shared = self.build_temp
        self.build_temp = str(Path(shared) / ext.name)
        try:
            if ext is CUDA:
                ext.extra_objects = compile_cuda(Path(self.build_temp))
            super().build_extension(ext)
        except Exception:
            Path(self.get_ext_fullpath(ext.name)).unlink(
                missing_ok=True
            )  # an older one would be installed in its place
            raise
        finally:
            self.build_temp = shared


setup(
    packages=find_packages("python_api") + find_packages(".", include=["lors_kernels*"]),
    cmdclass={"build_ext": BuildExt},
    ext_modules=[
        Pybind11Extension(
            f"lors_kernels._cpu_{isa}",
            sorted(["csrc/bindings.cpp", *glob("csrc/common/*.cpp"), *glob("csrc/cpu/*.cpp")]),
            depends=sorted(glob("csrc/**/*.h", recursive=True)),
            define_macros=[("LORS_MODULE", f"_cpu_{isa}")],
            extra_compile_args=[*COMMON, *flags],
            extra_link_args=["-pthread", *LINK],
            cxx_std=17,
        )
        for isa, flags in FLAGS.items()
    ]
    + ([CUDA] if CUDA else []),
)
