"""One operation, one stem: who finds one of its files finds the others."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import lors_kernels
from benchmarks.run_operation import OPERATIONS
from lors_kernels import reference
from lors_kernels.backends import cpu
from lors_kernels.testing import bench
from lors_kernels.testing.checks import CHECKS

ROOT = Path(__file__).parents[2]
PUBLIC = [
    name
    for name in lors_kernels.__all__
    if getattr(getattr(lors_kernels, name), "__module__", None) == f"lors_kernels.{name}"
]  # a function in a module of its name
COMPILED = {path.stem for path in (ROOT / "csrc" / "cpu").glob("*.cpp")} & set(PUBLIC)


def source(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def test_every_table_has_every_operation() -> None:
    assert sorted(OPERATIONS) == sorted(bench.OPERATIONS) == sorted(PUBLIC)
    assert set(PUBLIC) <= set(CHECKS)


@pytest.mark.parametrize("operation", PUBLIC)
def test_every_operation_has_its_test_and_its_benchmark(operation: str) -> None:
    for path, call in (
        (f"tests/kernels/test_{operation}.py", "def test_"),
        (f"benchmarks/bench_{operation}.py", f"def test_{operation}("),
    ):
        text = source(path)
        assert f"{operation}(" in text and call in text, path


def test_every_binding_is_one_operation_of_the_backend_and_the_reference() -> None:
    bound = set(re.findall(r'def\("(\w+)", \1\)', source("csrc/bindings.cpp")))
    bound -= {"eigh_single"}  # a step of truncated_svd
    assert bound == COMPILED
    declared = set(re.findall(r"^\w+ (\w+)\(", source("csrc/cpu/ops.h"), re.M))
    assert bound <= declared
    for operation in bound:
        assert hasattr(cpu, operation) and hasattr(reference, operation), operation


@pytest.mark.parametrize("operation", sorted(COMPILED))
def test_the_native_test_calls_every_compiled_operation(operation: str) -> None:
    assert f"lors::{operation}(" in source("tests/native/native_test.cpp")


@pytest.mark.parametrize("folder", ["csrc/cuda", "lors_kernels/backends/triton"])
def test_gpu_kernels_have_the_same_stems(folder: str) -> None:
    shared = {"__init__", "aot", "backend", "launch", "residual"}
    stems = {path.stem for path in (ROOT / folder).iterdir() if path.suffix in (".cu", ".py")}
    steps = {"eigh", "orthonormalise"}  # of truncated_svd
    assert COMPILED & stems and stems <= COMPILED | shared | steps
