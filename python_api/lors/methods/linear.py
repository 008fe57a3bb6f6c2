"""W = sum_t w_t W_t, divided by sum_t w_t with `normalize`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..errors import SettingError
from ..recipes.parameters import REQUIRED, MethodSpec, ParameterSpec
from .base import WEIGHT, Method, Reduction

NORMALIZE = ParameterSpec("normalize", "bool", True, scope="global", help="divide by the sum of the weights")


def reduce(models: Sequence[Mapping[str, Any]], shared: Mapping[str, Any]) -> list[Reduction]:
    weights = [model["weight"] for model in models]
    total = sum(weights) if shared["normalize"] else 1.0
    if abs(total) < 1e-8:
        raise SettingError("parameters.weight", f"expected weights whose sum is not 0 with normalize, got {weights}")
    if not any(weights):
        raise SettingError("parameters.weight", f"expected a weight that is not 0, got {weights}")
    return [Reduction(weight / total) for weight in weights]


METHOD = Method(
    # mergekit has no default weight here: leaving one out is more likely a mistake than a wish for 1
    MethodSpec("linear", (replace(WEIGHT, default=REQUIRED), NORMALIZE), base="optional"),
    reduce,
    everywhere=True,
    targets=False,
    relative=False,
)
