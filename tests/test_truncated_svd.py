from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import lors_kernels as kernels
from helpers import ringed
from lors_kernels import NonFiniteError
from lors_kernels.testing.cases import CASES, DTYPES, Case
from lors_kernels.testing.numerics import LOW_RANK_ERROR, delta_of, judge_low_rank


def low_rank(svd: kernels.TruncatedSVD) -> np.ndarray:
    return svd.left.astype(np.float64) @ svd.right.astype(np.float64).T


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_contract(case: Case) -> None:
    base, tuned = case.matrices()
    delta = delta_of(base, tuned)
    svd = kernels.truncated_svd(base, tuned, case.rank)
    verdict = judge_low_rank(delta, low_rank(svd), case.rank)
    assert verdict.ok, f"{svd.method} after {svd.passes} passes: {verdict}"
    assert svd.backend == "cpu"
    assert svd.energy == pytest.approx(float((delta.astype(np.float64) ** 2).sum()), rel=1e-5, abs=1e-80)
    exact = np.linalg.svd(delta.astype(np.float64), compute_uv=False)[: case.rank]
    np.testing.assert_allclose(svd.sigma, exact, rtol=2e-6, atol=1e-6 * exact[0] + 1e-44)


@pytest.mark.parametrize("case", [case for case in CASES if not case.large], ids=lambda case: case.name)
def test_the_certificate_is_an_upper_bound(case: Case) -> None:
    """The error that is claimed is never below the error that is there (where L is unique)."""
    base, tuned = case.matrices()
    svd = kernels.truncated_svd(base, tuned, case.rank)
    verdict = judge_low_rank(delta_of(base, tuned), low_rank(svd), case.rank)
    if verdict.unique and case.name != "denormals":  # there float32 factors, not the iteration, limit the error
        assert verdict.error <= svd.residual + 1e-6  # rounding of the factors to float32 comes on top


@given(
    m=st.integers(1, 90),
    n=st.integers(1, 90),
    data=st.data(),
    decay=st.floats(0.0, 3.0),
    dtype=st.sampled_from(list(DTYPES)),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_shape_rank_and_spectrum(m: int, n: int, data: st.DataObject, decay: float, dtype: str, seed: int) -> None:
    rank = data.draw(st.integers(1, min(m, n)))
    rng = np.random.default_rng(seed)
    k = min(m, n)
    u, v = (np.linalg.qr(rng.standard_normal((size, k)))[0] for size in (m, n))
    delta = (u * np.arange(1, k + 1) ** -decay) @ v.T
    base = (rng.standard_normal((m, n)) * 0.05).astype(DTYPES[dtype])
    tuned = (base.astype(np.float64) + delta).astype(DTYPES[dtype])
    svd = kernels.truncated_svd(base, tuned, rank, seed=seed % 7)
    verdict = judge_low_rank(delta_of(base, tuned), low_rank(svd), rank)
    assert verdict.ok, f"{svd.method}: {verdict}"


def test_same_bits_for_any_number_of_threads_and_on_every_run() -> None:
    base, tuned = next(case for case in CASES if case.name == "wide").matrices()
    results = set()
    for threads in (1, 2, 3, 1):
        svd = kernels.truncated_svd(base, tuned, 7, threads=threads)
        results.add(svd.left.tobytes() + svd.right.tobytes() + svd.sigma.tobytes())
    assert len(results) == 1


def test_the_seed_changes_the_start_and_not_the_result() -> None:
    base, tuned = next(case for case in CASES if case.name == "power-0.5").matrices()
    first, second = (kernels.truncated_svd(base, tuned, 7, seed=seed) for seed in (0, 1))
    assert first.left.tobytes() != second.left.tobytes()
    difference = np.linalg.norm(low_rank(first) - low_rank(second))
    assert difference <= LOW_RANK_ERROR * np.linalg.norm(low_rank(first))


def test_float64_continuation_is_needed_and_used() -> None:
    """Flat noise turns float32 vectors by more than the contract allows; the certificate must notice."""
    base, tuned = next(case for case in CASES if case.name == "flat-noise").matrices()
    assert kernels.truncated_svd(base, tuned, 7).method == "krylov64"


def test_strided_rows() -> None:
    rng = np.random.default_rng(0)
    tuned = rng.standard_normal((60, 45)).astype(np.float32)
    view, whole = ringed(tuned)
    before = whole.tobytes()
    assert kernels.truncated_svd(None, view, 3).left.tobytes() == kernels.truncated_svd(None, tuned, 3).left.tobytes()
    assert whole.tobytes() == before


def test_non_finite(backend: str) -> None:
    tuned = np.ones((30, 20), np.float32)
    tuned[3, 3] = np.nan
    with pytest.raises(NonFiniteError, match="got 1 NaN"):
        kernels.truncated_svd(None, tuned, 2, backend=backend)


@pytest.mark.parametrize("rank", [0, 5, -1, 1.0, True])
def test_wrong_rank(rank: object) -> None:
    with pytest.raises((TypeError, ValueError), match="rank: expected"):
        kernels.truncated_svd(None, np.ones((4, 6), np.float32), rank)  # type: ignore[arg-type]


def test_lors_delta_is_low_rank_plus_largest() -> None:
    rng = np.random.default_rng(1)
    delta = rng.standard_normal((80, 60)).astype(np.float32)
    u, s, vh = np.linalg.svd(delta.astype(np.float64), full_matrices=False)
    low = (u[:, :5] * s[:5]) @ vh[:5]
    mixed = kernels.lors_delta(delta, 5, 0.1)
    np.testing.assert_allclose(kernels.lors_delta(delta, 5, 0.0), low, atol=1e-4)
    np.testing.assert_allclose(kernels.lors_delta(delta, 5, 1.0), delta, atol=1e-5)
    assert (np.abs(mixed - low) > 1e-3).sum() == int(0.1 * delta.size)
