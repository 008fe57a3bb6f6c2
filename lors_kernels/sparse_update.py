"""out += weight * (L + S) with S stored as a mask and values."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from . import dispatch
from .arrays import FLOATS, check_factors, check_matrix, dtype_name, to_torch
from .sparse_part import SparsePart


class SparseStats(NamedTuple):
    energy: float  # sum of S^2
    non_finite: int  # entries of L or S that are NaN or infinite


def sparse_update(
    out: np.ndarray,
    part: SparsePart,
    left: np.ndarray | None = None,
    right: np.ndarray | None = None,
    *,
    scale: float = 1.0,
    weight: float = 1.0,
    backend: str | None = None,
) -> SparseStats:
    """out += weight * (left @ right.T + S), S[i, j] = scale * (next value) where the mask's bit i * n + j is set, else 0.

    Args:
        out: [m, n] float32, C-contiguous, updated in place by one thread.
        part: mask [ceil(m * n / 8)] uint8; values float32, float16 or bfloat16, one per set bit (ValueError otherwise).
        left, right: [m, r] and [n, r] float32; None: L = 0.

    With float32 values from `sparse_part` and scale 1, the result has the bits of `merge_update` on the whole delta, on
    the same backend. Nothing is raised for NaN or infinity: `non_finite` counts them.
    """
    check_matrix(out, "out", dtypes=("float32",))
    check_factors(left, right, out)
    m, n = out.shape
    if not out.flags.c_contiguous:
        raise ValueError(f"out: expected a C-contiguous matrix, got strides {out.strides}")
    if part.mask.dtype != np.uint8 or part.mask.size != (m * n + 7) // 8 or not part.mask.flags.c_contiguous:
        raise ValueError(
            f"mask: expected {(m * n + 7) // 8} bytes for {m} x {n}, got {part.mask.size} {part.mask.dtype}"
        )
    if dtype_name(part.values) not in FLOATS or part.values.ndim != 1 or not part.values.flags.c_contiguous:
        raise ValueError(
            f"values: expected a vector of {' or '.join(FLOATS)}, got {part.values.dtype} {part.values.shape}"
        )
    if m * n == 0:
        return SparseStats(0.0, 0)
    module = dispatch.select(backend, out)
    arrays = (out, part.mask, part.values, left, right)
    if module.NAME != "cpu":
        arrays = tuple(map(to_torch, arrays))  # type: ignore[assignment]
    energy, used, bad = module.sparse_update(*arrays, scale, weight)
    if used != part.values.size:
        raise ValueError(
            f"mask: expected {part.values.size} set bits, one per value, got {'more' if used < 0 else used}"
        )
    return SparseStats(energy, bad)
