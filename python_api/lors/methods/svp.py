"""W = W0 + lambda * sum_t w_t L_t: singular value pruning, the low-rank half of LoRS."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..recipes.parameters import MethodSpec
from .base import LAMBDA, RANK, WEIGHT, Method, Reduction


def reduce(models: Sequence[Mapping[str, Any]], shared: Mapping[str, Any]) -> list[Reduction]:
    return [Reduction(shared["lambda"] * model["weight"], model["rank"], 0.0) for model in models]


METHOD = Method(MethodSpec("svp", (RANK, WEIGHT, replace(LAMBDA, default=0.2))), reduce, separable=True)
