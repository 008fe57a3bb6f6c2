"""out = scale * base + update, rounded once: the end of a merge, after the experts' updates have been summed."""

from __future__ import annotations

from typing import Any

from . import dispatch
from .arrays import check_matrix, check_out, check_same_place, plain
from .scalars import check_number


def apply_update(
    out: Any,
    base: Any,
    update: Any,
    *,
    scale: float = 1.0,
    backend: str | None = None,
    threads: int | None = None,
) -> float:
    """out = scale * base + update, added in float32 and then rounded to out's dtype.

    A weight of 1 with updates of a thousandth loses ten bits of each of them: summed for themselves first, they lose
    these bits once and not once per expert. So out is within one unit in the last place of scale * base + update,
    whatever went into `update`. Base and update are read once and out is written once.

    Args:
        out: [m, n] float32, float16 or bfloat16, written. May be base's or update's own memory.
        base: [m, n] float32, float16 or bfloat16, or None for zeros.
        update: the same.
        scale: float, of base.

    Returns:
        The largest |scale * base + update| before the rounding to out's dtype, which may overflow: infinite or NaN where
        an entry is. 0 for an empty matrix. Nothing is raised.

    Raises:
        ValueError, TypeError: arguments that do not fit.
    """
    base, update = plain(base), plain(update)
    check_matrix(plain(out), "out")
    for name, x in (("base", base), ("update", update)):
        if x is not None:
            check_matrix(x, name, shape=out.shape)
            check_same_place(out, x, name)
    scale = check_number(scale, "scale")
    out = check_out(out, out, entrywise=(base, update))
    if 0 in out.shape:
        return 0.0
    run = dispatch.operation("apply_update", backend, out)
    return float(run(out, base, update, scale, threads=threads))
