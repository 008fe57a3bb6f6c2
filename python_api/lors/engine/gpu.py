"""The merge engine on GPUs.

From files or host memory: matrices that are decomposed, and tensors of which a method looks at all experts together, on
devices. Every other tensor is summed on the CPU beside them, because it is read, added to and written at the speed of the
files, which a detour over the bus cannot better; so are small tensors, of which a launch costs more than the work, and what
is boosted.

A step is a batch of same-shaped matrices with a slice of their experts, or one tensor with all of them. Several threads read
its tensors into page-locked memory, and each is copied on the stream of uploads as soon as it is read; all that while the step
before is computed, which waits for its own copies by an event. Results are copied back on a stream of their own, and
written by a thread, while the next batch is computed. The experts of a batch come in slices that fit the budget, in their
order and into the same float32 sum, so memory does not depend on how many there are. The base is added to the sum last, as in
`Engine`. A device that runs out of memory gets smaller batches, then an error; nothing of a failed batch has been written.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from lors_kernels import FactorOverflowError, NonFiniteError, UpdateStats, dense
from lors_kernels.group import MatrixGroup
from lors_kernels.grouped import merge_update_group, operations, residual_threshold_group, truncated_svd_group

from ..errors import LorsError
from ..experts.source import Slot, Source, StoredPart
from ..methods.operands import Buffers, Certificate, Outcome
from ..recipes.parameters import rank_of
from . import batches as planning
from .batches import Batch, Kind, Rule, Slice
from .cpu import Engine, SplitFactors
from .device import Device, host_memory, to_numpy
from .device_operands import DeviceOperands
from .feed import Feed, GivenUp, Inputs, Step, mapped
from .work import Piece, Work

READERS = 4
HOST_SHARE = 16  # of main memory a batch takes at most one of so many parts: two are in flight, and their results
SMALL = 1 << 16  # entries of a tensor below which the CPU is done before a device has begun


@dataclass
class GpuEngine(Engine):
    """`Engine` with what is worth it on `devices`.

    device_memory: bytes to use on each device; None: 80 % of what is free.
    device_backend: kernels there (`backend` is for the rest); None: the fastest.
    """

    devices: Sequence[str] = ("cuda:0",)
    device_memory: int | None = None
    device_backend: str | None = None

    def run(self, works: Sequence[Work], also: Sequence[Callable[[], None]] = ()) -> None:
        """Does all work; matrices go to the devices, pieces of other tensors to threads as in `Engine`."""
        pieces = self.begin(works)
        there = [i for i, piece in enumerate(pieces) if self.worth_it(piece.work)]
        chosen = set(there)
        matrices = [DeviceRun(self, name, pieces, indices).run for name, indices in self.shares(pieces, there)]
        others = [partial(self.do, index) for index in range(len(pieces)) if index not in chosen]
        self.carry_out([*matrices, *also, *others], self.threads + len(self.devices))

    def worth_it(self, work: Work) -> bool:
        """Whether a tensor goes to a device. What is boosted does not: an SVD of each matrix, which no GPU hurries."""
        if self.by_differences(work):
            return False
        if work.combination is not None:
            return work.matrix or work.spec.numel >= SMALL
        return work.matrix and any(r.weight for r in work.reductions)

    def shares(self, pieces: Sequence[Piece], indices: Sequence[int]) -> list[tuple[str, list[int]]]:
        """Splits the tensors by bytes: the largest first, each to the device with the least so far."""
        loads = dict.fromkeys(self.devices, 0)
        shares: dict[str, list[int]] = {name: [] for name in self.devices}
        for i in sorted(indices, key=lambda i: (-pieces[i].work.spec.numel, i)):
            name = min(self.devices, key=lambda name: loads[name])
            loads[name] += pieces[i].work.spec.numel
            shares[name].append(i)
        return [(name, sorted(share)) for name, share in shares.items() if share]

    def kind_of(self, work: Work) -> Kind:
        shape, dtypes = tuple(work.spec.shape), [str(e.tensors[work.name].dtype) for e in self.experts]
        if work.combination is not None:
            rules = tuple(Rule(0, 1.0, True, dtype, False) for dtype in dtypes)
            return Kind(shape, str(work.spec.dtype), rules, together=True)
        terms = self.terms(work)
        rules = tuple(
            Rule(r.rank, r.density, t in terms.experts, dtype, self.stored(t, work))
            for t, (dtype, r) in enumerate(zip(dtypes, work.reductions, strict=True))
        )
        return Kind(shape, str(terms.anchor.tensors[work.name].dtype), rules)

    def stored(self, t: int, work: Work) -> bool:
        """Whether expert t's delta is known by parts or factors."""
        expert = self.experts[t]
        return expert.parts is not None or (work.relative and expert.factors(work.name) is not None)

    def sizes_of(self, work: Work) -> tuple[int, int]:
        """Bytes per entry of the base, and at most of an expert."""
        return work.spec.dtype.itemsize, max(e.tensors[work.name].dtype.itemsize for e in self.experts)


class DeviceRun:
    """One device's share of the tensors."""

    resident = False  # whether the inputs are on the device already

    def __init__(self, engine: GpuEngine, name: str, pieces: Sequence[Piece], indices: Sequence[int]) -> None:
        self.engine, self.pieces, self.indices = engine, pieces, indices
        self.device = Device(name)
        self.name = name

    def run(self) -> None:
        with self.device.selected():
            try:
                self.run_batches()
            except GivenUp:
                assert self.engine.stop.is_set()

    def run_batches(self) -> None:
        found = list(self.batches())
        steps = [Step(b.pieces, part, number == 0) for b in found for number, part in enumerate(b.slices())]
        pools = ThreadPoolExecutor(READERS), ThreadPoolExecutor(1), ThreadPoolExecutor(1)
        with pools[0] as self.readers, pools[1] as feeder, pools[2] as self.writer:
            self.feed = Feed(feeder, self.load_ahead, self.release, steps)
            written: list[Future[None]] = []
            for batch in found:
                if self.engine.stop.is_set():
                    return
                following = self.merge(batch)
                for future in written:
                    future.result()  # at most one batch waits to be written
                written = following
            for future in written:
                future.result()

    def batches(self) -> Iterator[Batch]:
        engine = self.engine
        largest = planning.LARGEST
        if not self.resident:
            works = self.works(self.indices)
            inputs = sum(planning.input_bytes(w, engine.sizes_of(w), len(engine.experts)) for w in works)
            largest = min(max(planning.LEAST, inputs // planning.BATCHES), planning.MOST, host_memory() // HOST_SHARE)
        return planning.batches(
            self.pieces, self.indices, engine.kind_of, engine.sizes_of,
            budget=self.budget(), largest=largest, resident=self.resident,
        )  # fmt: skip

    def budget(self) -> int:
        if self.engine.device_memory is not None:
            return self.engine.device_memory
        return int(0.8 * self.device.free_memory()) if self.device.real else 1 << 30

    def works(self, indices: Sequence[int]) -> list[Work]:
        return [self.pieces[i].work for i in indices]

    # --- to the device

    def load_ahead(self, step: Step) -> Inputs | None:
        """`load` if the device has room for it beside what it is working on."""
        try:
            return self.load(step)
        except Exception as error:
            if not self.device.out_of_memory(error):
                raise
            return None

    def load(self, step: Step) -> Inputs:
        """Reads what a step needs, and starts the copies."""
        device, engine, slots = self.device, self.engine, list[Slot]()

        def bring(source: Source, work: Work, t: int | None) -> Any:
            if engine.stop.is_set():
                raise GivenUp
            with device.selected():
                if step.part.stored and t is not None:
                    return mapped(device.upload, self.stored(source, work, t))
                slots.append(slot := device.slot())
                values = source.fetch(work.name, 0, work.spec.numel, slot)
                return device.upload(values.reshape(work.spec.shape))

        # a matrix has a base: methods without one decompose nothing
        sources: list[tuple[Source, int | None]] = [(engine.base, None)] if step.first else []
        there = len(sources)
        sources += [(engine.experts[t], t) for t in step.part.experts]
        works = self.works(step.pieces)
        tasks = [[self.readers.submit(bring, source, work, t) for source, t in sources] for work in works]
        wait([task for row in tasks for task in row])
        try:
            rows = [[task.result() for task in row] for row in tasks]
        except BaseException:
            device.settle()
            device.slots += slots
            raise
        return Inputs([x for row in rows for x in row[:there]], [row[there:] for row in rows], slots, device.uploaded())

    def stored(self, source: Source, work: Work, t: int) -> StoredPart | SplitFactors | None:
        """What is known of expert t's delta, in main memory; None: it is zero."""
        if source.parts is not None:
            return source.parts.read(work.name)
        factors = source.factors(work.name)
        return SplitFactors.of(factors, work, work.reductions[t]) if factors is not None and factors.rank else None

    def inputs(self, step: Step) -> Inputs:
        """A step's inputs, for which the computing stream waits; those of the next are begun."""
        found = self.feed.ready(step) or self.load(step)
        self.feed.next(step)
        self.device.ready(list(found.tensors()), found.uploaded)
        return found

    def release(self, inputs: Inputs) -> None:
        """The memory that copies have read is free again; they have long been made."""
        if inputs.uploaded is not None:
            inputs.uploaded.synchronize()
        self.device.slots += inputs.slots

    def bring(self, source: Source, name: str, start: int, stop: int) -> Any:
        """A part of a tensor, now."""
        device, slot = self.device, self.device.slot()
        values = device.upload(source.fetch(name, start, stop, slot))
        uploaded = device.uploaded()
        device.ready([values], uploaded)
        self.release(Inputs([], [], [slot], uploaded))
        return values

    # --- the work

    def merge(self, batch: Batch) -> list[Future[None]]:
        """Merges a batch; where memory runs out, in halves, then with fewer experts at a time."""
        try:
            return self.attempt(batch)
        except Exception as error:
            if not self.device.out_of_memory(error):
                raise
            reason = str(error).splitlines()[0]
        self.device.torch.cuda.empty_cache()
        if smaller := batch.smaller():
            return [future for part in smaller for future in self.merge(part)]
        (work, *_), shape = self.works(batch.pieces), list(batch.kind.shape)
        raise LorsError(f"{self.name}: out of memory for tensor {work.name!r} {shape} alone: {reason}")

    def attempt(self, batch: Batch) -> list[Future[None]]:
        if batch.kind.together:
            return [self.combine(batch)]
        torch, works = self.device.torch, self.works(batch.pieces)
        outcomes: list[list[Outcome]] = [[] for _ in works]
        totals: list[Any] = []
        bases: list[Any] = []
        for number, part in enumerate(batch.slices()):
            inputs = self.inputs(Step(batch.pieces, part, number == 0))
            bases = bases or inputs.bases
            totals = totals or [torch.zeros_like(x, dtype=torch.float32) for x in bases]
            if part.stored:
                found = [
                    self.add_stored(*each, part.experts[0]) for each in zip(works, inputs.tuned, totals, strict=True)
                ]
            else:
                found = self.reduce(works, part, MatrixGroup(bases, inputs.tuned), totals)
            self.release(inputs)
            for row, new in zip(outcomes, found, strict=True):
                row += new
        done = zip(batch.pieces, works, bases, totals, outcomes, strict=True)
        return [self.store(i, [(0, rounded(self.engine, w, add_base(t, b)))], row) for i, w, b, t, row in done]

    def add_stored(self, work: Work, known: Sequence[Any], total: Any, t: int) -> list[Outcome]:
        """total += what an expert whose delta is stored in parts, or known by factors, contributes."""
        engine, backend = self.engine, self.engine.device_backend
        expert, reduction = engine.experts[t], work.reductions[t]
        if known[0] is None:
            return []
        if expert.parts is None:
            return engine.add_split(expert, work, total, known[0], reduction, backend)
        options = (reduction.weight, reduction.rank, reduction.density, backend, known[0])
        return [Outcome(expert.parts.add(work.name, 0, total.reshape(-1), *options))]

    def reduce(self, works: Sequence[Work], part: Slice, group: MatrixGroup, totals: list[Any]) -> list[list[Outcome]]:
        """totals += the slice's experts."""
        options: dict[str, Any] = {"backend": self.engine.device_backend}
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

    def boosted(self, work: Work, total: Any) -> Any:
        """The merged difference, boosted where that is asked for."""
        if work.boost is None:
            return total
        if not total.isfinite().all():
            self.engine.require_fit(work, math.inf)
        return dense.boost(total.double(), work.boost).float()

    def combine(self, batch: Batch) -> Future[None]:
        """A tensor of which the method looks at all experts together."""
        (index,), (work,) = batch.pieces, self.works(batch.pieces)
        there = None
        if parts := batch.slices():
            inputs = self.inputs(Step(batch.pieces, parts[0], True))
            there = inputs.bases[0].reshape(-1), [x.reshape(-1) for x in inputs.tuned[0]]
        operands = self.operands(work, [self.engine.base, *self.engine.experts], there)
        merged = [(start, rounded(self.engine, work, x)) for start, x in self.combined(work, operands)]
        if parts:
            self.release(inputs)
        return self.store(index, merged, operands.outcomes)

    def operands(
        self, work: Work, sources: Sequence[Source], there: tuple[Any, Sequence[Any]] | None
    ) -> DeviceOperands:
        engine, (base, *experts) = self.engine, sources
        return DeviceOperands(
            work.name, work.spec, base, experts, engine.seed, {"backend": engine.device_backend}, Buffers(),
            lambda expert: engine.blame(expert, work), there=there, bring=self.bring, device=self.device.device,
        )  # fmt: skip

    def combined(self, work: Work, operands: DeviceOperands) -> Iterator[tuple[int, Any]]:
        assert work.combination is not None
        for start, values in work.combination(operands):
            if self.engine.stop.is_set():
                raise GivenUp
            yield start, values

    # --- from the device

    def store(self, index: int, merged: Sequence[tuple[int, Any]], outcomes: list[Outcome]) -> Future[None]:
        """Hands a tensor to the writer, in parts from their first elements on."""
        piece, engine = self.pieces[index], self.engine
        parts = [(start, *self.device.download(values)) for start, values in merged]

        def write() -> None:
            for start, host, arrived in parts:
                arrived()
                engine.sink(piece.work.name, to_numpy(host, piece.work.out_dtype).reshape(-1), start)
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
