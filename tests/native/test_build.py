"""What setup.py asks of the compiler on each platform, and what the CPU backend picks there.

The compiler is a script that writes down its arguments: no processor or cross compiler is needed.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tarfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from lors_kernels.backends import cpu

ROOT = Path(__file__).parent.parent.parent
X86 = ("-mavx", "-mfma", "-mf16c", "-mpopcnt", "-mprefer")
RECORDER = f"""#!{sys.executable}
import json, sys
with open(__file__ + ".log", "a") as log:
    log.write(json.dumps(sys.argv[1:]) + "\\n")
open(sys.argv[sys.argv.index("-o") + 1], "w").close()
"""


def setup(folder: Path, target: str, **variables: str) -> tuple[subprocess.CompletedProcess[str], list[list[str]]]:
    """`setup.py build_ext` for a platform: its outcome, and the arguments of every call of the compiler."""
    compiler = folder / "compiler"
    compiler.write_text(RECORDER)
    compiler.chmod(0o755)
    log = folder / "compiler.log"
    environment = {**os.environ, "_PYTHON_HOST_PLATFORM": target, "CC": str(compiler), "CXX": str(compiler)}
    environment |= {"LORS_BUILD_CUDA": "0", "LORS_BUILD_JOBS": "1", "CFLAGS": "", "CXXFLAGS": "", **variables}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(folder / "lib")]
    command += ["--build-temp", str(folder / "temp")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    return done, [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


@pytest.mark.parametrize(
    ("target", "modules"),
    [
        ("linux-x86_64", {"avx512", "avx2", "portable"}),
        ("linux-aarch64", {"portable"}),
        ("macosx-11.0-arm64", {"portable"}),
        ("macosx-10.13-universal2", {"portable"}),
        ("linux-ppc64le", {"portable"}),
    ],
)
def test_flags_follow_the_platform_that_is_built_for(tmp_path: Path, target: str, modules: set[str]) -> None:
    done, calls = setup(tmp_path, target, LORS_CXXFLAGS="-DWANTED")
    assert done.returncode == 0, done.stderr[-2000:]
    built = {path.name.split(".")[0] for path in (tmp_path / "lib" / "lors_kernels").iterdir()}
    assert built == {f"_cpu_{isa}" for isa in modules}
    compiled = [call for call in calls if "-c" in call]
    sources = {path.name for path in [*ROOT.glob("csrc/cpu/*.cpp"), *ROOT.glob("csrc/common/*.cpp")]} | {"bindings.cpp"}
    for isa in modules:
        mine = [call for call in compiled if f"-DLORS_MODULE=_cpu_{isa}" in call]
        assert {Path(call[call.index("-c") + 1]).name for call in mine} == sources
        for call in mine:
            assert {"-std=c++17", "-O3", "-DWANTED"} <= set(call)
            given = {flag for flag in call if flag.startswith(X86)}
            assert ("-mavx512f" in given) == (isa == "avx512")
            assert ("-mavx2" in given) == (isa != "portable")
            assert isa != "portable" or not given
    assert len(compiled) == len(modules) * len(sources)


def test_one_instruction_set_alone(tmp_path: Path) -> None:
    done, calls = setup(tmp_path, "linux-x86_64", LORS_BUILD_ISA="avx2")
    assert done.returncode == 0, done.stderr[-2000:]
    assert [path.name.split(".")[0] for path in (tmp_path / "lib" / "lors_kernels").iterdir()] == ["_cpu_avx2"]
    done, _ = setup(tmp_path, "linux-aarch64", LORS_BUILD_ISA="avx2")
    assert done.returncode and done.stderr == "LORS_BUILD_ISA: expected one of portable, got 'avx2'\n"


def test_a_source_distribution_has_all_that_a_build_and_its_tests_need(tmp_path: Path) -> None:
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", tmp_path, "sdist", "--dist-dir", tmp_path]
    environment = {**os.environ, "LORS_BUILD_CUDA": "0"}  # as where no nvcc names the CUDA sources
    subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, check=True)
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        found = {name.partition("/")[2] for name in archive.getnames()}
    folders = ("csrc", "lors_kernels", "python_api/lors", "tests", "benchmarks", "examples", "docs")
    files = {path for folder in folders for path in (ROOT / folder).rglob("*") if path.is_file()}
    wanted = {str(path.relative_to(ROOT)) for path in files if path.suffix not in (".pyc", ".so")}
    wanted |= {"setup.py", "pyproject.toml", "constraints.txt", "Makefile", "README.md", "LICENSE"}
    assert len(wanted) > 300 and wanted - found == set()
    assert not [name for name in found if name.endswith((".so", ".pyc"))]


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13"])
def test_constraints_name_one_version_that_this_python_can_have(python: str) -> None:
    """As far as the packages that are installed here can tell: what each says of the Pythons it needs."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    pins = [pin for pin in pins if pin.marker is None or pin.marker.evaluate({"python_version": python})]
    names = [canonicalize_name(pin.name) for pin in pins]
    assert len(names) > 100 and len(names) == len(set(names))
    installed = {canonicalize_name(d.metadata["Name"]): d for d in metadata.distributions()}
    checked = [(pin, installed[name]) for pin, name in zip(pins, names, strict=True) if name in installed]
    refused = [
        str(pin)
        for pin, found in checked
        if pin.specifier.contains(found.version)
        and not SpecifierSet(found.metadata.get("Requires-Python", "")).contains(f"{python}.20")
    ]
    assert checked and refused == []


def test_windows_is_refused_in_one_line(tmp_path: Path) -> None:
    done, calls = setup(tmp_path, "win-amd64")
    assert done.returncode and not calls
    assert done.stderr.strip() == "LoRS: expected Linux or macOS, got win-amd64"


@pytest.mark.parametrize("machine", ["aarch64", "arm64", "ppc64le"])
def test_other_processors_take_the_portable_build(monkeypatch: pytest.MonkeyPatch, machine: str) -> None:
    monkeypatch.setattr(platform, "machine", lambda: machine)
    monkeypatch.delenv("LORS_ISA", raising=False)
    assert cpu.instruction_set() == "portable"
    monkeypatch.setenv("LORS_ISA", "avx2")
    with pytest.raises(ValueError, match="LORS_ISA: expected one of portable on this processor, got 'avx2'"):
        cpu.instruction_set()


def test_the_best_build_that_the_processor_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.delenv("LORS_ISA", raising=False)
    old = {"sse4_2", "popcnt"}
    new = old | {"avx2", "fma", "f16c"}
    newest = new | {"avx512f", "avx512bw", "avx512dq", "avx512vl"}
    for flags, best in [(old, "portable"), (new, "avx2"), (newest, "avx512"), (newest - {"avx512vl"}, "avx2")]:
        monkeypatch.setattr(cpu, "cpu_flags", lambda flags=flags: flags)
        assert cpu.instruction_set() == best
    monkeypatch.setattr(cpu, "cpu_flags", lambda: new)
    monkeypatch.setenv("LORS_ISA", "avx512")
    with pytest.raises(ValueError, match="one of avx2, portable on this processor, got 'avx512'"):
        cpu.instruction_set()
