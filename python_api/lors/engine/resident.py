"""The engine on a device for state dicts that are there already: no value passes through the host."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np

import lors_kernels
from lors_kernels import UpdateStats
from lors_kernels.arrays import is_torch
from lors_kernels.group import MatrixGroup
from lors_kernels.types import Consensus

from ..errors import LorsError
from ..experts.boosted import Boosted, Differences, Zeros, boosts, require_finite
from ..experts.source import Slot, Spec, matrix_shape
from ..methods.operands import Buffers, Certificate, Chunk, Operands, Outcome
from .account import Account
from .device import numpy_dtype, to_numpy
from .gpu import Copied, DeviceRun, GpuEngine, Kind, Loaded, add_base, rounded, slices
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

    def factors(self, name: str) -> None:
        return None

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
        summed = [i for i, piece in enumerate(pieces) if any(r.weight for r in piece.work.reductions)]
        run = _ResidentRun(self, self.devices[0], pieces, summed)
        with run.device.selected():
            for kind, most, batch in run.batches():
                run.merge(kind, batch, most, None)
            for i in sorted(set(range(len(pieces))) - set(summed)):
                self.alone(pieces[i].work, i, run)
        self.account.close(self.report, self.base, self.experts)

    def alone(self, work: Work, index: int, run: _ResidentRun) -> None:
        """A tensor that is carried over, or that the method treats by a combination of all experts."""
        assert isinstance(self.base, DeviceSource)
        if work.combination is None:
            value = self.base.values[work.name]
            carried = work.spec.dtype == work.out_dtype
            self.merged[work.name] = value.clone() if carried else rounded(self, work, value)
            self.account.done(index, [])
            return
        options = {"backend": self.device_backend}
        base: Any = self.base
        experts, apart = list[Any](self.experts), self.by_differences(work)
        if apart:
            base, experts = ZerosOnDevice(base), [DifferencesOnDevice(expert, base) for expert in experts]
        operands = DeviceOperands(
            work.name, work.spec, base, experts, self.seed, options, Buffers(), lambda expert: self.blame(expert, work)
        )
        parts = [values for _, values in work.combination(operands)]
        assert len(parts) == 1, "DeviceOperands hands out one chunk"
        self.account.done(index, operands.outcomes)
        values: Any = parts[0]
        if apart:
            values = add_base(run.boosted(index, values.reshape(work.spec.shape)), self.base.matrix(work.name))
        self.merged[work.name] = rounded(self, work, values).reshape(work.spec.shape)

    def kind_of(self, work: Work) -> Kind:
        return super().kind_of(work)._replace(shape=matrix_shape(work.spec.shape))


class _ResidentRun(DeviceRun):
    resident = True

    def attempt(
        self, kind: Kind, batch: Sequence[int], most: int, loaded: Loaded | Copied | None
    ) -> list[Future[None]]:
        engine, torch = self.engine, self.device.torch
        assert isinstance(engine, ResidentEngine)
        works = [self.pieces[i].work for i in batch]

        terms = [engine.terms(work) for work in works]
        bases = [t.anchor.matrix(work.name) for t, work in zip(terms, works, strict=True)]  # type: ignore[attr-defined]
        totals = [torch.zeros_like(x, dtype=torch.float32) for x in bases]
        outcomes: list[list[Outcome]] = [[] for _ in batch]
        for part in slices(kind, most):
            tuned = [[engine.experts[e].matrix(work.name) for e in part.experts] for work in works]  # type: ignore[attr-defined]
            found = self.reduce(batch, part, MatrixGroup(bases, tuned), totals)
            for row, new in zip(outcomes, found, strict=True):
                row += new
        for index, work, (_, scale, _), base, total, row in zip(
            batch, works, terms, bases, totals, outcomes, strict=True
        ):
            merged = rounded(engine, work, add_base(self.boosted(index, total), base, scale))
            engine.merged[work.name] = merged.reshape(work.spec.shape)
            engine.account.done(index, row)
        return []


class DeviceOperands(Operands):
    """`Operands` whose arrays are tensors on a device, whole: nothing has to be read in parts."""

    def base(self) -> Any:
        return self._values(self.base_source)

    def tuned(self, t: int) -> Any:
        return self._values(self.experts[t])

    def chunks(self, width: int = 1) -> Iterator[Chunk]:
        yield Chunk(0, self.base(), [self.tuned(t) for t in range(len(self.experts))])

    def out(self, values: Any) -> Any:
        import torch

        return values.to(torch.float32, copy=True)

    def delta(self, t: int) -> Any:
        known = self._known(t)
        return super().delta(t) if known is None else (known[0] * known[1]) @ known[2].T

    def svd(self, t: int, rank: int, tolerance: float = 0.0) -> Any:
        known = self._known(t)
        if known is None:
            return super().svd(t, rank, tolerance)
        u, sigma, v = known
        energy, dropped = (float(part.square().sum()) for part in (sigma, sigma[rank:]))
        self.outcomes.append(Outcome(UpdateStats(energy, dropped, 0.0, 0, 0), Certificate("factors", 0, 0.0)))
        return u[:, :rank], sigma[:rank], v[:, :rank]

    def _known(self, t: int) -> Any:
        source: Any = getattr(self.experts[t], "source", None)
        return source.triplets(self.name) if isinstance(source, BoostedOnDevice) else None

    def float32(self, values: Any) -> Any:
        return values.float()

    def moved(self, update: Any) -> Any:
        return self.out(self.base()).add_(update.float().ravel())

    def _values(self, source: Any) -> Any:
        return source.matrix(self.name).reshape(-1)

    def add(self, out: Any, chunk: Chunk, keep: Sequence[Any], weights: Sequence[float], rule: Consensus) -> None:
        shape = matrix_shape(self.spec.shape)
        base, tuned = chunk.base.reshape(shape), [x.reshape(shape) for x in chunk.tuned]
        stats = lors_kernels.ties_update(
            out.reshape(shape), base, tuned, keep, weights, **rule._asdict(), **self.kernels
        )
        for t, s in enumerate(stats):
            if s.non_finite:
                raise self.blame(self.experts[t])
            self.outcomes.append(Outcome(UpdateStats(s.delta_energy, s.delta_energy, s.kept_energy, s.kept, 0)))
