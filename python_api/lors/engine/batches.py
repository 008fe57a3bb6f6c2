"""What goes to a device together: matrices of one shape whose experts are treated alike, as many as its memory holds."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

from ..errors import LorsError
from .work import Piece, Work

# Bytes of inputs per batch. A device is busy with less; fewer batches wait less often for the host between two operations.
LARGEST = 8 << 30
# Inputs that have to be copied: those of the first batch have nothing to hide behind, so there are about so many batches, of
# so much at least; and page-locked memory, of two batches, takes long to get.
BATCHES, LEAST, MOST = 8, 1 << 30, 2 << 30
BASIS = 128  # columns of a Krylov basis to reckon with; convergence usually needs 80


class Rule(NamedTuple):
    """What is done with one expert."""

    rank: float
    density: float
    used: bool
    dtype: str
    stored: bool  # its delta is known by parts or factors: no matrix of it is read


class Kind(NamedTuple):
    """What the matrices of one batch have in common."""

    shape: tuple[int, ...]
    base: str  # dtype
    rules: tuple[Rule, ...]  # one per expert
    together: bool = False  # one tensor, of which the method sees all experts at once


class Slice(NamedTuple):
    """Consecutive experts that are treated alike; of those with stored parts one at a time."""

    experts: tuple[int, ...]
    rank: float
    density: float
    stored: bool


class Batch(NamedTuple):
    kind: Kind
    most: int  # experts at a time
    pieces: tuple[int, ...]

    def slices(self) -> list[Slice]:
        """The experts in order, cut where the rule changes and at `most` experts. Of a tensor that needs all experts together
        one slice or, where they do not fit, none: then the method brings what it looks at."""
        kind, most = self.kind, self.most
        if kind.together:
            whole = Slice(tuple(range(len(kind.rules))), 0, 1.0, False)
            return [whole] if most >= len(kind.rules) else []
        found = []
        used = [(rule, e) for e, rule in enumerate(kind.rules) if rule.used]
        for rule, run in groupby(used, key=lambda item: item[0]):
            experts, step = [e for _, e in run], 1 if rule.stored else most
            found += [
                Slice(tuple(experts[i : i + step]), rule.rank, rule.density, rule.stored)
                for i in range(0, len(experts), step)
            ]
        return found

    def smaller(self) -> list[Batch]:
        """Half the matrices, twice, or fewer experts at a time; nothing where it is as small as can be."""
        if len(self.pieces) > 1:
            middle = len(self.pieces) // 2
            return [self._replace(pieces=half) for half in (self.pieces[:middle], self.pieces[middle:])]
        if self.most > 1:
            return [self._replace(most=1 if self.kind.together else (self.most + 1) // 2)]
        return []


def input_bytes(work: Work, sizes: Sequence[int], experts: int) -> int:
    """sizes: bytes per entry of the base, and at most of an expert."""
    return work.spec.numel * (sizes[0] + experts * sizes[1])


def device_bytes(work: Work, kind: Kind, experts: int, inputs: int) -> int:
    """What one matrix with so many experts takes: inputs (twice: the next ones are copied meanwhile), sum, results that are
    copied back, workspace."""
    results = work.spec.numel * (4 + 2 * work.out_dtype.itemsize)
    if kind.together:
        return 2 * inputs + results + work.spec.numel * (16 + 12 * experts)  # differences, once in float64
    m, n = kind.shape
    workspace = experts * (min(m, n) * BASIS * 4 * 2 + BASIS * BASIS * 16 + max(m, n) * 64) if work.matrix else 0
    return 2 * inputs + results + workspace


def batches(
    pieces: Sequence[Piece],
    indices: Sequence[int],
    kind_of: Callable[[Work], Kind],
    sizes_of: Callable[[Work], tuple[int, int]],
    *,
    budget: int,
    largest: int,
    resident: bool,
) -> Iterator[Batch]:
    """The pieces with those numbers, within `budget` bytes of device memory and about `largest` bytes of inputs.

    resident: the inputs are on the device already. LorsError where one matrix does not fit."""
    kinds: dict[Kind, list[int]] = defaultdict(list)
    for index in indices:
        kinds[kind_of(pieces[index].work)].append(index)
    for kind, alike in kinds.items():
        work = pieces[alike[0]].work
        sizes, experts = sizes_of(work), max(1, len(kind.rules))

        def needs(count: int, work: Work = work, kind: Kind = kind, sizes: tuple[int, int] = sizes) -> int:
            return device_bytes(work, kind, count, 0 if resident else input_bytes(work, sizes, count))

        while experts > 1 and needs(experts) > budget:
            experts = 1 if kind.together else (experts + 1) // 2
        one = needs(experts)
        if one > budget:
            raise LorsError(
                f"device memory: expected at least {one / 1e6:.3g} MB for tensor {work.name!r}, got {budget / 1e6:.3g} MB"
            )
        count = max(1, min(budget // one, largest // input_bytes(work, sizes, experts)))
        count = 1 if kind.together else count
        for start in range(0, len(alike), count):
            yield Batch(kind, experts, tuple(alike[start : start + count]))
