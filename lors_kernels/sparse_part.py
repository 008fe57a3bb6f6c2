"""S as it is stored: which entries of the residual are kept, and their values."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from . import dispatch
from .arrays import check_factors, check_pair, is_torch, plain
from .scalars import check_threshold, check_whole
from .types import KEEP_NONE, Threshold


class SparsePart(NamedTuple):
    """A sparse [m, n] matrix."""

    mask: np.ndarray  # [ceil(m * n / 8)] uint8: bit i * n + j, least significant first
    values: np.ndarray  # [k] float32, row-major


def sparse_part(
    base: np.ndarray | None,
    tuned: np.ndarray,
    left: np.ndarray | None,
    right: np.ndarray | None,
    threshold: Threshold,
    k: int,
    *,
    backend: str | None = None,
) -> SparsePart:
    """S = keep(delta - L), delta = tuned - base, L = left @ right.T: what `merge_update` adds, entry for entry.

    Args:
        base, tuned, left, right: as for `residual_threshold`, in numpy.
        threshold: what `residual_threshold` gave for these and `k`.
        k: number of kept entries, a ValueError when the threshold keeps another number.

    The values have the bits that `merge_update` of the same backend adds. NaN and infinity in delta, which
    `residual_threshold` refuses, are not looked for. One thread.
    """
    if is_torch(tuned):
        raise TypeError("tuned: expected a numpy array, got a torch tensor: stored parts live in main memory")
    base, tuned, left, right = plain(base), plain(tuned), plain(left), plain(right)
    m, n = check_pair(base, tuned)
    check_factors(left, right, tuned)
    check_threshold(threshold, "threshold")
    k = check_whole(k, "k", 0, m * n, f" for a matrix {[m, n]}")
    mask, values = np.zeros((m * n + 7) // 8, np.uint8), np.empty(k, np.float32)
    if m * n == 0 or k == 0 and threshold[::2] == KEEP_NONE[::2]:
        return SparsePart(mask, values)
    run = dispatch.operation("sparse_part", backend, tuned)
    count = run(base, tuned, left, right, threshold, mask, values)
    if count != k:
        raise ValueError(f"threshold: expected one that keeps {k} entries, got {'more' if count < 0 else count}")
    return SparsePart(mask, values)
