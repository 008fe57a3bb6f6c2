from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import lors_kernels as kernels
from helpers import ringed
from lors_kernels import KEEP_ALL, KEEP_NONE
from lors_kernels.testing.cases import CASES, DTYPES, Case
from lors_kernels.testing.numerics import delta_of
from lors_kernels.testing.validate import ADD_ERROR

SMALL = [case for case in CASES if not case.large]


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_cases_against_float64(case: Case, backend: str) -> None:
    base, tuned = case.matrices()
    delta = delta_of(base, tuned)
    svd = kernels.truncated_svd(base, tuned, case.rank)
    k = delta.size // 5
    threshold = kernels.residual_threshold(base, tuned, svd.left, svd.right, k, backend=backend)
    out = base.astype(np.float32)
    stats = kernels.merge_update(out, base, tuned, svd.left, svd.right, threshold, 0.3, backend=backend)
    low = svd.left.astype(np.float64) @ svd.right.astype(np.float64).T
    residual = delta - low
    assert stats.kept == k and stats.non_finite == 0
    # L + S is delta where an entry is kept and L elsewhere
    change = (out.astype(np.float64) - base.astype(np.float64)) / 0.3
    scale = max(np.abs(base.astype(np.float64)).max(), np.abs(delta).max(), 2.0**-120)
    near_low, near_delta = np.abs(change - low) <= 4e-6 * scale, np.abs(change - delta) <= 4e-6 * scale
    assert (near_low | near_delta).all()
    energy = float((delta.astype(np.float64) ** 2).sum())
    assert stats.delta_energy == pytest.approx(energy, rel=1e-5)
    assert stats.residual_energy == pytest.approx(float((residual**2).sum()), rel=1e-3, abs=1e-9 * energy + 1e-36)
    assert stats.kept_energy <= stats.residual_energy * (1 + 1e-6)


@given(
    m=st.integers(1, 40),
    n=st.integers(1, 70),
    experts=st.integers(1, 4),
    rank=st.integers(0, 3),
    dtypes=st.tuples(*[st.sampled_from(list(DTYPES))] * 3),
    threads=st.integers(1, 3),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_number_of_experts_against_reference(
    m: int, n: int, experts: int, rank: int, dtypes: tuple[str, str, str], threads: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    base = rng.standard_normal((m, n)).astype(DTYPES[dtypes[0]])
    tuned = [rng.standard_normal((m, n)).astype(DTYPES[dtypes[1]]) for _ in range(experts)]
    left = [rng.standard_normal((m, rank)).astype(np.float32) if rank else None for _ in tuned]
    right = [rng.standard_normal((n, rank)).astype(np.float32) if rank else None for _ in tuned]
    kept = [int(rng.integers(0, m * n + 1)) for _ in tuned]
    weights = rng.standard_normal(experts).tolist()
    outs = []
    for backend in ("cpu", "reference"):
        out = np.ones((m, n), DTYPES[dtypes[2]])
        # a threshold holds for the backend that found it: another rounds L's last bit its own way
        thresholds = [
            kernels.residual_threshold(base, t, a, b, k, backend=backend)
            for t, a, b, k in zip(tuned, left, right, kept, strict=True)
        ]
        stats = kernels.merge_update(
            out, base, tuned, left, right, thresholds, weights, backend=backend, threads=threads
        )
        outs.append((out.astype(np.float64), [s.delta_energy for s in stats]))
    unit = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}[dtypes[2]]
    scale = max(1.0, np.abs(outs[1][0]).max(), experts * 20.0)
    assert np.abs(outs[0][0] - outs[1][0]).max() <= ADD_ERROR * scale * 8 + 2 * unit * np.abs(outs[1][0]).max()
    np.testing.assert_allclose(outs[0][1], outs[1][1], rtol=1e-5)


def test_fused_experts_have_the_bits_of_one_after_the_other() -> None:
    rng = np.random.default_rng(0)
    base = rng.standard_normal((50, 70)).astype(np.float32)
    tuned = [base + rng.standard_normal((50, 70)).astype(np.float32) for _ in range(3)]
    together, apart = base.copy(), base.copy()
    kernels.merge_update(together, base, tuned, weight=[0.1, 0.2, 0.3])
    for t, weight in zip(tuned, (0.1, 0.2, 0.3), strict=True):
        kernels.merge_update(apart, base, t, weight=weight)
    assert together.tobytes() == apart.tobytes()


def test_same_bits_for_any_number_of_threads() -> None:
    rng = np.random.default_rng(1)
    base, tuned = (rng.integers(-9, 9, (301, 130)).astype(np.float32) for _ in range(2))
    svd = kernels.truncated_svd(base, tuned, 4)
    threshold = kernels.residual_threshold(base, tuned, k=5000)
    results = set()
    for threads in (1, 2, 5):
        out = base.copy()
        stats = kernels.merge_update(out, base, tuned, svd.left, svd.right, threshold, 0.7, threads=threads)
        results.add((out.tobytes(), stats))
    assert len(results) == 1


def test_ties_at_the_threshold_are_kept_in_row_major_order(backend: str) -> None:
    tuned = np.full((6, 7), -2.0, np.float32)
    for k in range(43):
        out = np.zeros((6, 7), np.float32)
        stats = kernels.merge_update(
            out, None, tuned, threshold=kernels.residual_threshold(None, tuned, k=k), backend=backend
        )
        assert stats.kept == k
        assert (out.ravel() == np.where(np.arange(42) < k, -2.0, 0.0)).all()


def test_keep_all_and_keep_none(backend: str) -> None:
    rng = np.random.default_rng(2)
    base, tuned = (rng.standard_normal((9, 11)).astype(np.float32) for _ in range(2))
    for threshold, kept in ((KEEP_NONE, 0), (KEEP_ALL, 99), (None, 99)):
        out = base.copy()
        assert kernels.merge_update(out, base, tuned, threshold=threshold, backend=backend).kept == kept
        np.testing.assert_allclose(out, tuned if kept else base, rtol=1e-6, atol=1e-6)


def test_nothing_outside_the_view_is_touched() -> None:
    rng = np.random.default_rng(3)
    for dtype in DTYPES.values():
        for cols in (1, 15, 16, 17, 33):
            out = np.zeros((5, cols), dtype)
            view, whole = ringed(out, ring=5)
            tuned = rng.standard_normal((5, cols)).astype(dtype)
            kernels.merge_update(view, None, tuned)
            assert (view == tuned).all()
            view[...] = 0
            assert (whole[1:-1, 5:-5] == 0).all()
            whole[1:-1, 5:-5] = 77
            assert (whole == 77).all()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_rounding_to_half_is_to_nearest_even(dtype: str) -> None:
    rng = np.random.default_rng(4)
    special = [0.0, -0.0, 65504.0, 65519.0, 6e-8, 2.9e-8, 6.1e-5, 1 + 2**-9, 1 + 2**-11, 1 + 3 * 2**-11, 3.4e38]
    values = np.concatenate([np.array(special), rng.standard_normal(2000), 2.0 ** rng.uniform(-30, 15, 2000)])
    tuned = values.astype(np.float32).reshape(1, -1)
    for columns in (tuned, np.repeat(tuned, 2, axis=0)[:, :-3]):
        columns = np.ascontiguousarray(columns)
        out = np.zeros(columns.shape, DTYPES[dtype])
        kernels.merge_update(out, None, columns)
        with np.errstate(over="ignore"):
            expected = columns.astype(DTYPES[dtype])
        assert (out.view(np.uint16) & 0x7FFF == expected.view(np.uint16) & 0x7FFF).all()


def test_non_finite_deltas_are_counted_not_raised(backend: str) -> None:
    tuned = np.ones((8, 9), np.float32)
    tuned[0, 0], tuned[7, 8] = np.nan, np.inf
    assert kernels.merge_update(np.zeros((8, 9), np.float32), None, tuned, backend=backend).non_finite == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tuned": []}, "tuned: expected at least one expert"),
        (
            {"tuned": [np.ones((3, 4), np.float32)], "weight": [1.0, 2.0]},
            "weight: expected a sequence of 1, .* got 2 entries",
        ),
        ({"tuned": [np.ones((3, 4), np.float32)], "threshold": KEEP_ALL}, "threshold: expected a sequence of 1"),
        ({"threshold": 0.5}, "threshold: expected a Threshold or None, got float"),
        ({"left": np.ones((3, 2), np.float32)}, "left, right: expected both or neither"),
        (
            {"left": np.ones((3, 2), np.float32), "right": np.ones((4, 3), np.float32)},
            r"right: expected a matrix \[4, 2\]",
        ),
        ({"out": np.ones((4, 4), np.float32)}, r"out: expected a matrix \[3, 4\]"),
    ],
)
def test_wrong_arguments(arguments: dict[str, object], message: str) -> None:
    good = {"out": np.zeros((3, 4), np.float32), "base": None, "tuned": np.ones((3, 4), np.float32)}
    with pytest.raises((TypeError, ValueError), match=message):
        kernels.merge_update(**{**good, **arguments})
