"""What every Triton kernel shares: finding a pair of matrices, and the one definition of delta and of the residual.

Bits: tuned and base are converted to float32, subtracted with one rounding, and L is summed over the rank in order with
fused multiply-adds. All of it is elementwise, so selecting and applying see the same bits whatever tiles they use.
"""

from __future__ import annotations

import triton
import triton.language as tl

MAGNITUDE = tl.constexpr(0x7FFFFFFF)
NON_FINITE = tl.constexpr(0x7F800000)


@triton.jit
def matrix(table, which, p, pairs, dtype: tl.constexpr, ALIGNED: tl.constexpr):
    """Address and row stride of base (which = 0) or tuned (which = 1) of pair p; the table is [4, pairs] int64."""
    pointer = tl.load(table + 2 * which * pairs + p).to(tl.pointer_type(dtype))
    stride = tl.load(table + (2 * which + 1) * pairs + p)
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
        stride = tl.multiple_of(stride, 16 // (dtype.primitive_bitwidth // 8))
    return pointer, stride


@triton.jit
def delta_tile(base, base_stride, tuned, tuned_stride, rows, cols, mask, HAS_BASE: tl.constexpr):
    """delta[rows, cols] in float32, zero where masked. The strides are int64, and so is every offset."""
    delta = tl.load(tuned + rows * tuned_stride + cols, mask=mask, other=0.0).to(tl.float32)
    if HAS_BASE:
        delta = delta - tl.load(base + rows * base_stride + cols, mask=mask, other=0.0).to(tl.float32)
    return delta


@triton.jit
def low_rank_tile(left, right, p, m, n, rank, rows, cols, like):
    """L[rows, cols] of pair p; rows [BM, 1], cols [1, BN]; left [pairs, m, rank], right [pairs, n, rank]."""
    low = tl.zeros_like(like)
    left_row = left + (p.to(tl.int64) * m + rows) * rank
    right_row = right + (p.to(tl.int64) * n + cols) * rank
    for r in range(rank):
        l = tl.load(left_row + r, mask=rows < m, other=0.0)
        c = tl.load(right_row + r, mask=cols < n, other=0.0)
        low = tl.fma(l.broadcast_to(low.shape), c.broadcast_to(low.shape), low)
    return low


@triton.jit
def magnitude_key(x):
    """Bits of |x|, which grow with |x|; NaN and infinity are the keys from 0x7f800000."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
