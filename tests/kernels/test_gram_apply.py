from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import lors_kernels as kernels
from helpers import assert_no_worse, ringed
from lors_kernels.testing import plain
from lors_kernels.testing.cases import CASES, DTYPES, Case
from lors_kernels.testing.checks import SUM_ERROR
from lors_kernels.testing.numerics import delta_of

SMALL = [case for case in CASES if not case.large]


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
@pytest.mark.parametrize("side", ["right", "left"])
def test_cases(case: Case, side: str, backend: str) -> None:
    base, tuned = case.matrices()
    delta = delta_of(base, tuned).astype(np.float64)
    x = np.random.default_rng(0).standard_normal((tuned.shape[side == "right"], 3)).astype(np.float32)
    z = kernels.gram_apply(base, tuned, x, side=side, backend=backend)
    exact = delta.T @ (delta @ x) if side == "right" else delta @ (delta.T @ x)
    scale = np.linalg.norm(delta) ** 2 * np.linalg.norm(x)
    tiny = np.sqrt(z.size) * 2.0**-126  # denormal inputs: their squares vanish
    assert z.dtype == np.float32 and z.shape == x.shape
    assert np.linalg.norm(z - exact) <= SUM_ERROR * scale + tiny


@pytest.mark.parametrize("width", [0, 1, 7, 8, 9, 31])
def test_any_width(width: int, backend: str) -> None:
    rng = np.random.default_rng(1)
    tuned = rng.standard_normal((33, 21)).astype(np.float32)
    x = rng.standard_normal((21, width)).astype(np.float32)
    z = kernels.gram_apply(None, tuned, x, backend=backend)
    zeros, d, y = torch.zeros(33, 21), torch.from_numpy(tuned), torch.from_numpy(x)
    assert_no_worse(z, plain.gram_apply(zeros, d, y), plain.gram_apply(zeros, d, y.double()))


@given(
    m=st.integers(1, 70),
    n=st.integers(1, 70),
    width=st.integers(1, 10),
    dtypes=st.tuples(st.sampled_from(list(DTYPES)), st.sampled_from(list(DTYPES))),
    side=st.sampled_from(["right", "left"]),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_shape_and_dtype_against_float64(
    m: int, n: int, width: int, dtypes: tuple[str, str], side: str, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    base = rng.standard_normal((m, n)).astype(DTYPES[dtypes[0]])
    tuned = rng.standard_normal((m, n)).astype(DTYPES[dtypes[1]])
    x = rng.standard_normal((n if side == "right" else m, width)).astype(np.float32)
    delta = delta_of(base, tuned).astype(np.float64)
    exact = delta.T @ (delta @ x) if side == "right" else delta @ (delta.T @ x)
    z = kernels.gram_apply(base, tuned, x, side=side, backend="cpu")
    assert np.linalg.norm(z - exact) <= SUM_ERROR * np.linalg.norm(delta) ** 2 * np.linalg.norm(x)


def test_same_bits_for_any_number_of_threads_and_on_every_run() -> None:
    rng = np.random.default_rng(2)
    base, tuned = (rng.standard_normal((1500, 130)).astype(np.float32) for _ in range(2))
    x = rng.standard_normal((130, 8)).astype(np.float32)
    for side, y in (("right", x), ("left", np.ascontiguousarray(tuned[:, :8]))):
        first = kernels.gram_apply(base, tuned, y, side=side, threads=1)
        for threads in (1, 2, 3, 8):
            again = kernels.gram_apply(base, tuned, y, side=side, threads=threads)
            assert first.tobytes() == again.tobytes()


def test_strided_and_misaligned_rows_are_read_in_place() -> None:
    rng = np.random.default_rng(3)
    for dtype in DTYPES.values():
        tuned = rng.standard_normal((19, 37)).astype(dtype)
        x = rng.standard_normal((37, 4)).astype(np.float32)
        view, whole = ringed(tuned, ring=3)
        before = whole.tobytes()
        assert kernels.gram_apply(None, view, x).tobytes() == kernels.gram_apply(None, tuned, x).tobytes()
        assert whole.tobytes() == before


def test_nan_shows() -> None:
    tuned = np.ones((5, 4), np.float32)
    tuned[2, 1] = np.nan
    assert np.isnan(kernels.gram_apply(None, tuned, np.ones((4, 1), np.float32))).all()


def test_torch_in_torch_out() -> None:
    import torch

    tuned = torch.randn(12, 9).bfloat16()
    z = kernels.gram_apply(None, tuned, torch.ones(9, 2))
    assert isinstance(z, torch.Tensor) and z.dtype == torch.float32
    torch.testing.assert_close(z, tuned.float().T @ (tuned.float() @ torch.ones(9, 2)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": np.ones((5, 2), np.float32)}, r"x: expected a matrix \[4, 'any'\].*got ndarray of shape \[5, 2\]"),
        ({"x": np.ones((4, 2))}, "x: expected .* dtype float32, got .* float64"),
        ({"x": [1.0]}, "x: expected .* got list"),
        ({"base": np.ones((4, 3), np.float32)}, r"base: expected a matrix \[3, 4\]"),
        ({"tuned": np.ones((3, 4))}, "tuned: .* float64"),
        ({"tuned": np.ones(4, np.float32)}, "tuned: .*shape"),
        ({"tuned": np.ones((4, 3), np.float32).T}, "tuned: expected contiguous rows"),
        ({"side": "middle"}, "side: expected 'right' or 'left', got 'middle'"),
        ({"backend": "gpu"}, "backend: expected one of .* got 'gpu'"),
        ({"threads": 0}, "threads: expected 1 to 32768, got 0"),
    ],
)
def test_wrong_arguments(arguments: dict[str, object], message: str) -> None:
    good = {"base": None, "tuned": np.ones((3, 4), np.float32), "x": np.ones((4, 2), np.float32)}
    with pytest.raises((TypeError, ValueError), match=message):
        kernels.gram_apply(**{**good, **arguments})
