"""What a method sees of one tensor when it looks at all experts together: the base, the experts, and a bounded part of
them at a time.

Arrays are numpy's here. On a device they are torch's (`engine/device_operands.py`), so a method calls by a name of `Operands`
what the two call differently, and for the rest uses what they have in common: operators, slices, `reshape`, `sum(axis=)`.

A method that is no sum of per-expert `Reduction`s is a `Combination`: a generator that is given `Operands` and yields
(first element, merged values). Memory does not depend on the number of experts: an expert is whole in memory only one
at a time, and `chunks` gives of all of them together never more than BUDGET entries.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

import lors_kernels
from lors_kernels import Keep, KeepStats, NonFiniteError, Threshold, TruncatedSVD, UpdateStats, dense
from lors_kernels.types import Consensus

from ..errors import LorsError
from ..experts.source import COLUMNS, Slot, Source, Spec, matrix_shape, rows_of

if TYPE_CHECKING:
    from torch import Tensor

BUDGET = 1 << 24  # entries of base and experts that are in memory at a time; smaller tensors are read only once
BLOCK = 1 << 16  # entries of a float32 inner product; longer ones are summed in float64
STRIP = 1 << 21  # the same for tensors beyond it, where nothing is gained by more than a cache holds


class Certificate(NamedTuple):
    """How a decomposition was found. Its factors are not kept: those of all experts are many megabytes."""

    method: str
    passes: int
    residual: float
    unique: bool = True

    @classmethod
    def of(cls, svd: TruncatedSVD | None) -> Certificate | None:
        return None if svd is None else cls(svd.method, svd.passes, svd.residual, svd.unique)


class Outcome(NamedTuple):
    """What one expert contributed to one piece."""

    stats: UpdateStats
    svd: Certificate | None = None


class Chunk(NamedTuple):
    """Elements of a tensor from `start` on, flat."""

    start: int
    base: Any
    tuned: list[Any]


@dataclass
class Buffers:
    """Memory of one worker, used again for every tensor."""

    base: Slot = field(default_factory=Slot)
    one: Slot = field(default_factory=Slot)  # one whole expert
    tuned: list[Slot] = field(default_factory=list)  # a chunk of every expert
    out: Slot = field(default_factory=Slot)


@dataclass
class Operands:
    """One tensor of the base and of all experts.

    kernels: keyword arguments for every kernel call (backend, threads). blame: makes the error for NaN or infinity in
    the tensor of an expert.
    """

    name: str
    spec: Spec
    base_source: Source
    experts: Sequence[Source]
    seed: int
    kernels: dict[str, Any]
    buffers: Buffers
    blame: Callable[[Source], LorsError]
    outcomes: list[Outcome] = field(default_factory=list)

    def __post_init__(self) -> None:
        while len(self.buffers.tuned) < len(self.experts):
            self.buffers.tuned.append(Slot())
        self._fits = self.spec.numel * (len(self.experts) + 1) <= BUDGET
        self._base: Any = None
        self._held: dict[int, Any] = {}

    # --- values

    def _fetch(self, source: Source, start: int, stop: int, slot: Slot) -> Any:
        return source.fetch(self.name, start, stop, slot)

    def base(self) -> Any:
        """All of the base's tensor, flat."""
        if self._base is None:
            self._base = self._fetch(self.base_source, 0, self.spec.numel, self.buffers.base)
        return self._base

    def tuned(self, t: int) -> Any:
        """All of expert t's tensor, flat; valid until another expert is asked for."""
        if t in self._held:
            return self._held[t]
        slot = self.buffers.tuned[t] if self._fits else self.buffers.one
        values = self._fetch(self.experts[t], 0, self.spec.numel, slot)
        if self._fits:
            self._held[t] = values
        return values

    def pair(self, t: int) -> tuple[Any, Any]:
        """Base and expert t as matrices: the first axis against all others, a vector as one row."""
        shape = matrix_shape(self.spec.shape)
        return self.base().reshape(shape), self.tuned(t).reshape(shape)

    def chunks(self, width: int = 1) -> Iterator[Chunk]:
        """Base and all experts, the tensor's elements in order; all but the last chunk hold a multiple of `width`."""
        size = self.spec.numel
        if self._fits:
            yield Chunk(0, self.base(), [self.tuned(t) for t in range(len(self.experts))])
            return
        step = self._step(STRIP, width)
        for start in range(0, size, step):
            stop = min(size, start + step)
            if self._base is None:
                base = self._fetch(self.base_source, start, stop, self.buffers.base)
            else:
                base = self._base[start:stop]
            pairs = zip(self.experts, self.buffers.tuned, strict=False)
            yield Chunk(start, base, [self._fetch(expert, start, stop, slot) for expert, slot in pairs])

    def _step(self, entries: int, width: int) -> int:
        """Elements of each tensor in a chunk of about so many entries of all."""
        unit = width if width > 1 else COLUMNS
        return max(1, entries // (len(self.experts) + 1) // unit) * unit

    def out(self, values: Any) -> Any:
        """A float32 copy of `values`, to be added to; valid until the next chunk."""
        total = self.buffers.out.array(values.size, np.dtype(np.float32))
        lors_kernels.apply_update(total[None], values[None], None, **self.kernels)
        return total

    def deltas(self, chunk: Chunk) -> Any:
        """[T, n] float32: of every expert, checked."""
        base = self.float32(chunk.base)
        found = np.empty((len(chunk.tuned), base.size), np.float32)
        for t, tuned in enumerate(chunk.tuned):
            np.subtract(self.float32(tuned), base, out=found[t])
            self.check(t, found[t])
        return found

    # --- what numpy and torch call differently

    def float32(self, x: Any) -> Any:
        return x.astype(np.float32, copy=False)

    def float64(self, x: Any) -> Any:
        return x.astype(np.float64, copy=False)

    def subtract(self, a: Any, b: Any) -> Any:
        """a - b in float32."""
        found = np.empty(a.shape, np.float32)
        subtract(found.ravel(), a.ravel(), b.ravel())
        return found

    def array(self, x: np.ndarray) -> Any:
        """What was computed beside the tensors, in their place."""
        return x

    def tensor(self, x: Any) -> Tensor:
        """An array as a tensor, in the operands' place; a tensor is one already."""
        import torch

        return torch.from_numpy(x)

    def energy(self, x: Any) -> float:
        """sum x^2, summed in float64."""
        return float(np.square(x).sum(dtype=np.float64))

    def magnitude(self, x: Any) -> float:
        """sum |x|, summed in float64."""
        return float(np.abs(x).sum(dtype=np.float64))

    def products(self, x: Any) -> np.ndarray:
        """[.., T, T] float64, in main memory: inner products between the rows of x [.., T, n] float32."""
        if x.ndim > 2:
            wide = x.astype(np.float64)
            return wide @ wide.swapaxes(-1, -2)  # type: ignore[no-any-return]
        blocks = [x[:, i : i + BLOCK] for i in range(0, x.shape[1], BLOCK)]
        return sum((block @ block.T).astype(np.float64) for block in blocks)  # type: ignore[return-value]

    # --- kernels, with errors that name the expert

    def threshold(self, t: int, k: int) -> Threshold:
        """Of the k largest entries of expert t's delta in this tensor."""
        base, tuned = self.pair(t)
        try:
            return lors_kernels.residual_threshold(base, tuned, k=k, **self.kernels)
        except NonFiniteError:
            raise self.blame(self.experts[t]) from None

    def delta(self, t: int) -> Tensor:
        """Expert t's delta as a float64 matrix on the operands' device: exact where it is known by factors, else formed in
        float32."""
        factors = self.experts[t].factors(self.name)
        if factors is not None:
            return self.tensor(factors.exact())
        delta = self.difference(t)
        self.check(t, delta)
        return delta.double()

    def difference(self, t: int) -> Tensor:
        """The same in float32, and whether it is finite is for the caller to `check`."""
        factors = self.experts[t].factors(self.name)
        if factors is not None:
            return self.tensor(factors.matrix())
        base, tuned = self.pair(t)
        return self.tensor(self.subtract(tuned, base))

    def svd(self, t: int, rank: int, tolerance: float = 0.0) -> tuple[Tensor, Tensor, Tensor]:
        """(u [m, r], sigma [r], v [n, r]) in float64: the `rank` largest singular triplets of expert t's delta but those of
        value 0, each as exact as the others, and as `tolerance` asks (`dense.leading`)."""
        factors = self.experts[t].factors(self.name)
        if factors is None:
            delta, method = self.delta(t), "svd"
            u, sigma, v = dense.leading(delta, rank, tolerance)
            energy = float(delta.square().sum())
        else:
            (u, sigma, v), method = (self.tensor(x) for x in factors.svd()), "factors"
            energy = float(sigma.square().sum())
            there = int(dense.nonzero(sigma, (len(u), len(v)))[:rank].sum())
            u, sigma, v = u[:, :there], sigma[:there], v[:, :there]
        dropped = max(0.0, energy - float(sigma.square().sum()))
        self.outcomes.append(Outcome(UpdateStats(energy, dropped, 0.0, 0, 0), Certificate(method, 0, 0.0)))
        return u, sigma, v

    def moved(self, update: Tensor) -> Any:
        """base + update, flat, as a `Combination` yields it."""
        out = self.out(self.base())
        out += update.float().ravel().numpy()
        return out

    def account(self, t: int, keep: Keep) -> KeepStats:
        """What `keep` keeps of expert t's delta, before anything is merged."""
        base, tuned = self.pair(t)
        (stats,) = lors_kernels.ties_update(None, base, [tuned], [keep], [1.0], **self.kernels)
        if stats.non_finite:
            raise self.blame(self.experts[t])
        return stats

    def add(self, out: Any, chunk: Chunk, keep: Sequence[Keep], weights: Sequence[float], rule: Consensus) -> None:
        """`ties_update` of one chunk into `out`."""
        self._update(out, chunk.start, rows_of(chunk.base), chunk.tuned, keep, weights, rule)

    def add_deltas(
        self,
        out: Any,
        start: int,
        deltas: Sequence[Any],
        keep: Sequence[Keep],
        weights: Sequence[float],
        rule: Consensus,
    ) -> None:
        """The same for differences that are known already."""
        self._update(out, start, [None, None], deltas, keep, weights, rule)

    def count_dropped(self, energy: float) -> None:
        """The energy of what `add_deltas` does not see of a difference."""
        self.outcomes.append(Outcome(UpdateStats(energy, energy, 0.0, 0, 0)))

    def _update(
        self,
        out: Any,
        start: int,
        bases: Sequence[Any],
        experts: Sequence[Any],
        keep: Sequence[Keep],
        weights: Sequence[float],
        rule: Consensus,
    ) -> None:
        done = 0
        tuned = [rows_of(values) for values in experts]
        for part, total in enumerate(rows_of(out)):
            base, parts = bases[part], [rows[part] for rows in tuned]
            at = rule._replace(start=start + done)._asdict()
            stats = lors_kernels.ties_update(total, base, parts, keep, weights, **at, **self.kernels)
            done += total.shape[0] * total.shape[1]
            for t, s in enumerate(stats):
                if s.non_finite:
                    raise self.blame(self.experts[t])
                self.outcomes.append(Outcome(UpdateStats(s.delta_energy, s.delta_energy, s.kept_energy, s.kept, 0)))

    def check(self, t: int, values: Any) -> None:
        """Raises unless the values computed with expert t, in an array or a tensor, are finite."""
        finite = np.isfinite(values) if isinstance(values, np.ndarray) else values.isfinite()
        if not finite.all():
            raise self.blame(self.experts[t])


# one tensor's merge: yields (first element, merged values in float32), all elements in order
Combination = Callable[[Operands], Iterator[tuple[int, Any]]]


def subtract(out: np.ndarray, a: np.ndarray, b: np.ndarray) -> None:
    """out = a - b in float32, of flat arrays; what is not finite stays so."""
    if a.dtype == b.dtype == np.float32:
        with np.errstate(invalid="ignore", over="ignore"):
            np.subtract(a, b, out=out)
    else:  # numpy converts half precision an entry at a time, the kernels do it in vectors
        out[:] = 0
        lors_kernels.merge_update(out[None], b[None], a[None], threads=1)
