"""Isotropic merging in common and task-specific subspaces (arXiv 2502.04959).

    D = sum_t w_t delta_t = U S V^T,     U_c, V_c, S_c: its c largest triplets
    (I - U_c U_c^T) w_t delta_t = U_t S_t V_t^T,     U_t, V_t, S_t: its p largest, for each of T experts
    W = W0 + lambda * mean(S_c, S_1 .. S_T) * polar([U_c, U_1 .. U_T]) polar([V_c, V_1 .. V_T])^T

With r = min(m, n) and the share `common` the experts have p = round((r - int(common r)) / T) directions each, and the sum has
the others, c = r - p T. The mean is over all r; directions of singular value 0
(2^-53 max(m, n) of ||delta_t||_F) are left out. Experts of weight 0 do not count.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lors_kernels.dense import leading, polar

from ..recipes.parameters import MethodSpec, ParameterSpec
from .base import LAMBDA, WEIGHT, Method, whole
from .operands import Combination, Operands

COMMON = ParameterSpec(
    "common", "float", 0.8, minimum=0.0, maximum=1.0, scope="global", help="share of the directions that the sum has"
)


def combine(models: Sequence[Mapping[str, Any]], shared: Mapping[str, Any]) -> Combination:
    weights = {t: model["weight"] for t, model in enumerate(models) if model["weight"]}

    def update(operands: Operands) -> Any:
        import torch

        if not weights:
            return None
        count, own = split(min(operands.spec.shape), shared["common"], len(weights))
        total: Any = sum(weight * operands.delta(t) for t, weight in weights.items())
        found = [leading(total, count)]
        known = found[0][0]
        for t, weight in weights.items() if own else ():
            delta = weight * operands.delta(t)
            u, sigma, v = leading(delta - known @ (known.T @ delta), own)
            rounding = max(delta.shape) * 2.0**-53 * torch.linalg.vector_norm(delta)  # of the line above
            there = sigma > rounding
            found.append((u[:, there], sigma[there], v[:, there]))
        left, right = (polar(torch.cat([triplets[side] for triplets in found], dim=1)) for side in (0, 2))
        mean = float(sum(sigma.sum() for _, sigma, _ in found)) / min(operands.spec.shape)
        return (shared["lambda"] * mean) * (left @ right.T)

    return whole(update)


def split(directions: int, common: float, experts: int) -> tuple[int, int]:
    """(directions of the sum, directions of each expert): together `directions`."""
    own = min(round((directions - int(common * directions)) / experts), directions // experts)
    return directions - own * experts, own


# as in tsv: lambda wants to be about 1
METHOD = Method(
    MethodSpec("iso_cts", (WEIGHT, COMMON, LAMBDA), rest="average"), combine=combine, combines_on_device=True
)
