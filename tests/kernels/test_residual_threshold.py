from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import lors_kernels as kernels
from helpers import ringed
from lors_kernels import NonFiniteError, Threshold
from lors_kernels.testing.cases import CASES, DTYPES, Case, interesting_k
from lors_kernels.testing.checks import residual_of
from lors_kernels.testing.numerics import delta_of, exact_selection, selected

SMALL = [case for case in CASES if not case.large]


def check(residual: np.ndarray, threshold: Threshold, k: int) -> None:
    mask = selected(residual, threshold)
    assert mask.sum() == k
    assert (mask == exact_selection(residual, k)).all()
    if k:
        assert threshold.value in np.abs(residual)
        assert threshold.ties == (mask & (np.abs(residual) == threshold.value)).sum() > 0


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_cases_of_delta_itself(case: Case, backend: str) -> None:
    base, tuned = case.matrices()
    residual = delta_of(base, tuned)
    for k in interesting_k(residual.size):
        check(residual, kernels.residual_threshold(base, tuned, k=k, backend=backend), k)


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_cases_of_a_residual(case: Case, backend: str) -> None:
    base, tuned = case.matrices()
    svd = kernels.truncated_svd(base, tuned, case.rank)
    residual = residual_of(backend, base, tuned, svd.left, svd.right)
    for k in interesting_k(residual.size):
        check(residual, kernels.residual_threshold(base, tuned, svd.left, svd.right, k, backend=backend), k)


@pytest.mark.parametrize("name", ["small-attn-power", "small-fc1-power", "small-attn-flat"])
def test_real_sizes(name: str) -> None:
    base, tuned = next(case for case in CASES if case.name == name).matrices()
    svd = kernels.truncated_svd(base, tuned, 7)
    residual = residual_of("cpu", base, tuned, svd.left, svd.right)
    for k in (residual.size // 5, residual.size // 2, 1):
        for threads in (1, 2):
            check(residual, kernels.residual_threshold(base, tuned, svd.left, svd.right, k, threads=threads), k)


@pytest.mark.parametrize("offset", range(5))
def test_a_sample_unlike_the_rest_falls_back_to_counting_all_digits(offset: int) -> None:
    """Every fifth piece of a row is looked at here, and for one offset is of another scale than all that is not."""
    tuned = np.random.default_rng(0).standard_normal((4096, 64)).astype(np.float32)
    for scale in (1e-6, 1e6):
        unlike = tuned.copy()
        unlike.reshape(-1, 32)[offset::5] *= np.float32(scale)
        for k in interesting_k(tuned.size):
            check(unlike, kernels.residual_threshold(None, unlike, k=k), k)


@pytest.mark.parametrize("axis", [0, 1])
def test_rows_and_columns_of_any_scale_need_one_pass(axis: int) -> None:
    """Counting all digits takes seven times as long."""
    rng = np.random.default_rng(0)
    even = rng.standard_normal((1280, 1280)).astype(np.float32)
    scales = np.exp(0.3 * rng.standard_normal(1280)).astype(np.float32)
    uneven = even * (scales if axis else scales[:, None])
    assert seconds(uneven) < 3 * seconds(even)


def seconds(tuned: np.ndarray) -> float:
    """The least of some runs, in time of this thread."""
    taken = []
    for _ in range(7):
        start = time.thread_time()
        kernels.residual_threshold(None, tuned, k=tuned.size // 5, backend="cpu", threads=1)
        taken.append(time.thread_time() - start)
    return min(taken)


@given(
    m=st.integers(1, 60),
    n=st.integers(1, 60),
    distinct=st.integers(1, 3000),
    exponent=st.integers(0, 30),
    share=st.floats(0, 1),
    dtype=st.sampled_from(list(DTYPES)),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_bits(m: int, n: int, distinct: int, exponent: int, share: float, dtype: str, seed: int) -> None:
    """Values are drawn as bit patterns, few or many distinct ones, close together or over many exponents."""
    rng = np.random.default_rng(seed)
    pool = rng.integers(0x3F000000, 0x3F000000 + (exponent + 1) * 0x00800000, distinct, dtype=np.uint32).view(
        np.float32
    )
    tuned = (
        (rng.choice(pool, (m, n)) * rng.choice([-1, 1], (m, n)).astype(np.float32))
        .clip(-6e4, 6e4)
        .astype(DTYPES[dtype])
    )
    k = round(share * tuned.size)
    check(tuned.astype(np.float32), kernels.residual_threshold(None, tuned, k=k, backend="cpu"), k)


def test_same_result_for_any_number_of_threads() -> None:
    rng = np.random.default_rng(4)
    tuned = rng.integers(-40, 40, (700, 90)).astype(np.float32)
    results = {kernels.residual_threshold(None, tuned, k=tuned.size // 3, threads=threads) for threads in (1, 2, 3, 8)}
    assert len(results) == 1


def test_strided_rows() -> None:
    rng = np.random.default_rng(5)
    for dtype in DTYPES.values():
        tuned = rng.standard_normal((40, 33)).astype(dtype)
        view, _ = ringed(tuned)
        assert kernels.residual_threshold(None, view, k=100) == kernels.residual_threshold(None, tuned, k=100)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("shape", [(9, 7), (300, 200)])
@pytest.mark.parametrize("k", [0, 1, 20])
def test_non_finite_entries_are_counted(bad: float, shape: tuple[int, int], k: int, backend: str) -> None:
    tuned = np.ones(shape, np.float32)
    tuned[2, 3] = tuned[-1, -1] = bad
    with pytest.raises(NonFiniteError, match="got 2 NaN or infinite entries") as error:
        kernels.residual_threshold(None, tuned, k=k, backend=backend)
    assert error.value.count == 2


@pytest.mark.parametrize(
    ("k", "message"), [(-1, "k: expected 0 to 12 .* got -1"), (13, "got 13"), (1.0, "k: expected an integer")]
)
def test_wrong_k(k: object, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        kernels.residual_threshold(None, np.ones((3, 4), np.float32), k=k)  # type: ignore[arg-type]
