"""The merge engine: a plan of small pieces of work, done by a few threads with a few buffers each.

A piece is one decomposed matrix, or a slab of any other tensor. A worker reads the base's part of it, then one expert
after the other into the same buffer, and adds what the method keeps to a float32 sum: everything that is done with one
expert's matrix (decomposing, selecting, adding) happens while it is in the cache, and the memory in use does not depend on
the size of the model or on the number of experts. Experts are added in their order, each by one thread, so the result has
the same bits for any number of threads.

The sum is that of the updates alone, and the base is added to it at the end: a weight near 1 would lose the last bits of
every small update that is added to it, one rounding per expert; so it is rounded once.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np

import lors_kernels
from lors_kernels import FactorOverflowError, NonFiniteError, UpdateStats, dense
from lors_kernels.lors_delta import add_lors_delta
from lors_kernels.threads import one_torch_thread

from ..errors import LorsError
from ..experts.boosted import Differences, Zeros, boosts
from ..experts.factors import Factors
from ..experts.source import Slot, Source
from ..methods import Reduction
from ..methods.operands import Buffers, Certificate, Operands, Outcome, subtract
from ..recipes.parameters import rank_of
from ..tasks import run_all
from .account import Account
from .blas import one_thread_each
from .report import MergeReport
from .work import SLAB, Piece, Work

PART = 1 << 18  # entries of a matrix that are read at a time to be subtracted from: in cache, and few calls for Python
# From here on a float32 value rounds to infinity; and the largest value of the type.
OVERFLOWS = {
    "float32": (math.inf, float(np.finfo(np.float32).max)),
    "float16": (65520.0, 65504.0),
    "bfloat16": (255.5 * 2.0**120, 255 * 2.0**120),
}
ALL_HOLD = min(limit for limit, _ in OVERFLOWS.values())  # what is smaller fits each of them
AHEAD = 4  # pieces whose tensors are asked for before they are needed

Sink = Callable[[str, np.ndarray, int], None]  # name, values, first element
# (expert, tensor, rank) -> its (left, right) if they are known already
FactorCache = Callable[[str, str, int], "tuple[np.ndarray, np.ndarray] | None"]


class Terms(NamedTuple):
    """W = scale * W_anchor + sum over `experts` of weight_t * (L_t + S_t), their deltas being differences to the anchor."""

    anchor: Source
    scale: float
    experts: tuple[int, ...]


class SplitFactors(NamedTuple):
    """A delta that is known by factors, as a `Reduction` wants it."""

    low: Factors | None  # L; None: rank 0
    rest: Factors  # what S is selected from
    energy: float  # sums of squares of delta and of `rest`; 0 where there is no L
    rest_energy: float

    @classmethod
    def of(cls, factors: Factors, work: Work, reduction: Reduction) -> SplitFactors:
        if not reduction.rank:
            return cls(None, factors, 0.0, 0.0)
        low, rest = factors.split(rank_of(reduction.rank, *work.spec.shape))
        return cls(low, rest, *(float(np.square(part.sigma()).sum()) for part in (factors, rest)))


@dataclass
class Worker:
    """Buffers of one thread."""

    base: Slot = field(default_factory=Slot)
    tuned: Slot = field(default_factory=Slot)
    delta: Slot = field(default_factory=Slot)
    total: Slot = field(default_factory=Slot)
    out: Slot = field(default_factory=Slot)
    buffers: Buffers = field(default_factory=Buffers)


@dataclass
class Engine:
    """Carries out a list of `Work` from sources to a sink and keeps the account in a report."""

    base: Source
    experts: Sequence[Source]
    sink: Sink
    report: MergeReport
    backend: str | None = None
    threads: int = 1
    seed: int = 0
    cached: FactorCache | None = None
    progress: Callable[[int], None] = lambda entries: None
    stop: threading.Event = field(default_factory=threading.Event)  # set when the work is given up
    account: Account = field(init=False)
    _local: threading.local = field(default_factory=threading.local, init=False)

    def run(self, works: Sequence[Work], also: Sequence[Callable[[], None]] = ()) -> None:
        """Does all work, and the functions in `also` beside it; the first error stops everything and is raised."""
        pieces = self.begin(works)
        self.carry_out([*also, *(partial(self.do, index) for index in range(len(pieces)))], self.threads)

    def begin(self, works: Sequence[Work]) -> Sequence[Piece]:
        """The pieces of a run, whose account is opened."""
        self.account = Account([piece for work in works for piece in work.pieces()], self.progress)
        return self.account.pieces

    def carry_out(self, tasks: Sequence[Callable[[], None]], threads: int) -> None:
        """Runs all tasks, the first error stops them; then the account is closed."""
        with one_thread_each():
            run_all(tasks, threads, "lors", self.stop)
        self.account.close(self.report, self.base, self.experts)

    # --- one piece

    def do(self, index: int) -> None:
        """The piece with a number, unless the work is given up."""
        if self.stop.is_set():
            return
        pieces = self.account.pieces
        if not hasattr(self._local, "worker"):
            self._local.worker = Worker()
        if index + AHEAD < len(pieces):
            ahead = pieces[index + AHEAD]
            if ahead.start == 0:
                for source in (self.base, *self.experts):
                    source.prefetch(ahead.work.name)
        piece, worker, outcomes = pieces[index], self._local.worker, list[Outcome]()
        if piece.work.combination:
            outcomes = self._combine(piece.work, worker)
        elif any(reduction.weight for reduction in piece.work.reductions):
            outcomes = self._merge(piece, worker)
        else:
            values = self.base.fetch(piece.work.name, piece.start, piece.stop, worker.base)
            self._write(piece, worker, values, None)
        self.account.done(index, outcomes)

    def terms(self, work: Work) -> Terms:
        """What is summed. A method without a base sums the models: sum_t w_t W_t = (sum_t w_t) W_a + sum_t w_t (W_t - W_a)
        with any of them as W_a, where what is rounded is as small as the models are near each other."""
        used = tuple(t for t, reduction in enumerate(work.reductions) if reduction.weight)
        if work.relative or not used:
            return Terms(self.base, 1.0, used)
        return Terms(self.experts[used[0]], math.fsum(work.reductions[t].weight for t in used), used[1:])

    def _merge(self, piece: Piece, worker: Worker) -> list[Outcome]:
        work, terms = piece.work, self.terms(piece.work)
        base = terms.anchor.fetch(work.name, piece.start, piece.stop, worker.base)
        total = worker.total.array(piece.stop - piece.start, np.dtype(np.float32))
        total[:] = 0
        outcomes = []
        for expert, reduction in ((self.experts[t], work.reductions[t]) for t in terms.experts):
            if self.stop.is_set():
                return []
            if (parts := expert.parts) is not None:  # decomposed already
                options = (reduction.weight, reduction.rank, reduction.density, self.backend)
                outcomes.append(Outcome(parts.add(work.name, piece.start, total, *options), None))
                continue
            factors = expert.factors(work.name) if work.relative else None
            if factors is not None:
                outcomes += self._add_factors(expert, piece, total, factors, reduction)
                continue
            against, tuned = self._pair(expert, piece, base, worker)
            bases = [None, None] if against is None else piece.views(against)
            for t, b, w in zip(piece.views(tuned), bases, piece.views(total), strict=False):
                outcomes.append(self.add(expert, work, w, b, t, reduction, self.backend))
        self._write(piece, worker, base, self._boosted(work, total), terms.scale)
        return outcomes

    def _pair(
        self, expert: Source, piece: Piece, base: np.ndarray, worker: Worker
    ) -> tuple[np.ndarray | None, np.ndarray]:
        """What the kernels subtract, and from what: (base, tuned), or (None, delta).

        A matrix is read a part at a time and the base subtracted while the part is in the cache: what is kept of it is
        delta, and base and tuned need not be read and converted again for each step.
        """
        work = piece.work
        if not work.matrix:
            return base, expert.fetch(work.name, piece.start, piece.stop, worker.tuned)
        delta = worker.delta.array(base.size, np.dtype(np.float32))
        for start in range(0, base.size, PART):
            part = slice(start, min(base.size, start + PART))
            tuned = expert.fetch(work.name, piece.start + part.start, piece.start + part.stop, worker.tuned)
            subtract(delta[part], tuned, base[part])
        return None, delta

    def _add_factors(
        self, expert: Source, piece: Piece, total: np.ndarray, factors: Factors, r: Reduction
    ) -> list[Outcome]:
        """The same for an adapter: L comes from its factors, and a matrix is formed only of what S is selected from."""
        if not factors.rank:
            return []
        if not piece.work.matrix:
            total += np.float32(r.weight) * factors.flat(piece.start, piece.stop)
            return []
        split = SplitFactors.of(factors, piece.work, r)
        return self.add_split(expert, piece.work, total.reshape(piece.work.spec.shape), split, r, self.backend)

    def add_split(
        self, expert: Source, work: Work, total: Any, split: SplitFactors, r: Reduction, backend: str | None
    ) -> list[Outcome]:
        """total += weight * (L + S) for a matrix that may be on a device, and what is known of its delta beside it."""
        outcomes = []
        if split.rest.rank and r.density:
            outcomes = [self.add(expert, work, total, None, split.rest.matrix(), r._replace(rank=0), backend)]
        if split.low is not None:
            total += float(np.float32(r.weight)) * split.low.matrix()
            kept = sum(outcome.stats.kept_energy for outcome in outcomes)
            stats = UpdateStats(split.energy, split.rest_energy, kept, 0, 0)
            outcomes = [Outcome(stats, Certificate("factors", 0, 0.0))]
        return outcomes

    def _combine(self, work: Work, worker: Worker) -> list[Outcome]:
        """All experts together, as the method's `Combination` says."""
        assert work.combination is not None
        options: dict[str, Any] = {"backend": self.backend, "threads": 1}
        base, experts, apart = self.base, self.experts, self.by_differences(work)
        if apart:
            base, experts = Zeros(self.base), [Differences(expert, self.base) for expert in self.experts]
        operands = Operands(
            work.name, work.spec, base, experts, self.seed, options, worker.buffers,
            lambda expert: self.blame(expert, work),
        )  # fmt: skip
        whole = worker.total.array(work.spec.numel if apart else 0, np.dtype(np.float32))
        for start, values in work.combination(operands):
            if self.stop.is_set():
                return operands.outcomes
            if apart:
                whole[start : start + values.size] = values
            else:
                self._write(Piece(work, start, start + values.size), worker, None, values)
        if apart:
            values = self.base.fetch(work.name, 0, work.spec.numel, worker.base)
            self._write(Piece(work, 0, work.spec.numel), worker, values, self._boosted(work, whole))
        return operands.outcomes

    def by_differences(self, work: Work) -> bool:
        """Whether a combination is given differences instead of tensors: where one of them is boosted, or their sum, which
        the rounding of a tensor would add to in all directions."""
        return work.boost is not None or any(boosts(expert, work.name) for expert in self.experts)

    def _boosted(self, work: Work, update: np.ndarray) -> np.ndarray:
        """The merged difference, flat; boosted where that is asked for."""
        if work.boost is None:
            return update
        import torch

        if not np.isfinite(update).all():
            self.require_fit(work, math.inf)
        with one_torch_thread():
            matrix = torch.from_numpy(update.reshape(work.spec.shape)).double()
            return dense.boost(matrix, work.boost).float().numpy().ravel()  # type: ignore[no-any-return]

    def add(
        self, expert: Source, work: Work, total: Any, base: Any, tuned: Any, r: Reduction, backend: str | None
    ) -> Outcome:
        """total += weight * (L + S) of one expert's matrix."""
        rank = rank_of(r.rank, *tuned.shape) if r.rank else 0
        known = self.cached(expert.name, work.name, rank) if rank and self.cached is not None else None
        try:
            stats, svd = add_lors_delta(
                total, base, tuned, rank, r.density, r.weight,
                factors=known, seed=self.seed, backend=backend, threads=1,
            )  # fmt: skip
        except NonFiniteError:
            raise self.blame(expert, work) from None
        except FactorOverflowError as error:
            raise LorsError(f"{expert.name}: tensor {work.name!r}: {error}") from None
        if stats.non_finite:
            raise self.blame(expert, work)
        return Outcome(stats, Certificate.of(svd))

    def _write(
        self, piece: Piece, worker: Worker, base: np.ndarray | None, update: np.ndarray | None, scale: float = 1.0
    ) -> None:
        """scale * base + update in the output's type to the sink; LorsError where that type cannot hold it."""
        work, values = piece.work, base if update is None else update
        assert values is not None
        if update is not None or values.dtype != work.out_dtype:  # else carried over as it is
            in_place = update is not None and update.dtype == work.out_dtype
            out = values if in_place else worker.out.array(values.size, work.out_dtype)
            self.require_fit(work, _apply(out, base, update, scale, self.backend))
            values = out
        self.sink(work.name, values, piece.start)

    def require_fit(self, work: Work, largest: float) -> None:
        """LorsError unless the type that is written can hold values as large as `largest`, NaN included."""
        if largest < ALL_HOLD:  # numpy is slow to say the name of a type
            return
        dtype = str(work.out_dtype)
        if dtype not in OVERFLOWS or largest < OVERFLOWS[dtype][0]:
            return
        self._require_finite(work, (self.terms(work).anchor, *self.experts))
        advice = {
            "float16": "choose bfloat16 or float32 as out_dtype",
            "bfloat16": "choose float32 as out_dtype",
            "float32": "choose smaller weights",
        }[dtype]
        raise LorsError(
            f"tensor {work.name!r}: the merged values reach {largest:.4g}, expected at most {OVERFLOWS[dtype][1]:.6g} "
            f"for {dtype}; {advice}"
        )

    def blame(self, expert: Source, work: Work) -> LorsError:
        """The error for NaN or infinity in a difference, after counting them in the whole tensor; says whose they are."""
        anchor = self.terms(work).anchor
        try:
            self._require_finite(work, (anchor, expert))
        except LorsError as error:
            return error
        return LorsError(f"{expert.name}: tensor {work.name!r}: its difference to {anchor.name} overflows float32")

    def _require_finite(self, work: Work, sources: Sequence[Source]) -> None:
        """LorsError that names the first source whose tensor holds NaN or infinity, and how many."""
        slot = Slot()
        for source in sources:
            count = 0
            for start in range(0, work.spec.numel, SLAB):
                values = source.fetch(work.name, start, min(work.spec.numel, start + SLAB), slot)
                count += int(np.count_nonzero(~np.isfinite(values.astype(np.float32))))
            if count:
                raise LorsError(
                    f"{source.name}: tensor {work.name!r}: expected finite values, got {count} NaN or infinite"
                )


def _apply(
    out: np.ndarray, base: np.ndarray | None, update: np.ndarray | None, scale: float, backend: str | None
) -> float:
    """`apply_update` of flat arrays, which takes any of the three types."""
    rows = (None if x is None else x[None] for x in (base, update))
    return lors_kernels.apply_update(out[None], *rows, scale=scale, backend=backend, threads=1)
