"""What right means, as numbers: each function returns the quantity that a contract bounds."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..types import Threshold

LOW_RANK_ERROR = 1e-5  # contract of truncated_svd
LOW_RANK_ENERGY = 1e-6  # the same where L is not unique
UNIQUE_GAP = 1e-6  # relative gap below which it is not


def delta_of(base: np.ndarray | None, tuned: np.ndarray) -> np.ndarray:
    t = tuned.astype(np.float32)
    return t if base is None else t - base.astype(np.float32)


@dataclass(frozen=True)
class LowRankVerdict:
    error: float  # ||L - exact|| / ||exact||, or the relative excess of ||delta - L||^2 where L is not unique
    bound: float
    unique: bool

    @property
    def ok(self) -> bool:
        return self.error <= self.bound


def judge_low_rank(delta: np.ndarray, low: np.ndarray, rank: int) -> LowRankVerdict:
    """Compares L with a float64 SVD of delta."""
    d = delta.astype(np.float64)
    u, s, vh = np.linalg.svd(d, full_matrices=False)
    exact = (u[:, :rank] * s[:rank]) @ vh[:rank]
    if not s[0]:
        return LowRankVerdict(float(np.abs(low).max()), 0.0, True)
    follows = s[rank] if rank < len(s) else 0.0
    if s[rank - 1] - follows > UNIQUE_GAP * s[rank - 1] or s[rank - 1] < 1e-7 * s[0]:
        # float32 factors cannot be finer than the denormal spacing, which shows only where delta itself is denormal
        spacing = 2.0**-149 * rank * np.sqrt(d.size) / np.linalg.norm(exact)
        return LowRankVerdict(
            float(np.linalg.norm(low - exact) / np.linalg.norm(exact)), LOW_RANK_ERROR + spacing, True
        )
    optimal = float((s[rank:] ** 2).sum())
    excess = float(((d - low) ** 2).sum()) - optimal
    return LowRankVerdict(excess / optimal, LOW_RANK_ENERGY, False)


def selected(residual: np.ndarray, threshold: Threshold) -> np.ndarray:
    """The mask a threshold stands for."""
    magnitude = np.abs(residual)
    index = np.arange(residual.size).reshape(residual.shape)
    return (magnitude > threshold.value) | ((magnitude == threshold.value) & (index < threshold.cut))


def exact_selection(residual: np.ndarray, k: int) -> np.ndarray:
    """The mask by definition: sort by falling magnitude, then by index, and take k."""
    order = np.lexsort((np.arange(residual.size), -np.abs(residual.ravel()).astype(np.float64)))
    mask = np.zeros(residual.size, dtype=bool)
    mask[order[:k]] = True
    return mask.reshape(residual.shape)


@dataclass(frozen=True)
class ClaimVerdict:
    """What a decomposition claims of itself, against a float64 SVD of delta."""

    kind: str  # "kept", or how it lied: "error", "energy", "called equal", "too large a claim"
    error: float  # ||L - exact|| / ||exact||, or the excess of ||delta - L||^2 over its minimum where L is not unique
    claim: float

    @property
    def ok(self) -> bool:
        return self.kind == "kept"


def judge_claim(delta: np.ndarray, left: np.ndarray, right: np.ndarray, residual: float, unique: bool) -> ClaimVerdict:
    """Whether the residual that came with L = left @ right.T holds, and whether L is called not unique with reason."""
    d, rank = delta.astype(np.float64), left.shape[1]
    top = float(np.abs(d).max()) or 1.0
    scale = 2.0 ** -np.frexp(top)[1]  # so that no square leaves float64
    u, s, vh = np.linalg.svd(d * scale, full_matrices=False)
    low = (left.astype(np.float64) * scale) @ right.astype(np.float64).T
    exact = (u[:, :rank] * s[:rank]) @ vh[:rank]
    size = float(np.linalg.norm(exact))
    if not size:
        return ClaimVerdict("error" if low.any() else "kept", float(np.abs(low).max()), residual)
    spacing = 2.0**-149 * scale * np.sqrt(left.size) / size  # of float32, where delta itself is denormal
    if unique:
        error = float(np.linalg.norm(low - exact)) / size
        kind = "error" if error > residual else "too large a claim" if residual > LOW_RANK_ERROR + spacing else "kept"
        return ClaimVerdict(kind, error, residual)
    rest = s[rank:]
    optimal = float(rest @ rest)
    excess = float(((d * scale - low) ** 2).sum()) - optimal
    excess -= 1e-14 * float(s @ s) + (spacing * size) ** 2  # what this sum itself may be off, and denormal factors
    error = max(0.0, excess) / optimal if optimal else float("inf")
    equal = rank < len(s) and s[rank - 1] - s[rank] <= 1.01 * UNIQUE_GAP * s[rank - 1]
    return ClaimVerdict("called equal" if not equal else "energy" if error > residual else "kept", error, residual)
