"""The operations by their definitions, in numpy: what comes out exactly, and how far float32 may end from it.

A slack is no guess: it counts the roundings of a sum in order, each at most half a unit in the last place of its result,
whether or not products are fused into the sums. What a kernel gets wrong shows as a multiple of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import ml_dtypes
import numpy as np

from ..counter_random import random_bits
from ..types import ALWAYS, KEEP_NONE, Consensus, Keep, Threshold

UNIT = 2.0**-24  # half a unit in the last place of a float32 in [1, 2)
SECOND_ORDER = 1.01  # roundings of what was rounded before
# What rounding from float32 may change: of a number in [1, 2), and of the smallest.
STEPS = {"float32": (0.0, 0.0), "float16": (2.0**-11, 2.0**-25), "bfloat16": (2.0**-8, 2.0**-134)}
ENERGY_ERROR = 3e-5  # a float32 sum of up to 6144 squares, 16 side by side: 400 roundings in a row
SMALLEST_SQUARE = 2.0**-126  # a float32 below it has lost digits, or is 0


class Exact(NamedTuple):
    value: np.ndarray  # float64
    slack: np.ndarray  # float64, the largest distance from it that rounding explains

    def error(self, found: np.ndarray) -> float:
        """The largest distance from the value, as a share of the slack: at most 1 for a right result.

        What found's dtype cannot hold is rightly infinite.
        """
        high = np.abs(self.value) + self.slack > float(ml_dtypes.finfo(found.dtype).max)
        beyond = high & (found == np.where(self.value > 0, np.inf, -np.inf))
        distance = np.abs(np.where(beyond, self.value, found.astype(np.float64)) - self.value)
        if not distance.size:
            return 0.0
        share = np.divide(distance, self.slack, out=np.where(distance > 0, np.inf, 0.0), where=self.slack > 0)
        return float(np.max(np.where(np.isnan(share), np.inf, share)))


def low_rank(left: np.ndarray, right: np.ndarray) -> Exact:
    """L = left @ right.T, each entry a sum of `rank` products in float32."""
    l, r = left.astype(np.float64), right.astype(np.float64)
    slack = 2 * l.shape[1] * (UNIT * (np.abs(l) @ np.abs(r).T) + 2.0**-150)
    return Exact(l @ r.T, SECOND_ORDER * slack)


def applied(scale: float, base: np.ndarray | None, update: np.ndarray, dtype: np.dtype) -> Exact:
    """scale * base + update: one rounding to float32 and one to `dtype`; scales are powers of two, their products exact."""
    value = (0 if base is None else scale * base.astype(np.float64)) + update.astype(np.float64)
    relative, least = STEPS[str(dtype)]
    return Exact(value, SECOND_ORDER * ((UNIT + relative) * np.abs(value) + 2.0**-150 + least))


def nth_largest(residual: np.ndarray, k: int) -> Threshold:
    """The threshold that keeps the k largest magnitudes, of equal ones those that come first in row-major order."""
    if k == 0:
        return KEEP_NONE
    magnitude = np.abs(residual.astype(np.float32)).ravel()
    value = np.partition(magnitude, magnitude.size - k)[magnitude.size - k]
    ties = k - int(np.count_nonzero(magnitude > value))
    equal = np.flatnonzero(magnitude == value)
    return Threshold(float(value), ties, magnitude.size if len(equal) == ties else int(equal[ties - 1]) + 1)


def selected(values: np.ndarray, threshold: Threshold, start: int = 0) -> np.ndarray:
    """The mask a threshold stands for, where the first entry has row-major index `start` in its tensor."""
    magnitude = np.abs(values)
    before = np.arange(values.size).reshape(values.shape) < threshold.cut - start
    return (magnitude > threshold.value) | ((magnitude == threshold.value) & before)


def kept(delta: np.ndarray, rule: Keep, start: int = 0) -> np.ndarray:
    """Which entries of a delta survive a rule."""
    mask = selected(delta, rule.low, start) & ~selected(delta, rule.high, start)
    if rule.limit < ALWAYS:
        mask &= (random_bits(rule.key, start, delta.size) < np.uint64(rule.limit)).reshape(delta.shape)
    return mask


def merged(out: np.ndarray, terms: Sequence[tuple[float, np.ndarray, np.ndarray]]) -> Exact:
    """out + sum of weight * (low + kept) over `terms`, added in order in float32 and rounded once to out's dtype."""
    total = out.astype(np.float64)
    slack = np.zeros_like(total)
    for weight, low, residual in terms:
        part = low.astype(np.float64) + residual
        product = np.float64(np.float32(weight)) * part
        total = total + product
        # of the sum low + kept, of the product and of the addition
        slack += UNIT * (2 * np.abs(product) + np.abs(total)) + 2.0**-149 * max(1.0, abs(weight))
    return rounded(Exact(total, slack), str(out.dtype))


def rounded(exact: Exact, dtype: str) -> Exact:
    """After one more rounding, from float32 to a dtype."""
    step, smallest = STEPS[dtype]
    slack = SECOND_ORDER * exact.slack
    return Exact(exact.value, slack + np.maximum(step * (np.abs(exact.value) + slack), smallest))


def agreed(
    out: np.ndarray, deltas: Sequence[np.ndarray], keep: Sequence[Keep], weight: Sequence[float], rule: Consensus
) -> Exact:
    """`ties_update`. Election and sums are those of float32, bit for bit; only the last line rounds freely."""
    values = [
        np.where(kept(d, k, rule.start), d, np.float32(0)) * np.float32(k.factor) * np.float32(w)
        for d, k, w in zip(deltas, keep, weight, strict=True)
    ]
    total = _in_order(values)
    divisor = np.full_like(total, rule.divisor(weight))
    if rule.elect:
        positive = total >= 0
        agrees = [np.where(positive, v > 0, v < 0) for v in values]
        total = _in_order([np.where(a, v, np.float32(0)) for a, v in zip(agrees, values, strict=True)])
        divisor = _in_order([np.where(a, np.float32(w), np.float32(0)) for a, w in zip(agrees, weight, strict=True)])
        divisor = np.where(divisor == 0, np.float32(1), divisor)
    consensus = (total / divisor if rule.normalize else total).astype(np.float64)
    change = np.float64(np.float32(rule.scale)) * consensus
    exact = out.astype(np.float64) + change
    return rounded(Exact(exact, UNIT * (np.abs(change) + np.abs(exact)) + 2.0**-149), str(out.dtype))


def _in_order(terms: Sequence[np.ndarray]) -> np.ndarray:
    """Their float32 sum from the first to the last."""
    total = np.zeros_like(terms[0])
    for term in terms:
        total = total + term
    return total


def sum_error(found: float, values: np.ndarray, power: int) -> float:
    """Distance of a sum of |values|^power from the truth, as a share of what short float32 sums explain."""
    exact = float((np.abs(values.astype(np.float64)) ** power).sum())
    return abs(found - exact) / (ENERGY_ERROR * exact + max(1, values.size) * SMALLEST_SQUARE)
