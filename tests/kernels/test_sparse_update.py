from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import lors_kernels as kernels
from helpers import assert_right
from lors_kernels import SparsePart
from lors_kernels.testing import oracle
from lors_kernels.testing.cases import CASES, DTYPES, Case

SMALL = [case for case in CASES if not case.large]


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_cases(case: Case, backend: str) -> None:
    assert_right("sparse_update", case, backend)


@given(
    m=st.integers(1, 40),
    n=st.integers(1, 140),
    rank=st.integers(0, 3),
    share=st.floats(0, 1),
    weight=st.floats(-4, 4, width=32),
    seed=st.integers(0, 2**32 - 1),
)
def test_a_stored_part_gives_the_bits_of_the_whole(
    m: int, n: int, rank: int, share: float, weight: float, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    base, tuned, start = (rng.standard_normal((m, n)).astype(np.float32) for _ in range(3))
    left, right = (rng.standard_normal((x, rank)).astype(np.float32) if rank else None for x in (m, n))
    k = round(share * m * n)
    for backend in ("cpu", "reference"):
        threshold = kernels.residual_threshold(base, tuned, left, right, k, backend=backend)
        part = kernels.sparse_part(base, tuned, left, right, threshold, k, backend=backend)
        want, got = start.copy(), start.copy()
        kernels.merge_update(want, base, tuned, left, right, threshold, weight, backend=backend)
        stats = kernels.sparse_update(got, part, left, right, weight=weight, backend=backend)
        assert want.tobytes() == got.tobytes()
        assert stats.non_finite == 0 and oracle.sum_error(stats.energy, part.values, 2) <= 1


@given(
    m=st.integers(1, 20),
    n=st.integers(1, 140),
    share=st.floats(0, 1),
    dtype=st.sampled_from(list(DTYPES)),
    numbers=st.tuples(*[st.floats(-100, 100)] * 2),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_values_and_scale_against_float64(
    m: int, n: int, share: float, dtype: str, numbers: tuple[float, float], seed: int
) -> None:
    rng = np.random.default_rng(seed)
    mask = rng.random((m, n)) < share
    values = rng.standard_normal(int(mask.sum())).astype(DTYPES[dtype])
    start, (scale, weight) = rng.standard_normal((m, n)).astype(np.float32), numbers
    sparse = np.zeros((m, n), np.float32)
    sparse[mask] = values.astype(np.float32) * np.float32(scale)
    exact = oracle.merged(start, [(weight, np.zeros((m, n), np.float32), sparse)])
    part = SparsePart(np.packbits(mask, bitorder="little"), values)
    for backend in ("cpu", "reference"):
        out = start.copy()
        stats = kernels.sparse_update(out, part, scale=scale, weight=weight, backend=backend)
        assert exact.error(out) <= 1
        assert oracle.sum_error(stats.energy, sparse, 2) <= 1


def test_the_energy_of_a_long_row_is_summed_in_float64(backend: str) -> None:
    """A float32 sum of ones stops at 2^24."""
    n = 2**25
    part = SparsePart(np.full(n // 8, 255, np.uint8), np.ones(n, np.float32))
    assert kernels.sparse_update(np.zeros((1, n), np.float32), part, backend=backend).energy == n


def test_bits_behind_the_last_entry_do_not_count(backend: str) -> None:
    out = np.zeros((1, 3), np.float32)
    kernels.sparse_update(out, SparsePart(np.array([0b11111101], np.uint8), np.ones(2, np.float32)), backend=backend)
    assert out.tolist() == [[1, 0, 1]]


PART = SparsePart(np.array([0b1011, 0, 0], np.uint8), np.ones(3, np.float32))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"part": PART._replace(values=np.ones(2, np.float32))}, "mask: expected 2 set bits, one per value, got 3"),
        ({"part": PART._replace(values=np.ones(4, np.float32))}, "mask: expected 4 set bits, one per value, got 3"),
        ({"part": PART._replace(mask=PART.mask[:2])}, "mask: expected a vector of 3 uint8, got ndarray of shape .2."),
        ({"part": PART._replace(mask=PART.mask.astype(np.int8))}, "mask: expected a vector of 3 uint8"),
        ({"part": PART._replace(values=np.ones(3))}, "values: expected a vector of float32 or .* float64"),
        ({"part": PART._replace(values=np.ones((3, 1), np.float32))}, "values: expected a vector"),
        ({"part": PART._replace(values=[1.0, 1.0, 1.0])}, "values: expected a vector of .*, got list"),
        ({"scale": float("inf")}, "scale: expected a finite float32 number, got inf"),
        ({"weight": 1e39}, "weight: expected a finite float32 number, got 1e.39"),
        ({"weight": "1"}, "weight: expected a number, got str '1'"),
        ({"out": np.zeros((4, 7), np.float32)[:, :6]}, "out: expected a C-contiguous matrix"),
        ({"out": np.zeros((4, 6), np.float16)}, "out: expected a matrix .* of dtype float32, got .* float16"),
        ({"left": np.ones((4, 1), np.float32)}, "left, right: expected both or neither"),
    ],
)
def test_what_does_not_fit_is_refused_and_nothing_written(
    arguments: dict[str, Any], message: str, backend: str
) -> None:
    good: dict[str, Any] = {"out": np.zeros((4, 6), np.float32), "part": PART}
    out = (good | arguments)["out"]
    with pytest.raises((TypeError, ValueError), match=message):
        kernels.sparse_update(**{**good, **arguments}, backend=backend)
    assert not out.any()


def test_torch_tensors_give_what_arrays_give(backend: str) -> None:
    rng = np.random.default_rng(0)
    left, right = (rng.standard_normal((rows, 2)).astype(np.float32) for rows in (4, 6))
    wanted, got = np.ones((4, 6), np.float32), torch.ones(4, 6)
    stats = kernels.sparse_update(wanted, PART, left, right, scale=0.5, weight=-0.3, backend=backend)
    part = SparsePart(*map(torch.from_numpy, PART))
    factors = torch.from_numpy(left), torch.from_numpy(right)
    assert kernels.sparse_update(got, part, *factors, scale=0.5, weight=-0.3, backend=backend) == stats
    np.testing.assert_array_equal(got.numpy(), wanted)


@pytest.mark.parametrize("which", ["mask", "values"])
def test_a_part_in_another_place_is_refused(which: str, backend: str) -> None:
    part = SparsePart(*map(torch.from_numpy, PART))._replace(**{which: getattr(PART, which)})
    out = torch.zeros(4, 6)
    with pytest.raises(TypeError, match=f"{which}: expected it where out is, got ndarray .* beside a Tensor"):
        kernels.sparse_update(out, part, backend=backend)
    far = SparsePart(*map(torch.from_numpy, PART))._replace(**{which: torch.empty(3, device="meta")})
    with pytest.raises((TypeError, ValueError), match=f"{which}: expected"):
        kernels.sparse_update(out, far, backend=backend)
    assert not out.any()


def test_what_is_not_finite_is_counted(backend: str) -> None:
    out = np.zeros((4, 6), np.float32)
    part = PART._replace(values=np.array([1, np.nan, np.inf], np.float32))
    left, right = np.ones((4, 1), np.float32), np.ones((6, 1), np.float32)
    left[3] = np.inf
    assert kernels.sparse_update(out, part, left, right, backend=backend).non_finite == 2 + 6


@pytest.mark.parametrize("shape", [(0, 5), (5, 0)])
def test_empty_matrices(shape: tuple[int, int], backend: str) -> None:
    part = SparsePart(np.zeros(0, np.uint8), np.zeros(0, np.float32))
    assert kernels.sparse_update(np.zeros(shape, np.float32), part, backend=backend) == (0.0, 0)
