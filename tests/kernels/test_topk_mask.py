from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import lors_kernels as kernels
from helpers import assert_right, ringed
from lors_kernels import NonFiniteError
from lors_kernels.arrays import to_torch
from lors_kernels.testing.cases import CASES, DTYPES, Case
from lors_kernels.testing.numerics import exact_selection

SMALL = [case for case in CASES if not case.large]


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_cases(case: Case, backend: str) -> None:
    assert_right("topk_mask", case, backend)


@given(
    m=st.integers(1, 40),
    n=st.integers(1, 70),
    distinct=st.integers(0, 40),
    share=st.floats(0, 1),
    dtype=st.sampled_from(list(DTYPES)),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_matrix_packed_and_strided_in_numpy_and_torch(
    m: int, n: int, distinct: int, share: float, dtype: str, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    x = (rng.integers(-distinct, distinct + 1, (m, n)) * 0.25).astype(DTYPES[dtype])
    k = round(share * x.size)
    exact = exact_selection(x.astype(np.float32), k)
    view, whole = ringed(x, ring=3)
    for backend in ("cpu", "reference"):
        for same in (x, view):
            assert (kernels.topk_mask(same, k, backend=backend) == exact).all()
        strided = to_torch(whole)[1:-1, 3 : 3 + n]
        mask = kernels.topk_mask(strided, k, backend=backend)
        assert mask.dtype == torch.bool and (mask.numpy() == exact).all()


def test_signs_of_zero_are_equal_magnitudes(backend: str) -> None:
    x = np.array([[0.0, -0.0, 1e-45, -0.0]], np.float32)
    for k, row in enumerate(([0, 0, 0, 0], [0, 0, 1, 0], [1, 0, 1, 0], [1, 1, 1, 0], [1, 1, 1, 1])):
        assert kernels.topk_mask(x, k, backend=backend).tolist() == [[bool(entry) for entry in row]]


@pytest.mark.parametrize("shape", [(0, 3), (3, 0)])
def test_empty_matrices(shape: tuple[int, int], backend: str) -> None:
    assert kernels.topk_mask(np.zeros(shape, np.float32), 0, backend=backend).shape == shape


@pytest.mark.parametrize(
    ("x", "k", "message"),
    [
        (np.ones((2, 3), np.float32), 7, r"k: expected 0 to 6 for a matrix \[2, 3\], got 7"),
        (np.ones((2, 3), np.float32), True, "k: expected an integer, got bool True"),
        (np.ones(3, np.float32), 1, "expected a matrix"),
        (np.ones((2, 3)), 1, "expected a matrix .* got .* float64"),
        (np.array([[1, np.nan, np.inf]], np.float32), 0, "got 2 NaN or infinite entries"),
    ],
)
def test_wrong_arguments(x: np.ndarray, k: int, message: str, backend: str) -> None:
    with pytest.raises((TypeError, ValueError, NonFiniteError), match=message):
        kernels.topk_mask(x, k, backend=backend)
