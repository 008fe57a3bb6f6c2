"""z = delta.T @ (delta @ x) over a group: one program per pair and block of rows, tensor cores in three-term tf32."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from ...group import MatrixGroup
from .launch import TL_DTYPES, kernel, on_device
from .residual import delta_tile, matrix

# Three tf32 products carry 22 bits and more of each factor, which the 1e-5 contract needs; one tf32 product carries 11
# and fails it (tests/kernels/test_truncated_svd_group.py). "ieee" is the same accuracy without tensor cores.
PRECISION = "tf32x3"
BLOCK = {"BO": 64, "BI": 32}  # BI = 64 spills with float32 inputs
OPTIONS = {"num_warps": 4, "num_stages": 3}


@kernel
def gram_kernel(
    table, x, y_out, partial, pairs, outer, inner, b, chunks,
    BASE: tl.constexpr, TUNED: tl.constexpr, HAS_BASE: tl.constexpr, ALIGNED: tl.constexpr, TRANSPOSED: tl.constexpr,
    STORE_Y: tl.constexpr, BO: tl.constexpr, BI: tl.constexpr, B: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A is delta, or delta.T if TRANSPOSED: [outer, inner]. partial[p, chunk] = A[chunk].T @ (A[chunk] @ x[p]).

    x [pairs, inner, b], y_out [pairs, outer, b], partial [pairs, chunks, inner, b]. The block of A is read twice, the
    second time from L2; the chunks' sums are added in a second step, so that no bit depends on who finishes first.
    """
    pid = tl.program_id(0)
    chunk = pid % chunks
    p = (pid // chunks) % pairs
    column = (pid // chunks) // pairs * B + tl.arange(0, B)[None, :]
    base, base_stride = matrix(table, 0, p, pairs, BASE, ALIGNED)
    tuned, tuned_stride = matrix(table, 1, p, pairs, TUNED, ALIGNED)
    o = chunk * BO + tl.arange(0, BO)
    x_p = x + p.to(tl.int64) * inner * b
    y = tl.zeros((BO, B), dtype=tl.float32)
    for start in range(0, inner, BI):
        i = start + tl.arange(0, BI)
        x_tile = tl.load(
            x_p + i[:, None].to(tl.int64) * b + column, mask=(i[:, None] < inner) & (column < b), other=0.0
        )
        if TRANSPOSED:
            mask = (i[:, None] < inner) & (o[None, :] < outer)
            a = tl.trans(delta_tile(base, base_stride, tuned, tuned_stride, i[:, None], o[None, :], mask, HAS_BASE))
        else:
            mask = (o[:, None] < outer) & (i[None, :] < inner)
            a = delta_tile(base, base_stride, tuned, tuned_stride, o[:, None], i[None, :], mask, HAS_BASE)
        y = tl.dot(a, x_tile, y, input_precision=PRECISION)
    if STORE_Y:
        y_p = y_out + p.to(tl.int64) * outer * b
        tl.store(y_p + o[:, None].to(tl.int64) * b + column, y, mask=(o[:, None] < outer) & (column < b))
    z_p = partial + (p.to(tl.int64) * chunks + chunk) * inner * b
    for start in range(0, inner, BI):
        i = start + tl.arange(0, BI)
        if TRANSPOSED:
            mask = (i[:, None] < inner) & (o[None, :] < outer)
            at = delta_tile(base, base_stride, tuned, tuned_stride, i[:, None], o[None, :], mask, HAS_BASE)
        else:
            mask = (o[:, None] < outer) & (i[None, :] < inner)
            at = tl.trans(delta_tile(base, base_stride, tuned, tuned_stride, o[:, None], i[None, :], mask, HAS_BASE))
        z = tl.dot(at, y, input_precision=PRECISION)
        tl.store(z_p + i[:, None].to(tl.int64) * b + column, z, mask=(i[:, None] < inner) & (column < b))


def block_width(b: int) -> int:
    """Columns of x per program: 16 fills a tensor core tile; wider blocks share the reads of delta."""
    return 16 if b <= 16 else 32


def gram_apply(group: MatrixGroup, x: Any, *, side: str, product: bool = False) -> tuple[Any, Any]:
    """x [P, inner, b] contiguous -> z of the same shape, and A @ x if asked for."""
    pairs, inner, b = x.shape
    outer = group.m if side == "right" else group.n
    chunks, width = triton.cdiv(outer, BLOCK["BO"]), block_width(b)
    partial = x.new_empty((pairs, chunks, inner, b))
    y = x.new_empty((pairs, outer, b)) if product else x
    base, tuned = group.dtypes
    with on_device(group.device):
        gram_kernel[(chunks * pairs * triton.cdiv(b, width),)](
            group.table, x, y, partial, pairs, outer, inner, b, chunks,
            BASE=TL_DTYPES[base], TUNED=TL_DTYPES[tuned], HAS_BASE=group.bases is not None, ALIGNED=group.aligned,
            TRANSPOSED=side == "left", STORE_Y=product, B=width, PRECISION=PRECISION, **BLOCK, **OPTIONS,
        )  # fmt: skip
        z = partial[:, 0] if chunks == 1 else partial.sum(1)
    return z, (y if product else None)
