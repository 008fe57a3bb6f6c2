"""Helpers of the tests that are no fixtures."""

from __future__ import annotations

import os
from importlib import import_module
from typing import Any

import numpy as np
import pytest

from lors_kernels.dispatch import availability
from lors_kernels.testing.cases import Case
from lors_kernels.testing.checks import CHECKS, Place

BACKENDS = ("cpu", "reference")
REQUIRED = frozenset(filter(None, os.environ.get("LORS_REQUIRE", "").split(",")))
OPTIONAL = frozenset(
    ("cpu", "reference", "triton", "cuda", "triton-interpreter", "cuda-build", "cuda-emulation", "cuobjdump")
    + ("peers", "speech", "sweep", "ray", "plot", "remote", "export", "docs", "chromium", "espeak")
    + ("linux", "avx2", "avx512", "portable", "tmpfs", "ldd", "precision-switches")
)


def require(name: str, available: bool, reason: str) -> None:
    """Skips the test when something optional is missing, with the reason; fails if LORS_REQUIRE names it.

    At the top of a test file it skips, or fails, all of it.
    """
    assert name in OPTIONAL, name
    if available:
        return
    if name in REQUIRED:
        pytest.fail(f"{name} is required by LORS_REQUIRE and missing: {reason}", pytrace=False)
    pytest.skip(f"{name}: {reason}", allow_module_level=True)


def module(path: str, extra: str) -> Any:
    """An optional module, imported; `require` of its extra when it is not there or broken."""
    try:
        return import_module(path)
    except ImportError as error:
        reason = str(error)
    return require(extra, False, reason)


def require_backend(name: str) -> str:
    status = availability(name)
    require(name, status.ok, status.reason)
    return name


def assert_right(operation: str, case: Case, backend: str) -> None:
    """What `lors validate` checks of an operation."""
    wrong = [finding for finding in CHECKS[operation](Place(backend), case) if not finding.ok]
    assert not wrong, wrong


def assert_no_worse(found: Any, naive: Any, exact: Any, factor: float = 2.0) -> None:
    """A float32 result against float64: its largest error is no larger than that of plain float32, but for `factor`.

    2: the same roundings in another order. One rounding of the largest value comes on top, for plain float32 may be exact by
    luck, and one step between denormals.
    """
    found, naive, exact = (np.asarray(x, np.float64) for x in (found, naive, exact))
    assert found.shape == exact.shape
    allowed = factor * np.abs(naive - exact).max(initial=0) + 2.0**-24 * np.abs(exact).max(initial=0) + 2.0**-149
    assert np.abs(found - exact).max(initial=0) <= allowed


def ringed(array: np.ndarray, ring: int = 64) -> tuple[np.ndarray, np.ndarray]:
    """A copy of a matrix with strided rows inside a larger buffer of sentinels: (view, whole buffer)."""
    rows, cols = array.shape
    whole = np.full((rows + 2, cols + 2 * ring), 77, dtype=array.dtype)
    view = whole[1:-1, ring : ring + cols]
    view[...] = array
    return view, whole
