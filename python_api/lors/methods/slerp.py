"""Spherical interpolation between the base and one expert, tensor by tensor.

    W = (sin((1 - t) a) W0 + sin(t a) W1) / sin(a),     a the angle between W0 and W1 as vectors

Almost parallel or opposite tensors (|cos a| > 0.9995) are interpolated linearly.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ..recipes.parameters import MethodSpec, ParameterSpec
from .base import Method
from .operands import Combination, Operands

T = ParameterSpec("t", "float", minimum=0.0, maximum=1.0, scope="global", help="0 is the base, 1 the expert")
PARALLEL, TINY = 0.9995, 1e-8


def combine(models: Sequence[Mapping[str, Any]], shared: Mapping[str, Any]) -> Combination:
    def merge(operands: Operands) -> Iterator[tuple[int, Any]]:
        products = np.zeros(3)  # base.base, expert.expert, base.expert
        for chunk in operands.chunks():
            base, tuned = operands.float64(chunk.base), operands.float64(chunk.tuned[0])
            operands.check(0, tuned - base)
            products += float(base @ base), float(tuned @ tuned), float(base @ tuned)
        first, second = factors(shared["t"], *products)
        for chunk in operands.chunks():
            base, tuned = operands.float64(chunk.base), operands.float64(chunk.tuned[0])
            yield chunk.start, operands.float32(first * base + second * tuned)

    return merge


def factors(t: float, base: float, tuned: float, mixed: float) -> tuple[float, float]:
    """Of the base and of the expert, from |W0|^2, |W1|^2 and W0.W1."""
    norms = [norm if norm > TINY else 1.0 for norm in (math.sqrt(base), math.sqrt(tuned))]
    cosine = min(1.0, max(-1.0, mixed / (norms[0] * norms[1])))
    if abs(cosine) > PARALLEL:
        return 1 - t, t
    angle = math.acos(cosine)
    return math.sin((1 - t) * angle) / math.sin(angle), math.sin(t * angle) / math.sin(angle)


METHOD = Method(
    MethodSpec("slerp", (T,), max_experts=1), combine=combine, everywhere=True, targets=False, combines_on_device=True
)
