"""out += weight * (L + S) with S stored as a mask and values."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from . import dispatch
from .arrays import (
    FLOATS,
    check_factors,
    check_matrix,
    check_out,
    describe,
    dtype_name,
    is_numpy,
    is_torch,
    plain,
    strides_of,
)
from .scalars import check_number
from .sparse_part import SparsePart


class SparseStats(NamedTuple):
    energy: float  # sum of S^2
    non_finite: int  # entries of L or S that are NaN or infinite


def sparse_update(
    out: Any,
    part: SparsePart,
    left: Any = None,
    right: Any = None,
    *,
    scale: float = 1.0,
    weight: float = 1.0,
    backend: str | None = None,
) -> SparseStats:
    """out += weight * (left @ right.T + S), S[i, j] = scale * (next value) where the mask's bit i * n + j is set, else 0.

    Args:
        out: [m, n] float32, C-contiguous, updated in place by one thread; its memory is its own.
        part: mask [ceil(m * n / 8)] uint8; values float32, float16 or bfloat16, one per set bit (ValueError otherwise).
        left, right: [m, r] and [n, r] float32; None: L = 0.
        scale, weight: numbers that are finite in float32.

    numpy arrays, or torch tensors on one device; on a GPU it is plain torch, whatever runs the other operations there.
    With float32 values from `sparse_part` and scale 1, the result has the bits of `merge_update` on the whole delta, on
    the same backend. Nothing is raised for NaN or infinity: `non_finite` counts them.
    """
    left, right = plain(left), plain(right)
    check_matrix(plain(out), "out", dtypes=("float32",))
    check_factors(left, right, out)
    m, n = out.shape
    if m > 1 and n and strides_of(plain(out))[0] != n:
        raise ValueError(f"out: expected a C-contiguous matrix, got strides {strides_of(plain(out))}")
    mask = _vector(out, part.mask, "mask", ("uint8",), (m * n + 7) // 8)
    values = _vector(out, part.values, "values", FLOATS)
    scale, weight = check_number(scale, "scale"), check_number(weight, "weight")
    out = check_out(out, out, others=(left, right, mask[None], values[None]))
    if m * n == 0:
        return SparseStats(0.0, 0)
    run = dispatch.operation("sparse_update", backend, out)
    energy, used, bad = run(out, mask, values, left, right, scale, weight)
    if used != len(values):
        raise ValueError(f"mask: expected {len(values)} set bits, one per value, got {used}")
    return SparseStats(energy, bad)


def _vector(out: Any, x: Any, name: str, dtypes: tuple[str, ...], size: int | None = None) -> Any:
    """`x` as contiguous memory beside `out`."""
    x = plain(x)
    if not (is_numpy(x) or is_torch(x)) or x.ndim != 1 or dtype_name(x) not in dtypes or size not in (None, len(x)):
        wanted = f"a vector of {'' if size is None else f'{size} '}{' or '.join(dtypes)}"
        raise ValueError(f"{name}: expected {wanted}, got {describe(x)}")
    if is_torch(x) != is_torch(out) or is_torch(x) and x.device != out.device:
        raise TypeError(f"{name}: expected it where out is, got {describe(x)} beside a {describe(out)}")
    return x.contiguous() if is_torch(x) else np.require(x, requirements=["C", "A"])
