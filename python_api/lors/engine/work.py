"""A plan: all there is to do for each tensor, in pieces."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ..errors import LorsError, SettingError
from ..experts.source import Spec, rows_of
from ..methods import Reduction
from ..methods.operands import Combination
from ..recipes.parameters import LARGEST, rank_of

SLAB = 1 << 19  # entries of a piece of a tensor that is not decomposed: base, expert and sum stay in the cache


@dataclass(frozen=True)
class Work:
    """All there is to do for one tensor."""

    name: str
    spec: Spec  # of the base
    out_dtype: np.dtype[Any]
    reductions: tuple[Reduction, ...]  # one per expert; none: the base's values are carried over
    matrix: bool  # decomposed: treated as a whole
    relative: bool = True
    combination: Combination | None = None  # instead of reductions: all experts together
    boost: float | None = None  # of the merged difference, a matrix; see `dense.boosted`

    def pieces(self) -> Iterator[Piece]:
        step = max(1, self.spec.numel) if self.matrix or self.combination else SLAB
        for start in range(0, max(1, self.spec.numel), step):
            yield Piece(self, start, min(self.spec.numel, start + step))


class Piece(NamedTuple):
    work: Work
    start: int
    stop: int

    def views(self, flat: np.ndarray) -> list[np.ndarray]:
        """The piece's values as matrices: the tensor itself, or rows of COLUMNS and one shorter row."""
        if self.work.matrix:
            return [flat.reshape(self.work.spec.shape)]
        return rows_of(flat)


def plan(
    specs: Mapping[str, Spec],
    matrices: set[str],
    treatments: Callable[[str, bool], list[Reduction] | Combination],
    out_dtype: np.dtype[Any] | None,
    relative: bool,
) -> list[Work]:
    """One `Work` per tensor, in the base's order; every rank is checked against its matrix before any work."""
    works = []
    for name, spec in specs.items():
        matrix = name in matrices
        treatment = treatments(name, matrix) if spec.floating and spec.numel else []
        combination = treatment if callable(treatment) else None
        chosen = [] if callable(treatment) else treatment
        for reduction in chosen:
            if not abs(reduction.weight) <= LARGEST:
                raise LorsError(
                    f"tensor {name!r}: expected lambda times weight to be a number of float32, got {reduction.weight:g}"
                )
            if reduction.rank:
                try:
                    rank_of(reduction.rank, *spec.shape)
                except ValueError as error:
                    problem = str(error).removeprefix("rank: ")
                    raise SettingError("parameters.rank", f"{problem}: tensor {name!r}") from None
        dtype = out_dtype if out_dtype is not None and spec.floating else spec.dtype
        works.append(Work(name, spec, dtype, tuple(chosen), matrix, relative, combination))
    return works
