"""Magnitude selection of one matrix: a drop-in for torch.topk masks."""

from __future__ import annotations

from typing import Any

from .arrays import is_torch, plain
from .residual_threshold import residual_threshold


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
