"""out += sum_t weight_t * (L_t + keep_t(delta_t - L_t)): what is kept of the experts, added up."""

from __future__ import annotations

from numbers import Real
from typing import Any

from . import dispatch
from .arrays import check_factors, check_matrix, check_out, check_pair, check_same_place, plain
from .scalars import check_number, check_threshold
from .types import KEEP_ALL, Threshold, UpdateStats


def merge_update(
    out: Any,
    base: Any,
    tuned: Any,
    left: Any = None,
    right: Any = None,
    threshold: Any = None,
    weight: Any = 1.0,
    *,
    backend: str | None = None,
    threads: int | None = None,
) -> Any:
    """out += sum_t weight_t * (L_t + keep_t(R_t)), R_t = delta_t - L_t, delta_t = tuned_t - base, L_t = left_t @ right_t.T.

    base and every tuned_t are read once and out is written once; delta and R live in registers. The experts are added in
    order in float32, with one rounding to out's dtype at the end.

    Args:
        out: [m, n] float32, float16 or bfloat16, updated in place. May be base itself, or a tuned_t; else its memory is its
            own.
        base: [m, n], or None for zeros.
        tuned: [m, n], or a sequence of T of them (then left, right, threshold and weight are sequences of T too, or
            None, or for weight one number for all).
        left, right: [m, r] and [n, r] float32; None: L = 0.
        threshold: which entries of R are added: a `Threshold` from `residual_threshold`, `KEEP_NONE`, or None for all.
        weight: a number that is finite in float32.

    Returns:
        `UpdateStats`, or a list of T. Nothing is raised for NaN or infinity in delta: `stats.non_finite` counts them, and
        where there are any, out means nothing. Nor for a sum that out's dtype cannot hold: it becomes infinite.
    """
    single = not isinstance(tuned, (list, tuple))
    experts = [tuned] if single else list(tuned)
    if not experts:
        raise ValueError("tuned: expected at least one expert, got none")
    if single:
        lefts, rights, thresholds, weights = [left], [right], [threshold], [weight]
    else:
        lefts, rights, thresholds = (_sequence(x, len(experts), name) for x, name in _named(left, right, threshold))
        weights = [weight] * len(experts) if isinstance(weight, Real) else _sequence(weight, len(experts), "weight")
    base = plain(base)
    experts, lefts, rights = ([plain(x) for x in xs] for xs in (experts, lefts, rights))
    for tuned_t, left_t, right_t in zip(experts, lefts, rights, strict=True):
        m, n = check_pair(base, tuned_t)
        check_matrix(tuned_t, "tuned", shape=experts[0].shape)
        check_same_place(experts[0], tuned_t, "tuned")
        check_factors(left_t, right_t, tuned_t)
    thresholds = [KEEP_ALL if t is None else check_threshold(t, "threshold") for t in thresholds]
    weights = [check_number(w, "weight") for w in weights]
    out = check_out(out, experts[0], entrywise=(base, *experts), others=(*lefts, *rights))
    if m * n == 0:
        stats = [UpdateStats(0.0, 0.0, 0.0, 0, 0)] * len(experts)
    else:
        run = dispatch.operation("merge_update", backend, experts[0])
        stats = run(out, base, experts, lefts, rights, thresholds, weights, threads=threads)
    return stats[0] if single else stats


def _named(left: Any, right: Any, threshold: Any) -> tuple[tuple[Any, str], ...]:
    return (left, "left"), (right, "right"), (threshold, "threshold")


def _sequence(x: Any, count: int, name: str) -> list[Any]:
    if x is None:
        return [None] * count
    if not isinstance(x, (list, tuple)) or isinstance(x, Threshold) or len(x) != count:
        got = f"{len(x)} entries" if isinstance(x, (list, tuple)) else type(x).__name__
        raise ValueError(f"{name}: expected a sequence of {count}, one per expert, got {got}")
    return list(x)
