"""How experts interfere: what their task vectors share, matrix by matrix.

    cos(a, b)      <delta_a, delta_b> / (||delta_a|| ||delta_b||)
    subspace       mean cos^2 of the principal angles between the column (left) and row (right) spaces of L_a and L_b:
                   ||Q_a.T Q_b||_F^2 / r, 0 for orthogonal, 1 for equal; r / m for random subspaces
    support        |supp S_a and supp S_b| / |supp S_a or supp S_b|; density / (2 - density) for independent ones
    conflict       share of the entries kept by both whose signs differ; 1/2 for independent ones
    effective rank (sum sigma^2)^2 / sum sigma^4, the participation ratio of the spectrum

Everything is computed from delta in float32, with L and S as a merge chooses them.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import combinations
from typing import Any

import numpy as np

import lors_kernels
from lors_kernels import FactorOverflowError, NonFiniteError

from ..checkpoints import layers
from ..checkpoints.compatibility import compare
from ..checkpoints.reader import Checkpoint, open_checkpoint, require_unchanged
from ..errors import LorsError, SettingError
from ..experts.opening import kind_of, source_of
from ..experts.source import Slot
from ..recipes.parameters import rank_of
from .spectrum import effective_rank

__all__ = ["Interference", "MatrixRow", "interference"]

TOP = 16  # singular values reported
_LAYER = re.compile(r"(encoder|decoder)\.(?:layers|blocks)\.(\d+)\.|(?:layers|blocks|layer|h)\.(\d+)\.")


@dataclass
class MatrixRow:
    """One decomposed matrix. Lists follow the experts, dictionaries their pairs ("a, b")."""

    name: str
    kind: str
    layer: int
    shape: tuple[int, int]
    norm: list[float] = field(default_factory=list)
    relative: list[float] = field(default_factory=list)  # to the base's norm
    sigma: list[list[float]] = field(default_factory=list)
    low: list[float] = field(default_factory=list)  # share of the energy in L
    sparse: list[float] = field(default_factory=list)  # and in S
    effective_rank: list[float] = field(default_factory=list)
    cosine: dict[str, float] = field(default_factory=dict)
    left: dict[str, float] = field(default_factory=dict)
    right: dict[str, float] = field(default_factory=dict)
    support: dict[str, float] = field(default_factory=dict)
    conflict: dict[str, float] = field(default_factory=dict)
    inner: dict[str, float] = field(default_factory=dict)  # <delta_a, delta_b>


@dataclass
class Interference:
    """All matrices, and what follows for the model."""

    experts: list[str]
    rank: float
    density: float
    matrices: list[MatrixRow]

    @property
    def pairs(self) -> list[str]:
        return [f"{a}, {b}" for a, b in combinations(self.experts, 2)]

    def cosine(self, rows: Sequence[MatrixRow] | None = None) -> dict[str, float]:
        """Cosines of the experts' task vectors over all given matrices together."""
        rows = self.matrices if rows is None else rows
        norms = [sum(row.norm[i] ** 2 for row in rows) ** 0.5 for i in range(len(self.experts))]
        inner = {pair: sum(row.inner[pair] for row in rows) for pair in self.pairs}
        scale = dict(zip(self.pairs, combinations(norms, 2), strict=True))
        return {
            pair: inner[pair] / (a * b) if (a := scale[pair][0]) * (b := scale[pair][1]) else 0.0 for pair in self.pairs
        }

    def norms(self) -> list[float]:
        """||delta|| of every expert over all decomposed matrices."""
        return [sum(row.norm[i] ** 2 for row in self.matrices) ** 0.5 for i in range(len(self.experts))]

    def mean(self, measure: str, rows: Sequence[MatrixRow] | None = None) -> dict[str, float]:
        """Mean of a pairwise measure over matrices."""
        rows = self.matrices if rows is None else rows
        return {pair: float(np.mean([getattr(row, measure)[pair] for row in rows])) for pair in self.pairs}

    def by(self, key: Callable[[MatrixRow], Any]) -> dict[Any, list[MatrixRow]]:
        """Matrices in groups, in the order of their first."""
        groups: dict[Any, list[MatrixRow]] = defaultdict(list)
        for row in self.matrices:
            groups[key(row)].append(row)
        return groups

    def shares(self, rows: Sequence[MatrixRow]) -> tuple[float, float]:
        """Share of the energy in L and in S, over experts and matrices."""
        total = sum(norm**2 for row in rows for norm in row.norm) or 1.0
        low, sparse = (
            sum(share * norm**2 for row in rows for share, norm in zip(getattr(row, part), row.norm, strict=True))
            / total
            for part in ("low", "sparse")
        )
        return low, sparse

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "lors": "report", "experts": self.experts, "rank": self.rank, "density": self.density, "norms": self.norms(),
            "cosine": self.cosine(),
            **{measure: self.mean(measure) for measure in (("left", "right", "support", "conflict") if self.pairs else ())},
            "matrices": [asdict(row) for row in self.matrices],
        }  # fmt: skip


def interference(
    base: str | os.PathLike[str],
    experts: Mapping[str, str | os.PathLike[str]],
    *,
    rank: float = 7,
    density: float = 0.2,
    match: str | None = None,
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Interference:
    """Measures every decomposed matrix of checkpoints or expert files; an expert file stands for its L + S.

    match: only matrices whose name contains this regular expression. LorsError for anything wrong with the inputs.
    """
    if not experts:
        raise LorsError("report: expected at least one expert")
    if not 0 <= density <= 1:
        raise SettingError("density", f"expected a number in [0, 1], got {density}")
    try:
        wanted = re.compile(match or "")
    except re.error as error:
        raise LorsError(f"--match: {match!r} is not a regular expression: {error}") from None
    with contextlib.ExitStack() as stack:
        origin = stack.enter_context(open_checkpoint(os.fspath(base), name="base"))
        opened = [stack.enter_context(open_checkpoint(os.fspath(path), name=name)) for name, path in experts.items()]
        readers = [_Reader(checkpoint, origin) for checkpoint in opened]
        selected = layers.select(origin.tensors, origin.naming, origin.config).names
        names = [name for name in origin.tensors if name in selected and wanted.search(name)]
        if not names:
            raise LorsError(f"{base}: no decomposed matrix" + (f" has a name like {match!r}" if match else ""))
        for name in names:
            _check_rank(rank, origin.info(name).shape, name)
        rows = []
        with ThreadPoolExecutor(lors_kernels.thread_count(threads)) as pool:
            work = (pool.submit(_measure, name, origin, readers, rank, density) for name in names)
            for row in _in_order(work, 2 * lors_kernels.thread_count(threads)):
                rows.append(row)
                if progress:
                    progress(len(rows), len(names))
        require_unchanged((origin, *opened))
    return Interference(list(experts), rank, density, rows)


def _in_order(futures: Iterator[Any], ahead: int) -> Iterator[Any]:
    """Results in order with a bounded number under way: a matrix of every expert is in memory for each."""
    waiting: list[Any] = []
    for future in futures:
        waiting.append(future)
        if len(waiting) >= ahead:
            yield waiting.pop(0).result()
    for future in waiting:
        yield future.result()


def _check_rank(rank: float, shape: tuple[int, ...], name: str) -> None:
    if rank <= 0 or (rank >= 1 and rank != int(rank)):
        raise SettingError("rank", f"expected an integer >= 1 or a fraction of min(m, n), got {rank}")
    try:
        rank_of(rank, *shape)
    except ValueError as error:
        problem = str(error).removeprefix("rank: ")
        raise SettingError("rank", f"{problem}: tensor {name!r}") from None


class _Reader:
    """An expert's task vectors, from a checkpoint or an expert file."""

    def __init__(self, checkpoint: Checkpoint, base: Checkpoint) -> None:
        self.name = checkpoint.name
        if kind_of(checkpoint) != "expert file":
            compare(base, checkpoint)
        self._source = source_of(checkpoint, base)
        if (parts := self._source.parts) is not None:
            parts.require_base(base.sha256())

    def delta(self, name: str, base: np.ndarray) -> np.ndarray:
        if (parts := self._source.parts) is not None:
            return parts.update(name)
        tuned = self._source.fetch(name, 0, base.size, Slot()).reshape(base.shape)
        return tuned.astype(np.float32) - base.astype(np.float32)  # type: ignore[no-any-return]


@dataclass
class _Expert:
    """What the pairs of one matrix are measured from."""

    delta: np.ndarray
    left: np.ndarray  # orthonormal columns
    right: np.ndarray
    sign: np.ndarray  # int8: sign of S


def _measure(name: str, base: Checkpoint, readers: Sequence[_Reader], rank: float, density: float) -> MatrixRow:
    origin = base.read(name)
    found = _LAYER.search(name)
    layer = int(next(group for group in found.groups()[1:] if group)) if found else 0
    row = MatrixRow(name, layers.kind(name), layer, origin.shape)
    scale = float(np.linalg.norm(origin.astype(np.float32))) or 1.0
    parts = []
    for reader in readers:
        delta = reader.delta(name, origin)
        parts.append(_single(row, delta, rank_of(rank, *delta.shape), density, scale, reader.name))
    for (a, one), (b, other) in combinations(zip((r.name for r in readers), parts, strict=True), 2):
        _pair(row, f"{a}, {b}", one, other)
    return row


def _single(row: MatrixRow, delta: np.ndarray, rank: int, density: float, scale: float, expert: str) -> _Expert:
    top = max(rank, min(TOP, *delta.shape))
    try:
        svd = lors_kernels.truncated_svd(None, delta, top, threads=1)
    except NonFiniteError as error:
        raise LorsError(
            f"{expert}: tensor {row.name!r}: expected finite values, got {error.count} NaN or infinite"
        ) from None
    except FactorOverflowError as error:
        raise LorsError(f"{expert}: tensor {row.name!r}: {error}") from None
    left, right = (np.ascontiguousarray(x[:, :rank]) for x in (svd.left, svd.right))
    rest = delta - left @ right.T
    keep = lors_kernels.topk_mask(rest, int(density * delta.size), threads=1)
    energy = float(svd.energy)
    # sum of sigma^4 = ||delta.T @ delta||^2, over the shorter side
    gram = delta @ delta.T if delta.shape[0] <= delta.shape[1] else delta.T @ delta
    fourth = float(np.vdot(gram, gram))
    row.norm.append(energy**0.5)
    row.relative.append(energy**0.5 / scale)
    row.sigma.append([float(value) for value in svd.sigma])
    row.low.append(float((svd.sigma[:rank].astype(np.float64) ** 2).sum()) / energy if energy else 0.0)
    row.sparse.append(float((rest[keep].astype(np.float64) ** 2).sum()) / energy if energy else 0.0)
    row.effective_rank.append(effective_rank(energy, fourth))
    norms = np.linalg.norm(left, axis=0)
    return _Expert(delta, left / np.where(norms > 0, norms, 1), right, np.where(keep, np.sign(rest), 0).astype(np.int8))


def _pair(row: MatrixRow, pair: str, a: _Expert, b: _Expert) -> None:
    inner = float(np.vdot(a.delta, b.delta))
    scale = float(np.linalg.norm(a.delta)) * float(np.linalg.norm(b.delta))
    row.inner[pair], row.cosine[pair] = inner, inner / scale if scale else 0.0
    for side in ("left", "right"):
        first, second = getattr(a, side), getattr(b, side)
        getattr(row, side)[pair] = float((np.asarray(first.T @ second, np.float64) ** 2).sum()) / first.shape[1]
    both, either = np.count_nonzero(a.sign & b.sign & 1), np.count_nonzero((a.sign | b.sign) & 1)
    row.support[pair] = both / either if either else 0.0
    row.conflict[pair] = float(np.count_nonzero(a.sign * b.sign == -1)) / both if both else 0.0
