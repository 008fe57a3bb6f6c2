"""DELLA without an election: entries are kept with a probability that grows with their rank (arXiv 2406.11617).

    p = density - epsilon + 2 epsilon (rank - 1) / (n - 1),     rank 1 .. n by |delta| along the second axis

so a row keeps `density` of its entries on average. A vector is one row; a row of one entry has p = density. Of equal
magnitudes the one that comes first has the lower rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from lors_kernels import Keep
from lors_kernels.reference import random_bits

from ..errors import LorsError
from ..operands import Combination, Operands
from ..parameters import ParameterSpec
from .base import Method
from .sparsified import TOO_SMALL, spec, stream

EPSILON = ParameterSpec("epsilon", "float", 0.15, minimum=0.0, maximum=0.5, help="half the width of the probabilities")
ROWS = 1 << 20  # entries that are ranked at a time


def ranked(name: str, *, elect: bool, normalize: bool) -> Method:
    """A DELLA method; `normalize` is the default of its parameter."""

    def combine(models: Sequence[Mapping[str, Any]], shared: Mapping[str, Any]) -> Combination:
        for model in models:
            _check(model["density"], model["epsilon"])

        def merge(operands: Operands) -> Iterator[tuple[int, np.ndarray]]:
            kept = [kept_entries(operands, t, model) for t, model in enumerate(models)]
            keep = [Keep(factor=factor if shared["rescale"] else 1.0) for _, factor in kept]
            rule = {"elect": elect, "normalize": shared["normalize"], "scale": shared["lambda"]}
            for chunk in operands.chunks():
                out, base = operands.out(chunk.base), chunk.base.astype(np.float32)
                deltas = [
                    np.where(_unpacked(bits, chunk.start, base.size), tuned.astype(np.float32) - base, np.float32(0))
                    for (bits, _), tuned in zip(kept, chunk.tuned, strict=True)
                ]
                operands.add_deltas(out, chunk.start, deltas, keep, [model["weight"] for model in models], **rule)
                yield chunk.start, out

        return merge

    return Method(spec(name, normalize, True, (EPSILON,)), combine=combine, everywhere=True)


def _check(density: float, epsilon: float) -> None:
    if 0 < density < 1 and not (density - epsilon > 0 and density + epsilon < 1):
        raise LorsError(
            f"parameters.epsilon: expected density - epsilon > 0 and density + epsilon < 1, got density {density:g} "
            f"and epsilon {epsilon:g}"
        )


def kept_entries(operands: Operands, t: int, model: Mapping[str, Any]) -> tuple[np.ndarray, float]:
    """One bit per entry of expert t (a 32nd of its size in memory), and sum |delta| / sum |kept|."""
    size, density, epsilon = operands.spec.numel, model["density"], model["epsilon"]
    key = stream(operands, t)
    shape = operands.spec.shape if len(operands.spec.shape) > 1 else (1, size)
    width = size // shape[0]
    base, tuned = operands.base().reshape(shape), operands.tuned(t).reshape(shape)
    bits = np.zeros(size // 8 + 1, np.uint8)
    before = after = 0.0
    step = max(1, ROWS // width) * 8  # a multiple of 8 entries, so that blocks fill whole bytes
    for first in range(0, shape[0], step):
        rows = slice(first, min(shape[0], first + step))
        magnitude = np.abs(tuned[rows].astype(np.float32) - base[rows].astype(np.float32))
        operands.check(t, magnitude)
        if 0 < density < 1:
            limits = (_probabilities(magnitude, density, epsilon) * 2.0**32).astype(np.uint64)
            mask = random_bits(key, first * width, magnitude.size) < limits.ravel()
        else:
            mask = np.full(magnitude.size, density >= 1)
        flat = magnitude.ravel().astype(np.float64)
        before, after = before + float(flat.sum()), after + float(flat[mask].sum())
        packed = np.packbits(mask)
        bits[first * width // 8 : first * width // 8 + packed.size] = packed
    return bits, before / after if min(before, after) >= TOO_SMALL else 1.0


def _probabilities(magnitude: np.ndarray, density: float, epsilon: float) -> np.ndarray:
    count = magnitude.shape[1]
    if count == 1:
        return np.full(magnitude.shape, density)
    order = np.argsort(magnitude, axis=1, kind="stable")
    ranks = np.empty_like(order)
    steps = np.arange(count).reshape(-1, *[1] * (magnitude.ndim - 2))
    np.put_along_axis(ranks, order, np.broadcast_to(steps, order.shape), axis=1)
    return (density - epsilon) + ranks * (2 * epsilon / (count - 1))  # type: ignore[no-any-return]


def _unpacked(bits: np.ndarray, start: int, count: int) -> np.ndarray:
    skip = start % 8
    return np.unpackbits(bits[start // 8 :], count=skip + count)[skip:].view(bool)


METHOD = ranked("della_linear", elect=False, normalize=False)
