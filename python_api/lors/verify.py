"""Reload a merged checkpoint and compare it with the definition."""

from __future__ import annotations

import contextlib
import os
from collections import defaultdict

import numpy as np

from .checkpoint import open_checkpoint, require_unchanged
from .errors import LorsError
from .layers import kind
from .merge_report import MergeReport
from .methods import METHODS
from .recipe import Recipe

# Two decompositions agree to about 1e-6 of the largest entry of the update, and then an entry or two at the selection's
# threshold fall on the other side of it. So nearly all entries must agree closely, and a few may not.
ENTRY_ERROR = 2e-5  # of the update's largest entry
FLIPS = 1e-4  # share of the entries, besides two per expert
UNITS = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}


def disagreements(got: np.ndarray, want: np.ndarray, base: np.ndarray, unit: float) -> int:
    """How many entries of a merged tensor differ from the expected one by more than rounding; float64 arrays.

    unit: half a unit in the last place of 1.0 in the written type.
    """
    # one rounding to the written type, a few in the float32 sums before it; float16 is no finer than 2^-24
    allowed = ENTRY_ERROR * np.abs(want - base).max(initial=0.0) + (2 * unit + 8 * UNITS["float32"]) * np.abs(want)
    allowed += 2.0**-24 if unit == UNITS["float16"] else 0.0
    return int(np.count_nonzero(np.abs(got - want) > allowed))


def allowed_disagreements(entries: int, experts: int) -> int:
    """How many may."""
    return 2 * experts + int(FLIPS * entries * experts)


def verify(recipe: Recipe, out: str | os.PathLike[str]) -> str:
    """Checks every tensor's name, shape, type and finiteness, and one tensor of each kind against the reference.

    The reference merges the tensor by full SVD and sort. Returns a line that says what was checked; LorsError if more
    entries differ than can lie at the threshold.
    """
    from .merging import _engine, _open, _plan, source_of

    with contextlib.ExitStack() as stack:
        method = METHODS[recipe.merge_method]
        base, experts = _open(recipe, method, stack)
        merged = stack.enter_context(open_checkpoint(os.fspath(out), name=os.fspath(out)))
        report = MergeReport(recipe.merge_method, "reference", None, [])
        sources = [source_of(checkpoint, base) for checkpoint in (base, *experts)]
        works = _plan(recipe, method, sources[0], base.naming, base.config, report)
        by_kind = defaultdict(list)
        for work in works:
            info = merged.info(work.name)
            if (info.dtype, info.shape) != (work.out_dtype, work.spec.shape):
                raise LorsError(
                    f"check: tensor {work.name!r}: expected {work.out_dtype} {work.spec.shape}, got {info.dtype} {info.shape}"
                )
            if (
                work.spec.floating
                and work.spec.numel
                and not np.isfinite(merged.read(work.name).astype(np.float32)).all()
            ):
                raise LorsError(f"check: tensor {work.name!r}: expected finite values, got NaN or infinity")
            by_kind[kind(work.name)].append(work)
        sample = [group[len(group) // 2] for group in by_kind.values()]
        expected = {work.name: np.empty(work.spec.numel, work.out_dtype) for work in sample}

        def keep(name: str, values: np.ndarray, start: int) -> None:
            expected[name][start : start + values.size] = values

        _engine(recipe, sources, keep, report, sample, None).run(sample)
        require_unchanged((base, *experts, merged))  # or else the difference is theirs
        flips = 0
        for work in sample:
            want, got = (x.astype(np.float64).ravel() for x in (expected[work.name], merged.read(work.name)))
            start = base.read(work.name).astype(np.float64).ravel() if method.relative else np.zeros_like(want)
            wrong = disagreements(got, want, start, UNITS.get(str(work.out_dtype), 0.0))
            if wrong > allowed_disagreements(want.size, len(experts)):
                raise LorsError(
                    f"check: tensor {work.name!r}: {wrong} of {want.size} entries differ from the reference, "
                    f"expected at most {allowed_disagreements(want.size, len(experts))}"
                )
            flips += wrong
    entries = sum(work.spec.numel for work in sample)
    return (
        f"checked: {len(works)} tensors reloaded, {len(sample)} of them compared with the reference, "
        f"{flips} of {entries:,} entries at the selection's threshold differ"
    )
