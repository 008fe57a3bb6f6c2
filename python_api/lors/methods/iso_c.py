"""Isotropic merging in the common subspace: all directions of the summed task vector alike (arXiv 2502.04959).

    D = sum_t w_t delta_t = U S V^T,     W = W0 + lambda * mean(S) * U V^T

The mean is over all min(m, n) singular values. Directions that D has not got (S = 0 in float64) are left out of U V^T, which no
SVD defines there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lors_kernels.dense import polar

from ..recipes.parameters import MethodSpec
from .base import LAMBDA, WEIGHT, Method, whole
from .operands import Combination, Operands


def combine(models: Sequence[Mapping[str, Any]], shared: Mapping[str, Any]) -> Combination:
    def update(operands: Operands) -> Any:
        total = models[0]["weight"] * operands.delta(0)
        for t, model in enumerate(models[1:], 1):
            total += model["weight"] * operands.delta(t)
        directions = polar(total)
        # S are the eigenvalues of the other polar factor, (U V^T)^T D, so their sum is its trace
        mean = float((directions * total).sum()) / min(total.shape)
        return shared["lambda"] * mean * directions

    return whole(update)


# as in tsv: lambda wants to be about 1
METHOD = Method(MethodSpec("iso_c", (WEIGHT, LAMBDA), rest="average"), combine=combine, combines_on_device=True)
