"""The definition of correct: eager PyTorch, one tensor expression per formula of the method, no kernels.

Runs on any device. `delta` and the residual are float32 as everywhere; decompositions are full SVDs in float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from .counter_random import random_bits
from .types import (
    ALWAYS,
    Consensus,
    FactorOverflowError,
    Keep,
    KeepStats,
    NonFiniteError,
    Threshold,
    TruncatedSVD,
    UpdateStats,
    dense_claim,
)

NAME = "reference"
DEVICES: tuple[str, ...] = ()  # any
NUMPY = False


def probe() -> tuple[bool, str]:
    if find_spec("torch") is None:
        return False, "torch is not installed"
    import torch

    return True, f"torch {torch.__version__}"


def delta(base: Any, tuned: Any) -> Any:
    return tuned.float() if base is None else tuned.float() - base.float()


def low_rank(left: Any, right: Any, like: Any) -> Any:
    """L [m, n] float32, summed over the rank in order."""
    import torch

    total = torch.zeros_like(like)
    if left is not None:
        for r in range(left.shape[1]):
            total = torch.addcmul(total, left[:, r : r + 1], right[:, r].unsqueeze(0))
    return total


def keep_mask(residual: Any, threshold: Threshold) -> Any:
    """Boolean [m, n]: which residual entries survive."""
    import torch

    index = torch.arange(residual.numel(), device=residual.device).view(residual.shape)
    magnitude = residual.abs()
    return (magnitude > threshold.value) | ((magnitude == threshold.value) & (index < threshold.cut))


def gram_apply(base: Any, tuned: Any, x: Any, *, side: str, threads: int | None = None) -> Any:
    d = delta(base, tuned).double()
    y = x.double()
    return (d.T @ (d @ y) if side == "right" else d @ (d.T @ y)).float()


def residual_threshold(
    base: Any, tuned: Any, left: Any, right: Any, k: int, *, threads: int | None = None
) -> Threshold:
    import torch

    d = delta(base, tuned)
    bad = int((~torch.isfinite(d)).sum())
    if bad:
        raise NonFiniteError(bad)
    if k == 0:
        return Threshold(math.inf, 0, 0)
    magnitude = (d - low_rank(left, right, d)).abs().flatten()
    value = torch.sort(magnitude, descending=True).values[k - 1]
    ties = k - int((magnitude > value).sum())
    equal = torch.nonzero(magnitude == value).flatten()
    cut = magnitude.numel() if len(equal) == ties else int(equal[ties - 1]) + 1
    return Threshold(float(value), ties, cut)


def merge_update(
    out: Any,
    base: Any,
    tuned: Sequence[Any],
    left: Sequence[Any],
    right: Sequence[Any],
    threshold: Sequence[Threshold],
    weight: Sequence[float],
    *,
    threads: int | None = None,
) -> list[UpdateStats]:
    import torch

    total, stats = out.float(), []
    for tuned_t, left_t, right_t, threshold_t, weight_t in zip(tuned, left, right, threshold, weight, strict=True):
        d = delta(base, tuned_t)
        low = low_rank(left_t, right_t, d)
        residual = d - low
        mask = keep_mask(residual, threshold_t)
        kept = torch.where(mask, residual, 0.0)
        total = total + weight_t * (low + kept)
        energy = [float(x.double().square().sum()) for x in (d, residual, kept)]
        stats.append(UpdateStats(energy[0], energy[1], energy[2], int(mask.sum()), int((~torch.isfinite(d)).sum())))
    out.copy_(total)
    return stats


def apply_update(out: Any, base: Any, update: Any, scale: float, *, threads: int | None = None) -> float:
    import torch

    total = torch.zeros(out.shape, dtype=torch.float64, device=out.device)
    if base is not None:
        total += scale * base.double()
    if update is not None:
        total += update.double()
    out.copy_(total.float())
    return float(total.float().abs().max())


def kept_entries(d: Any, rule: Keep, start: int) -> Any:
    """Boolean [m, n]: which entries of a delta survive a `Keep` rule."""
    import torch

    mask = torch.ones_like(d, dtype=torch.bool)
    for threshold, wanted in ((rule.low, True), (rule.high, False)):
        mask &= keep_mask(d, threshold._replace(cut=threshold.cut - start)) == wanted
    if rule.limit < ALWAYS:
        drawn = random_bits(rule.key, start, d.numel()) < rule.limit
        mask &= torch.from_numpy(drawn).to(d.device).view(d.shape)
    return mask


def ties_update(
    out: Any,
    base: Any,
    tuned: Sequence[Any],
    keep: Sequence[Keep],
    weight: Sequence[float],
    rule: Consensus,
    *,
    threads: int | None = None,
) -> list[KeepStats]:
    import torch

    values, stats = [], []
    for tuned_t, keep_t, weight_t in zip(tuned, keep, weight, strict=True):
        d = delta(base, tuned_t)
        mask = kept_entries(d, keep_t, rule.start)
        kept = torch.where(mask, d, 0.0)
        values.append(kept * keep_t.factor * weight_t)
        sums = [float(x.double().sum()) for x in (d.double().square(), kept.double().square(), d.abs(), kept.abs())]
        stats.append(KeepStats(*sums, int(mask.sum()), int((~torch.isfinite(d)).sum())))  # type: ignore[call-arg,arg-type]
    if out is None:
        return stats
    total, divisor = torch.zeros_like(values[0]), torch.tensor(rule.divisor(weight), device=values[0].device)
    for v in values:
        total = total + v
    if rule.elect:
        sign = torch.where(total >= 0, 1.0, -1.0)
        total, divisor = torch.zeros_like(total), torch.zeros_like(total)
        for v, weight_t in zip(values, weight, strict=True):
            agrees = v.sign() == sign
            total = total + torch.where(agrees, v, 0.0)
            divisor = divisor + torch.where(agrees, weight_t, 0.0)
        divisor = torch.where(divisor == 0, 1.0, divisor)
    out.copy_(out.float() + rule.scale * (total / divisor if rule.normalize else total))
    return stats


def sparse_part(base: Any, tuned: Any, left: Any, right: Any, threshold: Threshold, mask: Any, values: Any) -> int:
    import torch

    d = delta(base, tuned)
    residual = d - low_rank(left, right, d)
    keep = keep_mask(residual, threshold).flatten()
    kept = residual.flatten()[keep]
    if len(kept) > len(values):
        return -1
    values[: len(kept)] = kept
    padded = torch.nn.functional.pad(keep.to(torch.uint8), (0, -len(keep) % 8)).view(-1, 8)
    mask.copy_((padded << torch.arange(8, dtype=torch.uint8)).sum(1, dtype=torch.uint8))
    return len(kept)


def sparse_update(
    out: Any, mask: Any, values: Any, left: Any, right: Any, scale: float, weight: float
) -> tuple[float, int, int]:
    import torch

    places = torch.arange(8, dtype=torch.uint8, device=mask.device)
    bits = ((mask.unsqueeze(1) >> places) & 1).flatten()[: out.numel()].bool()
    if int(bits.sum()) != len(values):
        return 0.0, int(bits.sum()), 0
    sparse = torch.zeros(out.numel(), device=out.device)
    sparse[bits] = values.float() * scale
    sparse = sparse.view(out.shape)
    low = low_rank(left, right, out)
    out += weight * (low + sparse)
    bad = int((~(torch.isfinite(sparse) & torch.isfinite(low))).sum())
    return float(sparse.double().square().sum()), len(values), bad


def truncated_svd(base: Any, tuned: Any, rank: int, *, seed: int = 0, threads: int | None = None) -> TruncatedSVD:
    import torch

    d = delta(base, tuned)
    bad = int((~torch.isfinite(d)).sum())
    if bad:
        raise NonFiniteError(bad)
    u, s, vh = torch.linalg.svd(d.double(), full_matrices=False)
    left, right = (u[:, :rank] * s[:rank]).float().contiguous(), vh[:rank].T.contiguous().float()
    overflows = int((~torch.isfinite(left)).sum())
    if overflows:
        raise FactorOverflowError(overflows)
    energy = float(d.double().square().sum())
    residual, unique = dense_claim(s.tolist(), rank, left.numel())
    return TruncatedSVD(left, right, s[:rank].float(), 0, residual, "svd", energy, NAME, unique)
