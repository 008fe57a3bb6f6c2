"""The merge engine on GPUs.

From files or host memory: decomposed matrices in groups on devices, every other tensor on the CPU beside them, because it
is read, added to and written at the speed of the files, which a detour over the bus cannot better.

A batch is a few same-shaped matrices. Its tensors are read into page-locked memory and copied on a stream of their own, by
a thread of their own, while the batch before is computed; merged in float32 on the device, and written behind. Experts come
in slices that fit the budget, in their order and into the same float32 sum, so memory does not depend on how many there are.
Of a batch with several slices the first is copied ahead. The base is added to the sum last, as in `Engine`.
A device that runs out of memory gets smaller batches, then an error; nothing of a failed batch has been written.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np

from lors_kernels import FactorOverflowError, NonFiniteError, UpdateStats, dense
from lors_kernels.group import MatrixGroup
from lors_kernels.grouped import merge_update_group, operations, residual_threshold_group, truncated_svd_group

from ..errors import LorsError
from ..experts.source import Slot
from ..methods.operands import Certificate, Outcome
from ..recipes.parameters import rank_of
from .cpu import Engine
from .device import Device, to_numpy
from .work import Piece, Work

BATCH_BYTES = 1 << 30  # of inputs per batch: larger ones gain nothing once a launch fills the device
READERS = 4
BASIS = 128  # columns of a Krylov basis to reckon with; convergence usually needs 80


class Kind(NamedTuple):
    """What the matrices of one batch have in common."""

    shape: tuple[int, ...]
    base: str  # dtype
    rules: tuple[tuple[float, float, bool, str], ...]  # per expert: rank, density, used, dtype


class Slice(NamedTuple):
    """Consecutive experts with one rank, density and dtype."""

    experts: tuple[int, ...]
    rank: float
    density: float


class Loaded(NamedTuple):
    """Host memory of one batch and slice: bases, and tuned by matrix and expert."""

    bases: list[np.ndarray]
    tuned: list[list[np.ndarray]]
    slots: list[Slot]


class Copied(NamedTuple):
    """The same on the device, the copies under way."""

    bases: list[Any]
    tuned: list[list[Any]]
    slots: list[Slot]  # the copies read from them
    copied: Any  # event


def slices(kind: Kind, most: int) -> list[Slice]:
    """The experts in order, cut where the rule changes and at `most` experts."""
    found = []
    used = [(rank, density, dtype, e) for e, (rank, density, use, dtype) in enumerate(kind.rules) if use]
    for (rank, density, _), run in groupby(used, key=lambda rule: rule[:3]):
        experts = [rule[3] for rule in run]
        found += [Slice(tuple(experts[i : i + most]), rank, density) for i in range(0, len(experts), most)]
    return found


def bytes_on_device(work: Work, shape: tuple[int, ...], experts: int, inputs: int) -> int:
    """What one matrix with so many experts takes: inputs (twice: the next ones are copied meanwhile), sum, workspace."""
    m, n = shape
    workspace = experts * (min(m, n) * BASIS * 4 * 2 + BASIS * BASIS * 16 + max(m, n) * 64) if work.matrix else 0
    return 2 * inputs + m * n * (4 + work.out_dtype.itemsize) + workspace


@dataclass
class GpuEngine(Engine):
    """`Engine` with the decomposed matrices on `devices`.

    device_memory: bytes to use on each device; None: 80 % of what is free.
    device_backend: kernels for the matrices (`backend` is for the rest); None: the fastest.
    """

    devices: Sequence[str] = ("cuda:0",)
    device_memory: int | None = None
    device_backend: str | None = None

    def run(self, works: Sequence[Work], also: Sequence[Callable[[], None]] = ()) -> None:
        """Does all work; matrices go to the devices, pieces of other tensors to threads as in `Engine`."""
        pieces = self.begin(works)
        grouped = [
            i for i, piece in enumerate(pieces) if piece.work.matrix and any(r.weight for r in piece.work.reductions)
        ]
        chosen = set(grouped)
        matrices = [DeviceRun(self, name, pieces, indices).run for name, indices in self.shares(pieces, grouped)]
        others = [partial(self.do, index) for index in range(len(pieces)) if index not in chosen]
        self.carry_out([*matrices, *also, *others], self.threads + len(self.devices))

    def shares(self, pieces: Sequence[Piece], indices: Sequence[int]) -> list[tuple[str, list[int]]]:
        """Splits the matrices by bytes: the largest first, each to the device with the least so far."""
        loads = dict.fromkeys(self.devices, 0)
        shares: dict[str, list[int]] = {name: [] for name in self.devices}
        for i in sorted(indices, key=lambda i: (-pieces[i].work.spec.numel, i)):
            name = min(self.devices, key=lambda name: loads[name])
            loads[name] += pieces[i].work.spec.numel
            shares[name].append(i)
        return [(name, sorted(share)) for name, share in shares.items() if share]

    def kind_of(self, work: Work) -> Kind:
        terms = self.terms(work)
        rules = tuple(
            (r.rank, r.density, t in terms.experts, str(expert.tensors[work.name].dtype))
            for t, (expert, r) in enumerate(zip(self.experts, work.reductions, strict=True))
        )
        return Kind(tuple(work.spec.shape), str(terms.anchor.tensors[work.name].dtype), rules)


class DeviceRun:
    """One device's share of the matrices."""

    resident = False  # whether the inputs are on the device already

    def __init__(self, engine: GpuEngine, name: str, pieces: Sequence[Piece], indices: Sequence[int]) -> None:
        self.engine, self.pieces, self.indices = engine, pieces, indices
        self.device = Device(name)
        self.name = name

    def run(self) -> None:
        with self.device.selected():
            self.run_batches()

    def run_batches(self) -> None:
        batches = list(self.batches())
        with ThreadPoolExecutor(READERS) as self.readers, ThreadPoolExecutor(1) as self.writer:
            ahead: Future[Loaded | Copied] | None = None
            written: list[Future[None]] = []
            for number, (kind, most, batch) in enumerate(batches):
                if self.engine.stop.is_set():
                    return
                first = slices(kind, most)[0]
                loaded = ahead.result() if ahead else self.load(kind, batch, first)
                following = batches[number + 1] if number + 1 < len(batches) else None
                if following:
                    ahead = self.readers.submit(
                        self.load_ahead, following[0], following[2], slices(following[0], following[1])[0]
                    )
                for future in written:
                    future.result()  # at most one batch waits to be written
                written = self.merge(kind, batch, most, loaded)
            for future in written:
                future.result()

    def budget(self) -> int:
        limit = self.engine.device_memory
        if limit is None:
            limit = (
                int(0.8 * self.device.torch.cuda.mem_get_info(self.device.device)[0]) if self.device.real else 1 << 30
            )
        return limit

    def batches(self) -> Iterator[tuple[Kind, int, list[int]]]:
        """(what they share, experts at a time, pieces) within the budget."""
        kinds: dict[Kind, list[int]] = defaultdict(list)
        for index in self.indices:
            kinds[self.engine.kind_of(self.pieces[index].work)].append(index)
        budget = self.budget()
        for kind, indices in kinds.items():
            work = self.pieces[indices[0]].work
            sizes = (work.spec.dtype.itemsize, max(e.tensors[work.name].dtype.itemsize for e in self.engine.experts))
            experts = max(1, len(self.engine.experts))

            def needs(count: int, work: Work = work, kind: Kind = kind, sizes: tuple[int, int] = sizes) -> int:
                inputs = 0 if self.resident else work.spec.numel * (sizes[0] + count * sizes[1])
                return bytes_on_device(work, kind.shape, count, inputs)

            while experts > 1 and needs(experts) > budget:
                experts = (experts + 1) // 2
            one = needs(experts)
            if one > budget:
                raise LorsError(
                    f"device memory: expected at least {one / 1e6:.3g} MB for tensor {work.name!r}, got {budget / 1e6:.3g} MB"
                )
            inputs = work.spec.numel * (sizes[0] + experts * sizes[1])
            count = max(1, min(budget // one, BATCH_BYTES // inputs))
            for start in range(0, len(indices), count):
                yield kind, experts, indices[start : start + count]

    def load(self, kind: Kind, batch: Sequence[int], part: Slice) -> Loaded:
        """Reads what one slice needs into page-locked memory."""
        engine, slots = self.engine, list[Slot]()

        def fetch(source: Any, index: int) -> np.ndarray:
            work = self.pieces[index].work
            slots.append(slot := self.device.slot())
            return source.fetch(work.name, 0, work.spec.numel, slot).reshape(kind.shape)  # type: ignore[no-any-return]

        bases = [fetch(engine.base, i) for i in batch]  # a matrix has a base: methods without one decompose nothing
        tuned = [[fetch(engine.experts[e], i) for e in part.experts] for i in batch]
        return Loaded(bases, tuned, slots)

    def load_ahead(self, kind: Kind, batch: Sequence[int], part: Slice) -> Loaded | Copied:
        """`load`, and the copies to the device if it has room for them now; else they wait for their turn."""
        loaded = self.load(kind, batch, part)
        try:
            with self.device.selected():
                return self.upload(loaded)
        except Exception as error:
            if not self.device.out_of_memory(error):
                raise
            return loaded

    def upload(self, loaded: Loaded, bases: Sequence[Any] = ()) -> Copied:
        """Starts the copies; bases that are there already are not copied again."""
        device = self.device
        with device.copying():
            there = list(bases) or [device.upload(x) for x in loaded.bases]
            tuned = [[device.upload(x) for x in row] for row in loaded.tuned]
            return Copied(there, tuned, loaded.slots, device.copied())

    def merge(self, kind: Kind, batch: Sequence[int], most: int, loaded: Loaded | Copied | None) -> list[Future[None]]:
        """Merges a batch; where memory runs out, in halves, then with fewer experts at a time."""
        try:
            return self.attempt(kind, batch, most, loaded)
        except Exception as error:
            if not self.device.out_of_memory(error):
                raise
            reason = str(error).splitlines()[0]
        self.device.torch.cuda.empty_cache()
        if len(batch) > 1:
            middle = len(batch) // 2
            return [f for half in (batch[:middle], batch[middle:]) for f in self.merge(kind, half, most, None)]
        if most > 1:
            return self.merge(kind, batch, (most + 1) // 2, None)
        work = self.pieces[batch[0]].work
        raise LorsError(f"{self.name}: out of memory for tensor {work.name!r} {list(kind.shape)} alone: {reason}")

    def attempt(
        self, kind: Kind, batch: Sequence[int], most: int, loaded: Loaded | Copied | None
    ) -> list[Future[None]]:
        device, torch = self.device, self.device.torch
        outcomes: list[list[Outcome]] = [[] for _ in batch]
        totals: list[Any] = []
        bases: list[Any] = []
        for part in slices(kind, most):
            source = loaded or self.load(kind, batch, part)
            loaded = None
            there = source if isinstance(source, Copied) else self.upload(source, bases)
            bases, tuned = there.bases, there.tuned
            device.ready([*bases, *(x for row in tuned for x in row)], there.copied)
            if not totals:
                totals = [torch.zeros_like(x, dtype=torch.float32) for x in bases]
            found = self.reduce(batch, part, MatrixGroup(bases, tuned), totals)  # waits for the device: slots are free
            device.slots += source.slots
            for row, new in zip(outcomes, found, strict=True):
                row += new
        done = zip(batch, bases, totals, outcomes, strict=True)
        return [self.store(i, add_base(self.boosted(i, total), base), row) for i, base, total, row in done]

    def boosted(self, index: int, total: Any) -> Any:
        """The merged difference, boosted where that is asked for."""
        work = self.pieces[index].work
        if work.boost is None:
            return total
        if not total.isfinite().all():
            self.engine.require_fit(work, math.inf)
        return dense.boost(total.double(), work.boost).float()

    def reduce(self, batch: Sequence[int], part: Slice, group: MatrixGroup, totals: list[Any]) -> list[list[Outcome]]:
        """totals += the slice's experts."""
        options: dict[str, Any] = {"backend": self.engine.device_backend}
        works = [self.pieces[i].work for i in batch]
        svd, left, right, threshold = None, None, None, None
        try:
            if part.rank:
                svd = truncated_svd_group(group, rank_of(part.rank, group.m, group.n), seed=self.engine.seed, **options)
                left, right = svd.left, svd.right
        except NonFiniteError:
            bad = operations("gram_apply", group, self.engine.device_backend).measure(group)[1]
            raise self.non_finite(bad.tolist(), works, part) from None
        except FactorOverflowError as error:
            i, t = divmod(error.pair, len(part.experts))
            expert = self.engine.experts[part.experts[t]]
            raise LorsError(f"{expert.name}: tensor {works[i].name!r}: {error}") from None
        if part.density < 1:
            threshold = residual_threshold_group(group, left, right, int(part.density * group.m * group.n), **options)
        weights = [work.reductions[e].weight for work in works for e in part.experts]
        stats = merge_update_group(group, totals, left, right, threshold, weights, **options).stats()
        if any(s.non_finite for s in stats):
            raise self.non_finite([s.non_finite for s in stats], works, part)
        return _by_matrix(stats, svd, len(part.experts))

    def non_finite(self, counts: Sequence[int], works: Sequence[Work], part: Slice) -> LorsError:
        p = next(p for p, count in enumerate(counts) if count)
        i, t = divmod(p, len(part.experts))
        return self.engine.blame(self.engine.experts[part.experts[t]], works[i])

    def store(self, index: int, total: Any, outcomes: list[Outcome]) -> Future[None]:
        """Rounds one sum to the output's dtype and hands it to the writer."""
        piece, engine = self.pieces[index], self.engine
        host, arrived = self.device.download(rounded(engine, piece.work, total))

        def write() -> None:
            arrived()
            values = to_numpy(host, piece.work.out_dtype)
            engine.sink(piece.work.name, values.reshape(-1), 0)
            engine.account.done(index, outcomes)

        return self.writer.submit(write)


def add_base(total: Any, base: Any, scale: float = 1.0) -> Any:
    """total += scale * base in float32, rounded once; a scale that float32 has not got is added as two numbers."""
    nearest = float(np.float32(scale))
    if nearest != scale:
        total.add_(base, alpha=scale - nearest)
    return total.add_(base, alpha=nearest)


def rounded(engine: Engine, work: Work, values: Any) -> Any:
    """Values in the output's dtype; LorsError where it cannot hold them."""
    import torch

    if values.numel():
        engine.require_fit(work, float(torch.stack(torch.aminmax(values)).abs().max()))
    return values.to(getattr(torch, str(work.out_dtype)))


def _by_matrix(stats: list[UpdateStats], svd: Any, experts: int) -> list[list[Outcome]]:
    outcomes = []
    for p, found in enumerate(stats):
        certificate = None
        if svd:
            certificate = Certificate(svd.method[p], svd.passes[p], svd.residual[p], svd.unique[p])
        outcomes.append(Outcome(found, certificate))
    return [outcomes[p : p + experts] for p in range(0, len(outcomes), experts)]
