"""Which backend runs: what is absent is passed over, what is broken or misconfigured never is."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lors_kernels
from helpers import require_backend
from lors_kernels import Availability, BackendUnavailable, dispatch

PACKAGE = Path(lors_kernels.__file__).parent
PYTHON_API = PACKAGE.parent / "python_api"
BACKEND = "import numpy, lors_kernels.dispatch as d; print(d.select(None, numpy.ones((1, 1), numpy.float32)).NAME)"


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A copy of the package that a test may break; its directory goes on PYTHONPATH.

    What an editable install adds to the import system would find in the original what the copy has not.
    """
    place = tmp_path / "home"
    shutil.copytree(PACKAGE, place / "lors_kernels", ignore=shutil.ignore_patterns("__pycache__"))
    remove = "sys.meta_path[:] = [finder for finder in sys.meta_path if 'editable' not in str(finder).lower()]"
    (place / "sitecustomize.py").write_text(f"import sys\n{remove}\n")
    return place


def python(home: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **variables, "PYTHONPATH": os.pathsep.join([str(home), str(PYTHON_API)])}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, env=environment, cwd=home)


def doctor(home: Path, **variables: str) -> tuple[int, dict]:
    done = python(home, "-m", "lors_kernels", "--json", **variables)
    assert "Traceback" not in done.stderr
    return done.returncode, json.loads(done.stdout)


def merge(home: Path, models: Path, out: Path, *options: str, **variables: str) -> subprocess.CompletedProcess[str]:
    arguments = ("--base", str(models / "base"), "--expert", f"ca={models / 'ca'}", str(out), *options)
    return python(home, "-c", "from lors.cli import main; main()", "merge", *arguments, **variables)


def compiled(home: Path, stem: str = "_cpu_") -> list[Path]:
    require_backend("cpu")
    return sorted((home / "lors_kernels").glob(f"{stem}*.so"))


def test_what_is_not_built_is_passed_over(home: Path) -> None:
    for path in [*compiled(home), *compiled(home, "_cuda")]:
        path.unlink()
    status, found = doctor(home)
    assert status == 0 and found["broken"] == []
    assert found["backends"]["cpu"] == {
        "ok": False, "broken": False, "misconfigured": False, "state": "not available", "reason": "not built"
    }  # fmt: skip
    assert found["backends"]["cuda"]["reason"].startswith("not built")
    assert python(home, "-c", BACKEND).stdout == "reference\n"


def junk(home: Path) -> None:
    for path in compiled(home):
        path.write_bytes(b"\x7fELF and nothing that could be loaded")


def for_another_python(home: Path) -> None:
    for path in compiled(home):
        path.rename(path.with_name(path.name.replace(f"cpython-3{sys.version_info[1]}", "cpython-38")))


def half_built(home: Path) -> None:
    paths = compiled(home)
    for path in paths:
        if len(paths) > 1 and "portable" not in path.name or len(paths) == 1:
            path.rename(path.with_name("_cpu_other.so"))


BROKEN = {
    "junk": (junk, {}, "ImportError: "),
    "another Python": (for_another_python, {}, "ImportError: _cpu_.*: none for .*, got _cpu_.*cpython-38"),
    "half built": (half_built, {}, "ImportError: _cpu_.*: none for .*, got _cpu_"),
    "no such instruction set": (
        lambda home: None,
        {"LORS_ISA": "avx9"},
        "LORS_ISA: expected one of .*'avx9'",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_what_is_broken_is_not(home: Path, kind: str, tiny_whisper: Path, tmp_path: Path) -> None:
    spoil, variables, reason = BROKEN[kind]
    spoil(home)
    status, found = doctor(home, **variables)
    assert status == 1 and found["broken"] == ["cpu"]
    assert found["backends"]["cpu"]["state"] == "broken"
    assert re.match(reason, found["backends"]["cpu"]["reason"])
    done = merge(home, tiny_whisper, tmp_path / "out", **variables)
    assert done.returncode == 2 and not (tmp_path / "out").exists(), done.stderr
    where = "" if reason.startswith("LORS_ISA") else "backend cpu is broken: "
    assert re.fullmatch(f"error: {where}{reason}.*\n", done.stderr)


def test_another_backend_runs_by_name(home: Path, tiny_whisper: Path, tmp_path: Path) -> None:
    done = merge(home, tiny_whisper, tmp_path / "out", "--backend", "reference", LORS_ISA="avx9")
    assert done.returncode == 0 and (tmp_path / "out" / "model.safetensors").exists(), done.stderr
    shown = python(home, "-m", "lors_kernels", LORS_ISA="avx9")
    assert shown.returncode == 1 and "cpu        broken: LORS_ISA" in shown.stdout


def test_a_cuda_module_that_cannot_be_loaded_is_no_matter_on_the_cpu(home: Path) -> None:
    compiled(home)
    for path in (home / "lors_kernels").glob("_cuda*.so"):
        path.unlink()
    suffix = next(path.name for path in compiled(home)).split(".", 1)[1]
    (home / "lors_kernels" / f"_cuda.{suffix}").write_bytes(b"junk")
    status, found = doctor(home)
    assert status == 1 and found["broken"] == ["cuda"] and "ImportError" in found["backends"]["cuda"]["reason"]
    assert python(home, "-c", BACKEND).stdout == "cpu\n"


@pytest.mark.parametrize("fault", ["raise RuntimeError('no such symbol')", "import a_module_that_triton_needs"])
def test_a_triton_that_cannot_be_imported_is_broken(home: Path, fault: str) -> None:
    (home / "triton").mkdir()
    (home / "triton" / "__init__.py").write_text(fault)
    status, found = doctor(home)
    assert status == 1 and found["broken"] == ["triton"]
    assert found["backends"]["triton"]["reason"].startswith(("RuntimeError: no such", "ModuleNotFoundError: No module"))


@pytest.mark.parametrize("variable", ["LORS_THREADS", "OMP_NUM_THREADS"])
def test_doctor_names_a_number_of_threads_that_is_none(home: Path, variable: str) -> None:
    status, found = doctor(home, **{variable: "many"})
    assert status == 1 and found["broken"] == ["threads"]
    assert found["threads"] == f"{variable}: expected a whole number from 1 to 32768, got 'many'"
    assert found["backends"]["cpu"]["state"] != "broken"


@pytest.mark.parametrize(
    ("cuda", "triton", "expected"),
    [
        (Availability(True, "a GPU"), Availability(False, "junk", True), "cuda"),
        (Availability(False, "not built"), Availability(True, "a GPU"), "triton"),
        (Availability(False, "not built"), Availability(False, "not installed"), "reference"),
        (Availability(False, "not built"), Availability(False, "junk", True), "triton is broken: junk"),
        (Availability(False, "junk", True), Availability(True, "a GPU"), "cuda is broken: junk"),
    ],
)
def test_order_on_a_gpu(
    cuda: Availability, triton: Availability, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    states = {"cuda": cuda, "triton": triton, "reference": Availability(True, "torch")}
    monkeypatch.setattr(dispatch, "availability", states.__getitem__)
    monkeypatch.setattr(dispatch, "device_of", lambda x: "cuda")
    like = np.ones((1, 1), np.float32)
    if "broken" in expected:
        with pytest.raises(BackendUnavailable, match=expected):
            dispatch.select(None, like, "merge_update")
    else:
        assert expected == dispatch.select(None, like, "merge_update").NAME


def test_a_backend_without_an_operation(monkeypatch: pytest.MonkeyPatch) -> None:
    from lors_kernels.backends import cpu

    x = np.ones((2, 3), np.float32)
    monkeypatch.delattr(cpu, "sparse_part")
    with pytest.raises(BackendUnavailable, match="cpu: has no sparse_part"):
        lors_kernels.sparse_part(None, x, None, None, lors_kernels.KEEP_ALL, 6, backend="cpu")
    assert lors_kernels.sparse_part(None, x, None, None, lors_kernels.KEEP_ALL, 6).values.tolist() == [1.0] * 6


@pytest.mark.parametrize("numpy_too", [False, True])
def test_a_backend_gets_the_arrays_it_takes(numpy_too: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In lists too, in memory that both see; what it makes comes back as the caller's kind."""
    import torch

    from lors_kernels import reference

    def merge_update(out: Any, base: Any, tuned: list[Any], *rest: Any, threads: int | None) -> list[str]:
        out[:] = tuned[1]
        return [type(x).__name__ for x in (out, base, *tuned)]

    monkeypatch.setattr(reference, "NUMPY", numpy_too)
    monkeypatch.setattr(reference, "merge_update", merge_update)
    out, base, tuned = np.zeros((2, 3), np.float32), None, [np.full((2, 3), x, np.float32) for x in (1, 2)]
    got = lors_kernels.merge_update(
        out, base, tuned, [None] * 2, [None] * 2, [None] * 2, [1.0] * 2, backend="reference"
    )
    kind = "ndarray" if numpy_too else "Tensor"
    assert got == [kind, "NoneType", kind, kind] and out.tolist() == [[2.0] * 3] * 2
    monkeypatch.undo()
    svd = lors_kernels.truncated_svd(None, tuned[0], 1, backend="reference")
    assert all(isinstance(x, np.ndarray) for x in svd[:3]) and svd.backend == "reference"
    assert isinstance(
        lors_kernels.gram_apply(None, torch.ones(2, 3), torch.ones(3, 1), backend="reference"), torch.Tensor
    )
