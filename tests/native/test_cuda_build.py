"""The CUDA module without a GPU: what was built, what it needs, and the host's side of it."""

from __future__ import annotations

import itertools
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

import pytest
import torch

from helpers import require
from lors_kernels import BackendUnavailable, available_backends, gram_apply
from lors_kernels.backends import cuda, cuda_module
from lors_kernels.dispatch import select
from lors_kernels.group import MatrixGroup

ROOT = Path(__file__).parent.parent.parent
TILE = 16  # rows that gram_apply takes at a time


@pytest.fixture
def built() -> ModuleType:
    try:
        return cuda_module.library()
    except ModuleNotFoundError:
        require("cuda-build", False, "not built: no nvcc at build time, or LORS_BUILD_CUDA=0")
        raise


def test_availability_says_what_is_missing(built: ModuleType) -> None:
    status = available_backends()["cuda"]
    if torch.cuda.is_available():
        assert status.ok, status.reason
        return
    assert not status.ok
    assert status.reason.startswith(f"built for {built.arches}; no device")
    with pytest.raises(BackendUnavailable, match="cuda: built for .*no device"):
        gram_apply(None, torch.ones(2, 2), torch.ones(2, 1), backend="cuda")


def test_tensors_in_the_wrong_place_are_refused() -> None:
    if available_backends()["cuda"].ok:
        with pytest.raises(BackendUnavailable, match="cuda: runs on cuda, got tensors on cpu"):
            select("cuda", torch.ones(1, 1))
    assert select(None, torch.ones(1, 1)).NAME in ("cpu", "reference")


def test_native_code_for_every_architecture_and_ptx(built: ModuleType) -> None:
    tool = shutil.which("cuobjdump") or _triton_tool()
    require("cuobjdump", tool is not None, "not found")
    assert tool is not None
    listed = [
        subprocess.run([tool, flag, built.__file__], capture_output=True, text=True, check=True).stdout
        for flag in ("--list-elf", "--list-ptx")
    ]
    for arch in re.findall(r"sm_(\d+),", built.arches) + re.findall(r"sm_(\d+) and", built.arches):
        assert f"sm_{arch}.cubin" in listed[0]
    assert ".ptx" in listed[1]


def test_no_kernel_spills(built: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    """From the machine code itself: registers and stack of every kernel, the largest printed."""
    tool = shutil.which("cuobjdump") or _triton_tool()
    require("cuobjdump", tool is not None, "not found")
    assert tool is not None
    text = subprocess.run(
        [tool, "--dump-resource-usage", built.__file__], capture_output=True, text=True, check=True
    ).stdout
    arch, rows = "", []
    for line in text.splitlines():
        if found := re.search(r"arch = (sm_\d+)", line):
            arch = found.group(1)
        if found := re.search(r"Function (\S+):", line):
            name = found.group(1)
        if found := re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", line):
            rows.append((arch, re.findall(r"[a-z]+(?:_[yz])?_kernel", name)[0], *map(int, found.groups())))
    assert rows
    with capsys.disabled():
        print(f"\n{'arch':6s} {'kernel':18s} {'instances':>9s} {'registers':>9s} {'shared':>7s} {'stack':>6s}")
        for (arch, name), group in itertools.groupby(sorted(rows), key=lambda row: row[:2]):
            same = list(group)
            worst = [max(row[i] for row in same) for i in (2, 4, 3)]
            print(f"{arch:6s} {name:18s} {len(same):9d} {worst[0]:9d} {worst[1]:7d} {worst[2]:6d}")
    # what docs/gpu-notes.md names: gram_apply of float16 with 1280 of the shorter side
    known = {"tensor_kernel": 32}
    assert [row for row in rows if row[3] > known.get(row[1], 0) or row[5]] == []


def _triton_tool() -> str | None:
    try:
        import triton
    except ImportError:
        return None
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump")


def test_the_module_links_no_cuda_library(built: ModuleType) -> None:
    require("ldd", sys.platform == "linux" and shutil.which("ldd") is not None, "not on this system")
    needed = subprocess.run(["ldd", built.__file__], capture_output=True, text=True, check=True).stdout
    assert "cudart" not in needed and "torch" not in needed


ROOM = {"sm_90": 227 << 10, "sm_80": 163 << 10, "the least": 99 << 10}  # shared memory of a block


@pytest.mark.parametrize("item_size", [2, 4])
@pytest.mark.parametrize("device", ROOM)
def test_gram_plans_cover_every_row_and_fit_the_device(built: ModuleType, item_size: int, device: str) -> None:
    room = ROOM[device]
    for pairs, outer, inner in itertools.product((1, 7, 320), (1, 8, 131, 768, 5120), (8, 264, 768, 1280)):
        rows, chunks, per_thread, shared, tensor = built.plan_gram(pairs, outer, inner, item_size, True, 132, room)
        assert rows % TILE == 0 and (chunks - 1) * rows < outer <= chunks * rows
        assert (per_thread - 1) * 256 < inner <= per_thread * 256
        assert shared + (11 << 10 if tensor else 2 << 10) <= room, "with what is not dynamic"
        most = {"sm_90": 5, "sm_80": 4, "the least": 2}[device] if item_size == 4 else 5
        assert tensor == (per_thread <= most)
    assert built.plan_gram(1, 5120, 1280, 2, True, 132, room)[1] >= 66, "one matrix should fill half of the processors"
    assert built.plan_gram(320, 1280, 1280, 2, True, 132, room)[0] == 256


def test_what_the_fast_kernels_cannot_read_goes_to_the_plain_ones(built: ModuleType) -> None:
    assert built.plan_gram(1, 100, 2000, 4, True, 132, 99 << 10)[2] == 0
    assert built.plan_gram(1, 100, 64, 4, False, 132, 99 << 10)[2] == 0

    def fast(base: torch.Tensor | None, tuned: torch.Tensor) -> bool:
        return cuda.is_fast(MatrixGroup(None if base is None else [base], [[tuned]]))

    whole = torch.zeros(16, 64)
    assert fast(whole, whole) and fast(None, whole.half())
    assert not fast(whole.half(), whole)
    assert not fast(whole[:, 1:], whole[:, 1:]) and not fast(whole[:, 1:57], whole[:, :56])
    assert not fast(None, torch.zeros(16, 60).half())


def test_tiles_and_chunks(built: ModuleType) -> None:
    assert [built.tie_chunks(m, 1280) for m in (1, 64, 65, 1280)] == [1, 1, 2, 20]
    assert [built.tie_chunks(*shape) for shape in ((64, 8192), (1, 8193), (3, 1 << 20))] == [1, 2, 384]
    huge = 2**31 - 1  # rows and columns that each fit 32 bits, and whose product does not
    assert built.tie_chunks(huge, huge) == huge * 2**18
    assert built.merge_tiles(huge, huge) == 2**26 * 2**23 and built.ties_tiles(huge, huge) == 2**28 * 2**23
    assert built.plan_gram(1, huge, huge, 4, True, 132, 99 << 10)[:2] == (4096, 2**19)
    assert [built.merge_tiles(*shape) for shape in ((1, 1), (32, 256), (33, 257), (1280, 1280))] == [1, 1, 4, 200]
    assert [built.measure_tiles(*shape) for shape in ((1, 1), (128, 256), (129, 257), (1280, 1280))] == [1, 1, 4, 50]


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"LORS_BUILD_CUDA": "yes"}, "LORS_BUILD_CUDA: expected auto, 0 or 1, got 'yes'"),
        ({"LORS_BUILD_CUDA": "1", "PATH": "/nowhere"}, "LORS_BUILD_CUDA=1: expected nvcc on the PATH, found none"),
    ],
)
def test_a_build_that_cannot_be_done_says_so(variables: dict[str, str], message: str) -> None:
    command = [sys.executable, "setup.py", "--name"]
    found = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **variables}, capture_output=True, text=True, check=False
    )
    assert found.returncode and message in found.stderr


HOME = 'case "$*" in *--dryrun*) echo "#\\$ TOP={home}" >&2; exit 0;; esac'  # what a toolkit says of itself
WORKS = 'while [ $# -gt 0 ]; do [ "$1" = -o ] && : > "$2"; shift; done'  # whatever is to be written is there, and empty
# name -> (what nvcc does, the reason that is told)
NVCC = {
    "too old": (f"{HOME}\necho 'nvcc fatal   : Unsupported gpu architecture'; exit 1", "Unsupported gpu architecture"),
    "another host compiler": (
        f"{HOME}\necho 'In file included'; echo '#error -- unsupported GNU version!'; echo more; exit 1",
        "nvcc failed: #error -- unsupported GNU version!",
    ),
    "says nothing": (f"{HOME}\nexit 3", "nvcc failed: exit code 3"),
    "no toolkit": ("echo no such option", "expected nvcc --dryrun to name its toolkit, got 'no such option"),
    "hangs at once": ("sleep 1000", "nvcc x.cu took more than 2 s"),
    "hangs on a file": (f"{HOME}\nsleep 1000 & echo $! > {{home}}/child; wait", "probe.cu took more than 2 s"),
    "fails on a kernel": (
        f"{HOME}\ncase \"$*\" in *probe.cu) {WORKS};; *) echo 'x.cu(3): error: no such thing'; exit 1;; esac",
        "nvcc failed: x.cu(3): error: no such thing",
    ),
}


def build_with_fakes(tmp_path: Path, wanted: str, nvcc: str) -> subprocess.CompletedProcess[str]:
    for name, text in {"nvcc": nvcc, "g++": WORKS}.items():
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(f"#!/bin/sh\n{text}\n".replace("{home}", str(tmp_path)))
        program.chmod(0o755)
    compilers = dict.fromkeys(("CC", "CXX", "LDSHARED", "LDCXXSHARED"), str(tmp_path / "bin" / "g++"))
    environment = {**os.environ, **compilers, "LORS_BUILD_CUDA": wanted, "CUDA_HOME": "", "LORS_NVCC_SECONDS": "2"}
    environment["PATH"] = f"{tmp_path / 'bin'}:{environment['PATH']}"
    command = [sys.executable, "setup.py", "-q", "build_ext", "-b", str(tmp_path / "lib"), "-t", str(tmp_path / "temp")]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("what", NVCC)
def test_a_compiler_that_does_not_work_breaks_no_install_that_did_not_ask_for_it(what: str, tmp_path: Path) -> None:
    nvcc, reason = NVCC[what]
    old = tmp_path / "lib" / "lors_kernels" / f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    old.parent.mkdir(parents=True)
    old.write_text("of an earlier build")
    found = build_with_fakes(tmp_path, "auto", nvcc)
    assert found.returncode == 0, found.stderr
    (line,) = [line for line in (found.stderr + found.stdout).splitlines() if line.strip()]
    assert 'building extension "lors_kernels._cuda" failed: ' in line and reason in line
    assert not old.exists() and list(old.parent.glob("_cpu_portable*"))
    if (child := tmp_path / "child").exists():
        status = Path(f"/proc/{child.read_text().strip()}/status")
        assert not status.exists() or "State:\tZ" in status.read_text(), "what it started has ended"


@pytest.mark.parametrize("what", ["too old", "no toolkit", "hangs on a file", "fails on a kernel"])
def test_a_compiler_that_was_asked_for_and_does_not_work_is_an_error(what: str, tmp_path: Path) -> None:
    nvcc, reason = NVCC[what]
    found = build_with_fakes(tmp_path, "1", nvcc)
    assert found.returncode and reason in found.stderr and "Traceback" not in found.stderr


def test_a_compiler_that_cannot_be_run(tmp_path: Path) -> None:
    (tmp_path / "nvcc").write_text("#!/nowhere\n")
    (tmp_path / "nvcc").chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "LORS_BUILD_CUDA": "auto"}
    code = "import runpy, sys; sys.argv[1:] = ['--name']; runpy.run_path('setup.py')['find_cuda']()"
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert found.returncode and "CompileError: nvcc cannot be run: No such file or directory" in found.stderr


def test_kernels_are_compiled_once_for_all_pythons(tmp_path: Path) -> None:
    """In one tree; and again for other architectures. nvcc is told where the runtime is: as wheels it does not find it."""
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "libcudart_static.a").touch()
    log = f'echo "$*" >> {tmp_path}/log\n{HOME}\n{WORKS}'
    build_with_fakes(tmp_path, "1", log)
    environment = {**os.environ, "LORS_BUILD_CUDA": "1", "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    environment |= dict.fromkeys(("CC", "CXX", "LDSHARED", "LDCXXSHARED"), str(tmp_path / "bin" / "g++"))

    def compiled(python: str, archs: str) -> int:
        (tmp_path / "log").write_text("")
        command = [sys.executable, "setup.py", "-q", "build_ext", "-b", str(tmp_path / python)]
        command += ["-t", str(tmp_path / "build" / f"temp.linux-{python}")]
        environment["LORS_CUDA_ARCHS"] = archs
        subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
        log = (tmp_path / "log").read_text()
        (probe,) = [line for line in log.splitlines() if line.endswith("probe.cu")]
        assert f"-L{tmp_path / 'elsewhere'} " in probe
        return log.count(" -c csrc/cuda/")

    sources = len(list((ROOT / "csrc" / "cuda").glob("*.cu")))
    assert [compiled("311", "80,90"), compiled("312", "80,90"), compiled("312", "80")] == [sources, 0, sources]
