"""Matrices that are hard to decompose truthfully, by class and seed: what the certificate of `truncated_svd` is judged on.

A solver that starts from a few random vectors can miss copies of a singular value, take a lower bound for an upper one, or
stop at values that rounding has mixed. The classes put copies, near-copies and small gaps at, above and below the cut, and
let magnitudes differ by as much as float32 holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

Build = Callable[[np.random.Generator, int, int, int], np.ndarray]  # (rng, m, n, rank) -> delta


@dataclass(frozen=True)
class HardCase:
    kind: str
    seed: int
    delta: np.ndarray  # float32
    rank: int


def hard_case(kind: str, seed: int, smallest: int = 16, largest: int = 160, *, any_rank: bool = False) -> HardCase:
    """A matrix of this class; sides and rank are drawn too. The same arguments give the same bits.

    any_rank: from 1 to the smaller side, each as likely as another; else few are above 17.
    """
    rng = np.random.default_rng([seed, *kind.encode()])
    m, n = (int(x) for x in rng.integers(smallest, largest + 1, 2))
    rank = int(rng.integers(1, min(17, min(m, n)) + 1))
    if any_rank or rng.random() < 0.05:
        rank = int(rng.integers(1, min(m, n) + 1))
    with np.errstate(over="ignore", under="ignore"):
        delta = np.ascontiguousarray(KINDS[kind](rng, m, n, rank), dtype=np.float32)
    return HardCase(kind, seed, delta, min(rank, *delta.shape))


def hard_cases(
    count: int, first: int = 0, smallest: int = 16, largest: int = 160, *, any_rank: bool = False
) -> Iterator[HardCase]:
    """The classes in turn."""
    kinds = list(KINDS)
    return (
        hard_case(kinds[i % len(kinds)], i, smallest, largest, any_rank=any_rank) for i in range(first, first + count)
    )


def orthonormal(rng: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    return np.linalg.qr(rng.standard_normal((rows, columns)))[0]  # type: ignore[no-any-return]


def from_spectrum(rng: np.random.Generator, m: int, n: int, sigma: np.ndarray) -> np.ndarray:
    """Random singular vectors with these values, as many as fit."""
    s = np.sort(np.asarray(sigma, dtype=np.float64))[::-1][: min(m, n)]
    return (orthonormal(rng, m, len(s)) * s) @ orthonormal(rng, n, len(s)).T  # type: ignore[no-any-return]


def _decay(rng: np.random.Generator, count: int) -> np.ndarray:
    return np.arange(1, count + 1) ** -float(rng.choice([0.2, 0.3, 0.5, 1.0]))  # type: ignore[no-any-return]


def _cluster(rng: np.random.Generator, m: int, n: int, rank: int, spread: float) -> np.ndarray:
    """2 to 2 r copies of one value that begin above, at or below the cut; relative differences up to `spread`."""
    copies = int(rng.integers(2, 2 * rank + 2))
    first = max(0, rank + int(rng.integers(-copies - 2, 3)))
    s = _decay(rng, min(m, n) + copies + 4)
    s[first : first + copies] = s[first] * (1 - spread * rng.random(copies))
    return from_spectrum(rng, m, n, s)


def copies(rng: np.random.Generator, m: int, n: int, rank: int) -> np.ndarray:
    return _cluster(rng, m, n, rank, 0.0)


def near_copies(rng: np.random.Generator, m: int, n: int, rank: int) -> np.ndarray:
    return _cluster(rng, m, n, rank, 10 ** rng.uniform(-8, -1.5))


def levels(rng: np.random.Generator, m: int, n: int, rank: int) -> np.ndarray:
    """Every value several times."""
    return from_spectrum(rng, m, n, np.repeat(rng.random(8), rng.integers(1, 2 * rank + 2, 8)))


def near_levels(rng: np.random.Generator, m: int, n: int, rank: int) -> np.ndarray:
    s = np.repeat(rng.random(6), rng.integers(1, 12, 6))
    return from_spectrum(rng, m, n, s * (1 + 10 ** rng.uniform(-8, -2) * rng.random(len(s))))


def gap(rng: np.random.Generator, m: int, n: int, rank: int) -> np.ndarray:
    """A relative gap of 1e-1 to 1e-7 at the cut."""
    s = _decay(rng, min(m, n))
    if rank < len(s):
        s[rank:] *= s[rank - 1] * (1 - 10 ** rng.uniform(-7, -1)) / s[rank]
    return from_spectrum(rng, m, n, s)


def graded(rng: np.random.Generator, m: int, n: int, rank: int) -> np.ndarray:
    """Down to 1e-30 of the largest."""
    s = 10.0 ** -(np.arange(min(m, n)) * rng.uniform(0.02, 5))
    return from_spectrum(rng, m, n, s[s > 1e-30])


def graded_copies(rng: np.random.Generator, m: int, n: int, rank: int) -> np.ndarray:
    s = np.repeat(10.0 ** -(np.arange(12) * rng.uniform(0.1, 2)), rng.integers(1, 6, 12))
    return from_spectrum(rng, m, n, s)


def low_rank_and_noise(rng: np.random.Generator, m: int, n: int, rank: int) -> np.ndarray:
    k = int(rng.integers(1, 10))
    return rng.standard_normal((m, k)) @ rng.standard_normal((k, n)) + 10 ** rng.uniform(-8, 0) * rng.standard_normal(
        (m, n)
    )


def exact_low_rank(rng: np.random.Generator, m: int, n: int, rank: int) -> np.ndarray:
    k = int(rng.integers(1, 10))
    return rng.integers(-3, 4, (m, k)) @ rng.integers(-3, 4, (k, n))  # type: ignore[no-any-return]


def flat_tail(rng: np.random.Generator, m: int, n: int, rank: int) -> np.ndarray:
    """A few large values on a floor of equal ones."""
    s = np.full(min(m, n), 10 ** rng.uniform(-9, -0.1))
    k = min(int(rng.integers(1, rank + 3)), len(s))
    s[:k] = 1 + rng.random(k)
    return from_spectrum(rng, m, n, s)


def gaussian(rng: np.random.Generator, m: int, n: int, rank: int) -> np.ndarray:
    return rng.standard_normal((m, n))


def power_law_and_noise(rng: np.random.Generator, m: int, n: int, rank: int) -> np.ndarray:
    low = from_spectrum(rng, m, n, _decay(rng, min(m, n)))
    return low + 10 ** rng.uniform(-4, 0) / np.sqrt(m + n) * rng.standard_normal((m, n))


def integers(rng: np.random.Generator, m: int, n: int, rank: int) -> np.ndarray:
    return rng.integers(-2, 3, (m, n)).astype(np.float64)  # type: ignore[no-any-return]


def signs(rng: np.random.Generator, m: int, n: int, rank: int) -> np.ndarray:
    """Hadamard-like: all singular values equal where it is one."""
    h = np.ones((1, 1))
    while len(h) < min(m, n) // 2 + 1:
        h = np.block([[h, h], [h, -h]])
    return h if rng.random() < 0.5 else h * np.repeat(rng.integers(1, 4, (len(h) + 3) // 4), 4)[: len(h)]


def kronecker(rng: np.random.Generator, m: int, n: int, rank: int) -> np.ndarray:
    c = int(rng.integers(2, 2 * rank + 2))
    block = rng.standard_normal((max(1, m // c), max(1, n // c)))
    return np.kron(np.eye(c), block) if rng.random() < 0.5 else np.kron(block, np.eye(c))  # type: ignore[no-any-return]


def blocks(rng: np.random.Generator, m: int, n: int, rank: int) -> np.ndarray:
    """Block-diagonal; the blocks are one, turned, or different."""
    size, one = int(rng.integers(1, 17)), int(rng.integers(0, 3))
    count = max(1, min(m, n) // size)
    whole, block = np.zeros((size * count, size * count)), rng.standard_normal((size, size))
    for i in range(count):
        part = (block, orthonormal(rng, size, size) @ block, rng.standard_normal((size, size)))[one]
        whole[i * size : (i + 1) * size, i * size : (i + 1) * size] = part
    return whole


def orthogonal(rng: np.random.Generator, m: int, n: int, rank: int) -> np.ndarray:
    q = orthonormal(rng, max(m, n), min(m, n))
    return q if m >= n else q.T


def diagonal(rng: np.random.Generator, m: int, n: int, rank: int) -> np.ndarray:
    """Singular vectors that are unit vectors; distinct, few-valued or equal entries."""
    k, whole = min(m, n), np.zeros((m, n))
    values = (rng.random(k), rng.integers(0, 4, k), np.ones(k), _decay(rng, k))[int(rng.integers(0, 4))]
    whole[np.arange(k), rng.permutation(k)] = values
    return whole


def sparse(rng: np.random.Generator, m: int, n: int, rank: int) -> np.ndarray:
    return rng.standard_normal((m, n)) * (rng.random((m, n)) < 10 ** rng.uniform(-2.5, -0.5))  # type: ignore[no-any-return]


def all_equal(rng: np.random.Generator, m: int, n: int, rank: int) -> np.ndarray:
    return np.full((m, n), 10 ** rng.uniform(-3, 3))


def thin(rng: np.random.Generator, m: int, n: int, rank: int) -> np.ndarray:
    """One side of 1 to 20."""
    short = int(rng.integers(1, 21))
    x = from_spectrum(rng, m, short, np.repeat(rng.random(7), rng.integers(1, 5, 7)))
    return x if rng.random() < 0.5 else x.T


def huge(rng: np.random.Generator, m: int, n: int, rank: int) -> np.ndarray:
    """The largest entry is near the largest float32."""
    x = _any(rng, m, n, rank)
    return x / (np.abs(x).max() or 1.0) * np.finfo(np.float32).max * 2.0 ** -int(rng.integers(8, 20))


def tiny(rng: np.random.Generator, m: int, n: int, rank: int) -> np.ndarray:
    """Denormal entries among the others."""
    x = _any(rng, m, n, rank)
    return x / (np.abs(x).max() or 1.0) * 2.0 ** -int(rng.integers(110, 140))


def _any(rng: np.random.Generator, m: int, n: int, rank: int) -> np.ndarray:
    builds: tuple[Build, ...] = (copies, gap, graded, gaussian, kronecker, low_rank_and_noise, integers)
    return builds[int(rng.integers(0, len(builds)))](rng, m, n, rank)


KINDS: dict[str, Build] = {
    build.__name__.replace("_", "-"): build
    for build in (
        copies, near_copies, levels, near_levels, gap, graded, graded_copies, low_rank_and_noise, exact_low_rank, flat_tail,
        gaussian, power_law_and_noise, integers, signs, kronecker, blocks, orthogonal, diagonal, sparse, all_equal, thin,
        huge, tiny,
    )
}  # fmt: skip
