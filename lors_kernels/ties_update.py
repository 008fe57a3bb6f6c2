"""out += scale * consensus over experts of what is kept of each: TIES, DARE, breadcrumbs and their mixtures in one pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from . import dispatch
from .arrays import check_matrix, check_out, check_pair, check_same_place, plain
from .scalars import FAR, check_number, check_threshold, check_whole
from .types import ALWAYS, Consensus, Keep, KeepStats


def ties_update(
    out: Any,
    base: Any,
    tuned: Sequence[Any],
    keep: Sequence[Keep],
    weight: Sequence[float],
    *,
    elect: bool = True,
    normalize: bool = True,
    scale: float = 1.0,
    start: int = 0,
    backend: str | None = None,
    threads: int | None = None,
) -> list[KeepStats]:
    """out += scale * sum_t a_t v_t / sum_t a_t weight_t,  v_t = weight_t * factor_t * keep_t(tuned_t - base).

    a_t is 1 where v_t has the sign of sum_t v_t (a sum of 0 counts as positive) and is not 0, else 0; with
    `elect=False` it is 1 everywhere. Without `normalize` there is no divisor; a divisor of 0 counts as 1, and so does a sum of
    all weights below 1e-8. Base and every tuned_t are read once, out is written once; sums run over the experts in order in
    float32.

    Args:
        out: [m, n] float32, float16 or bfloat16, updated in place; None: only the account is made. May be base itself, or a
            tuned_t; else its memory is its own.
        base: [m, n], or None for zeros.
        tuned: T matrices [m, n], each float32, float16 or bfloat16.
        keep: T rules (`Keep`): magnitude thresholds, and random numbers that depend on (key, index) only.
        weight: T numbers that are finite in float32, as `scale` and the factors of `keep`.
        start: row-major index, in its tensor, of the first entry given here; thresholds and random numbers count from it.

    Returns:
        T `KeepStats`. Nothing is raised for NaN or infinity in a delta: `non_finite` counts them, and where there are any,
        out means nothing. Nor for a sum that out's dtype cannot hold: it becomes infinite.

    Raises:
        ValueError, TypeError: arguments that do not fit. BackendUnavailable: a backend without this operation.
    Source: Yadav et al. 2023 (TIES), Yu et al. 2023 (DARE), Davari and Belilovsky 2023 (breadcrumbs).
    """
    if not 0 < len(tuned) == len(keep) == len(weight):
        got = f"{len(tuned)}, {len(keep)} and {len(weight)}"
        raise ValueError(f"tuned, keep, weight: expected as many of each and at least one, got {got}")
    base, experts = plain(base), [plain(x) for x in tuned]
    for expert in experts:
        m, n = check_pair(base, expert)
        check_matrix(expert, "tuned", shape=experts[0].shape)
        check_same_place(experts[0], expert, "tuned")
    for keep_t in keep:
        check_keep(keep_t)
    weights = [check_number(w, "weight") for w in weight]
    rule = check_consensus(elect, normalize, scale, start, m * n)
    if out is not None:
        out = check_out(out, experts[0], entrywise=(base, *experts))
    if m * n == 0:
        return [KeepStats(0.0, 0.0, 0.0, 0.0, 0, 0)] * len(experts)
    run = dispatch.operation("ties_update", backend, experts[0])
    return run(out, base, experts, list(keep), weights, rule, threads=threads)  # type: ignore[no-any-return]


def check_consensus(elect: bool, normalize: bool, scale: float, start: int, count: int) -> Consensus:
    start = check_whole(start, "start", 0, FAR - count)
    return Consensus(bool(elect), bool(normalize), check_number(scale, "scale"), start)


def check_keep(rule: Any) -> None:
    if not isinstance(rule, Keep):
        raise TypeError(f"keep: expected a Keep, got {type(rule).__name__}")
    check_threshold(rule.low, "keep.low")
    check_threshold(rule.high, "keep.high")
    check_whole(rule.key, "keep.key", 0, 2**64 - 1)
    check_whole(rule.limit, "keep.limit", 0, ALWAYS)
    check_number(rule.factor, "keep.factor")
