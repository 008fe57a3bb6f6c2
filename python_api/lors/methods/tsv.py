"""Task Singular Vectors: every expert's strongest directions, made orthogonal to the others' (arXiv 2412.00081).

    delta_t ~ U_t S_t V_t^T, the int(min(m, n) / T) largest triplets of each of T experts
    W = W0 + lambda * polar([U_1 .. U_T]) diag(w_1 S_1 .. w_T S_T) polar([V_1 .. V_T])^T

polar(X) = X (X^T X)^(-1/2) is the nearest matrix with orthonormal columns. Experts of weight 0 are left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lors_kernels.dense import polar_and_values
from lors_kernels.threads import one_torch_thread

from ..errors import LorsError
from ..recipes.parameters import MethodSpec
from .base import LAMBDA, WEIGHT, Method
from .operands import Combination, Operands

# Of the directions, as proven (what is seen is a fifth of it); and what may become of it in a polar factor. Independent
# experts of Whisper's shapes have a growth of 2.
TOLERANCE, GROWTH = 2e-5, 4.0


def combine(models: Sequence[Mapping[str, Any]], shared: Mapping[str, Any]) -> Combination:
    chosen = [t for t, model in enumerate(models) if model["weight"]]

    def decorrelated(operands: Operands, rank: int, tolerance: float) -> tuple[Any, Any, Any, float]:
        """(polar of all U, all sigma, polar of all V, how much an error of a direction grows on its way there)."""
        import torch

        found = [operands.svd(t, rank, tolerance) for t in chosen]
        (u, of_u), (v, of_v) = (
            polar_and_values(torch.cat([triplets[side] for triplets in found], dim=1), tolerance / 4) for side in (0, 2)
        )
        sigma = torch.cat([models[t]["weight"] * s for t, (_, s, _) in zip(chosen, found, strict=True)])
        # entry i, j of the error is divided by the sum of two of these values, which is not below 2 sqrt(s_i s_j)
        growth = max((float((0.5 / values).mean()) for values in (of_u, of_v) if len(values)), default=0.0)
        return u, sigma, v, growth

    def update(operands: Operands, rank: int) -> Any:
        accounted = len(operands.outcomes)
        u, sigma, v, growth = decorrelated(operands, rank, TOLERANCE)
        if growth > GROWTH:  # experts that are nearly the same: what they differ in counts as much as the rest
            del operands.outcomes[accounted:]
            u, sigma, v, _ = decorrelated(operands, rank, 0.0)
        return shared["lambda"] * ((u * sigma).float() @ v.float().T)

    def merge(operands: Operands) -> Iterator[tuple[int, Any]]:
        least = min(operands.spec.shape)
        rank = int(least * (1 / len(chosen))) if chosen else 0
        if chosen and not rank:
            raise LorsError(
                f"tensor {operands.name!r}: expected at most {least} experts for a matrix {list(operands.spec.shape)} "
                f"with tsv, got {len(chosen)}"
            )
        if not chosen:
            yield 0, operands.out(operands.base())
            return
        with one_torch_thread():
            moved = operands.moved(update(operands, rank))
        yield 0, moved

    return merge


# lambda wants to be about 1, which is T times too much for tensors that are not decomposed
METHOD = Method(MethodSpec("tsv", (WEIGHT, LAMBDA), rest="average"), combine=combine, combines_on_device=True)
