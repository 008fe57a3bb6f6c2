"""The best rank-r approximation of a task vector, with a certificate."""

from __future__ import annotations

from typing import Any

from . import dispatch
from .arrays import check_pair, plain
from .types import TruncatedSVD


def truncated_svd(
    base: Any, tuned: Any, rank: int, *, seed: int = 0, backend: str | None = None, threads: int | None = None
) -> TruncatedSVD:
    """L = sum_{i<=r} sigma_i u_i v_i^T, the r largest singular triplets of delta = tuned - base; L = left @ right.T.

    Block Krylov iteration on delta.T @ delta with full reorthogonalisation, until it is certain of what it claims: that
    the wanted triplets are exact enough and that none was missed. What it cannot be certain of is decomposed densely, and
    on the CPU what costs less that way: large ranks.

    Contract, whatever the spectrum: ||L - exact|| <= residual ||exact|| against a float64 SVD of the float32 delta, and
    residual <= 1e-5 (more where entries of `left` are denormal). Where sigma_r and sigma_{r+1} agree to 1e-6 relative
    the result may say that L is not `unique`; then ||delta - L||^2 exceeds its minimum by at most the part `residual` of
    it, residual <= 1e-6. The start is random: for a given delta, a value was missed with a chance of at most 1e-3 over
    the seeds by what is proven, and hardly ever by what is seen (docs/certificate.md).

    Args:
        base: [m, n] float32, float16 or bfloat16, rows contiguous; None stands for zeros.
        tuned: [m, n].
        rank: 1 <= rank <= min(m, n).
        seed: of the random starting block. Same seed and inputs: same bits, for any number of threads.

    Returns:
        `TruncatedSVD(left, right, sigma, passes, residual, method, energy, backend, unique)`.

    Raises:
        NonFiniteError: delta holds NaN or infinity.
        FactorOverflowError: float32 cannot hold `left`.

    Not promised: the signs of the vectors, their order among equal singular values, the same bits on another backend.
    Source: block Lanczos, Golub and Underwood 1977; bounds of Davis and Kahan, and of Nakatsukasa 2020.
    """
    base, tuned = plain(base), plain(tuned)
    m, n = check_pair(base, tuned)
    if isinstance(rank, bool) or not isinstance(rank, int):
        raise TypeError(f"rank: expected an integer, got {type(rank).__name__} {rank!r}")
    if not 1 <= rank <= min(m, n):
        raise ValueError(f"rank: expected 1 to {min(m, n)} for a matrix {[m, n]}, got {rank}")
    run = dispatch.operation("truncated_svd", backend, tuned)
    return run(base, tuned, rank, seed=seed, threads=threads)  # type: ignore[no-any-return]
