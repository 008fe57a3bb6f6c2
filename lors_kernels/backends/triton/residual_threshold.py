"""Exact radix select over the bits of |delta - L|: four digits, one histogram pass each, no buffer of candidates.

Counting uses integer atomics, whose sum does not depend on their order. Everything a pass needs to know about the one
before stays on the device, per pair: the digits so far, and the rank of the wanted key among what is still in play.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from ...group import GroupThreshold, MatrixGroup
from .launch import TL_DTYPES, kernel, on_device
from .residual import delta_tile, low_rank_tile, magnitude_key, matrix

DIGITS = ((23, 8), (15, 8), (7, 8), (0, 7))  # (shift, bits) from the top: the exponent, then the mantissa
BINS = 256
# A program's chunk is whole rows, or a part of one that is long: either way the order of the chunks is the row-major
# order that ties are cut in.
WIDE = 8192  # longer rows are cut
BLOCK = {"TALL": 64, "BM": 8, "BN": 256}
WIDE_BLOCK = {"TALL": 1, "BM": 1, "BN": 2048}
CUT_BLOCK = {"BN": 1024, "BC": 1024}
# With 4 warps float16 inputs spill on sm_80; without a bound of its own the assembler aims for 64 registers and spills.
OPTIONS = {"num_warps": 8, "num_stages": 2, "maxnreg": 128}


@triton.jit
def chunk_at(chunk, m, n, tall, wide):
    """First and last + 1 row and column of a chunk of tall x wide entries."""
    across = tl.cdiv(n, wide)
    row, col = chunk // across * tall, chunk % across * wide
    return row, tl.minimum(row + tall, m), col, tl.minimum(col + wide, n)


@triton.jit
def residual_key(
    table, left, right, p, pairs, m, n, rank, rows, cols, inside,
    BASE: tl.constexpr, TUNED: tl.constexpr, HAS_BASE: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    base, base_stride = matrix(table, 0, p, pairs, BASE, ALIGNED)
    tuned, tuned_stride = matrix(table, 1, p, pairs, TUNED, ALIGNED)
    delta = delta_tile(base, base_stride, tuned, tuned_stride, rows, cols, inside, HAS_BASE)
    return magnitude_key(delta - low_rank_tile(left, right, p, m, n, rank, rows, cols, delta))


@kernel
def histogram_kernel(
    table, left, right, prefix, counts, pairs, m, n, rank, chunks, wide,
    BASE: tl.constexpr, TUNED: tl.constexpr, HAS_BASE: tl.constexpr, ALIGNED: tl.constexpr,
    SHIFT: tl.constexpr, BITS: tl.constexpr, BINS: tl.constexpr,
    TALL: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """counts[p, digit] += keys of the chunk whose higher digits are prefix[p]; counts [pairs, BINS] int64."""
    pid = tl.program_id(0)
    p, chunk = pid // chunks, pid % chunks
    wanted = tl.load(prefix + p)
    total = tl.zeros((BINS,), dtype=tl.int64)
    top, end, left_col, stop = chunk_at(chunk, m, n, TALL, wide)
    for first in range(0, TALL, BM):
        rows = (top + first + tl.arange(0, BM))[:, None]
        for start in range(left_col, stop, BN):
            cols = (start + tl.arange(0, BN))[None, :]
            inside = (rows < end) & (cols < stop)
            key = residual_key(
                table, left, right, p, pairs, m, n, rank, rows, cols, inside, BASE, TUNED, HAS_BASE, ALIGNED
            )
            play = inside & ((key >> (SHIFT + BITS)) == wanted)
            digit = (key >> SHIFT) & ((1 << BITS) - 1)
            found = tl.histogram(tl.reshape(digit, (BM * BN,)), BINS, mask=tl.reshape(play, (BM * BN,)))
            total += found.to(tl.int64)
    bins = tl.arange(0, BINS)
    tl.atomic_add(counts + p.to(tl.int64) * BINS + bins, total, mask=total > 0, sem="relaxed")


@kernel
def descend_kernel(
    counts, prefix, wanted, equal, non_finite, FIRST: tl.constexpr, BITS: tl.constexpr, BINS: tl.constexpr
):
    """Takes the digit that holds the wanted[p]-th largest key; wanted becomes its rank inside that digit."""
    p = tl.program_id(0).to(tl.int64)
    digit = BINS - 1 - tl.arange(0, BINS)
    found = tl.load(counts + p * BINS + digit)
    if FIRST:
        tl.store(non_finite + p, tl.sum(tl.where(digit == 255, found, 0)))
    k = tl.load(wanted + p)
    upto = tl.cumsum(found, 0)
    hit = (upto >= k) & (upto - found < k)
    tl.store(prefix + p, (tl.load(prefix + p) << BITS) + tl.sum(tl.where(hit, digit, 0)))
    tl.store(wanted + p, k - tl.sum(tl.where(hit, upto - found, 0)))
    tl.store(equal + p, tl.sum(tl.where(hit, found, 0)))


@kernel
def tie_kernel(
    table, left, right, key_of, ties, equal, counts, pairs, m, n, rank, chunks, wide,
    BASE: tl.constexpr, TUNED: tl.constexpr, HAS_BASE: tl.constexpr, ALIGNED: tl.constexpr,
    TALL: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """counts[p, chunk] = entries of the chunk equal to the threshold; nothing where all of them are kept."""
    pid = tl.program_id(0)
    p, chunk = pid // chunks, pid % chunks
    if tl.load(equal + p) != tl.load(ties + p):
        wanted = tl.load(key_of + p)
        total = tl.zeros((BM, BN), dtype=tl.int32)
        top, end, left_col, stop = chunk_at(chunk, m, n, TALL, wide)
        for first in range(0, TALL, BM):
            rows = (top + first + tl.arange(0, BM))[:, None]
            for start in range(left_col, stop, BN):
                cols = (start + tl.arange(0, BN))[None, :]
                inside = (rows < end) & (cols < stop)
                key = residual_key(
                    table, left, right, p, pairs, m, n, rank, rows, cols, inside, BASE, TUNED, HAS_BASE, ALIGNED
                )
                total += (inside & (key == wanted)).to(tl.int32)
        tl.store(counts + p.to(tl.int64) * chunks + chunk, tl.sum(total.to(tl.int64)))


@kernel
def cut_kernel(
    table, left, right, key_of, ties, equal, counts, cut, pairs, m, n, rank, chunks, wide,
    BASE: tl.constexpr, TUNED: tl.constexpr, HAS_BASE: tl.constexpr, ALIGNED: tl.constexpr,
    TALL: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """cut[p] = row-major index just behind the ties[p]-th equal entry: find its chunk, then walk that chunk."""
    p = tl.program_id(0)
    remaining = tl.load(ties + p)
    if tl.load(equal + p) == remaining:
        tl.store(cut + p, m.to(tl.int64) * n)
    else:
        wanted = tl.load(key_of + p)
        chunk = 0
        before = remaining * 0
        for start in range(0, chunks, BC):
            c = start + tl.arange(0, BC)
            found = tl.load(counts + p.to(tl.int64) * chunks + c, mask=c < chunks, other=0)
            upto = before + tl.cumsum(found, 0)
            passed = (upto < remaining) & (c < chunks)
            chunk += tl.sum(passed.to(tl.int32))
            before = before + tl.sum(found)
        earlier = remaining * 0
        for start in range(0, chunks, BC):
            c = start + tl.arange(0, BC)
            found = tl.load(counts + p.to(tl.int64) * chunks + c, mask=c < chunks, other=0)
            earlier = earlier + tl.sum(tl.where(c < chunk, found, 0))
        seen = earlier
        found_at = seen * 0
        top, end, left_col, stop = chunk_at(chunk, m, n, TALL, wide)
        for row in range(top, end):
            for start in range(left_col, stop, BN):
                cols = (start + tl.arange(0, BN))[None, :]
                rows = tl.full((1, 1), row, dtype=tl.int32)
                inside = cols < stop
                key = residual_key(
                    table, left, right, p, pairs, m, n, rank, rows, cols, inside, BASE, TUNED, HAS_BASE, ALIGNED
                )
                equals = (inside & (key == wanted)).to(tl.int64)
                upto = seen + tl.cumsum(equals, 1)
                hit = (equals == 1) & (upto == remaining)
                found_at = found_at + tl.sum(tl.where(hit, rows.to(tl.int64) * n + cols + 1, 0))
                seen = seen + tl.sum(equals)
        tl.store(cut + p, found_at)


def residual_threshold(group: MatrixGroup, left: Any, right: Any, k: int) -> GroupThreshold:
    import torch

    pairs, device = group.pairs, group.device
    rank = 0 if left is None else left.shape[2]
    prefix = torch.zeros(pairs, dtype=torch.int32, device=device)
    wanted = torch.full((pairs,), max(k, 1), dtype=torch.int64, device=device)
    equal, non_finite, cut = (torch.empty_like(wanted) for _ in range(3))
    long = group.n > WIDE
    wide, block = (WIDE, WIDE_BLOCK) if long else (group.n, BLOCK)
    chunks = triton.cdiv(group.m, block["TALL"]) * triton.cdiv(group.n, wide)
    base, tuned = group.dtypes
    factors = (prefix, prefix) if left is None else (left, right)
    common = {
        "BASE": TL_DTYPES[base], "TUNED": TL_DTYPES[tuned], "HAS_BASE": group.bases is not None,
        "ALIGNED": group.aligned, **OPTIONS,
    }  # fmt: skip
    sizes = (pairs, group.m, group.n, rank, chunks, wide)
    with on_device(device):
        for number, (shift, bits) in enumerate(DIGITS):
            counts = torch.zeros((pairs, BINS), dtype=torch.int64, device=device)
            histogram_kernel[(pairs * chunks,)](
                group.table, *factors, prefix, counts, *sizes, SHIFT=shift, BITS=bits, BINS=BINS, **block, **common
            )
            descend_kernel[(pairs,)](
                counts, prefix, wanted, equal, non_finite, FIRST=number == 0, BITS=bits, BINS=BINS, num_warps=4
            )
            if k == 0:  # only the count of non-finite entries was wanted
                return GroupThreshold(
                    torch.full((pairs,), float("inf"), device=device),
                    torch.zeros_like(cut),
                    torch.zeros_like(cut),
                    non_finite,
                )
        counts = torch.empty((pairs, chunks), dtype=torch.int64, device=device)
        tie_kernel[(pairs * chunks,)](group.table, *factors, prefix, wanted, equal, counts, *sizes, **block, **common)
        cut_kernel[(pairs,)](
            group.table, *factors, prefix, wanted, equal, counts, cut, *sizes, TALL=block["TALL"], **CUT_BLOCK, **common
        )
    return GroupThreshold(prefix.view(torch.float32), wanted, cut, non_finite)
