"""out_i += sum_t weight_it * (L_it + kept residual): a program reads a tile of base and of every expert once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl

from ...group import GroupStats, GroupThreshold, MatrixGroup, is_aligned, row_stride, upload
from .launch import TL_DTYPES, kernel, on_device
from .residual import NON_FINITE, delta_tile, low_rank_tile, magnitude_key, matrix

BLOCK = {"BM": 4, "BN": 256}
OPTIONS = {"num_warps": 4, "num_stages": 2}


@kernel
def merge_kernel(
    table, out_table, left, right, value, cut, weight, energy, counts, pairs, matrices, experts, m, n, rank, tiles,
    BASE: tl.constexpr, TUNED: tl.constexpr, OUT: tl.constexpr, HAS_BASE: tl.constexpr, ALIGNED: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Program = (matrix, tile). value [pairs] float32, cut [pairs] int64, weight [pairs]; energy and counts receive
    the tile's sums, [pairs, tiles, 3] float32 and [pairs, tiles, 2] int32, which the caller adds in order."""
    pid = tl.program_id(0)
    i, tile = pid // tiles, pid % tiles
    across = tl.cdiv(n, BN)
    rows = (tile // across * BM + tl.arange(0, BM))[:, None]
    cols = (tile % across * BN + tl.arange(0, BN))[None, :]
    inside = (rows < m) & (cols < n)
    index = rows.to(tl.int64) * n + cols
    out, out_stride = matrix(out_table, 0, i, matrices, OUT, ALIGNED)
    place = out + rows * out_stride + cols
    total = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    for t in range(experts):
        p = i * experts + t
        base, base_stride = matrix(table, 0, p, pairs, BASE, ALIGNED)
        tuned, tuned_stride = matrix(table, 1, p, pairs, TUNED, ALIGNED)
        delta = delta_tile(base, base_stride, tuned, tuned_stride, rows, cols, inside, HAS_BASE)
        low = low_rank_tile(left, right, p, m, n, rank, rows, cols, delta)
        residual = delta - low
        key, bound = magnitude_key(residual), magnitude_key(tl.load(value + p))
        keep = ((key > bound) | ((key == bound) & (index < tl.load(cut + p)))) & inside
        kept = tl.where(keep, residual, 0.0)
        total = tl.fma(tl.load(weight + p).to(tl.float32).broadcast_to(total.shape), low + kept, total)
        bad = (magnitude_key(delta) >= NON_FINITE) & inside
        at = p.to(tl.int64) * tiles + tile
        tl.store(energy + at * 3, tl.sum(delta * delta))
        tl.store(energy + at * 3 + 1, tl.sum(residual * residual))
        tl.store(energy + at * 3 + 2, tl.sum(kept * kept))
        tl.store(counts + at * 2, tl.sum(keep.to(tl.int32)))
        tl.store(counts + at * 2 + 1, tl.sum(bad.to(tl.int32)))
    tl.store(place, total.to(OUT), mask=inside)


@kernel
def measure_kernel(
    table, energy, counts, pairs, m, n, tiles,
    BASE: tl.constexpr, TUNED: tl.constexpr, HAS_BASE: tl.constexpr, ALIGNED: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """energy [pairs, tiles] = sum of delta^2; counts [pairs, tiles, 2] = non-finite entries, key of the largest finite."""
    pid = tl.program_id(0)
    p, tile = pid // tiles, pid % tiles
    across = tl.cdiv(n, BN)
    rows = (tile // across * BM + tl.arange(0, BM))[:, None]
    cols = (tile % across * BN + tl.arange(0, BN))[None, :]
    base, base_stride = matrix(table, 0, p, pairs, BASE, ALIGNED)
    tuned, tuned_stride = matrix(table, 1, p, pairs, TUNED, ALIGNED)
    delta = delta_tile(base, base_stride, tuned, tuned_stride, rows, cols, (rows < m) & (cols < n), HAS_BASE)
    key = magnitude_key(delta)
    bad = key >= NON_FINITE
    at = p.to(tl.int64) * tiles + tile
    tl.store(energy + at, tl.sum(delta * delta))
    tl.store(counts + at * 2, tl.sum(bad.to(tl.int32)))
    tl.store(counts + at * 2 + 1, tl.max(tl.where(bad, 0, key)))


def tiles_of(group: MatrixGroup) -> int:
    return triton.cdiv(group.m, BLOCK["BM"]) * triton.cdiv(group.n, BLOCK["BN"])


def merge_update(
    group: MatrixGroup, out: Sequence[Any], left: Any, right: Any, threshold: GroupThreshold, weight: list[float]
) -> GroupStats:
    import torch

    from ...arrays import dtype_name

    device, tiles, pairs = group.device, tiles_of(group), group.pairs
    rank = 0 if left is None else left.shape[2]
    energy = torch.empty((pairs, tiles, 3), dtype=torch.float32, device=device)
    counts = torch.empty((pairs, tiles, 2), dtype=torch.int32, device=device)
    weights = torch.tensor(weight, dtype=torch.float32).to(device, non_blocking=True)
    out_table = upload([[x.data_ptr(), row_stride(x)] for x in out], device)
    base, tuned = group.dtypes
    with on_device(device):
        merge_kernel[(group.matrices * tiles,)](
            group.table, out_table, weights if left is None else left, weights if right is None else right,
            threshold.value, threshold.cut, weights, energy, counts, pairs, group.matrices, group.experts,
            group.m, group.n, rank, tiles,
            BASE=TL_DTYPES[base], TUNED=TL_DTYPES[tuned], OUT=TL_DTYPES[dtype_name(out[0])],
            HAS_BASE=group.bases is not None, ALIGNED=group.aligned and all(is_aligned(x) for x in out),
            **BLOCK, **OPTIONS,
        )  # fmt: skip
        sums = counts.sum(1)
        return GroupStats(energy.double().sum(1), sums[:, 0], sums[:, 1])


def measure(group: MatrixGroup) -> tuple[Any, Any, Any]:
    """Per pair: the sum of delta^2 (float64), its NaN and infinite entries, its largest finite magnitude."""
    import torch

    tiles = tiles_of(group)
    energy = torch.empty((group.pairs, tiles), dtype=torch.float32, device=group.device)
    counts = torch.empty((group.pairs, tiles, 2), dtype=torch.int32, device=group.device)
    base, tuned = group.dtypes
    with on_device(group.device):
        measure_kernel[(group.pairs * tiles,)](
            group.table, energy, counts, group.pairs, group.m, group.n, tiles,
            BASE=TL_DTYPES[base], TUNED=TL_DTYPES[tuned], HAS_BASE=group.bases is not None, ALIGNED=group.aligned,
            **BLOCK, **OPTIONS,
        )  # fmt: skip
        return energy.double().sum(1), counts[:, :, 0].sum(1), counts[:, :, 1].amax(1).view(torch.float32)
