"""The whole LoRS reduction of one matrix: a drop-in for SVD truncation and a topk."""

from __future__ import annotations

from typing import Any

from . import dispatch
from .arrays import check_factors, check_matrix, check_out, check_pair, new, plain
from .scalars import check_number, check_whole
from .types import KEEP_ALL, KEEP_NONE, NonFiniteError, TruncatedSVD, UpdateStats


def lors_delta(
    delta: Any, rank: int, density: float, *, seed: int = 0, backend: str | None = None, threads: int | None = None
) -> Any:
    """L + S: the rank-`rank` part of delta and the int(density * numel) largest entries of what remains.

    delta: [m, n] float32, float16 or bfloat16; rank 0 leaves L out, density 0 leaves S out. Returns float32 [m, n].
    NaN and infinity are refused: `NonFiniteError`.
    """
    delta = plain(delta)
    check_matrix(delta, "delta")
    out = new(delta, tuple(delta.shape), zero=True)
    stats, _ = add_lors_delta(out, None, delta, rank, density, seed=seed, backend=backend, threads=threads)
    if stats.non_finite:
        raise NonFiniteError(stats.non_finite)
    return out


def add_lors_delta(
    out: Any,
    base: Any,
    tuned: Any,
    rank: int,
    density: float,
    weight: float = 1.0,
    *,
    factors: tuple[Any, Any] | None = None,
    seed: int = 0,
    backend: str | None = None,
    threads: int | None = None,
) -> tuple[UpdateStats, TruncatedSVD | None]:
    """out += weight * (L + S) of delta = tuned - base, the step of a merge that is repeated for every matrix and expert.

    `truncated_svd`, `residual_threshold` and `merge_update` one after the other, with their arguments and their bits;
    what they check is checked once, which is most of what three calls take in Python.

    factors: (left, right) of L, where they are known; then `rank` counts for nothing. Returns what was added, and the
    decomposition (None: none was made). Non-finite entries of delta are counted in the former, unless decomposing or
    selecting raises `NonFiniteError` for them; either way out means nothing then.
    """
    base, tuned = plain(base), plain(tuned)
    m, n = check_pair(base, tuned)
    rank = check_whole(rank, "rank", 0, min(m, n), f" for a matrix {[m, n]}")
    if not 0 <= density <= 1:
        raise ValueError(f"density: expected 0 to 1, got {density}")
    weight = check_number(weight, "weight")
    left, right = (None, None) if factors is None else map(plain, factors)
    check_factors(left, right, tuned)
    out = check_out(out, tuned, entrywise=(base, tuned), others=(left, right))
    if m * n == 0:
        return UpdateStats(0.0, 0.0, 0.0, 0, 0), None

    def run(operation: str, *arguments: Any, **options: Any) -> Any:
        return dispatch.operation(operation, backend, tuned)(*arguments, **options, threads=threads)

    svd = run("truncated_svd", base, tuned, rank, seed=seed) if rank and factors is None else None
    if svd is not None:
        left, right = svd.left, svd.right
    k, threshold = int(density * (m * n)), KEEP_ALL
    if density < 1:
        threshold = run("residual_threshold", base, tuned, left, right, k) if k else KEEP_NONE
    return run("merge_update", out, base, [tuned], [left], [right], [threshold], [weight])[0], svd
