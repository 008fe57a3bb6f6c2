"""The best rank-r approximation of a task vector, with a certificate."""

from __future__ import annotations

from typing import Any

from . import dispatch
from .arrays import check_pair, is_torch, like_kind, plain, to_torch
from .types import TruncatedSVD


def truncated_svd(
    base: Any, tuned: Any, rank: int, *, seed: int = 0, backend: str | None = None, threads: int | None = None
) -> TruncatedSVD:
    """L = sum_{i<=r} sigma_i u_i v_i^T, the r largest singular triplets of delta = tuned - base; L = left @ right.T.

    Block Krylov iteration on delta.T @ delta with full reorthogonalisation. Its accuracy is certified: the residual of
    every wanted triplet is measured, and the iteration goes on, in float64 or finally by a dense eigen-decomposition,
    until the contract holds.

    Contract, whatever the spectrum: ||L - exact|| <= 1e-5 ||exact|| against a float64 SVD of the float32 delta. Where
    sigma_r and sigma_{r+1} agree to 1e-6 relative, L is not unique; then ||delta - L||^2 is within 1e-6 of its minimum.

    Args:
        base: [m, n] float32, float16 or bfloat16, rows contiguous; None stands for zeros.
        tuned: [m, n].
        rank: 1 <= rank <= min(m, n).
        seed: of the random starting block. Same seed and inputs: same bits, for any number of threads.

    Returns:
        `TruncatedSVD(left, right, sigma, passes, residual, method, energy, backend)`.

    Raises:
        NonFiniteError: delta holds NaN or infinity.

    Not promised: the signs of the vectors, their order among equal singular values, the same bits on another backend.
    Source: block Lanczos, Golub and Underwood 1977; the bound is Davis and Kahan's sin-theta theorem.
    """
    base, tuned = plain(base), plain(tuned)
    m, n = check_pair(base, tuned)
    if isinstance(rank, bool) or not isinstance(rank, int):
        raise TypeError(f"rank: expected an integer, got {type(rank).__name__} {rank!r}")
    if not 1 <= rank <= min(m, n):
        raise ValueError(f"rank: expected 1 to {min(m, n)} for a matrix {[m, n]}, got {rank}")
    module = dispatch.select(backend, tuned)
    if module.NAME == "cpu" or is_torch(tuned):
        return module.truncated_svd(base, tuned, rank, seed=seed, threads=threads)  # type: ignore[no-any-return]
    result = module.truncated_svd(to_torch(base), to_torch(tuned), rank, seed=seed)
    left, right, sigma = (like_kind(tuned, x) for x in result[:3])
    return result._replace(left=left, right=right, sigma=sigma)  # type: ignore[no-any-return]
