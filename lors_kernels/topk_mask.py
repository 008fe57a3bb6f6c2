"""Magnitude selection and the whole LoRS reduction of one matrix: drop-ins for torch.topk masks and SVD truncation."""

from __future__ import annotations

from typing import Any

from .arrays import check_matrix, is_torch, new, plain
from .merge_update import merge_update
from .residual_threshold import residual_threshold
from .scalars import check_whole
from .truncated_svd import truncated_svd


def topk_mask(x: Any, k: int, *, backend: str | None = None, threads: int | None = None) -> Any:
    """Boolean mask of the k largest |x|: exactly k entries, of equal magnitudes the lowest row-major index first.

    x: [m, n] float32, float16 or bfloat16. Stands in for `topk(x.abs().flatten(), k)` and a scatter, without the sort.
    NaN and infinity are refused: `NonFiniteError`.
    """
    x = plain(x)
    value, _, cut = residual_threshold(None, x, k=k, backend=backend, threads=threads)
    magnitude = abs(x.float() if is_torch(x) else x.astype("float32")).reshape(-1)
    mask = magnitude > value
    mask[:cut] |= magnitude[:cut] == value
    return mask.reshape(x.shape)


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
