"""Single-matrix operations as groups of one, for the backends whose kernels work on groups."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..group import GroupThreshold, MatrixGroup
from ..types import Consensus, Keep, KeepStats, NonFiniteError, Threshold, TruncatedSVD, UpdateStats


class Single:
    """`gram_apply`, `residual_threshold`, `merge_update`, `ties_update`, `truncated_svd` as `dispatch` expects them of a module."""

    def __init__(self, grouped: Any) -> None:
        self.grouped = grouped

    def gram_apply(self, base: Any, tuned: Any, x: Any, *, side: str, threads: int | None = None) -> Any:
        return self.grouped.gram_apply(_group(base, [tuned]), x.contiguous().unsqueeze(0), side=side)[0][0]

    def residual_threshold(
        self, base: Any, tuned: Any, left: Any, right: Any, k: int, *, threads: int | None = None
    ) -> Threshold:
        found = self.grouped.residual_threshold(_group(base, [tuned]), *_stack([left], [right]), k)
        bad = int(found.non_finite[0])
        if bad:
            raise NonFiniteError(bad)
        return found.thresholds()[0]

    def merge_update(
        self,
        out: Any,
        base: Any,
        tuned: Sequence[Any],
        left: Sequence[Any],
        right: Sequence[Any],
        threshold: Sequence[Threshold],
        weight: Sequence[float],
        *,
        threads: int | None = None,
    ) -> list[UpdateStats]:
        tuned = _same_dtype(tuned)
        group = _group(base, tuned)
        thresholds = GroupThreshold.of(threshold, group.device)
        stats = self.grouped.merge_update(group, (out,), *_stack(left, right), thresholds, list(weight))
        return stats.stats()  # type: ignore[no-any-return]

    def ties_update(
        self,
        out: Any,
        base: Any,
        tuned: Sequence[Any],
        keep: Sequence[Keep],
        weight: Sequence[float],
        rule: Consensus,
        *,
        threads: int | None = None,
    ) -> list[KeepStats]:
        group = _group(base, _same_dtype(tuned))
        outs = None if out is None else (out,)
        return self.grouped.ties_update(group, outs, list(keep), list(weight), rule).stats()  # type: ignore[no-any-return]

    def truncated_svd(
        self, base: Any, tuned: Any, rank: int, *, seed: int = 0, threads: int | None = None
    ) -> TruncatedSVD:
        from .truncated_svd import decompose

        f = decompose(self.grouped, _group(base, [tuned]), rank, seed)
        left, right, sigma = f.left[0], f.right[0], f.sigma[0]
        return TruncatedSVD(
            left, right, sigma, f.passes[0], f.residual[0], f.method[0], f.energy[0], f.backend, f.unique[0]
        )


def _group(base: Any, tuned: Sequence[Any]) -> MatrixGroup:
    return MatrixGroup(None if base is None else [base], [tuned])


def _same_dtype(tuned: Sequence[Any]) -> Sequence[Any]:
    """Experts of different dtypes, which one launch cannot read, in float32; nothing is rounded by that."""
    return tuned if len({t.dtype for t in tuned}) == 1 else [t.float() for t in tuned]


def _stack(left: Sequence[Any], right: Sequence[Any]) -> tuple[Any, Any]:
    """Factors of every expert, padded with zero columns to one rank; a zero term does not change the sum's bits."""

    ranks = [0 if l is None else l.shape[1] for l in left]
    rank = max(ranks)
    if rank == 0:
        return None, None
    known = next(i for i, r in enumerate(ranks) if r)
    stacks = []
    for factors in (left, right):
        stack = factors[known].new_zeros((len(factors), factors[known].shape[0], rank))
        for p, factor in enumerate(factors):
            if factor is not None:
                stack[p, :, : factor.shape[1]] = factor
        stacks.append(stack)
    return stacks[0], stacks[1]
