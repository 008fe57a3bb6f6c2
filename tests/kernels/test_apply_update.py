from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import lors_kernels as kernels
from helpers import ringed
from lors_kernels.testing.cases import CASES, DTYPES, Case

SMALL = [case for case in CASES if not case.large]
UNITS = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}  # half a unit in the last place of 1
LEAST = {"float32": 2.0**-149, "float16": 2.0**-24, "bfloat16": 2.0**-133}  # the spacing of the smallest numbers


def allowed(exact: np.ndarray, dtype: str) -> np.ndarray:
    """One rounding to float32 and one to the output's type."""
    return (UNITS[dtype] + (UNITS["float32"] if dtype != "float32" else 0)) * np.abs(exact) * (1 + 1e-7) + LEAST[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_cases_against_float64(case: Case, dtype: str, backend: str) -> None:
    base, update = case.matrices()
    exact = update.astype(np.float64) + (0 if base is None else base.astype(np.float64))
    out = np.full(update.shape, 7, DTYPES[dtype])
    largest = kernels.apply_update(out, base, update, backend=backend)
    fits = np.abs(exact) < float(np.finfo(np.float16).max) if dtype == "float16" else np.abs(exact) < 3e38
    assert (np.abs(out.astype(np.float64) - exact) <= allowed(exact, dtype))[fits].all()
    assert largest == np.abs(exact.astype(np.float32)).max(initial=0)


@given(
    m=st.integers(1, 40),
    n=st.one_of(st.integers(1, 70), st.sampled_from([1023, 1024, 1025, 2100])),
    dtypes=st.tuples(*[st.sampled_from(list(DTYPES))] * 3),
    missing=st.sampled_from(["", "base", "update", "base update"]),
    scale=st.sampled_from([1.0, 0.5, -2.0, 1.4]),
    threads=st.integers(1, 3),
    seed=st.integers(0, 2**32 - 1),
)
def test_against_float64_and_reference(
    m: int, n: int, dtypes: tuple[str, str, str], missing: str, scale: float, threads: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    base, update = (
        None if name in missing else rng.standard_normal((m, n)).astype(DTYPES[dtype])
        for name, dtype in zip(("base", "update"), dtypes, strict=False)
    )
    exact = np.zeros((m, n))
    exact += 0 if base is None else scale * base.astype(np.float64)
    exact += 0 if update is None else update
    for backend in ("cpu", "reference"):
        out, whole = ringed(np.empty((m, n), DTYPES[dtypes[2]]))
        largest = kernels.apply_update(out, base, update, scale=scale, backend=backend, threads=threads)
        # a scale that float32 has not got rounds the sum of its rest and the update besides
        slack = (
            0 if scale in (1.0, 0.5, -2.0) else 2.0**-24 * (0 if update is None else np.abs(update.astype(np.float64)))
        )
        assert (np.abs(out.astype(np.float64) - exact) <= allowed(exact, dtypes[2]) + slack).all()
        assert largest == pytest.approx(np.abs(exact).max(), rel=3 * 2.0**-24)  # a product, a sum and the scale's rest
        out[...] = 77
        assert (whole == 77).all(), "nothing else was written"


@pytest.mark.parametrize("shape", [(1, 5), (3, 1024), (40, 130)])
def test_in_place_of_either_input(shape: tuple[int, int], backend: str) -> None:
    rng = np.random.default_rng(1)
    base, update = (rng.standard_normal(shape).astype(np.float32) for _ in range(2))
    want = base + update
    for out in (b := base.copy(), u := update.copy()):
        kernels.apply_update(out, b if out is b else base, u if out is u else update, backend=backend)
        assert (out == want).all()


@pytest.mark.parametrize("place", [(0, 0), (17, 66), (39, 1029)])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3e38])
def test_the_largest_value_is_seen_wherever_it_is(place: tuple[int, int], value: float, backend: str) -> None:
    update = np.ones((40, 1030), np.float32)
    update[place] = value
    largest = kernels.apply_update(np.empty_like(update), None, update, backend=backend, threads=2)
    assert np.isnan(largest) if np.isnan(value) else largest == np.abs(np.float32(value))


def test_overflow_of_the_sum_is_infinite(backend: str) -> None:
    x = np.full((2, 3), 3e38, np.float32)
    assert kernels.apply_update(np.empty_like(x), x, x, backend=backend) == np.inf
    assert kernels.apply_update(np.empty((2, 3), np.float16), x, None, backend=backend) == np.float32(3e38)


def test_same_bits_for_any_number_of_threads() -> None:
    rng = np.random.default_rng(2)
    base, update = rng.standard_normal((2, 100, 1500)).astype(np.float32)
    results = []
    for threads in (1, 2, 7):
        out = np.empty((100, 1500), np.float16)
        results.append((kernels.apply_update(out, base, update, threads=threads), out.tobytes()))
    assert results[0] == results[1] == results[2]


def test_torch_tensors_and_nothing_at_all() -> None:
    base, update = torch.ones(4, 5).bfloat16(), torch.full((4, 5), 0.25)
    out = torch.zeros(4, 5)
    assert kernels.apply_update(out, base, update) == 1.25 and (out == 1.25).all()
    assert kernels.apply_update(np.empty((0, 3), np.float32), None, None) == 0.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((np.zeros((2, 3)), None, None), "out: expected a matrix"),
        ((np.zeros((2, 3), np.float32), np.zeros((3, 2), np.float32), None), r"base: expected a matrix \[2, 3\]"),
        ((np.zeros((2, 3), np.float32), None, np.zeros((2, 3), np.int32)), "update: expected a matrix"),
        ((np.zeros((2, 3), np.float32), None, torch.zeros(2, 3)), "update: expected a ndarray"),
        ((None, None, None), "out: expected a matrix"),
    ],
)
def test_arguments_that_do_not_fit(arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        kernels.apply_update(*arguments)
