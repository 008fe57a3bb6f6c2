"""z = delta.T @ (delta @ x): the product every decomposition is built from."""

from __future__ import annotations

from typing import Any

from . import dispatch
from .arrays import check_matrix, check_pair, check_same_place, new, plain


def gram_apply(
    base: Any, tuned: Any, x: Any, *, side: str = "right", backend: str | None = None, threads: int | None = None
) -> Any:
    """z = delta.T @ (delta @ x) with delta = tuned - base, in one pass over base and tuned.

    With `side="left"`: z = delta @ (delta.T @ x). delta is formed in float32 registers and never stored.

    Args:
        base: [m, n] float32, float16 or bfloat16, rows contiguous; None stands for zeros.
        tuned: [m, n], its dtype may differ from base's.
        x: [n, b] float32 ([m, b] for `side="left"`); any b >= 0.
        backend: None chooses; a name runs that backend or raises `BackendUnavailable`.
        threads: CPU threads; the result has the same bits for every number.

    Returns:
        z, float32, same shape, kind and device as x.

    Sums run in float32 in an order fixed by the shape (float64 in the reference), so the relative error is a few units
    of 1e-7 of ||delta||^2 ||x||. Bits may differ between backends and instruction sets. NaN and infinity propagate.
    """
    base, tuned, x = plain(base), plain(tuned), plain(x)
    m, n = check_pair(base, tuned)
    if side not in ("right", "left"):
        raise ValueError(f"side: expected 'right' or 'left', got {side!r}")
    check_matrix(x, "x", shape=(n if side == "right" else m, None), dtypes=("float32",))
    check_same_place(tuned, x, "x")
    if 0 in (m, n, x.shape[1]):
        return new(tuned, tuple(x.shape), zero=True)
    run = dispatch.operation("gram_apply", backend, tuned)
    return run(base, tuned, x, side=side, threads=threads)
