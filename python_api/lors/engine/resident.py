"""The engine on a device for state dicts that are there already: no value passes through the host."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np

from lors_kernels.arrays import is_torch
from lors_kernels.group import MatrixGroup

from ..errors import LorsError
from ..experts.boosted import Boosted, Differences, Zeros, boosts, require_finite
from ..experts.factors import Factors
from ..experts.source import Slot, Spec, matrix_shape
from ..methods.operands import Outcome
from .account import Account
from .batches import Batch, Kind
from .device import numpy_dtype, to_numpy
from .gpu import DeviceRun, GpuEngine, add_base, rounded
from .work import Piece, Work


def place_of(states: Sequence[tuple[str, Mapping[str, Any]]]) -> str | None:
    """The device all tensors are on; None where there are numpy arrays only. LorsError where they are on several."""
    place: str | None = None
    first = True
    for source, state in states:
        for name, value in state.items():
            found = str(value.device) if is_torch(value) else None
            if first:
                place, first = found, False
            elif found != place and not {found, place} <= {None, "cpu"}:
                wanted, got = (x or "a numpy array" for x in (place, found))
                raise LorsError(f"{source}: tensor {name!r}: expected all tensors on one device, {wanted}, got {got}")
    return place


class DeviceSource:
    """A state dict of tensors on one device. What is not contiguous is copied, on the device."""

    parts = None

    def __init__(self, name: str, state: Mapping[str, Any]) -> None:
        self.name = name
        self.values = {key: value.detach().contiguous() for key, value in state.items()}
        self.tensors = {key: Spec(numpy_dtype(value), tuple(value.shape)) for key, value in state.items()}

    def matrix(self, name: str) -> Any:
        return self.values[name].reshape(matrix_shape(self.tensors[name].shape))

    def fetch(self, name: str, start: int, stop: int, slot: Slot) -> np.ndarray:
        """A copy on the host, which only an error's account asks for."""
        return to_numpy(self.values[name].reshape(-1)[start:stop].cpu(), self.tensors[name].dtype)

    def prefetch(self, name: str) -> None:
        pass

    def factors(self, name: str) -> None:
        return None


class BoostedOnDevice(Boosted):
    """`Boosted` of a `DeviceSource`."""

    source: Any
    base_source: Any

    def matrix(self, name: str) -> Any:
        found = self.triplets(name)
        if found is None:
            return self.source.matrix(name)
        u, sigma, v = found
        return self.base_source.matrix(name).float() + ((u * sigma) @ v.T).float()

    def fetch(self, name: str, start: int, stop: int, slot: Slot) -> np.ndarray:
        """As of a `DeviceSource`."""
        if name not in self.shares:
            return np.asarray(self.source.fetch(name, start, stop, slot))
        return to_numpy(self.matrix(name).reshape(-1)[start:stop].cpu(), self.tensors[name].dtype)

    def factors(self, name: str) -> Factors | None:
        found = self.triplets(name)
        if found is None:
            return None
        u, sigma, v = found
        return Factors((u * sigma).float(), v.float(), found)

    def _delta(self, name: str) -> Any:
        before, after = (source.matrix(name).float() for source in (self.base_source, self.source))
        for source, values in ((self.base_source, before), (self.source, after)):
            require_finite(source.name, name, (~values.isfinite()).sum())
        return (after - before).double()


class DifferencesOnDevice(Differences):
    source: Any
    base_source: Any

    def matrix(self, name: str) -> Any:
        known = self.source.triplets(name) if boosts(self.source, name) else None
        if known is not None:
            return ((known[0] * known[1]) @ known[2].T).float()
        return self.source.matrix(name).float() - self.base_source.matrix(name).float()


class ZerosOnDevice(Zeros):
    def __init__(self, base: DeviceSource) -> None:
        super().__init__(base)
        self._base = base

    def matrix(self, name: str) -> Any:
        return self._base.matrix(name).float().new_zeros(self.tensors[name].shape)


@dataclass
class ResidentEngine(GpuEngine):
    """`Engine` for `DeviceSource`s: every tensor is merged where it is, same-shaped ones together; see `merged`.

    A tensor that is no matrix is one all the same: its first axis against the others, a vector as one row.
    """

    def run(self, works: Sequence[Work], also: Sequence[Callable[[], None]] = ()) -> None:
        pieces = [Piece(work, 0, work.spec.numel) for work in works]
        self.merged: dict[str, Any] = {}
        self.account = Account(pieces, self.progress)
        changed = [i for i, p in enumerate(pieces) if p.work.combination or any(r.weight for r in p.work.reductions)]
        run = _ResidentRun(self, self.devices[0], pieces, changed)
        with run.device.selected():
            for batch in run.batches():
                run.merge(batch)
        for i in sorted(set(range(len(pieces))) - set(changed)):
            self.carry_over(i, pieces[i].work)
        self.account.close(self.report, self.base, self.experts)

    def carry_over(self, index: int, work: Work) -> None:
        assert isinstance(self.base, DeviceSource)
        value = self.base.values[work.name]
        self.merged[work.name] = value.clone() if work.spec.dtype == work.out_dtype else rounded(self, work, value)
        self.account.done(index, [])

    def stored(self, t: int, work: Work) -> bool:
        return False

    def kind_of(self, work: Work) -> Kind:
        return super().kind_of(work)._replace(shape=matrix_shape(work.spec.shape))


class _ResidentRun(DeviceRun):
    resident = True

    def attempt(self, batch: Batch) -> list[Future[None]]:
        engine, torch, works = self.engine, self.device.torch, self.works(batch.pieces)
        assert isinstance(engine, ResidentEngine)
        if batch.kind.together:
            return self.attempt_together(batch.pieces[0], works[0])
        terms = [engine.terms(work) for work in works]
        bases = [t.anchor.matrix(work.name) for t, work in zip(terms, works, strict=True)]  # type: ignore[attr-defined]
        totals = [torch.zeros_like(x, dtype=torch.float32) for x in bases]
        outcomes: list[list[Outcome]] = [[] for _ in works]
        for part in batch.slices():
            tuned = [[engine.experts[e].matrix(work.name) for e in part.experts] for work in works]  # type: ignore[attr-defined]
            found = self.reduce(works, part, MatrixGroup(bases, tuned), totals)
            for row, new in zip(outcomes, found, strict=True):
                row += new
        done = zip(batch.pieces, works, terms, bases, totals, outcomes, strict=True)
        for index, work, (_, scale, _), base, total, row in done:
            merged = rounded(engine, work, add_base(self.boosted(work, total), base, scale))
            engine.merged[work.name] = merged.reshape(work.spec.shape)
            engine.account.done(index, row)
        return []

    def attempt_together(self, index: int, work: Work) -> list[Future[None]]:
        engine = self.engine
        assert isinstance(engine, ResidentEngine) and isinstance(engine.base, DeviceSource)
        sources: list[Any] = [engine.base, *engine.experts]
        apart = engine.by_differences(work)
        if apart:
            sources = [ZerosOnDevice(engine.base), *(DifferencesOnDevice(e, engine.base) for e in engine.experts)]
        base, *experts = (source.matrix(work.name).reshape(-1) for source in sources)
        operands = self.operands(work, sources, (base, experts))
        total = self.device.torch.cat([values for _, values in self.combined(work, operands)])
        if apart:
            origin = engine.base.matrix(work.name)
            total = add_base(self.boosted(work, total.reshape(origin.shape)), origin)
        engine.merged[work.name] = rounded(engine, work, total).reshape(work.spec.shape)
        engine.account.done(index, operands.outcomes)
        return []
