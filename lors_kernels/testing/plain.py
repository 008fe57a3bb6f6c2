"""Every operation in plain torch, as one would write it without this package: what the benchmarks compare with.

Each computes in the precision of its float arguments, so that the float64 form is the truth and the float32 form says what
rounding alone does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import torch

Tensor: TypeAlias = "torch.Tensor"


def delta(base: Tensor, tuned: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    return tuned.to(dtype) - base.to(dtype)


def gram_apply(base: Tensor, tuned: Tensor, x: Tensor) -> Tensor:
    d = delta(base, tuned, x.dtype)
    return d.T @ (d @ x)


def thin_svd(d: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(left [m, rank] times the singular values, right [n, rank]), from the thin SVD."""
    left, sigma, right = torch.linalg.svd(d, full_matrices=False)
    return left[:, :rank] * sigma[:rank], right[:rank].T


def residual_magnitudes(base: Tensor, tuned: Tensor, left: Tensor, right: Tensor) -> Tensor:
    return (delta(base, tuned, left.dtype) - left @ right.T).abs().flatten()


def kth_largest(magnitudes: Tensor, k: int) -> Tensor:
    return magnitudes.kthvalue(magnitudes.numel() - k + 1).values


def merge_update(
    out: Tensor,
    base: Tensor,
    tuned: Sequence[Tensor],
    left: Sequence[Tensor],
    right: Sequence[Tensor],
    values: Sequence[float],
    weight: float,
) -> Tensor:
    for expert, u, v, value in zip(tuned, left, right, values, strict=True):
        low = u.to(out.dtype) @ v.to(out.dtype).T
        residual = delta(base, expert, out.dtype) - low
        out += weight * (low + torch.where(residual.abs() >= value, residual, 0))
    return out


def apply_update(out: Tensor, base: Tensor, update: Tensor) -> Tensor:
    """Added in the precision of update, rounded by the copy."""
    return out.copy_(base.to(update.dtype) + update)


def ties_update(out: Tensor, base: Tensor, tuned: Sequence[Tensor], values: Sequence[float], scale: float) -> Tensor:
    """Trim by magnitude, elect signs, mean of those that agree."""
    deltas = torch.stack([delta(base, expert, out.dtype) for expert in tuned])
    kept = torch.where(
        deltas.abs() >= torch.tensor(values, dtype=out.dtype, device=out.device)[:, None, None], deltas, 0
    )
    sign = torch.where(kept.sum(0) >= 0, 1, -1).to(out.dtype)
    agreeing = (kept.sign() == sign) & (kept != 0)
    out += scale * (kept * agreeing).sum(0) / agreeing.sum(0).clamp(min=1)
    return out


def sparse_part(base: Tensor, tuned: Tensor, left: Tensor, right: Tensor, value: float) -> tuple[Any, Tensor]:
    """(mask, values) in main memory; the bits by numpy, torch has no packbits."""
    residual = delta(base, tuned, left.dtype) - left @ right.T
    kept = residual.abs() >= value
    return np.packbits(kept.numpy(), bitorder="little"), residual[kept]


def sparse_update(out: Tensor, mask: Any, values: Tensor, left: Tensor, right: Tensor, weight: float) -> Tensor:
    sparse = torch.zeros_like(out)
    bits = torch.from_numpy(np.unpackbits(mask, count=out.numel(), bitorder="little")).view(out.shape)
    sparse[bits.bool()] = values.to(out.dtype)
    out += weight * (left.to(out.dtype) @ right.to(out.dtype).T + sparse)
    return out


def topk_mask(x: Tensor, k: int) -> Tensor:
    mask = torch.zeros(x.numel(), dtype=torch.bool, device=x.device)
    mask[torch.topk(x.abs().flatten(), k, sorted=False).indices] = True
    return mask.view(x.shape)


def lors_delta(d: Tensor, rank: int, density: float) -> Tensor:
    left, right = thin_svd(d, rank)
    low = left @ right.T
    residual = d - low
    return low + residual * topk_mask(residual, int(d.numel() * density))
