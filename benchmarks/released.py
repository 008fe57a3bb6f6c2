"""The procedure as the authors released it, written from its description, and two faster forms of it in plain torch.

    delta = W_t - W_0;  L = U_r diag(s_r) V_r^T;  R = delta - L;  S = R where |R| is among its k largest
    W = W_0 + lambda * sum_t (L_t + S_t)          other weights: W_0 + lambda * sum_t delta_t

As released: `torch.linalg.svd(full_matrices=True)` of every matrix and a mask from `torch.topk` of all entries, in
float32, every expert in memory. The faster forms change one step each and nothing else, so that a comparison says
which step cost what: the thin SVD with `kthvalue`, and `torch.svd_lowrank` tuned until L is right to 1e-3.
"""

from __future__ import annotations

import re
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypedDict

import torch
from torch import Tensor

from lors_kernels.testing import plain

from .errors import BenchmarkError

TARGETS = re.compile(r"\.(self_attn|encoder_attn)\.(q|k|v|out)_proj\.weight$|\.fc[12]\.weight$")


class Settings(TypedDict):
    """The numbers of LoRS-Merging, under the names of lors.merge."""

    rank: int
    density: float
    lam: float


PAPER: Settings = {"rank": 7, "density": 0.2, "lam": 0.2}

Decompose = Callable[[Tensor, int], Tensor]  # (delta, rank) -> L
Prune = Callable[[Tensor, int], Tensor]  # (R, k) -> S


@dataclass
class Clock:
    """Seconds by phase, and by phase and shape."""

    phases: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    shapes: dict[tuple[int, ...], float] = field(default_factory=lambda: defaultdict(float))

    def add(self, phase: str, shape: tuple[int, ...], seconds: float) -> None:
        self.phases[phase] += seconds
        self.shapes[shape] += seconds


@dataclass(frozen=True)
class Procedure:
    """One way to decompose and one way to prune."""

    decompose: Decompose
    prune: Prune


def full_svd(delta: Tensor, rank: int) -> Tensor:
    """L [m, n] of rank `rank`, by the complete SVD: also the m - n left vectors that nothing uses."""
    left, sigma, right = torch.linalg.svd(delta, full_matrices=True)
    low: Tensor = left[:, :rank] @ torch.diag(sigma[:rank]) @ right[:rank]
    return low


def thin_svd(delta: Tensor, rank: int) -> Tensor:
    left, right = plain.thin_svd(delta, rank)
    return left @ right.T


def lowrank_svd(q: int, niter: int) -> Decompose:
    """torch.svd_lowrank with sketch width q and niter power iterations."""

    def decompose(delta: Tensor, rank: int) -> Tensor:
        left, sigma, right = torch.svd_lowrank(delta, q=min(q, *delta.shape), niter=niter)
        return (left[:, :rank] * sigma[:rank]) @ right[:, :rank].T

    return decompose


def topk_prune(residual: Tensor, k: int) -> Tensor:
    """The mask of the k largest |residual| built from torch.topk's indices, then multiplied."""
    indices = torch.topk(residual.abs().flatten(), k).indices
    mask = torch.zeros(residual.numel(), dtype=residual.dtype, device=residual.device)
    mask[indices] = 1
    return residual * mask.view_as(residual)


def kthvalue_prune(residual: Tensor, k: int) -> Tensor:
    """Entries not below the k-th largest magnitude (more than k where that one is tied)."""
    if k == 0:
        return torch.zeros_like(residual)
    magnitude = residual.abs()
    threshold = magnitude.flatten().kthvalue(residual.numel() - k + 1).values
    return torch.where(magnitude >= threshold, residual, 0)


RELEASED = Procedure(full_svd, topk_prune)
THIN = Procedure(thin_svd, kthvalue_prune)


def merge(
    base: Mapping[str, Tensor],
    experts: Iterable[Mapping[str, Tensor]],
    procedure: Procedure = RELEASED,
    *,
    rank: int = 7,
    density: float = 0.2,
    lam: float = 0.2,
    only: Callable[[int, str], bool] = lambda expert, name: True,
    clock: Clock | None = None,
) -> dict[str, Tensor]:
    """Merge state dicts of float tensors; `only(expert, name)` leaves matrices out (sampled timing)."""
    clock = clock or Clock()
    merged = {name: tensor.to(torch.float32, copy=True) for name, tensor in base.items()}
    for number, expert in enumerate(experts):
        for name, tensor in base.items():
            if not only(number, name):
                continue
            begin = time.perf_counter()
            delta = expert[name].float() - tensor.float()
            if TARGETS.search(name):
                low = procedure.decompose(delta, rank)
                middle = time.perf_counter()
                clock.add("decompose", tuple(tensor.shape), middle - begin)
                delta = low + procedure.prune(delta - low, int(delta.numel() * density))
                begin = time.perf_counter()
                clock.add("prune", tuple(tensor.shape), begin - middle)
            merged[name] += lam * delta
            clock.add("merge", tuple(tensor.shape), time.perf_counter() - begin)
    return merged


def relative_error(low: Tensor, delta: Tensor, rank: int) -> float:
    """||low - L|| / ||L|| against L from a float64 SVD of delta."""
    truth = thin_svd(delta.double(), rank)
    return float((low.double() - truth).norm() / truth.norm())


def tune_lowrank(samples: list[Tensor], rank: int, target: float = 1e-3) -> dict[str, Any]:
    """The fastest (q, niter) with which svd_lowrank gets L of every sample right to `target`.

    Returns q, niter, error (the worst sample), met, and all that was tried. If nothing on the grid meets the target,
    the most accurate setting is returned with met = False. Every setting starts from the same seed.
    """
    truths = [thin_svd(delta.double(), rank) for delta in samples]
    lowrank_svd(rank, 1)(samples[0], rank)  # the first call pays for threads and workspaces
    tried: list[dict[str, Any]] = []
    for q in sorted({min(rank + extra, *samples[0].shape) for extra in (8, 25, 57, 121)}):
        for niter in (2, 4, 8, 16, 32):
            torch.manual_seed(0)
            begin = time.perf_counter()
            lows = [lowrank_svd(q, niter)(delta, rank) for delta in samples]
            seconds = (time.perf_counter() - begin) / len(samples)
            error = max(float((low - truth).norm() / truth.norm()) for low, truth in zip(lows, truths, strict=True))
            tried.append({"q": q, "niter": niter, "seconds": seconds, "error": error})
            if error <= target:
                break  # more iterations at this width only cost more
    good = [trial for trial in tried if trial["error"] <= target]
    best = min(good, key=lambda trial: trial["seconds"]) if good else min(tried, key=lambda trial: trial["error"])
    return {**best, "met": bool(good), "target": target, "tried": tried}


def targets_by_shape(base: Mapping[str, Tensor]) -> dict[tuple[int, ...], list[str]]:
    """Shape -> names of the matrices that are decomposed."""
    groups: dict[tuple[int, ...], list[str]] = defaultdict(list)
    for name, tensor in base.items():
        if TARGETS.search(name):
            groups[tuple(tensor.shape)].append(name)
    if not groups:
        raise BenchmarkError("state dict: expected Whisper attention and MLP weights in Hugging Face naming, got none")
    return dict(groups)
