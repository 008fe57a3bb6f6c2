"""Model Stock: W = W0 + t mean_i(delta_i) with t from the angles between the task vectors (arXiv 2403.19522).

    t = N c / (1 + (N - 1) c),     c = mean over pairs of cos(delta_i, delta_j)

of the whole tensor, or with `filter_wise` of each of its rows (last axis). Where the denominator vanishes t is 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ..recipes.parameters import MethodSpec, ParameterSpec
from .base import Method
from .operands import Chunk, Combination, Operands

FILTER_WISE = ParameterSpec("filter_wise", "bool", False, scope="global", help="an interpolation of its own per row")


def combine(models: Sequence[Mapping[str, Any]], shared: Mapping[str, Any]) -> Combination:
    def merge(operands: Operands) -> Iterator[tuple[int, Any]]:
        width = operands.spec.shape[-1] if shared["filter_wise"] and operands.spec.shape else 0
        # inner products between the experts' deltas: [rows, N, N] for rows of `width` entries, [1, N, N] for width 0
        products = [_products(operands, chunk, width) for chunk in operands.chunks(width or 1)]
        gram = np.concatenate(products) if width else np.sum(products, axis=0)[None]
        t = interpolation(gram).astype(np.float32)  # [rows] or [1]
        for chunk in operands.chunks(width or 1):
            out, deltas = operands.out(chunk.base), operands.deltas(chunk)
            mean = deltas.sum(axis=0) / len(models)
            first = chunk.start // width if width else 0
            rows = mean.reshape(-1, width or len(mean))
            factors = t[first : first + len(rows)] if width else t
            out += (rows * operands.array(factors[:, None])).reshape(-1)
            yield chunk.start, out

    return merge


def interpolation(gram: np.ndarray) -> np.ndarray:
    """t of inner products [.., N, N] between task vectors."""
    count = gram.shape[-1]
    norms = np.sqrt(np.diagonal(gram, axis1=-2, axis2=-1))
    first, second = np.triu_indices(count, 1)
    cosines = gram[..., first, second] / np.maximum(norms[..., first] * norms[..., second], 1e-6)
    cosine = np.clip(cosines, -1, 1).mean(axis=-1)
    denominator = 1 + (count - 1) * cosine
    singular = np.abs(denominator) < 1e-6
    return np.where(singular, 0.0, count * cosine / np.where(singular, 1.0, denominator))


def _products(operands: Operands, chunk: Chunk, width: int) -> np.ndarray:
    deltas = operands.deltas(chunk)
    rows = deltas.reshape(len(deltas), -1, width).swapaxes(0, 1) if width else deltas
    return operands.products(rows)


METHOD = Method(
    MethodSpec("model_stock", (FILTER_WISE,), min_experts=2), combine=combine, everywhere=True, combines_on_device=True
)
