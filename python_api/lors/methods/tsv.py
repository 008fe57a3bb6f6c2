"""Task Singular Vectors: every expert's strongest directions, made orthogonal to the others' (arXiv 2412.00081).

    delta_t ~ U_t S_t V_t^T, the int(min(m, n) / T) largest triplets of each of T experts
    W = W0 + lambda * polar([U_1 .. U_T]) diag(w_1 S_1 .. w_T S_T) polar([V_1 .. V_T])^T

polar(X) = X (X^T X)^(-1/2) is the nearest matrix with orthonormal columns. Experts of weight 0 are left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lors_kernels.dense import polar_and_values

from ..errors import LorsError
from ..recipes.parameters import MethodSpec
from .base import LAMBDA, WEIGHT, Method, whole
from .operands import Combination, Operands

# Of the directions, as proven (what is seen is a fifth of it); and what may become of it in a polar factor. Independent
# experts of Whisper's shapes have a growth of 2.
TOLERANCE, GROWTH = 2e-5, 4.0


class Decorrelated(NamedTuple):
    """triplets: (u, sigma, v) of each expert; left, right: the polar factors of all u and of all v, side by side."""

    triplets: list[tuple[Any, Any, Any]]
    left: Any
    right: Any


def decorrelated(operands: Operands, ranks: Mapping[int, int]) -> Decorrelated:
    """Of the largest triplets of some experts, whose number `ranks` says."""
    accounted = len(operands.outcomes)
    found, growth = _decorrelated(operands, ranks, TOLERANCE)
    if growth > GROWTH:  # experts that are nearly the same: what they differ in counts as much as the rest
        del operands.outcomes[accounted:]
        found, _ = _decorrelated(operands, ranks, 0.0)
    return found


def _decorrelated(operands: Operands, ranks: Mapping[int, int], tolerance: float) -> tuple[Decorrelated, float]:
    """And how much an error of a direction grows on its way into the factors."""
    import torch

    triplets = [operands.svd(t, rank, tolerance) for t, rank in ranks.items()]
    (left, of_u), (right, of_v) = (
        polar_and_values(torch.cat([found[side] for found in triplets], dim=1), tolerance / 4) for side in (0, 2)
    )
    # entry i, j of the error is divided by the sum of two of these values, which is not below 2 sqrt(s_i s_j)
    growth = max((float((0.5 / values).mean()) for values in (of_u, of_v) if len(values)), default=0.0)
    return Decorrelated(triplets, left, right), growth


def rank_of_each(operands: Operands, experts: int) -> int:
    """int(min(m, n) / T), which is at least 1, or LorsError."""
    least = min(operands.spec.shape)
    if not (rank := int(least * (1 / experts))):
        raise LorsError(
            f"tensor {operands.name!r}: expected at most {least} experts for a matrix {list(operands.spec.shape)} "
            f"with tsv, got {experts}"
        )
    return rank


def combine(models: Sequence[Mapping[str, Any]], shared: Mapping[str, Any]) -> Combination:
    weights = {t: model["weight"] for t, model in enumerate(models) if model["weight"]}

    def update(operands: Operands) -> Any:
        import torch

        if not weights:
            return None
        found = decorrelated(operands, dict.fromkeys(weights, rank_of_each(operands, len(weights))))
        sigma = torch.cat([w * s for w, (_, s, _) in zip(weights.values(), found.triplets, strict=True)])
        return shared["lambda"] * ((found.left * sigma).float() @ found.right.float().T)

    return whole(update)


# lambda wants to be about 1, which is T times too much for tensors that are not decomposed
METHOD = Method(MethodSpec("tsv", (WEIGHT, LAMBDA), rest="average"), combine=combine, combines_on_device=True)
