from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import lors_kernels as kernels
from helpers import assert_no_worse, assert_right
from lors_kernels import NonFiniteError
from lors_kernels.arrays import to_torch
from lors_kernels.lors_delta import add_lors_delta
from lors_kernels.testing import plain
from lors_kernels.testing.cases import CASES, DTYPES, Case
from lors_kernels.testing.numerics import LOW_RANK_ERROR

SMALL = [case for case in CASES if not case.large]


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_cases(case: Case, backend: str) -> None:
    assert_right("lors_delta", case, backend)


@given(
    m=st.integers(1, 40),
    n=st.integers(1, 60),
    rank=st.integers(0, 5),
    density=st.floats(0, 1),
    dtype=st.sampled_from(list(DTYPES)),
    seed=st.integers(0, 2**32 - 1),
)
def test_against_the_definition_in_float64(m: int, n: int, rank: int, density: float, dtype: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    rank = min(rank, m, n)
    delta = rng.standard_normal((m, n)).astype(DTYPES[dtype])
    exact = delta.astype(np.float64)
    u, s, vh = np.linalg.svd(exact, full_matrices=False)
    if 0 < rank < len(s) and s[rank - 1] - s[rank] < 1e-3 * s[0]:
        return  # L is hardly unique
    low = (u[:, :rank] * s[:rank]) @ vh[:rank]
    rest, k = np.abs(exact - low), int(density * exact.size)
    unsure = LOW_RANK_ERROR * s[0] * np.sqrt(max(1, rank))  # ||L|| is no larger than that times s[0]
    value = np.partition(rest, exact.size - k, axis=None)[exact.size - k] if k else np.inf
    for backend in ("cpu", "reference"):
        for kind in (delta, to_torch(delta.copy())):
            found = np.asarray(kernels.lors_delta(kind, rank, density, backend=backend), np.float64)
            is_low, is_whole = np.abs(found - low) <= 2 * unsure, np.abs(found - exact) <= 2 * unsure
            assert (is_whole | (rest < value + 2 * unsure)).all(), "an entry of S is missing"
            assert (is_low | (rest > value - 2 * unsure)).all(), "an entry of S is too many"


@pytest.mark.parametrize(("rank", "density"), [(0, 0.0), (0, 0.3), (3, 0.0), (3, 0.3), (3, 1.0)])
def test_adding_it_has_the_bits_of_its_three_steps(rank: int, density: float, backend: str) -> None:
    rng = np.random.default_rng(4)
    base, tuned, start = (rng.standard_normal((30, 41)).astype(np.float32) for _ in range(3))
    options = {"backend": backend, "threads": 1}
    left = right = None
    if rank:
        left, right = kernels.truncated_svd(base, tuned, rank, seed=7, **options)[:2]
    threshold = kernels.residual_threshold(base, tuned, left, right, int(density * tuned.size), **options)
    wanted = start.copy()
    stats = kernels.merge_update(wanted, base, tuned, left, right, threshold, 0.7, **options)
    found, again = start.copy(), start.copy()
    said, svd = add_lors_delta(found, base, tuned, rank, density, 0.7, seed=7, **options)
    known = None if left is None else (left, right)
    assert add_lors_delta(again, base, tuned, rank, density, 0.7, factors=known, seed=8, **options) == (stats, None)
    assert said == stats and (svd is not None) == bool(rank)
    np.testing.assert_array_equal(found, wanted)
    np.testing.assert_array_equal(again, wanted)
    with pytest.raises(ValueError, match="out: expected memory of its own"):
        add_lors_delta(start[1:], None, start[:-1], rank, density, **options)


def test_kind_and_dtype_of_the_result(backend: str) -> None:
    x = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)).bfloat16()
    found = kernels.lors_delta(x, 2, 0.5, backend=backend)
    assert isinstance(found, torch.Tensor) and found.dtype == torch.float32
    assert isinstance(kernels.lors_delta(x.float().numpy(), 2, 0.5, backend=backend), np.ndarray)


@pytest.mark.parametrize(("rank", "density"), [(0, 0.0), (0, 1.0), (3, 1.0)])
def test_nothing_and_everything(rank: int, density: float, backend: str) -> None:
    x = np.random.default_rng(0).standard_normal((6, 9)).astype(np.float32)
    found = kernels.lors_delta(x, rank, density, backend=backend)
    if rank:
        assert_no_worse(found, plain.lors_delta(torch.from_numpy(x), rank, density), x * density)
    else:
        np.testing.assert_array_equal(found, x * density)


def test_the_number_of_entries_is_that_of_the_engine() -> None:
    """int(density * numel), in this order: density * m * n may round to another number."""
    density, (m, n) = next(
        (d / 1000, (m, n))
        for d in range(1, 1000)
        for m in range(2, 12)
        for n in range(2, 12)
        if int(d / 1000 * m * n) != int(d / 1000 * (m * n))
    )
    x = np.arange(1, m * n + 1, dtype=np.float32).reshape(m, n)
    assert np.count_nonzero(kernels.lors_delta(x, 0, density)) == int(density * x.size)


@pytest.mark.parametrize("shape", [(0, 3), (3, 0)])
def test_empty_matrices(shape: tuple[int, int], backend: str) -> None:
    assert kernels.lors_delta(np.zeros(shape, np.float32), 0, 0.5, backend=backend).shape == shape


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rank": -1}, r"rank: expected 0 to 3 for a matrix \[3, 4\], got -1"),
        ({"rank": 4}, "rank: expected 0 to 3"),
        ({"rank": 1.0}, "rank: expected an integer, got float 1.0"),
        ({"rank": None}, "rank: expected an integer, got NoneType None"),
        ({"density": -0.1}, "density: expected 0 to 1, got -0.1"),
        ({"density": float("nan")}, "density: expected 0 to 1, got nan"),
        ({"delta": np.ones((3, 4))}, "delta: expected a matrix .* float64"),
    ],
)
def test_wrong_arguments(arguments: dict[str, object], message: str, backend: str) -> None:
    good = {"delta": np.ones((3, 4), np.float32), "rank": 1, "density": 0.5}
    with pytest.raises((TypeError, ValueError), match=message):
        kernels.lors_delta(**{**good, **arguments}, backend=backend)


@pytest.mark.parametrize(("rank", "density"), [(0, 0.0), (0, 0.5), (2, 0.0), (2, 0.5)])
def test_non_finite_entries_are_refused(rank: int, density: float, backend: str) -> None:
    x = np.ones((5, 6), np.float32)
    x[1, 2], x[4, 5] = np.nan, -np.inf
    with pytest.raises(NonFiniteError) as caught:
        kernels.lors_delta(x, rank, density, backend=backend)
    assert caught.value.count == 2


def test_lors_delta_is_low_rank_plus_largest() -> None:
    rng = np.random.default_rng(1)
    delta = rng.standard_normal((80, 60)).astype(np.float32)
    u, s, vh = np.linalg.svd(delta.astype(np.float64), full_matrices=False)
    low = (u[:, :5] * s[:5]) @ vh[:5]
    mixed = kernels.lors_delta(delta, 5, 0.1)
    error = np.linalg.norm(kernels.lors_delta(delta, 5, 0.0) - low)
    assert error <= LOW_RANK_ERROR * np.linalg.norm(low)
    assert_no_worse(kernels.lors_delta(delta, 5, 1.0), plain.lors_delta(torch.from_numpy(delta), 5, 1.0), delta)
    assert (np.abs(mixed - low) > 1e-3).sum() == int(0.1 * delta.size)  # far above the error, far below what is kept
