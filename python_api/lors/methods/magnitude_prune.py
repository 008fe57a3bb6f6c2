"""W = W0 + lambda * sum_t w_t topk(delta_t): magnitude pruning, the sparse half of LoRS."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..recipes.parameters import MethodSpec
from .base import DENSITY, LAMBDA, WEIGHT, Method, Reduction


def reduce(models: Sequence[Mapping[str, Any]], shared: Mapping[str, Any]) -> list[Reduction]:
    return [Reduction(shared["lambda"] * model["weight"], 0, model["density"]) for model in models]


METHOD = Method(MethodSpec("magnitude_prune", (DENSITY, WEIGHT, replace(LAMBDA, default=0.2))), reduce, separable=True)
