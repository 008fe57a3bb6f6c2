from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import lors_kernels as kernels
from helpers import assert_right
from lors_kernels import KEEP_ALL, KEEP_NONE, Threshold
from lors_kernels.testing import oracle
from lors_kernels.testing.cases import CASES, DTYPES, Case
from lors_kernels.testing.checks import residual_of
from lors_kernels.testing.numerics import delta_of

SMALL = [case for case in CASES if not case.large]


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_cases(case: Case, backend: str) -> None:
    assert_right("sparse_part", case, backend)


@given(
    m=st.integers(1, 40),
    n=st.integers(1, 70),
    rank=st.integers(0, 3),
    share=st.floats(0, 1),
    distinct=st.integers(1, 50),
    dtypes=st.tuples(st.sampled_from(list(DTYPES)), st.sampled_from(list(DTYPES))),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_selection_is_stored_entry_for_entry(
    m: int, n: int, rank: int, share: float, distinct: int, dtypes: tuple[str, str], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    base, tuned = (rng.integers(-distinct, distinct + 1, (m, n)).astype(DTYPES[dtype]) for dtype in dtypes)
    left, right = ((rng.standard_normal((x, rank)) / 8).astype(np.float32) if rank else None for x in (m, n))
    for backend in ("cpu", "reference"):
        residual = delta_of(base, tuned) if not rank else residual_of(backend, base, tuned, left, right)
        k = round(share * residual.size)
        threshold = oracle.nth_largest(residual, k)
        part = kernels.sparse_part(base, tuned, left, right, threshold, k, backend=backend)
        mask = oracle.selected(residual, threshold)
        assert part.mask.tobytes() == np.packbits(mask, bitorder="little").tobytes()
        assert part.values.tobytes() == residual[mask].tobytes()
        assert (part.mask.dtype, part.values.dtype, part.values.shape) == (np.uint8, np.float32, (k,))


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
def test_empty_matrices(shape: tuple[int, int], backend: str) -> None:
    part = kernels.sparse_part(None, np.zeros(shape, np.float32), None, None, KEEP_ALL, 0, backend=backend)
    assert part.mask.size == part.values.size == 0


@pytest.mark.parametrize(
    ("threshold", "k", "message"),
    [
        (KEEP_ALL, 5, "threshold: expected one that keeps 5 entries, got more"),
        (Threshold(2.0, 0, 0), 5, "threshold: expected one that keeps 5 entries, got 3"),
        (Threshold(2.0, 0, 0), 0, "threshold: expected one that keeps 0 entries, got more"),
        (KEEP_NONE, 1, "threshold: expected one that keeps 1 entries, got 0"),
        (KEEP_ALL, -1, r"k: expected 0 to 6 for a matrix \[2, 3\], got -1"),
        (KEEP_ALL, 7, "k: expected 0 to 6"),
        (KEEP_ALL, 6.0, "k: expected an integer, got float 6.0"),
        (2.0, 6, "threshold: expected a Threshold, got float"),
        (Threshold(-1.0, 0, 0), 6, "threshold.value: expected a magnitude of float32, got -1.0"),
        (Threshold(float("nan"), 0, 0), 6, "threshold.value: expected a magnitude of float32, got nan"),
        (Threshold(1.0, 0, 2**63), 6, "threshold.cut: expected 0 to"),
    ],
)
def test_wrong_arguments(threshold: Threshold, k: int, message: str, backend: str) -> None:
    tuned = np.array([[1, -2, 3], [-4, 5, 0]], np.float32)
    with pytest.raises((TypeError, ValueError), match=message):
        kernels.sparse_part(None, tuned, None, None, threshold, k, backend=backend)


def test_stored_parts_live_in_main_memory() -> None:
    import torch

    with pytest.raises(TypeError, match="tuned: expected a numpy array, got a torch tensor"):
        kernels.sparse_part(None, torch.ones(2, 3), None, None, KEEP_ALL, 6)
