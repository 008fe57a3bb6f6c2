"""An expert file as an expert: L + S of any smaller rank and density, checked and read as it is asked for."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Mapping
from typing import Any

import numpy as np

import lors_kernels
from lors_kernels import KEEP_ALL, KEEP_NONE, SparsePart, UpdateStats
from lors_kernels.arrays import contiguous, is_torch, new

from ..checkpoints.reader import Checkpoint, open_checkpoint
from ..errors import LorsError
from ..recipes.parameters import rank_of
from .expert_file import (
    BLOCK,
    CHECKS,
    CHUNK,
    ENERGIES,
    EXPONENTS,
    F32,
    KEY,
    Layout,
    Part,
    checksums,
    decode_gaps,
    is_expert_file,
    seal,
)
from .factors import Factors
from .source import Slot, Source, Spec, StoredPart

__all__ = ["ExpertSource", "open_expert"]

LARGEST_EXPONENT = 126  # of a factor 2^e: with the values, of float16, it is a float32


class ExpertSource:
    """An expert file as the engine sees it: what it contributes to a tensor, without the checkpoint it came from.

    ranks r' <= r and densities d' <= d are served from the same file. With r' = r the selection is the checkpoint's own
    (of the stored values, so ties at the precision of the file go to the lowest index). With r' < r what the file has,
    L + S, stands for delta: L' is exact, S' is chosen among what is known of delta - L'. A method that asks for all of
    delta gets L + S; one that looks at all experts together (`fetch`) gets the float32 checkpoint W0 + L + S.

    base: W0, needed by `fetch` alone.
    """

    def __init__(self, checkpoint: Checkpoint, base: Source | None = None) -> None:
        self.name, self.checkpoint, self._base = checkpoint.name, checkpoint, base
        self._local = threading.local()  # of every thread: the last matrix that was put together
        text = checkpoint.metadata[KEY]
        self.layout = Layout.from_json(text, f"{checkpoint.path}: damaged expert file: its metadata")
        self._check_arrays(text)
        self._parts = {part.name: part for part in self.layout.parts}
        self._row = {part.name: row for row, part in enumerate(p for p in self.layout.parts if p.matrix)}
        self._exponents = self._read(EXPONENTS)
        self._energies = self._read(ENERGIES)
        if (np.abs(self._exponents.astype(np.int32)) > LARGEST_EXPONENT).any():
            raise self._damaged(f"expected exponents of at most {LARGEST_EXPONENT}")
        if not np.isfinite(self._energies).all() or (self._energies < 0).any():
            raise self._damaged("expected energies that are finite and not negative")
        self.tensors: dict[str, Spec] = {part.name: Spec(F32, part.shape) for part in self.layout.parts}

    def _check_arrays(self, text: str) -> None:
        expected = {stored.name: (stored.dtype, stored.shape) for stored in self.layout.stored.values()}
        found = {name: (info.dtype, info.shape) for name, info in self.checkpoint.tensors.items()}
        if expected != found:
            odd = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
            raise self._damaged(f"array {odd[0]!r} is not as its metadata say")
        self._checks = self.checkpoint.read(CHECKS)
        if int(self._checks[-1]) != seal(self._checks[:-1], text):
            raise self._damaged("the checksum of its metadata is wrong")

    def _damaged(self, reason: str) -> LorsError:
        return LorsError(f"{self.checkpoint.path}: damaged expert file: {reason}")

    # --- checks before the work

    def require_names(self, base: Checkpoint) -> None:
        """LorsError unless the file was made for a base with these tensors."""
        wanted = {name: info.shape for name, info in base.tensors.items() if Spec(info.dtype, info.shape).floating}
        found = {part.name: part.shape for part in self.layout.parts}
        if odd := sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name)):
            raise LorsError(
                f"{self.name}: made from another base: tensor {odd[0]!r}: expected "
                f"{_shape(wanted.get(odd[0]))} as in {base.name}, got {_shape(found.get(odd[0]))}"
            )

    def require_base(self, digests: Mapping[str, str]) -> None:
        """LorsError unless the base's weight files are those the file was made from."""
        if sorted(digests.values()) != sorted(self.layout.base.values()):
            ours, theirs = (min(d.values())[:12] for d in (digests, self.layout.base))
            raise LorsError(
                f"{self.name}: made from another base: expected sha256 {ours}... of the base, got {theirs}..."
            )

    def require(self, name: str, matrix: bool, rank: float, density: float) -> None:
        """LorsError unless the file can serve `rank` and `density` for a tensor that the recipe decomposes, or not."""
        part, where = self._parts[name], f"{self.name}: tensor {name!r}"
        if matrix and not part.matrix:
            raise LorsError(
                f"{where}: the recipe decomposes it, the expert file does not; make it with the same target"
            )
        if not matrix:
            return
        asked, kept = rank_of(rank, *part.shape) if rank else 0, int(density * part.numel)
        if asked > part.rank:
            raise LorsError(f"{where}: rank: expected at most {part.rank}, which the expert file holds, got {asked}")
        if kept > part.kept:
            raise LorsError(
                f"{where}: density: expected at most {self.layout.density:g}, which the expert file holds, got {density:g}"
            )

    def stands_in(self, name: str) -> bool:
        """Whether L + S is less than the whole difference of a tensor."""
        part = self._parts.get(name)
        return part is not None and part.matrix and part.kept < part.numel

    def approximates(self, name: str, rank: float, density: float) -> bool:
        """Whether S' of a smaller rank is chosen from L + S because the file knows no more of the difference."""
        part = self._parts[name]
        asked, kept = rank_of(rank, *part.shape) if rank else 0, int(density * part.numel)
        return self.stands_in(name) and asked < part.rank and kept > 0

    def notices(self, partly: bool, approximated: bool) -> list[str]:
        """What a merge has to say of the file. partly: whole differences are asked for where it stands in for them;
        approximated: smaller ranks than it holds."""
        layout, found = self.layout, list[str]()
        if partly:
            found.append(
                f"{self.name}: the expert file stands for its rank {layout.rank:g} and density {layout.density:g} where the "
                "whole difference is asked for"
            )
        if approximated:
            found.append(
                f"{self.name}: a smaller rank is asked for than the expert file's {layout.rank:g}: S is chosen from what the "
                f"file holds (density {layout.density:g}), not from the whole difference; docs/expert-files.md says how far "
                "off that is"
            )
        if layout.remainder == "none":
            found.append(f"{self.name}: the expert file leaves out what is not decomposed; the base's is kept")
        return found

    # --- the engine's protocol

    @property
    def parts(self) -> ExpertSource:
        return self

    def prefetch(self, name: str) -> None:
        for suffix in ("left", "right", "mask", "gaps", "values", "delta", "int8", "scales"):
            if (stored := f"{name}:{suffix}") in self.layout.stored:
                self.checkpoint.prefetch(stored)

    def fetch(self, name: str, start: int, stop: int, slot: Slot) -> np.ndarray:
        """W0 + L + S, or W0 + delta of a tensor that is not decomposed, in float32."""
        assert self._base is not None, "made without its base"
        values = self._base.fetch(name, start, stop, slot)
        if name not in self._parts:
            return values
        total = values.astype(np.float32)
        self.add(name, start, total, 1.0, 0, 1.0, None)
        return total

    def stored_bytes(self, name: str) -> int:
        """Bytes of the file that belong to a tensor."""
        suffixes = ("left", "right", "mask", "gaps", "values", "delta", "int8", "scales")
        found = [self.layout.stored.get(f"{name}:{suffix}") for suffix in suffixes]
        return sum(math.prod(stored.shape) * stored.dtype.itemsize for stored in found if stored)

    def read(self, name: str) -> StoredPart:
        """What the file holds of a decomposed matrix, checked."""
        part = self._parts[name]
        return StoredPart(*self._factors(part), *self._sparse(part))

    def add(
        self,
        name: str,
        start: int,
        total: Any,
        weight: float,
        rank: float,
        density: float,
        backend: str | None,
        stored: StoredPart | None = None,
    ) -> UpdateStats:
        """total += weight * (L + S), or for a tensor that is not decomposed weight * delta[start : start + size].

        total: float32, flat; for a matrix all of it, unless rank 0 and density 1 ask for all that is known of delta. It may
        be a tensor on a device, then with `stored` beside it.
        """
        part = self._parts[name]
        if not part.matrix:
            return self._add_rest(part, start, total, weight, backend)
        if not rank and density >= 1:
            return self._add_known(part, start, total, weight, stored)
        asked, kept = rank_of(rank, *part.shape) if rank else 0, int(density * part.numel)
        return self._add_parts(part, total, weight, asked, kept, backend, stored or self.read(name))

    def _add_parts(
        self, part: Part, total: Any, weight: float, asked: int, kept: int, backend: str | None, stored: StoredPart
    ) -> UpdateStats:
        """total += weight * (L' + S') of a whole matrix, with `asked` triplets and `kept` entries."""
        name, matrix = part.name, total.reshape(part.shape)
        left, right, sparse, scale = stored
        plain = None if is_torch(total) else backend  # a GPU's kernels have no stored parts: plain torch there
        try:
            if asked == part.rank:
                if kept < part.kept:
                    sparse = sparse._replace(values=_largest(sparse.values, kept))
                found = lors_kernels.sparse_update(
                    matrix, sparse, left, right, scale=scale, weight=weight, backend=plain
                )
                non_finite, energy = found.non_finite, found.energy
            else:
                known = new(matrix, part.shape, zero=True)
                non_finite = lors_kernels.sparse_update(
                    known, sparse, left, right, scale=scale, backend=plain
                ).non_finite
                energy = 0.0 if non_finite else _reduce(matrix, known, left, right, asked, kept, weight, backend)
        except ValueError as error:
            raise self._damaged(f"tensor {name!r}: {error}") from None
        if non_finite:
            raise LorsError(f"{self.name}: tensor {name!r}: expected finite values, got {non_finite} NaN or infinite")
        delta, residual, _ = self._energies[self._row[name]]
        if asked < part.rank and left is not None:  # the columns of left are orthogonal: their norms are sigma
            residual += _energy(left[:, asked:])
        return UpdateStats(float(delta), float(residual), energy, kept, 0)

    def _add_known(self, part: Part, start: int, total: Any, weight: float, stored: StoredPart | None) -> UpdateStats:
        """total += weight * (L + S)[start : start + size]."""
        if stored is not None:
            known = new(total, part.shape, zero=True)
            self._add_parts(part, known, 1.0, part.rank, part.kept, None, stored)
            known = known.reshape(-1)
        else:
            if getattr(self._local, "name", None) != part.name:
                self._local.matrix = None  # let the old one go first
                self._local.name, self._local.matrix = part.name, self.update(part.name).reshape(-1)
            known = self._local.matrix[start : start + total.size]
        energy, kept = _energy(known), int((known != 0).sum())
        total += float(np.float32(weight)) * known
        return UpdateStats(energy, energy, energy, kept, 0)

    def update(self, name: str) -> np.ndarray:
        """L + S of a decomposed matrix, or delta of another tensor, float32 in its shape."""
        part = self._parts[name]
        total = np.zeros(part.numel, np.float32)
        if part.matrix:
            self._add_parts(part, total, 1.0, part.rank, part.kept, None, self.read(name))
        else:
            for start in range(0, part.numel, CHUNK):
                self._add_rest(part, start, total[start : start + CHUNK], 1.0, None)
        return total.reshape(part.shape)

    def rank(self, name: str) -> int:
        """Stored rank of a tensor, 0 where it is not decomposed."""
        return self._parts[name].rank

    def factors(self, name: str) -> Factors | None:
        """L, where the file knows no more of a matrix (density 0): exact, while `fetch` rounds W0 + L to float32."""
        part = self._parts.get(name)
        return Factors(*self.stored_factors(name)) if part is not None and part.matrix and not part.kept else None

    def stored_factors(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """(left, right) of a decomposed matrix; [m, 0] and [n, 0] at rank 0."""
        part = self._parts[name]
        left, right = self._factors(part)
        if left is None or right is None:
            return np.zeros((part.shape[0], 0), np.float32), np.zeros((part.shape[1], 0), np.float32)
        return left, right

    def stored(self, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
        """(left, right, S) of a tensor in float64; of one that is not decomposed S is delta. None: it is not in the file."""
        part = self._parts.get(name)
        if part is None:
            return None
        if not part.matrix:
            none = np.zeros((0, 0))
            return none, none, self.update(name).astype(np.float64)
        (mask, values), scale = self._sparse(part)
        sparse = np.zeros(part.numel)
        sparse[np.unpackbits(mask, count=part.numel, bitorder="little").view(bool)] = values.astype(np.float64) * scale
        left, right = (x.astype(np.float64) for x in self.stored_factors(name))
        return left, right, sparse.reshape(part.shape)

    # --- reading

    def _read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Elements [start, stop) of an array, checked; `start` at the beginning of a chunk."""
        stored = self.layout.stored[name]
        values = self.checkpoint.read(name, None, start, stop)
        first = stored.first + start // CHUNK
        found = checksums(values)
        if found != self._checks[first : first + len(found)].tolist():
            raise self._damaged(f"the checksum of array {name!r} is wrong")
        return values

    def _factors(self, part: Part) -> tuple[np.ndarray | None, np.ndarray | None]:
        if not part.rank:
            return None, None
        return self._read(f"{part.name}:left"), self._read(f"{part.name}:right")

    def _sparse(self, part: Part) -> tuple[SparsePart, float]:
        if not part.kept:
            return SparsePart(np.zeros((part.numel + 7) // 8, np.uint8), np.zeros(0, np.float32)), 1.0
        values = self._read(f"{part.name}:values")
        exponent = self._exponents[self.layout.stored[f"{part.name}:values"].first]
        index = self._read(f"{part.name}:{self.layout.index}")
        if self.layout.index == "gaps":
            try:
                index = decode_gaps(index, part.numel)
            except ValueError as error:
                raise self._damaged(f"tensor {part.name!r}: {error}") from None
        return SparsePart(index, values), 2.0 ** int(exponent)

    def _add_rest(self, part: Part, start: int, total: np.ndarray, weight: float, backend: str | None) -> UpdateStats:
        if self.layout.remainder == "none":
            return UpdateStats(0.0, 0.0, 0.0, 0, 0)
        stats = UpdateStats(0.0, 0.0, 0.0, 0, 0)
        begin, end = start // CHUNK * CHUNK, start + total.size
        for chunk in range(begin, end, CHUNK):
            values, scale = self._rest(part, chunk)
            low, high = max(start, chunk), min(end, chunk + values.size)
            piece, into = values[low - chunk : high - chunk], total[low - start : high - start]
            got = lors_kernels.merge_update(
                into.reshape(1, -1),
                None,
                piece.reshape(1, -1),
                threshold=KEEP_ALL,
                weight=weight * scale,
                backend=backend,
                threads=1,
            )
            if got.non_finite:
                raise LorsError(
                    f"{self.name}: tensor {part.name!r}: expected finite values, got {got.non_finite} NaN or infinite"
                )
            energy = stats.delta_energy + scale**2 * got.delta_energy
            stats = UpdateStats(energy, energy, energy, stats.kept + got.kept, 0)
        return stats

    def _rest(self, part: Part, chunk: int) -> tuple[np.ndarray, float]:
        """One chunk of an undecomposed tensor's delta, flat, and its factor."""
        stop = min(chunk + CHUNK, part.numel)
        if self.layout.remainder == "int8":
            quantised = self._read(f"{part.name}:int8", chunk, stop).reshape(-1)
            scales = self._read(f"{part.name}:scales")[chunk // BLOCK : -(-stop // BLOCK)]
            return quantised.astype(np.float32) * np.repeat(scales, BLOCK)[: quantised.size], 1.0
        name = f"{part.name}:delta"
        exponent = self._exponents[self.layout.stored[name].first + chunk // CHUNK]
        return self._read(name, chunk, stop).reshape(-1), 2.0 ** int(exponent)


def _shape(shape: tuple[int, ...] | None) -> str:
    return "no such tensor" if shape is None else str(list(shape))


def _energy(x: Any) -> float:
    """sum x^2 in float64."""
    wide = x.double() if is_torch(x) else x.astype(np.float64)
    return float((wide * wide).sum())


def _largest(values: Any, k: int) -> Any:
    """The values with all but the k largest magnitudes set to zero; of equal ones the first stay."""
    found = values.clone() if is_torch(values) else values.copy()
    if not k:
        found[:] = 0
        return found
    threshold = lors_kernels.residual_threshold(None, values.reshape(1, -1), k=k, threads=1)
    magnitude = abs(values.float() if is_torch(values) else values.astype(np.float32))
    keep = magnitude > threshold.value
    keep[: threshold.cut] |= magnitude[: threshold.cut] == threshold.value
    found[~keep] = 0
    return found


def _reduce(
    out: Any, delta: Any, left: Any, right: Any, rank: int, k: int, weight: float, backend: str | None
) -> float:
    """out += weight * (L' + S') of what is known of delta; returns the energy of S'."""
    options: dict[str, Any] = {"backend": backend, "threads": 1}
    l, r = (None if not rank or x is None else contiguous(x[:, :rank]) for x in (left, right))
    threshold = lors_kernels.residual_threshold(None, delta, l, r, k, **options) if k else KEEP_NONE
    return float(lors_kernels.merge_update(out, None, delta, l, r, threshold, weight, **options).kept_energy)


def open_expert(path: str | os.PathLike[str], name: str | None = None) -> ExpertSource:
    """An expert file, checked; close its `.checkpoint` after use. LorsError when it is a checkpoint or damaged."""
    checkpoint = open_checkpoint(os.fspath(path), name=name)
    try:
        if not is_expert_file(checkpoint):
            raise LorsError(f"{path}: expected an expert file, got a checkpoint; `lors decompose` makes one of it")
        source = ExpertSource(checkpoint)
        if name is None:
            source.name = checkpoint.name = source.layout.name
        return source
    except BaseException:
        checkpoint.close()
        raise
