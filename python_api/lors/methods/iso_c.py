"""Isotropic merging in the common subspace: all directions of the summed task vector alike (arXiv 2502.04959).

    D = sum_t w_t delta_t = U S V^T,     W = W0 + lambda * mean(S) * U V^T

The mean is over all min(m, n) singular values. Directions that D has not got (S = 0 in float64) are left out of U V^T, which no
SVD defines there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ..recipes.parameters import MethodSpec
from .base import LAMBDA, WEIGHT, Method
from .operands import Combination, Operands
from .tsv import polar


def combine(models: Sequence[Mapping[str, Any]], shared: Mapping[str, Any]) -> Combination:
    def merge(operands: Operands) -> Iterator[tuple[int, np.ndarray]]:
        total = np.zeros(operands.spec.shape, np.float64)
        for t, model in enumerate(models):
            total += model["weight"] * operands.delta(t)
        directions = polar(total)
        # S are the eigenvalues of the other polar factor, (U V^T)^T D, so their sum is its trace
        mean = float(np.vdot(directions, total)) / min(total.shape)
        out = operands.out(operands.base())
        out += (shared["lambda"] * mean * directions).astype(np.float32).ravel()
        yield 0, out

    return merge


# as in tsv: lambda wants to be about 1
METHOD = Method(MethodSpec("iso_c", (WEIGHT, LAMBDA), rest="average"), combine=combine)
