"""The whole LoRS reduction of one matrix: a drop-in for SVD truncation and a topk."""

from __future__ import annotations

from typing import Any

from .arrays import check_matrix, new, plain
from .merge_update import merge_update
from .residual_threshold import residual_threshold
from .scalars import check_whole
from .truncated_svd import truncated_svd


def lors_delta(
    delta: Any, rank: int, density: float, *, seed: int = 0, backend: str | None = None, threads: int | None = None
) -> Any:
    """L + S: the rank-`rank` part of delta and the int(density * numel) largest entries of what remains.

    delta: [m, n] float32, float16 or bfloat16; rank 0 leaves L out, density 0 leaves S out. Returns float32 [m, n].
    NaN and infinity are refused: `NonFiniteError`.
    """
    delta = plain(delta)
    check_matrix(delta, "delta")
    m, n = delta.shape
    rank = check_whole(rank, "rank", 0, min(m, n), f" for a matrix {[m, n]}")
    if not 0 <= density <= 1:
        raise ValueError(f"density: expected 0 to 1, got {density}")
    left = right = None
    if rank:
        left, right = truncated_svd(None, delta, rank, seed=seed, backend=backend, threads=threads)[:2]
    k = int(density * (m * n))
    threshold = residual_threshold(None, delta, left, right, k, backend=backend, threads=threads)
    out = new(delta, tuple(delta.shape), zero=True)
    merge_update(out, None, delta, left, right, threshold, 1.0, backend=backend, threads=threads)
    return out
