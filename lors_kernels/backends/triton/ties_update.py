"""Trim, elect and sum over all experts in one pass: a program keeps, of its tile, the sums of the positive and of the
negative values beside the sum of all, so that the election needs no second look at the experts."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from ...group import GroupKeepStats, MatrixGroup, is_aligned, row_stride, rule_tables, upload
from ...types import Consensus, Keep
from .launch import TL_DTYPES, kernel, on_device
from .residual import NON_FINITE, delta_tile, magnitude_key, matrix

BLOCK = {"BM": 4, "BN": 256}
# A sum that were fused with the product before it could have the other sign than the reference's.
OPTIONS = {"num_warps": 4, "num_stages": 2, "enable_fp_fusion": False}
ALWAYS = tl.constexpr(1 << 32)


@triton.jit
def random_bits(key, index):
    """SplitMix64 entered at any place, its upper 32 bits; csrc/common/counter_random.h."""
    z = key + (index.to(tl.uint64) + 1) * 0x9E3779B97F4A7C15
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return (z ^ (z >> 31)) >> 32


@triton.jit
def selects(key, value, index, cut):
    bound = magnitude_key(value)
    return (key > bound) | ((key == bound) & (index < cut))


@kernel
def ties_kernel(
    table, out_table, numbers, integers, energy, counts, pairs, matrices, experts, m, n, tiles, start, scale, all_weights,
    BASE: tl.constexpr, TUNED: tl.constexpr, OUT: tl.constexpr, HAS_BASE: tl.constexpr, ALIGNED: tl.constexpr,
    HAS_OUT: tl.constexpr, ELECT: tl.constexpr, NORMALIZE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Program = (matrix, tile). numbers float32 and integers int64 [4, pairs] as in `rule_tables`; energy and counts
    receive the tile's sums, [pairs, tiles, 4] float32 and [pairs, tiles, 2] int32, which the caller adds in order."""
    pid = tl.program_id(0)
    i, tile = pid // tiles, pid % tiles
    across = tl.cdiv(n, BN)
    rows = (tile // across * BM + tl.arange(0, BM))[:, None]
    cols = (tile % across * BN + tl.arange(0, BN))[None, :]
    inside = (rows < m) & (cols < n)
    index = start + rows.to(tl.int64) * n + cols
    total = tl.zeros((BM, BN), dtype=tl.float32)
    positive = tl.zeros_like(total)
    negative = tl.zeros_like(total)
    positive_weight = tl.zeros_like(total)
    negative_weight = tl.zeros_like(total)
    for t in range(experts):
        p = i * experts + t
        base, base_stride = matrix(table, 0, p, pairs, BASE, ALIGNED)
        tuned, tuned_stride = matrix(table, 1, p, pairs, TUNED, ALIGNED)
        delta = delta_tile(base, base_stride, tuned, tuned_stride, rows, cols, inside, HAS_BASE)
        key = magnitude_key(delta)
        keep = inside & selects(key, tl.load(numbers + p), index, tl.load(integers + p))
        keep = keep & (selects(key, tl.load(numbers + pairs + p), index, tl.load(integers + pairs + p)) == 0)
        limit = tl.load(integers + 3 * pairs + p)
        if limit < ALWAYS:
            drawn = random_bits(tl.load(integers + 2 * pairs + p).to(tl.uint64), index)
            keep = keep & (drawn.to(tl.int64) < limit)
        kept = tl.where(keep, delta, 0.0)
        weight = tl.load(numbers + 3 * pairs + p)
        v = (kept * tl.load(numbers + 2 * pairs + p)) * weight
        total += v
        positive += tl.where(v > 0, v, 0.0)
        negative += tl.where(v < 0, v, 0.0)
        positive_weight += tl.where(v > 0, weight, 0.0)
        negative_weight += tl.where(v < 0, weight, 0.0)
        at = p.to(tl.int64) * tiles + tile
        tl.store(energy + at * 4, tl.sum(delta * delta))
        tl.store(energy + at * 4 + 1, tl.sum(kept * kept))
        tl.store(energy + at * 4 + 2, tl.sum(tl.abs(delta)))
        tl.store(energy + at * 4 + 3, tl.sum(tl.abs(kept)))
        tl.store(counts + at * 2, tl.sum(keep.to(tl.int32)))
        tl.store(counts + at * 2 + 1, tl.sum(((key >= NON_FINITE) & inside).to(tl.int32)))
    if HAS_OUT:
        divisor = tl.zeros_like(total) + all_weights
        if ELECT:
            up = total >= 0
            divisor = tl.where(up, positive_weight, negative_weight)
            divisor = tl.where(divisor == 0, 1.0, divisor)
            total = tl.where(up, positive, negative)
        if NORMALIZE:
            total = tl.div_rn(total, divisor)
        out, out_stride = matrix(out_table, 0, i, matrices, OUT, ALIGNED)
        place = out + rows * out_stride + cols
        total = tl.load(place, mask=inside, other=0.0).to(tl.float32) + scale * total
        tl.store(place, total.to(OUT), mask=inside)


def ties_update(group: MatrixGroup, out: Any, keep: list[Keep], weight: list[float], rule: Consensus) -> GroupKeepStats:
    import torch

    from ...arrays import dtype_name

    device, pairs = group.device, group.pairs
    tiles = triton.cdiv(group.m, BLOCK["BM"]) * triton.cdiv(group.n, BLOCK["BN"])
    energy = torch.empty((pairs, tiles, 4), dtype=torch.float32, device=device)
    counts = torch.empty((pairs, tiles, 2), dtype=torch.int32, device=device)
    numbers, integers = rule_tables(keep, weight, device)
    out_table = integers if out is None else upload([[x.data_ptr(), row_stride(x)] for x in out], device)
    base, tuned = group.dtypes
    with on_device(device):
        ties_kernel[(group.matrices * tiles,)](
            group.table, out_table, numbers, integers, energy, counts, pairs, group.matrices, group.experts,
            group.m, group.n, tiles, rule.start, rule.scale, rule.divisor(weight),
            BASE=TL_DTYPES[base], TUNED=TL_DTYPES[tuned], OUT=TL_DTYPES[tuned if out is None else dtype_name(out[0])],
            HAS_BASE=group.bases is not None, ALIGNED=group.aligned and all(is_aligned(x) for x in out or ()),
            HAS_OUT=out is not None, ELECT=rule.elect, NORMALIZE=rule.normalize, **BLOCK, **OPTIONS,
        )  # fmt: skip
        sums = counts.sum(1)
        return GroupKeepStats(energy.double().sum(1), sums[:, 0], sums[:, 1])
