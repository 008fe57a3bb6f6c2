"""`Operands` on a device: the same tensors of torch, and what torch calls otherwise than numpy."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lors_kernels.arrays import to_torch

from ..experts.source import Slot, Source
from ..methods.operands import Chunk, Operands

CHUNK = 1 << 26  # entries of base and experts that are worked on at a time

# (source, tensor, first, behind the last) -> its values on the device
Bring = Callable[[Source, str, int, int], Any]


@dataclass
class DeviceOperands(Operands):
    """bring: copies a part of a tensor here. there: base and experts, flat, where they are here already; None: each is
    brought when it is asked for, a chunk of all or one of them whole, as in `Operands` of a large tensor."""

    device: Any = field(kw_only=True)
    bring: Bring = field(kw_only=True)
    there: tuple[Any, Sequence[Any]] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._fits = False  # in one chunk
        if self.there is not None:
            self._base, self._held = self.there[0], dict(enumerate(self.there[1]))

    def _fetch(self, source: Source, start: int, stop: int, slot: Slot) -> Any:
        return self.bring(source, self.name, start, stop)

    def chunks(self, width: int = 1) -> Iterator[Chunk]:
        step = self._step(CHUNK, width)
        for start in range(0, self.spec.numel, step):
            stop = min(self.spec.numel, start + step)
            sources = [self.base_source, *self.experts]
            known = [self._base, *(self._held.get(t) for t in range(len(self.experts)))]
            base, *tuned = (
                self.bring(source, self.name, start, stop) if values is None else values[start:stop]
                for source, values in zip(sources, known, strict=True)
            )
            yield Chunk(start, base, tuned)

    def out(self, values: Any) -> Any:
        import torch

        return values.to(torch.float32, copy=True)

    def deltas(self, chunk: Chunk) -> Any:
        import torch

        base = self.float32(chunk.base)
        found = base.new_empty((len(chunk.tuned), len(base)))
        for t, tuned in enumerate(chunk.tuned):
            torch.sub(self.float32(tuned), base, out=found[t])
            self.check(t, found[t])
        return found

    def float32(self, x: Any) -> Any:
        return x.float()

    def float64(self, x: Any) -> Any:
        return x.double()

    def subtract(self, a: Any, b: Any) -> Any:
        return a.float() - b.float()

    def array(self, x: np.ndarray) -> Any:
        return self.tensor(x)

    def tensor(self, x: Any) -> Any:
        return to_torch(x).to(self.device)

    def moved(self, update: Any) -> Any:
        return self.out(self.base()).add_(update.float().reshape(-1))

    def energy(self, x: Any) -> float:
        return float(x.double().square().sum())

    def magnitude(self, x: Any) -> float:
        return float(x.double().abs().sum())

    def products(self, x: Any) -> np.ndarray:
        wide = x.double()
        return (wide @ wide.mT).cpu().numpy()  # type: ignore[no-any-return]
