"""What the kernel operations take and return beside arrays, and what they raise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple


class MisconfiguredError(ValueError):
    """A variable of the environment has a value that it cannot have; the message names it."""


class NonFiniteError(ValueError):
    """delta = tuned - base holds NaN or infinity; `count` entries of it."""

    def __init__(self, count: int) -> None:
        super().__init__(f"delta: expected finite values, got {count} NaN or infinite entries")
        self.count = count


class FactorOverflowError(ValueError):
    """The singular vectors times singular values of delta exceed float32 in `count` entries; `pair` is the first such
    delta of a group."""

    def __init__(self, count: int, pair: int = 0) -> None:
        super().__init__(f"its decomposition overflows float32: {count} entries of singular vectors times values")
        self.count, self.pair = count, pair


class Threshold(NamedTuple):
    """Which entries of the residual R = delta - L survive.

    R[i, j] is kept when |R[i, j]| > value, or when |R[i, j]| == value and its row-major index i * n + j < cut.
    """

    value: float
    ties: int  # entries equal to `value` that are kept
    cut: int


KEEP_NONE = Threshold(math.inf, 0, 0)
KEEP_ALL = Threshold(0.0, 0, 2**62)


ALWAYS = 2**32


class Keep(NamedTuple):
    """Which entries of one expert's delta survive, and their factor.

    Entry i (row-major in its tensor) survives when `low` selects it, `high` does not, and
    random_bits(key, i) < limit, which has probability limit / 2^32.
    """

    low: Threshold = KEEP_ALL
    high: Threshold = KEEP_NONE
    key: int = 0  # of the random numbers, see `random_key`
    limit: int = ALWAYS
    factor: float = 1.0


class Consensus(NamedTuple):
    """How `ties_update` puts the experts together; its keyword arguments of these names."""

    elect: bool
    normalize: bool
    scale: float
    start: int = 0

    def divisor(self, weight: Sequence[float]) -> float:
        """What the sum is divided by without an election: weights that cancel leave it undivided."""
        total = math.fsum(weight)
        return total if abs(total) >= 1e-8 else 1.0


class KeepStats(NamedTuple):
    """What one expert contributed to a ties_update. Where `non_finite` is not 0 the rest means nothing.

    Squares and short sums of them are of float32, the sums of these of float64: to 1e-5 where the squares are neither
    above nor below the range of float32.
    """

    delta_energy: float  # sum of delta^2
    kept_energy: float  # sum of the kept delta^2
    delta_sum: float  # sum of |delta|
    kept_sum: float  # sum of the kept |delta|
    kept: int
    non_finite: int  # NaN or infinite entries of delta


class UpdateStats(NamedTuple):
    """What one expert contributed to a merge_update, as exact as `KeepStats`. Where `non_finite` is not 0 the rest means
    nothing."""

    delta_energy: float  # sum of delta^2
    residual_energy: float  # sum of (delta - L)^2
    kept_energy: float  # sum of kept (delta - L)^2
    kept: int  # number of kept entries
    non_finite: int  # NaN or infinite entries of delta


class TruncatedSVD(NamedTuple):
    """L = left @ right.T, the best rank-r approximation of delta, with its certificate."""

    left: Any  # [m, r] float32: left singular vectors times singular values
    right: Any  # [n, r] float32: right singular vectors
    sigma: Any  # [r] float32, largest first
    passes: int  # products with delta.T @ delta
    residual: float  # bound on ||L - exact|| / ||exact||; see docs/certificate.md
    method: str  # "krylov", "krylov64", "eigh32", "eigh64", "svd64", "svd"
    energy: float  # sum of delta^2
    backend: str
    unique: bool = True  # False: sigma_r = sigma_{r+1}; residual bounds the excess of ||delta - L||^2 over its minimum


CONTRACT = 1e-5  # relative error of L
FACTORS = 1.2e-7  # rounding of both factors to float32, relative
DENORMAL = 2.0**-150  # the same where entries of `left` are denormal, absolute
EQUAL = 1e-6  # relative difference below which two singular values count as equal
DENSE_ROUNDING = 4e-15  # of a float64 decomposition, relative to the largest value


def dense_claim(
    sigma: Any, rank: int, entries: int, scale: float = 1.0, *, squared: bool = False
) -> tuple[float, bool]:
    """(residual, unique) of an L from a float64 SVD with these singular values, or from the eigenvectors of A.T A
    (`squared`), whose left factor has so many entries. `sigma` are those of delta times `scale`.

    A backward stable solver turns a vector by its rounding over the gap to what is left out.
    """
    power = 2 if squared else 1
    values = [float(s) for s in sigma]
    last, following = values[rank - 1], values[rank] if rank < len(values) else 0.0
    kept = math.sqrt(math.fsum(s * s for s in values[:rank]))
    if not kept:
        return 0.0, True
    rounding = DENSE_ROUNDING * values[0] ** power
    if rank < len(values) and last - following <= EQUAL * last and rank * last**2 > (1e-6 * kept) ** 2:
        if squared and rounding > 0.1 * EQUAL * last**2:
            return math.inf, True  # squares this small do not tell
        rest = math.fsum(s * s for s in values[rank:])
        return (2 * rank * rounding * last ** (2 - power) + (FACTORS * kept) ** 2) / rest, False
    turned = 0.0
    for s in values[:rank] if rank < len(values) else ():
        gap = s**power - following**power
        turned += (s * s + following**2) * (min(1.0, rounding / gap) if gap > 0 else 1.0) ** 2
    return math.sqrt(turned) / kept + FACTORS + DENORMAL * math.sqrt(entries) * scale / kept, True
