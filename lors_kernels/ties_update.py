"""out += scale * consensus over experts of what is kept of each: TIES, DARE, breadcrumbs and their mixtures in one pass."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from types import ModuleType
from typing import Any

from . import dispatch
from .arrays import check_matrix, check_pair, check_same_place, to_torch
from .types import ALWAYS, Keep, KeepStats


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
    `elect=False` it is 1 everywhere. Without `normalize` there is no divisor; a divisor of 0 counts as 1. Base and every
    tuned_t are read once, out is written once; sums run over the experts in order in float32.

    Args:
        out: [m, n] float32, float16 or bfloat16, updated in place; None: only the account is made.
        base: [m, n], or None for zeros.
        tuned: T matrices [m, n], each float32, float16 or bfloat16.
        keep: T rules (`Keep`): magnitude thresholds, and random numbers that depend on (key, index) only.
        weight: T floats.
        start: row-major index, in its tensor, of the first entry given here; thresholds and random numbers count from it.

    Returns:
        T `KeepStats`. Nothing is raised for NaN or infinity: `non_finite` counts them.

    Raises:
        ValueError, TypeError: arguments that do not fit. BackendUnavailable: a backend without this operation.
    Source: Yadav et al. 2023 (TIES), Yu et al. 2023 (DARE), Davari and Belilovsky 2023 (breadcrumbs).
    """
    if not tuned or not len(tuned) == len(keep) == len(weight):
        got = f"{len(tuned)}, {len(keep)} and {len(weight)}"
        raise ValueError(f"tuned, keep, weight: expected as many of each and at least one, got {got}")
    for expert in tuned:
        m, n = check_pair(base, expert)
        check_matrix(expert, "tuned", shape=tuned[0].shape)
        check_same_place(tuned[0], expert, "tuned")
    if out is not None:
        check_matrix(out, "out", shape=(m, n))
        check_same_place(tuned[0], out, "out")
    for rule in keep:
        _check_keep(rule)
    if start < 0:
        raise ValueError(f"start: expected at least 0, got {start}")
    if m * n == 0:
        return [KeepStats(0.0, 0.0, 0.0, 0.0, 0, 0)] * len(tuned)
    module = _module(backend, tuned[0])
    experts = list(tuned)
    if module.NAME != "cpu":
        out, base, experts = to_torch(out), to_torch(base), [to_torch(x) for x in experts]
    options = {"elect": elect, "normalize": normalize, "scale": float(scale), "start": start, "threads": threads}
    return module.ties_update(out, base, experts, list(keep), [float(w) for w in weight], **options)  # type: ignore[no-any-return]


def random_key(*parts: object) -> int:
    """The 64-bit key of a random stream, from what names it: (seed, expert, tensor) for instance."""
    text = "\0".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def keep_limit(probability: float) -> int:
    """`Keep.limit` of a probability: floor(p * 2^32)."""
    if not 0 <= probability <= 1:
        raise ValueError(f"probability: expected 0 to 1, got {probability}")
    return int(probability * ALWAYS)


def _check_keep(rule: Any) -> None:
    if not isinstance(rule, Keep):
        raise TypeError(f"keep: expected a Keep, got {type(rule).__name__}")
    if not 0 <= rule.limit <= ALWAYS:
        raise ValueError(f"keep.limit: expected 0 to 2**32, got {rule.limit}")
    if not math.isfinite(rule.factor):
        raise ValueError(f"keep.factor: expected a finite number, got {rule.factor}")


def _module(backend: str | None, like: Any) -> ModuleType:
    """As `dispatch.select`, passing over backends that have not got this operation."""
    module = dispatch.select(backend, like, "ties_update")
    if hasattr(module, "ties_update"):
        return module
    if backend is not None:
        raise dispatch.BackendUnavailable(f"{backend}: has no ties_update")
    return dispatch.select("reference", like)
