"""Reload a merged checkpoint and compare it with the definition."""

from __future__ import annotations

import contextlib
import os
from collections import defaultdict

import numpy as np

from .checkpoint import open_checkpoint
from .errors import LorsError
from .layers import kind
from .merge_report import MergeReport
from .methods import METHODS
from .recipe import Recipe

# L agrees to about 1e-6, so that an entry or two at the selection's threshold may fall on the other side: their share of
# the update's norm is below 1e-3, and a wrong selection is far above.
UPDATE_ERROR = 2e-3


def verify(recipe: Recipe, out: str | os.PathLike[str]) -> str:
    """Checks every tensor's name, shape, type and finiteness, and one tensor of each kind against the reference.

    The reference merges the tensor by full SVD and sort; ||W - W_ref|| <= 2e-3 ||W_ref - W0|| plus the rounding of the
    written type is asked for. Returns a line that says what was checked; LorsError if it is not so.
    """
    from .merging import _engine, _open, _plan
    from .sources import FileSource

    with contextlib.ExitStack() as stack:
        method = METHODS[recipe.merge_method]
        base, experts = _open(recipe, method, stack)
        merged = stack.enter_context(open_checkpoint(os.fspath(out), name=os.fspath(out)))
        report = MergeReport(recipe.merge_method, "reference", None, [])
        sources = [FileSource(checkpoint, list(base.tensors)) for checkpoint in (base, *experts)]
        works = _plan(recipe, method, sources[0], base.naming, base.config, report)
        by_kind = defaultdict(list)
        for work in works:
            info = merged.info(work.name)
            if (info.dtype, info.shape) != (work.out_dtype, work.spec.shape):
                raise LorsError(f"check: tensor {work.name!r}: expected {work.out_dtype} {work.spec.shape}, got {info.dtype} {info.shape}")
            if work.spec.floating and work.spec.numel and not np.isfinite(merged.read(work.name).astype(np.float32)).all():
                raise LorsError(f"check: tensor {work.name!r}: expected finite values, got NaN or infinity")
            by_kind[kind(work.name)].append(work)
        sample = [group[len(group) // 2] for group in by_kind.values()]
        expected = {work.name: np.empty(work.spec.numel, work.out_dtype) for work in sample}

        def keep(name: str, values: np.ndarray, start: int) -> None:
            expected[name][start : start + values.size] = values

        _engine(recipe, sources, keep, report, sample, None).run(sample)
        worst = 0.0
        for work in sample:
            want, got = (x.astype(np.float64).ravel() for x in (expected[work.name], merged.read(work.name)))
            update = want - (base.read(work.name).astype(np.float64).ravel() if method.relative else 0)
            # half a unit in the last place of every entry, as a norm
            rounding = 2.0 ** -{"float32": 24, "float16": 11, "bfloat16": 8}.get(str(work.out_dtype), 60) * np.linalg.norm(want)
            error, scale = float(np.linalg.norm(got - want)), float(np.linalg.norm(update))
            if error > UPDATE_ERROR * scale + 2 * rounding:
                raise LorsError(f"check: tensor {work.name!r}: differs from the reference by {error / (scale or 1):.2g} of the update")
            worst = max(worst, error / scale if scale else 0.0)
    return f"checked: {len(works)} tensors reloaded, {len(sample)} compared with the reference, largest difference {worst:.1e} of the update"
