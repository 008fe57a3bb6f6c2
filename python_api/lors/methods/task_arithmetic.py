"""W = W0 + lambda * sum_t w_t delta_t, divided by sum_t w_t with `normalize` (Ilharco et al., arXiv 2212.04089)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..recipes.parameters import MethodSpec
from .base import INT8_MASK, LAMBDA, WEIGHT, Method, Reduction
from .sparsified import NORMALIZE


def reduce(models: Sequence[Mapping[str, Any]], shared: Mapping[str, Any]) -> list[Reduction]:
    total = sum(model["weight"] for model in models) if shared["normalize"] else 1.0
    divisor = total if abs(total) >= 1e-8 else 1.0  # as mergekit: opposite weights are not normalized
    return [Reduction(shared["lambda"] * model["weight"] / divisor) for model in models]


PARAMETERS = (WEIGHT, LAMBDA, replace(NORMALIZE, default=False), INT8_MASK)
METHOD = Method(MethodSpec("task_arithmetic", PARAMETERS), reduce, everywhere=True, separable=True)
