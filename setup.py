"""Builds the native modules, and completes links of the README; everything else is declared in pyproject.toml.

The CPU source is compiled once per instruction set into separate modules (`_cpu_avx512`, `_cpu_avx2`, `_cpu_portable`);
lors_kernels picks one when it first needs it. Separate modules, because inline functions of the standard library
compiled for AVX-512 must never be merged by the linker into code that an older processor runs. Everywhere but on x86-64
Linux there is one, `_cpu_portable`: with NEON on arm64, and on macOS without -m flags, because one compilation may be for
both of its processors. LORS_BUILD_ISA names the only one to build, for a machine that runs it.

The CUDA module (`_cuda`) is built where nvcc is found: LORS_BUILD_CUDA=auto (the default; where it cannot be built a line
says why, and the rest is installed), 0 (never) or 1 (or fail). nvcc is tried on a few lines first, so that one that is too
old, hangs, or dislikes the C++ compiler is known within a minute; no call of it may take longer than LORS_NVCC_SECONDS.
LORS_CUDA_ARCHS lists the native architectures; PTX of the last one serves newer devices. The CUDA runtime is linked
statically, and no GPU is looked for: what is built does not depend on the machine that builds it.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sysconfig
import tempfile
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
CUDA_WANTED = os.environ.get("LORS_BUILD_CUDA", "auto")
NVCC = shutil.which("nvcc") or "nvcc"
NVCC_SECONDS = float(os.environ.get("LORS_NVCC_SECONDS", "1800"))
FLAGS_CUDA = ["-std=c++17", "-O3", *(f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in CUDA_ARCHS)]
FLAGS_CUDA.append(f"-gencode=arch=compute_{CUDA_ARCHS[-1]},code=compute_{CUDA_ARCHS[-1]}")
PROBE = """#include <cuda_fp16.h>
__global__ void probe(__half* x) { if constexpr (sizeof(x) > 0) *x = __float2half(0.0f); }
int main() { probe<<<1, 1>>>(nullptr); return cudaDeviceSynchronize(); }
"""


RUNNING = set[subprocess.Popen[str]]()


def nvcc(arguments: list[str], seconds: float = NVCC_SECONDS) -> str:
    """What nvcc says; CompileError, in one line, where it fails or does not end. Ends what it started too."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    try:
        process = subprocess.Popen([NVCC, *arguments], **pipes, text=True, errors="replace", start_new_session=True)
    except OSError as error:
        raise CompileError(f"nvcc cannot be run: {error.strerror}") from None
    RUNNING.add(process)
    try:
        said, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        end(process)
        raise CompileError(f"nvcc {arguments[-1]} took more than {seconds:g} s") from None
    except BaseException:  # Ctrl-C, of which a session of its own hears nothing
        end(process)
        raise
    finally:
        RUNNING.discard(process)
    if process.returncode:
        if CUDA_WANTED == "1":
            print(said[-4000:])  # whoever asked for it gets all of it
        lines = [line.strip() for line in said.splitlines() if line.strip()]
        telling = [line for line in lines if re.search(r"error|fatal|unsupported|cannot find", line, re.IGNORECASE)]
        raise CompileError(f"nvcc failed: {(telling or lines[-1:] or [f'exit code {process.returncode}'])[0][:300]}")
    return said


def end(process: subprocess.Popen[str]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def find_cuda() -> tuple[Path, list[str]]:
    """The toolkit's headers and libraries, after nvcc has shown that it can compile, for every architecture, and link."""
    # nvcc may be a link or a script: it says itself where it lives
    said = nvcc(["--dryrun", "x.cu"], min(60, NVCC_SECONDS))
    home = next((Path(line.split("TOP=")[1]).resolve() for line in said.splitlines() if "TOP=" in line), None)
    if home is None:
        raise CompileError(f"expected nvcc --dryrun to name its toolkit, got {' '.join(said.split())[:300]!r}")
    # told explicitly: where the toolkit comes as wheels, nvcc looks in lib64, which they have not got
    libraries = sorted({str(path.parent) for path in home.glob("**/libcudart_static.a")})
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "probe.cu"
        source.write_text(PROBE)
        where = [f"-L{path}" for path in libraries]
        nvcc([*FLAGS_CUDA, *where, "-o", str(source.with_suffix("")), str(source)], min(120, NVCC_SECONDS))
    return home / "include", libraries


def compile_cuda(folder: Path) -> list[str]:
    """nvcc on every .cu file that is newer than its object."""
    folder.mkdir(parents=True, exist_ok=True)
    newest = max(os.path.getmtime(path) for path in [__file__, *CUDA_SOURCES, *glob("csrc/**/*.*h", recursive=True)])
    flags = [*FLAGS_CUDA, "--Werror=all-warnings", "-Xcompiler=-Wall,-Wextra,-fPIC", "-Xptxas=-v"]

    def one(source: str) -> str:
        target = folder / f"{Path(source).stem}.cu.o"
        if not target.exists() or target.stat().st_mtime < newest:
            part = target.with_suffix(".part")  # an object is there when it is whole
            said = nvcc([*flags, f'-DLORS_CUDA_ARCHS="{CUDA_NAME}"', "-o", str(part), "-c", source])
            (folder / f"{Path(source).stem}.resources.txt").write_text(said)
            part.replace(target)
        return str(target)

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        try:
            return list(pool.map(one, CUDA_SOURCES))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for process in list(RUNNING):
                end(process)
            raise


def cuda_extension() -> Pybind11Extension | None:
    if CUDA_WANTED not in ("auto", "0", "1"):
        raise SystemExit(f"LORS_BUILD_CUDA: expected auto, 0 or 1, got {CUDA_WANTED!r}")
    if CUDA_WANTED == "0":
        return None
    if shutil.which("nvcc") is None:
        if CUDA_WANTED == "1":
            raise SystemExit("LORS_BUILD_CUDA=1: expected nvcc on the PATH, found none")
        return None
    return Pybind11Extension(
        "lors_kernels._cuda",
        ["csrc/bindings_cuda.cpp"],
        depends=[*CUDA_SOURCES, *sorted(glob("csrc/**/*.*h", recursive=True))],
        define_macros=[("LORS_CUDA_ARCHS", f'"{CUDA_NAME}"')],
        libraries=["cudart_static", "dl", "rt", "pthread"],
        extra_compile_args=COMMON,
        cxx_std=17,
        optional=CUDA_WANTED == "auto",
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
                self.prepare_cuda(ext, Path(shared))
            super().build_extension(ext)
        except Exception:
            Path(self.get_ext_fullpath(ext.name)).unlink(
                missing_ok=True
            )  # an older one would be installed in its place
            raise
        finally:
            self.build_temp = shared

    def prepare_cuda(self, ext, shared):
        """Compiles the kernels, once for all Pythons that are built for in one tree."""
        headers, libraries = find_cuda()
        ext.include_dirs.append(str(headers))
        ext.library_dirs += libraries
        folder = shared.parent if shared.name.startswith("temp.") else Path(self.build_temp)
        ext.extra_objects = compile_cuda(folder / f"cuda-{'-'.join(CUDA_ARCHS)}")


def package_page():
    """The README for the package page, where links between files of the repository need its address."""
    home = re.search(r'^Repository = "(.+)"$', Path("pyproject.toml").read_text("utf-8"), re.MULTILINE)[1]

    def complete(found):
        before, target = found.groups()
        if re.match(r"[a-z]+:|#", target):
            return found[0]
        kind = "raw" if Path(target).suffix in {".png", ".svg"} else "blob"
        return f"{before}{home}/{kind}/main/{target}"

    return re.sub(r'(\]\(|(?:src|srcset|href)=")([^)"\s]+)', complete, Path("README.md").read_text("utf-8"))


setup(
    long_description=package_page(),
    long_description_content_type="text/markdown",
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
