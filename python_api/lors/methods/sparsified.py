"""W = W0 + lambda * consensus_t(w_t f_t keep_t(delta_t)): the frame that TIES, DARE, DELLA and breadcrumbs share.

They differ in what they keep of a task vector (`Trim`), in whether the experts elect a sign per entry, and in their
defaults. Names, defaults and edge cases are mergekit's (its generalized task arithmetic); `rescale` restores the sum of
magnitudes that the task vector had before it was trimmed, f_t = sum |delta_t| / sum |keep_t(delta_t)|.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from lors_kernels import KEEP_NONE, Keep, keep_limit, random_key
from lors_kernels.types import Consensus

from ..errors import LorsError
from ..recipes.parameters import MethodSpec, ParameterSpec
from .base import DENSITY, INT8_MASK, LAMBDA, WEIGHT, Method
from .operands import Combination, Operands

TOO_SMALL = 1e-7  # sums of magnitudes below this are not rescaled

# (operands, expert, its parameters) -> what of its delta is kept
Trim = Callable[[Operands, int, Mapping[str, Any]], Keep]


def sparsified(
    name: str,
    trim: Trim,
    *,
    elect: bool,
    normalize: bool,
    rescale: bool,
    own: tuple[ParameterSpec, ...] = (),
) -> Method:
    """A method of this family; `normalize` and `rescale` are the defaults of its parameters."""

    def combine(models: Sequence[Mapping[str, Any]], shared: Mapping[str, Any]) -> Combination:
        def merge(operands: Operands) -> Iterator[tuple[int, Any]]:
            keep = [trim(operands, t, model) for t, model in enumerate(models)]
            if shared["rescale"]:
                keep = [rescaled(operands, t, rule) for t, rule in enumerate(keep)]
            rule = Consensus(elect, shared["normalize"], shared["lambda"])
            for chunk in operands.chunks():
                out = operands.out(chunk.base)
                operands.add(out, chunk, keep, [model["weight"] for model in models], rule)
                yield chunk.start, out

        return merge

    return Method(spec(name, normalize, rescale, own), combine=combine, everywhere=True, combines_on_device=True)


def spec(name: str, normalize: bool, rescale: bool, own: tuple[ParameterSpec, ...]) -> MethodSpec:
    shared = (
        replace(NORMALIZE, default=normalize),
        ParameterSpec("rescale", "bool", rescale, scope="global", help="restore the sum of magnitudes after trimming"),
        INT8_MASK,
    )
    return MethodSpec(name, (WEIGHT, replace(DENSITY, default=1.0), *own, LAMBDA, *shared))


NORMALIZE = ParameterSpec("normalize", "bool", scope="global", help="divide by the sum of the weights that went in")
GAMMA = ParameterSpec("gamma", "float", 0.01, minimum=0.0, maximum=1.0, help="share of the largest entries dropped")


def rescaled(operands: Operands, t: int, keep: Keep) -> Keep:
    if keep == Keep():
        return keep
    stats = operands.account(t, keep)
    usable = min(stats.delta_sum, stats.kept_sum) >= TOO_SMALL
    if not math.isfinite(stats.delta_sum):
        raise LorsError(f"tensor {operands.name!r}: the sum of its changes overflows float32; set rescale: false")
    return keep._replace(factor=stats.delta_sum / stats.kept_sum) if usable else keep


def largest(operands: Operands, t: int, model: Mapping[str, Any]) -> Keep:
    """The max(1, int(density * n)) largest entries."""
    density = model["density"]
    if density >= 1:
        return Keep()
    if density <= 0:
        return Keep(KEEP_NONE)
    return Keep(operands.threshold(t, max(1, int(density * operands.spec.numel))))


def without_outliers(operands: Operands, t: int, model: Mapping[str, Any]) -> Keep:
    """The int(density * n) largest entries after the int(gamma * n) largest of all; fewer of these are left out when
    not enough entries would remain."""
    size = operands.spec.numel
    if model["density"] >= 1:
        return Keep()
    kept = int(model["density"] * size)
    dropped = min(int(model["gamma"] * size), size - kept)
    high = operands.threshold(t, dropped) if dropped else KEEP_NONE
    return Keep(operands.threshold(t, dropped + kept), high)


def at_random(operands: Operands, t: int, model: Mapping[str, Any]) -> Keep:
    """Each entry with probability density, by random numbers of (seed, expert, tensor)."""
    if model["density"] >= 1:
        return Keep()
    return Keep(key=stream(operands, t), limit=keep_limit(model["density"]))


def stream(operands: Operands, t: int) -> int:
    return random_key(operands.seed, operands.experts[t].name, operands.name)
