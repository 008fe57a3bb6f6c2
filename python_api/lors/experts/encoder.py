"""The arrays of an expert file, computed and written part by part."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import Any

import numpy as np

import lors_kernels
from lors_kernels import KEEP_NONE, FactorOverflowError, NonFiniteError

from ..checkpoints.tensor_info import FLOATS
from ..checkpoints.writer import WeightWriter
from ..errors import LorsError
from ..tasks import run_all
from .expert_file import (
    BLOCK,
    CHECKS,
    CHUNK,
    ENERGIES,
    EXPONENTS,
    Layout,
    Part,
    checksums,
    encode_gaps,
    seal,
)
from .source import Slot, Source


class Encoder:
    """Computes and writes every part; parts in any order, each by one thread."""

    def __init__(self, layout: Layout, base: Source, tuned: Source, writer: WeightWriter, backend: str | None) -> None:
        self._layout, self._base, self._tuned, self._writer, self._backend = layout, base, tuned, writer, backend
        stored = layout.stored
        self._checks = np.zeros(stored[CHECKS].shape, np.uint32)
        self._exponents = np.zeros(stored[EXPONENTS].shape, np.int16)
        self._energies = np.zeros(stored[ENERGIES].shape)
        self._row = {part.name: row for row, part in enumerate(p for p in layout.parts if p.matrix)}
        self._lock, self._local = threading.Lock(), threading.local()
        self._waiting: dict[str, np.ndarray] = {}
        self.lost, self.energy = 0.0, 0.0  # squared norms of what storing loses, and of the update

    def run(self, threads: int) -> None:
        tasks: list[Callable[[], None]] = []
        for part in self._layout.parts:
            if part.matrix:
                tasks.append(lambda part=part: self._matrix(part))  # type: ignore[misc]
            else:
                tasks += [lambda part=part, at=at: self._rest(part, at) for at in range(0, part.numel, CHUNK)]  # type: ignore[misc]
        run_all(tasks, threads, "lors")

    def finish(self, text: str) -> None:
        """The tables at the end of the file."""
        self._put(ENERGIES, self._energies)
        self._put(EXPONENTS, self._exponents)
        self._checks[-1] = seal(self._checks[:-1], text)
        self._writer.write(CHECKS, self._checks)

    def _put(self, name: str, array: np.ndarray, start: int = 0) -> None:
        """Writes elements from `start`, the beginning of a chunk, on."""
        first = self._layout.stored[name].first + start // CHUNK
        found = checksums(array)
        self._checks[first : first + len(found)] = found
        self._writer.write(name, array, start)

    def _fetch(self, part: Part, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        if not hasattr(self._local, "slots"):
            self._local.slots = Slot(), Slot()
        base, tuned = self._local.slots
        return self._base.fetch(part.name, start, stop, base), self._tuned.fetch(part.name, start, stop, tuned)

    def _matrix(self, part: Part) -> None:
        base, tuned = (x.reshape(part.shape) for x in self._fetch(part, 0, part.numel))
        options: dict[str, Any] = {"backend": self._backend}
        left, right = None, None
        try:
            if part.rank:
                svd = lors_kernels.truncated_svd(base, tuned, part.rank, seed=self._layout.seed, threads=1, **options)
                left, right = svd.left, svd.right
            pair = (base, tuned, left, right)
            threshold = (
                lors_kernels.residual_threshold(*pair, part.kept, threads=1, **options) if part.kept else KEEP_NONE
            )
        except NonFiniteError as error:
            raise self._non_finite(part, error.count) from None
        except FactorOverflowError as error:
            raise LorsError(f"{self._tuned.name}: tensor {part.name!r}: {error}") from None
        out = np.zeros(part.shape, np.float32)
        stats = lors_kernels.merge_update(out, *pair, threshold, 1.0, threads=1, **options)
        if stats.non_finite:
            raise self._non_finite(part, stats.non_finite)
        lost = 0.0
        if left is not None and right is not None:
            self._put(f"{part.name}:left", np.ascontiguousarray(left))
            self._put(f"{part.name}:right", np.ascontiguousarray(right))
        if part.kept:
            sparse = lors_kernels.sparse_part(*pair, threshold, part.kept, **options)
            mask = sparse.mask
            if self._layout.index == "gaps":
                size = self._layout.stored[f"{part.name}:gaps"].shape[0]
                mask = encode_gaps(mask, part.numel, size)
            self._put(f"{part.name}:{self._layout.index}", mask)
            lost = self._floats(part, "values", sparse.values, self._layout.values)
        energies = stats.delta_energy, stats.residual_energy, stats.kept_energy
        if not np.isfinite(energies).all():
            raise LorsError(
                f"{self._tuned.name}: tensor {part.name!r}: the squares of its difference to the base overflow float32"
            )
        self._energies[self._row[part.name]] = energies
        self._count(lost, _square(out))

    def _rest(self, part: Part, start: int) -> None:
        base, tuned = self._fetch(part, start, min(start + CHUNK, part.numel))
        with np.errstate(over="ignore", invalid="ignore"):
            delta = tuned.astype(np.float32) - base.astype(np.float32)
        if bad := int(np.count_nonzero(~np.isfinite(delta))):
            raise self._non_finite(part, bad)
        if self._layout.remainder == "none":
            lost = _square(delta)
        elif self._layout.remainder == "int8":
            lost = self._int8(part, delta, start)
        else:
            lost = self._floats(part, "delta", delta, self._layout.remainder, start)
        self._count(lost, _square(delta))

    def _floats(self, part: Part, array: str, values: np.ndarray, kind: str, start: int = 0) -> float:
        """Writes float32 values as `kind` and returns the squared norm of what that loses."""
        name = f"{part.name}:{array}"
        exponent, stored = 0, values
        if kind == "float16":
            # The largest goes to [2^14, 2^15): deltas are small, and float16 has 11 bits only above 2^-14.
            largest = float(np.abs(values).max()) if values.size else 0.0
            exponent = max(-100, math.frexp(largest)[1] - 15) if largest else 0
            stored = (values * np.float32(2.0**-exponent)).astype(np.float16)
        elif kind == "bfloat16":
            stored = values.astype(FLOATS[kind])
        self._exponents[self._layout.stored[name].first + start // CHUNK] = exponent
        self._put(name, stored, start)
        if kind == "float32":
            return 0.0
        with np.errstate(over="ignore"):
            return self._loss(part, kind, stored.astype(np.float32) * np.float32(2.0**exponent), values)

    def _int8(self, part: Part, delta: np.ndarray, start: int) -> float:
        padded = np.zeros(-(-delta.size // BLOCK) * BLOCK, np.float32)
        padded[: delta.size] = delta
        blocks = padded.reshape(-1, BLOCK)
        scales = np.abs(blocks).max(axis=1) / np.float32(127)
        quantised = np.rint(blocks / np.where(scales > 0, scales, 1)[:, None]).astype(np.int8)
        self._put(f"{part.name}:int8", quantised.reshape(-1)[: delta.size], start)
        self._scales(part, scales, start)
        with np.errstate(over="ignore"):
            return self._loss(part, "int8", quantised * scales[:, None], blocks)

    def _loss(self, part: Part, kind: str, restored: np.ndarray, values: np.ndarray) -> float:
        """The squared norm of what storing loses; LorsError where what is stored is infinite again."""
        with np.errstate(invalid="ignore"):
            lost = _square(restored - values)
        if not math.isfinite(lost):
            option = "values" if part.matrix else "remainder"
            raise LorsError(
                f"{self._tuned.name}: tensor {part.name!r}: its difference to the base reaches {np.abs(values).max():.6g}, "
                f"which rounds to infinity as {kind}; choose float32 as --{option}"
            )
        return lost

    def _scales(self, part: Part, scales: np.ndarray, start: int) -> None:
        """Scales of one chunk; the array as a whole is written when the last of them is there."""
        name = f"{part.name}:scales"
        with self._lock:
            waiting = self._waiting.setdefault(name, np.full(self._layout.stored[name].shape, np.nan, np.float32))
            waiting[start // BLOCK : start // BLOCK + scales.size] = scales
            complete = not np.isnan(waiting).any()
        if complete:
            self._put(name, waiting)

    def _count(self, lost: float, energy: float) -> None:
        with self._lock:
            self.lost += lost
            self.energy += energy

    def _non_finite(self, part: Part, count: int) -> LorsError:
        return LorsError(
            f"{self._tuned.name}: tensor {part.name!r}: expected a finite difference to the base, got {count} NaN or "
            "infinite entries"
        )


def _square(values: np.ndarray) -> float:
    """The sum of squares, in float64: of values that float32 holds it may not."""
    return float(np.square(values, dtype=np.float64).sum())
