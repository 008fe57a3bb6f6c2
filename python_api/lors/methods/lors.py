"""W = W0 + lambda * sum_t w_t (L_t + S_t): low rank plus sparse (arXiv 2502.17380). Defaults are the paper's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..recipes.parameters import MethodSpec
from .base import DENSITY, LAMBDA, RANK, WEIGHT, Method, Reduction


def reduce(models: Sequence[Mapping[str, Any]], shared: Mapping[str, Any]) -> list[Reduction]:
    return [Reduction(shared["lambda"] * model["weight"], model["rank"], model["density"]) for model in models]


METHOD = Method(MethodSpec("lors", (RANK, DENSITY, WEIGHT, replace(LAMBDA, default=0.2))), reduce, separable=True)
