"""The exact k-th largest |delta - L|."""

from __future__ import annotations

from typing import Any

from . import dispatch
from .arrays import check_factors, check_pair, plain
from .scalars import check_whole
from .types import KEEP_NONE, Threshold


def residual_threshold(
    base: Any,
    tuned: Any,
    left: Any = None,
    right: Any = None,
    k: int = 0,
    *,
    backend: str | None = None,
    threads: int | None = None,
) -> Threshold:
    """The k-th largest magnitude of R = delta - L, with delta = tuned - base and L = left @ right.T.

    Exact for every input: a radix select over the bits of |R|. Of entries with equal magnitude those that come first in
    row-major order are kept, so exactly k survive. R is recomputed in each pass and never stored; selecting and
    `merge_update` see the same bits of it.

    Args:
        base: [m, n] float32, float16 or bfloat16, rows contiguous; None stands for zeros.
        tuned: [m, n].
        left, right: [m, r] and [n, r] float32, or both None (r = 0: the threshold of delta itself).
        k: 0 <= k <= m * n. k = 0 keeps nothing, k = m * n everything.

    Returns:
        `Threshold(value, ties, cut)`.

    Raises:
        NonFiniteError: delta holds NaN or infinity.
        ValueError, TypeError: arguments that do not fit.
    """
    base, tuned, left, right = plain(base), plain(tuned), plain(left), plain(right)
    m, n = check_pair(base, tuned)
    check_factors(left, right, tuned)
    k = check_whole(k, "k", 0, m * n, f" for a matrix {[m, n]}")
    if m * n == 0:
        return KEEP_NONE
    run = dispatch.operation("residual_threshold", backend, tuned)
    return run(base, tuned, left, right, k, threads=threads)  # type: ignore[no-any-return]
