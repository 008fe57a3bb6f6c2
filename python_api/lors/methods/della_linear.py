"""DELLA without an election: entries are kept with a probability that grows with their rank (arXiv 2406.11617).

    p = density - epsilon + 2 epsilon (rank - 1) / (n - 1),     rank 1 .. n by |delta| along the second axis

so a row keeps `density` of its entries on average. A vector is one row; a row of one entry has p = density. Of equal
magnitudes the one that comes first has the lower rank.

`rescale` multiplies what is kept by sum |delta| / sum |kept|, as mergekit does. So an entry is not kept as it is on average:
its expectation is p |delta| sum |delta| / sum (p |delta|), less than |delta| for small entries and more for large ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from lors_kernels import Keep
from lors_kernels.arrays import is_torch
from lors_kernels.counter_random import random_bits, random_bits_on
from lors_kernels.types import Consensus

from ..errors import LorsError
from ..recipes.parameters import ParameterSpec
from .base import Method
from .operands import Combination, Operands
from .sparsified import TOO_SMALL, spec, stream

EPSILON = ParameterSpec("epsilon", "float", 0.15, minimum=0.0, maximum=0.5, help="half the width of the probabilities")
ROWS = 1 << 20  # entries that are ranked at a time


def ranked(name: str, *, elect: bool, normalize: bool) -> Method:
    """A DELLA method; `normalize` is the default of its parameter."""

    def combine(models: Sequence[Mapping[str, Any]], shared: Mapping[str, Any]) -> Combination:
        for model in models:
            _check(model["density"], model["epsilon"])

        def merge(operands: Operands) -> Iterator[tuple[int, Any]]:
            draws = [Draw(operands, t, model["density"], model["epsilon"]) for t, model in enumerate(models)]
            keep = [Keep(factor=draw.factor() if shared["rescale"] else 1.0) for draw in draws]
            rule = Consensus(elect, shared["normalize"], shared["lambda"])
            for chunk in operands.chunks(_width(operands)):
                out, deltas = operands.out(chunk.base), operands.deltas(chunk)
                for draw, delta in zip(draws, deltas, strict=True):
                    energy = operands.energy(delta)
                    draw.drop(chunk.start, delta)
                    operands.count_dropped(energy - operands.energy(delta))
                operands.add_deltas(out, chunk.start, deltas, keep, [model["weight"] for model in models], rule)
                yield chunk.start, out

        return merge

    return Method(spec(name, normalize, True, (EPSILON,)), combine=combine, everywhere=True, combines_on_device=True)


def _check(density: float, epsilon: float) -> None:
    if 0 < density < 1 and not (density - epsilon > 0 and density + epsilon < 1):
        raise LorsError(
            f"parameters.epsilon: expected density - epsilon > 0 and density + epsilon < 1, got density {density:g} "
            f"and epsilon {epsilon:g}"
        )


def _width(operands: Operands) -> int:
    """Entries that are drawn together: those of one index of the first axis, a whole vector."""
    shape = operands.spec.shape
    return operands.spec.numel // max(1, shape[0]) if len(shape) > 1 else operands.spec.numel


class Draw:
    """Which entries of expert t's delta are kept. Nothing is stored: what is asked for twice is drawn twice."""

    def __init__(self, operands: Operands, t: int, density: float, epsilon: float) -> None:
        self._operands, self._t, self._density, self._epsilon = operands, t, density, epsilon
        self._key, self._width = stream(operands, t), max(1, _width(operands))

    def drop(self, start: int, delta: Any) -> None:
        """Sets to zero what is dropped of the delta's entries from `start` on, whole rows."""
        if self._density >= 1:
            return
        if self._density <= 0:
            delta[:] = 0
            return
        step = max(1, ROWS // self._width) * self._width
        for first in range(0, len(delta), step):
            part = delta[first : first + step]
            magnitude = abs(part).reshape(-1, *(self._operands.spec.shape[1:] or (self._width,)))
            zero = _dropped_there if is_torch(part) else _dropped
            part[zero(magnitude, self._density, self._epsilon, self._key, start + first)] = 0

    def factor(self) -> float:
        """sum |delta| / sum |kept|, what is kept grows by."""
        operands, before, after = self._operands, 0.0, 0.0
        base, tuned = operands.base(), operands.tuned(self._t)
        step = max(1, ROWS // self._width) * self._width
        for first in range(0, len(base), step):
            part = slice(first, first + step)
            delta = operands.float32(tuned[part]) - operands.float32(base[part])
            operands.check(self._t, delta)
            before += operands.magnitude(delta)
            self.drop(first, delta)
            after += operands.magnitude(delta)
        return before / after if min(before, after) >= TOO_SMALL else 1.0


def _dropped(magnitude: np.ndarray, density: float, epsilon: float, key: int, start: int) -> np.ndarray:
    """Which entries are dropped, flat; the first is number `start` of its tensor."""
    limits = (_probabilities(magnitude, density, epsilon) * 2.0**32).astype(np.uint64)
    return random_bits(key, start, magnitude.size) >= limits.ravel()  # type: ignore[no-any-return]


def _dropped_there(magnitude: Any, density: float, epsilon: float, key: int, start: int) -> Any:
    """`_dropped` of a tensor, where it is."""
    import torch

    count = magnitude.shape[1]
    places = torch.arange(count, device=magnitude.device).reshape(-1, *[1] * (magnitude.ndim - 2))
    order = magnitude.argsort(dim=1, stable=True)
    ranks = torch.empty_like(order).scatter_(1, order, places.expand_as(order))
    if count == 1:
        chance = torch.full(magnitude.shape, density, dtype=torch.float64, device=magnitude.device)
    else:
        chance = (density - epsilon) + ranks * torch.tensor(2 * epsilon / (count - 1), dtype=torch.float64)
    drawn = random_bits_on(magnitude.device, key, start, magnitude.numel())
    return drawn >= (chance * 2.0**32).long().reshape(-1)


def _probabilities(magnitude: np.ndarray, density: float, epsilon: float) -> np.ndarray:
    count = magnitude.shape[1]
    if count == 1:
        return np.full(magnitude.shape, density)
    return (density - epsilon) + _ranks(magnitude) * (2 * epsilon / (count - 1))  # type: ignore[no-any-return]


def _ranks(magnitude: np.ndarray) -> np.ndarray:
    """0 .. n - 1 by magnitude along the second axis; of equal ones the first is lower.

    Non-negative floats are ordered as their bits are. With the place behind them no two keys are equal, and sorting keys
    is several times as fast as a stable argsort.
    """
    count = magnitude.shape[1]
    places = np.arange(count, dtype=np.uint64).reshape(-1, *[1] * (magnitude.ndim - 2))
    keys = np.ascontiguousarray(magnitude).view(np.uint32).astype(np.uint64) << np.uint64(32) | places
    keys.sort(axis=1)
    ranks = np.empty(keys.shape, np.uint32)
    np.put_along_axis(ranks, (keys & np.uint64(0xFFFFFFFF)).astype(np.int64), places.astype(np.uint32), axis=1)
    return ranks


METHOD = ranked("della_linear", elect=False, normalize=False)
