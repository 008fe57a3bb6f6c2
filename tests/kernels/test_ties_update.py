"""ties_update: the fused pass against the reference and against a definition written out in numpy."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import lors_kernels as kernels
from helpers import assert_right, ringed
from lors_kernels import ALWAYS, KEEP_ALL, KEEP_NONE, Keep, Threshold, keep_limit, random_key
from lors_kernels.counter_random import random_bits
from lors_kernels.testing import oracle
from lors_kernels.testing.cases import CASES, DTYPES, Case
from lors_kernels.testing.numerics import delta_of
from lors_kernels.types import Consensus

SMALL = [case for case in CASES if not case.large]


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


@pytest.mark.parametrize("case", SMALL, ids=lambda case: case.name)
def test_cases(case: Case, backend: str) -> None:
    assert_right("ties_update", case, backend)


@given(
    m=st.integers(1, 40),
    n=st.integers(1, 70),
    count=st.integers(1, 5),
    distinct=st.integers(1, 12),
    dtypes=st.tuples(*[st.sampled_from(list(DTYPES))] * 3),
    options=st.tuples(st.booleans(), st.booleans(), st.floats(-3, 3, width=32)),
    start=st.sampled_from([0, 1, 7, 2**31 - 5, 2**33, 2**60]),
    threads=st.integers(1, 3),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_rules_against_the_definition(
    m: int, n: int, count: int, distinct: int, dtypes: tuple[str, str, str], options: tuple[bool, bool, float],
    start: int, threads: int, seed: int,
) -> None:  # fmt: skip
    """Quarters: many magnitudes are equal, and many sums are zero."""
    rng = np.random.default_rng(seed)
    base, *tuned = (
        (rng.integers(-distinct, distinct + 1, (m, n)) / 4).astype(DTYPES[dtypes[min(1, t)]]) for t in range(count + 1)
    )
    deltas = [delta_of(base, x) for x in tuned]

    def threshold(delta: np.ndarray) -> Threshold:
        found = oracle.nth_largest(delta, int(rng.integers(0, delta.size + 1)))
        return found._replace(cut=min(found.cut + start, 2**62))

    keep = [
        Keep(
            KEEP_ALL if rng.random() < 0.3 else threshold(delta),
            KEEP_NONE if rng.random() < 0.5 else threshold(delta),
            int(rng.integers(0, 2**64, dtype=np.uint64)),
            ALWAYS if rng.random() < 0.5 else int(rng.integers(0, ALWAYS)),
            float(rng.choice([1.0, 2.5, -0.5])),
        )
        for delta in deltas
    ]
    weight = rng.choice([0.0, 0.3, 0.6, -0.9, 1.0, -2.0], count).tolist()
    rule = Consensus(*options, start)
    first = base.astype(DTYPES[dtypes[2]])
    exact = oracle.agreed(first, deltas, keep, weight, rule)
    for backend in ("cpu", "reference"):
        out = first.copy()
        stats = kernels.ties_update(out, base, tuned, keep, weight, **rule._asdict(), backend=backend, threads=threads)
        assert exact.error(out) <= 1
        for s, delta, k in zip(stats, deltas, keep, strict=True):
            mask = oracle.kept(delta, k, start)
            assert (s.kept, s.non_finite) == (np.count_nonzero(mask), 0)
            kept = np.where(mask, delta, 0)
            for found, x, power in zip(s[:4], (delta, kept, delta, kept), (2, 2, 1, 1), strict=True):
                assert oracle.sum_error(found, x, power) <= 1


@pytest.mark.parametrize("weight", [[0.3, 0.6, -0.9], [1.0, -1.0]])
def test_weights_that_cancel_leave_the_sum_undivided(weight: list[float], backend: str) -> None:
    """Summed in float32 the first would make a divisor of 6e-8."""
    tuned, out = [np.ones((1, 2), np.float32)] * len(weight), np.zeros((1, 2), np.float32)
    kernels.ties_update(out, None, tuned, [Keep()] * len(weight), weight, elect=False, backend=backend)
    assert np.abs(out).max() <= 3 * 2.0**-24  # the weights in float32, and their sum


def test_election_by_hand() -> None:
    base = np.zeros((1, 4), np.float32)
    tuned = [np.array([row], np.float32) for row in ([1, 1, -1, 0], [2, -3, 1, 0], [-1, 1, 1, 0])]
    out = base.copy()
    kernels.ties_update(out, base, tuned, [Keep()] * 3, [1, 1, 2], backend="cpu")
    # sums 1, 0 (counts as positive), 2, 0; the agreeing values over the agreeing weights
    assert out.tolist() == [[3 / 2, 3 / 3, 3 / 3, 0]]


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


def test_random_numbers_are_those_of_their_definition_and_uniform() -> None:
    key, p = random_key(3, "ca", "w"), 0.25
    base, tuned = np.zeros((40, 1000), np.float32), np.ones((40, 1000), np.float32)
    out = base.copy()
    kernels.ties_update(out, base, [tuned], [Keep(key=key, limit=keep_limit(p))], [1.0], start=2**33, backend="cpu")
    drawn = random_bits(key, 2**33, 40000) < keep_limit(p)
    assert ((out.ravel() == 1) == drawn).all()
    assert abs(drawn.mean() - p) < 5 * np.sqrt(p * (1 - p) / drawn.size)
    assert random_key(3, "ca", "w") != random_key(3, "de", "w") != random_key(4, "de", "w")
    assert keep_limit(1.0) == ALWAYS and keep_limit(0.0) == 0


def test_nothing_outside_the_view_is_touched(backend: str) -> None:
    for dtype in DTYPES.values():
        for cols in (1, 15, 16, 17, 33, 1025):
            view, whole = ringed(np.zeros((5, cols), dtype), ring=5)
            tuned = np.ones((5, cols), dtype)
            kernels.ties_update(view, None, [tuned], [Keep()], [1.0], backend=backend)
            assert (view == tuned).all()
            view[...] = 77
            assert (whole == 77).all()


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
        ({"keep": [Keep(key=2**64)]}, "keep.key: expected 0 to 18446744073709551615, got 18446744073709551616"),
        ({"keep": [Keep(key=-1)]}, "keep.key: expected 0 to"),
        ({"keep": [Keep(0.5)]}, "keep.low: expected a Threshold, got float"),
        ({"keep": [Keep(high=Threshold(-1.0, 0, 0))]}, "keep.high.value: expected a magnitude of float32, got -1.0"),
        ({"weight": [float("nan")]}, "weight: expected a finite float32 number, got nan"),
        ({"scale": 1e39}, "scale: expected a finite float32 number"),
        ({"start": 2**62}, "start: expected 0 to"),
        ({"start": 0.0}, "start: expected an integer, got float 0.0"),
        ({"out": np.zeros((2, 3), np.float32)}, "out: expected"),
        ({"start": -1}, "start: expected"),
    ],
)
def test_bad_arguments(change: dict, message: str) -> None:
    base = np.zeros((2, 2), np.float32)
    arguments = {"out": base.copy(), "base": base, "tuned": [base], "keep": [Keep()], "weight": [1.0]} | change
    with pytest.raises((ValueError, TypeError), match=message):
        kernels.ties_update(**arguments)
