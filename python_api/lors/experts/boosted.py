"""An expert whose weak directions are raised (subspace boosting, arXiv 2506.16506).

    delta = U diag(s) V^T,     s_i <- max(s_i, s_k),     k the first with s_1 + .. + s_k >= share * sum_i s_i

Directions of singular value 0 stay 0. An expert file stands for W0 + L + S.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from lors_kernels import dense
from lors_kernels.threads import one_torch_thread

from ..errors import LorsError
from .factors import Factors
from .source import Slot, Source, Spec

if TYPE_CHECKING:
    from torch import Tensor


class Boosted:
    """A source with some of its matrices boosted, as differences to `base`: those in `shares`. Memory per thread: the singular
    vectors of one matrix."""

    parts = None

    def __init__(self, source: Source, base: Source, shares: Mapping[str, float]) -> None:
        self.name, self.source, self.base_source, self.shares = source.name, source, base, shares
        self._local = threading.local()  # of every thread: the last matrix that was decomposed
        self.tensors: dict[str, Spec] = {
            name: replace(spec, dtype=np.dtype(np.float32)) if name in shares else spec
            for name, spec in source.tensors.items()
        }

    def triplets(self, name: str) -> tuple[Tensor, Tensor, Tensor] | None:
        """(u [m, r], sigma [r], v [n, r]) in float64, in the order of the singular values as they were; None where nothing is
        boosted."""
        if name not in self.shares:
            return None
        if getattr(self._local, "name", None) != name:
            with one_torch_thread():
                delta = self._delta(name)
                u, sigma, v = dense.leading(delta, min(delta.shape))
                self._local.found = u, dense.boosted(sigma, self.shares[name]), v
            self._local.name = name
        return self._local.found  # type: ignore[no-any-return]

    def factors(self, name: str) -> Factors | None:
        found = self.triplets(name)
        if found is None:
            return self.source.factors(name)
        u, sigma, v = (x.numpy() for x in found)
        return Factors((u * sigma).astype(np.float32), v.astype(np.float32), (u, sigma, v))

    def fetch(self, name: str, start: int, stop: int, slot: Slot) -> np.ndarray:
        if name not in self.shares:
            return self.source.fetch(name, start, stop, slot)
        factors = self.factors(name)
        assert factors is not None
        out = slot.array(stop - start, np.dtype(np.float32))
        out[:] = self.base_source.fetch(name, start, stop, Slot())
        out += factors.flat(start, stop)
        return out

    def prefetch(self, name: str) -> None:
        self.source.prefetch(name)

    def _delta(self, name: str) -> Tensor:
        import torch

        if (known := self.source.factors(name)) is not None:
            return torch.from_numpy(known.exact())
        spec = self.tensors[name]
        before, after = (
            source.fetch(name, 0, spec.numel, Slot()).astype(np.float32) for source in (self.base_source, self.source)
        )
        for source, values in ((self.base_source, before), (self.source, after)):
            require_finite(source.name, name, int(np.count_nonzero(~np.isfinite(values))))
        return torch.from_numpy((after - before).reshape(spec.shape)).double()


class Differences:
    """A source's differences to the base as float32 tensors of their own; what they differ from is 0 (`Zeros`)."""

    parts = None

    def __init__(self, source: Source, base: Source) -> None:
        self.name, self.source, self.base_source = source.name, source, base
        self.tensors = {name: replace(spec, dtype=np.dtype(np.float32)) for name, spec in source.tensors.items()}

    def factors(self, name: str) -> Factors | None:
        return self.source.factors(name)

    def fetch(self, name: str, start: int, stop: int, slot: Slot) -> np.ndarray:
        out = slot.array(stop - start, np.dtype(np.float32))
        if (factors := self.source.factors(name)) is not None:
            out[:] = factors.flat(start, stop)
            return out
        out[:] = self.source.fetch(name, start, stop, Slot())
        out -= self.base_source.fetch(name, start, stop, Slot()).astype(np.float32, copy=False)
        return out

    def prefetch(self, name: str) -> None:
        self.source.prefetch(name)


class Zeros:
    """The base that `Differences` differ from."""

    parts = None

    def __init__(self, base: Source) -> None:
        self.name = base.name
        self.tensors = {name: replace(spec, dtype=np.dtype(np.float32)) for name, spec in base.tensors.items()}

    def factors(self, name: str) -> None:
        return None

    def fetch(self, name: str, start: int, stop: int, slot: Slot) -> np.ndarray:
        out = slot.array(stop - start, np.dtype(np.float32))
        out[:] = 0
        return out

    def prefetch(self, name: str) -> None:
        pass


def boosts(source: Source, name: str) -> bool:
    """Whether a source is `Boosted` where this tensor is concerned."""
    return isinstance(source, Boosted) and name in source.shares


def require_finite(source: str, name: str, wrong: Any) -> None:
    """LorsError unless the number of values that are not finite is 0."""
    if wrong:
        raise LorsError(f"{source}: tensor {name!r}: expected finite values, got {int(wrong)} NaN or infinite")
