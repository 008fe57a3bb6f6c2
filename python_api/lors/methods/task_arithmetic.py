"""W = W0 + lambda * sum_t w_t delta_t (Ilharco et al., arXiv 2212.04089)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..parameters import MethodSpec
from .base import LAMBDA, WEIGHT, Method, Reduction


def reduce(models: Sequence[Mapping[str, Any]], shared: Mapping[str, Any]) -> list[Reduction]:
    return [Reduction(shared["lambda"] * model["weight"]) for model in models]


METHOD = Method(MethodSpec("task_arithmetic", (WEIGHT, LAMBDA)), reduce, everywhere=True)
