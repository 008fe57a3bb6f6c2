"""ties_update: the fused pass against the reference and against a definition written out in numpy."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

import lors_kernels as kernels
from lors_kernels import ALWAYS, KEEP_ALL, Keep, keep_limit, random_key
from lors_kernels.reference import random_bits
from lors_kernels.testing.cases import DTYPES

ADD_ERROR = 4e-7  # of out, relative to its largest entry: a few float32 roundings


def experts(shape: tuple[int, int], count: int, seed: int = 0, dtype: str = "float32"):
    rng = np.random.default_rng(seed)
    base = rng.standard_normal(shape).astype(np.float32).astype(DTYPES[dtype])
    tuned = [
        (base.astype(np.float32) + rng.standard_normal(shape).astype(np.float32)).astype(DTYPES[dtype])
        for _ in range(count)
    ]
    return base, tuned


def rules(base: np.ndarray, tuned: list[np.ndarray]) -> list[Keep]:
    """A different kind of rule for every expert."""
    size = base.size
    low = [kernels.residual_threshold(base, t, k=size // 3) for t in tuned]
    high = kernels.residual_threshold(base, tuned[1], k=size // 10)
    key = random_key(0, "expert", "tensor")
    return [
        Keep(low[0]),
        Keep(low[1], high, factor=1.5),
        Keep(key=key, limit=keep_limit(0.3)),
        Keep(low[3], key=key, limit=keep_limit(0.7)),
    ]


@pytest.mark.parametrize("shape", [(1, 1), (1, 37), (5, 1), (33, 67), (3, 2500)])
@pytest.mark.parametrize("elect,normalize", list(itertools.product([True, False], repeat=2)))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_cpu_agrees_with_the_reference(shape: tuple[int, int], elect: bool, normalize: bool, dtype: str) -> None:
    base, tuned = experts(shape, 4, dtype=dtype)
    keep, weight = rules(base, tuned), [0.5, -1.0, 2.0, 0.25]
    outs, stats = [], []
    for backend in ("cpu", "reference"):
        out = base.astype(np.float32)
        stats.append(
            kernels.ties_update(
                out, base, tuned, keep, weight, elect=elect, normalize=normalize, scale=0.7, backend=backend
            )
        )
        outs.append(out)
    assert np.abs(outs[0] - outs[1]).max() <= ADD_ERROR * np.abs(outs[1]).max()
    for mine, reference in zip(*stats, strict=True):
        assert (mine.kept, mine.non_finite) == (reference.kept, reference.non_finite)
        np.testing.assert_allclose(mine[:4], reference[:4], rtol=1e-5)
    if base.size > 1000:
        assert 0 < stats[0][2].kept < base.size  # the random rule is no trivial one
        assert stats[0][1].kept == base.size // 3 - base.size // 10


def test_election_by_hand() -> None:
    base = np.zeros((1, 4), np.float32)
    tuned = [np.array([row], np.float32) for row in ([1, 1, -1, 0], [2, -3, 1, 0], [-1, 1, 1, 0])]
    out = base.copy()
    kernels.ties_update(out, base, tuned, [Keep()] * 3, [1, 1, 2], backend="cpu")
    # sums 1, 0 (counts as positive), 2, 0; the agreeing values over the agreeing weights
    np.testing.assert_allclose(out, [[3 / 2, 3 / 3, 3 / 3, 0]], rtol=1e-6)


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_same_bits_for_any_threads_and_chunks(threads: int) -> None:
    base, tuned = experts((70, 128), 4)
    keep, weight = rules(base, tuned), [1.0, 1.0, 1.0, 1.0]
    whole = base.copy()
    kernels.ties_update(whole, base, tuned, keep, weight, threads=1, backend="cpu")
    out = base.copy()
    for rows in (slice(0, 13), slice(13, 50), slice(50, 70)):
        part = [t[rows] for t in tuned]
        kernels.ties_update(
            out[rows], base[rows], part, keep, weight, start=rows.start * 128, threads=threads, backend="cpu"
        )
    assert (out == whole).all() and (whole != base).any()


def test_random_numbers_are_those_of_the_reference_and_uniform() -> None:
    key, p = random_key(3, "ca", "w"), 0.25
    base, tuned = np.zeros((40, 1000), np.float32), np.ones((40, 1000), np.float32)
    out = base.copy()
    kernels.ties_update(out, base, [tuned], [Keep(key=key, limit=keep_limit(p))], [1.0], start=2**33, backend="cpu")
    drawn = random_bits(key, 2**33, 40000) < keep_limit(p)
    assert ((out.ravel() == 1) == drawn).all()
    assert abs(drawn.mean() - p) < 5 * np.sqrt(p * (1 - p) / drawn.size)
    assert random_key(3, "ca", "w") != random_key(3, "de", "w") != random_key(4, "de", "w")
    assert keep_limit(1.0) == ALWAYS and keep_limit(0.0) == 0


def test_without_out_only_the_account_and_non_finite_is_counted() -> None:
    tuned = np.array([[1.0, np.nan, -3.0]], np.float32)
    (stats,) = kernels.ties_update(None, None, [tuned], [Keep()], [1.0], backend="cpu")
    assert stats.non_finite == 1
    (stats,) = kernels.ties_update(None, None, [np.array([[1.0, 2.0, -3.0]], np.float32)], [Keep(KEEP_ALL)], [1.0])
    assert (stats.delta_sum, stats.kept_sum, stats.delta_energy, stats.kept) == (6.0, 6.0, 14.0, 3)


@pytest.mark.parametrize(
    "change,message",
    [
        ({"tuned": []}, "tuned, keep, weight"),
        ({"weight": [1.0, 2.0]}, "tuned, keep, weight"),
        ({"keep": [0.5]}, "keep: expected a Keep"),
        ({"keep": [Keep(limit=2**33)]}, "keep.limit"),
        ({"keep": [Keep(factor=float("inf"))]}, "keep.factor"),
        ({"out": np.zeros((2, 3), np.float32)}, "out: expected"),
        ({"start": -1}, "start: expected"),
    ],
)
def test_bad_arguments(change: dict, message: str) -> None:
    base = np.zeros((2, 2), np.float32)
    arguments = {"out": base.copy(), "base": base, "tuned": [base], "keep": [Keep()], "weight": [1.0]} | change
    with pytest.raises((ValueError, TypeError), match=message):
        kernels.ties_update(**arguments)
