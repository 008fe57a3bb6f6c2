"""Many same-shaped matrices as one group, what operations on it return, and the tables its kernels read.

A group is G matrices, each with T tuned versions: P = G * T pairs, pair p = i * T + t being delta_p = tuned[i][t] -
base[i]. The kernels find the matrices through a table of addresses.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from .arrays import check_matrix, check_same_place, describe, dtype_name, is_torch, plain
from .types import Keep, KeepStats, Threshold, UpdateStats

if TYPE_CHECKING:
    import torch
    from torch import Tensor

VECTOR = 16  # bytes of the widest load; rows on this alignment take the fast path


class MatrixGroup:
    """G bases [m, n] and G x T tuned [m, n] on one device.

    Args:
        bases: G tensors [m, n] of one dtype, rows contiguous; None for all stands for zeros.
        tuned: G sequences of T tensors [m, n] of one dtype.

    Raises:
        TypeError, ValueError: no matrix, or shapes, dtypes or devices that differ.

    The tensors are kept alive by the group; their memory is read whenever an operation runs.
    """

    def __init__(self, bases: Sequence[Tensor] | None, tuned: Sequence[Sequence[Tensor]]) -> None:
        self.tuned = tuple(tuple(plain(x) for x in row) for row in tuned)
        if not self.tuned or not self.tuned[0]:
            raise ValueError("tuned: expected at least one matrix with at least one expert, got none")
        self.bases = None if bases is None else tuple(plain(x) for x in bases)
        self.matrices, self.experts = len(self.tuned), len(self.tuned[0])
        if self.bases is not None and len(self.bases) != self.matrices:
            raise ValueError(f"bases: expected {self.matrices}, one per row of tuned, got {len(self.bases)}")
        like = self.tuned[0][0]
        check_alike([x for row in self.tuned for x in row], like, "tuned")
        if self.bases is not None:
            check_same_place(like, self.bases[0], "bases")
            check_alike(self.bases, self.bases[0], "bases")
            check_matrix(self.bases[0], "bases", shape=like.shape)
        for i, row in enumerate(self.tuned):
            if len(row) != self.experts:
                raise ValueError(f"tuned[{i}]: expected {self.experts} experts like tuned[0], got {len(row)}")
        self.m, self.n = int(like.shape[0]), int(like.shape[1])
        if self.m >= 2**31:  # columns are checked with the matrix; kernels count both in 32 bits, their products in 64
            raise ValueError(f"tuned: expected fewer than 2**31 rows, got {describe(like)}")

    @property
    def pairs(self) -> int:
        return self.matrices * self.experts

    @property
    def like(self) -> Tensor:
        return self.tuned[0][0]

    @property
    def device(self) -> torch.device:
        return self.like.device

    @property
    def dtypes(self) -> tuple[str, str]:
        """Of base and tuned; a missing base counts as float32."""
        return ("float32" if self.bases is None else dtype_name(self.bases[0])), dtype_name(self.like)

    def pair(self, p: int) -> tuple[Tensor | None, Tensor]:
        i, t = divmod(p, self.experts)
        return (None if self.bases is None else self.bases[i]), self.tuned[i][t]

    def each(self) -> Iterator[tuple[Tensor | None, Tensor]]:
        return (self.pair(p) for p in range(self.pairs))

    def take(self, pairs: Sequence[int]) -> MatrixGroup:
        """Some pairs as a group of its own with one expert; not checked again."""
        chosen = MatrixGroup.__new__(MatrixGroup)
        picked = [self.pair(p) for p in pairs]
        chosen.bases = None if self.bases is None else tuple(base for base, _ in picked)  # type: ignore[misc]
        chosen.tuned = tuple((tuned,) for _, tuned in picked)
        chosen.matrices, chosen.experts, chosen.m, chosen.n = len(picked), 1, self.m, self.n
        return chosen

    @cached_property
    def table(self) -> Tensor:
        """int64 [4, P] on the device: base address (0: zeros), base row stride, tuned address, tuned row stride."""
        return upload([_columns(base) + _columns(tuned) for base, tuned in self.each()], self.device)

    @cached_property
    def aligned(self) -> bool:
        """Whether every row starts on a 16-byte boundary."""
        return all(is_aligned(x) for pair in self.each() for x in pair)


class GroupThreshold(NamedTuple):
    """A `Threshold` per pair, on the device: reading it there costs no synchronisation."""

    value: Any  # [P] float32
    ties: Any  # [P] int64
    cut: Any  # [P] int64
    non_finite: Any  # [P] int64: NaN or infinite entries of delta; where > 0 the rest means nothing

    @classmethod
    def of(cls, thresholds: Sequence[Threshold], device: Any) -> GroupThreshold:
        import torch

        ties, cut = (torch.tensor([t[c] for t in thresholds], dtype=torch.int64, device=device) for c in (1, 2))
        value = torch.tensor([t.value for t in thresholds], dtype=torch.float32, device=device)
        return cls(value, ties, cut, torch.zeros_like(ties))

    def thresholds(self) -> list[Threshold]:
        value, ties, cut = (x.tolist() for x in self[:3])
        return [Threshold(*each) for each in zip(value, ties, cut, strict=True)]


class GroupStats(NamedTuple):
    """`UpdateStats` per pair, on the device."""

    energy: Any  # [P, 3] float64: of delta, of the residual, of what was kept
    kept: Any  # [P] int64
    non_finite: Any  # [P] int64

    def stats(self) -> list[UpdateStats]:
        rows = zip(self.energy.tolist(), self.kept.tolist(), self.non_finite.tolist(), strict=True)
        return [UpdateStats(energy[0], energy[1], energy[2], kept, bad) for energy, kept, bad in rows]


class GroupKeepStats(NamedTuple):
    """`KeepStats` per pair, on the device."""

    sums: Any  # [P, 4] float64: delta^2, kept delta^2, |delta|, kept |delta|
    kept: Any  # [P] int64
    non_finite: Any  # [P] int64

    def stats(self) -> list[KeepStats]:
        rows = zip(self.sums.tolist(), self.kept.tolist(), self.non_finite.tolist(), strict=True)
        return [KeepStats(sums[0], sums[1], sums[2], sums[3], kept, bad) for sums, kept, bad in rows]


class GroupSVD(NamedTuple):
    """A truncated SVD per pair: L_p = left[p] @ right[p].T."""

    left: Any  # [P, m, r] float32: left singular vectors times singular values
    right: Any  # [P, n, r] float32
    sigma: Any  # [P, r] float32, largest first
    passes: list[int]
    residual: list[float]
    method: list[str]
    energy: list[float]
    backend: str
    unique: list[bool]


def upload(rows: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """The transpose of `rows` as int64 on the device, without waiting for it."""
    import torch

    return to_device(torch.tensor(rows, dtype=torch.int64).T.contiguous(), device)


def rule_tables(keep: Sequence[Keep], weight: Sequence[float], device: torch.device) -> tuple[Tensor, Tensor]:
    """What `ties_update` kernels read per pair, for rules in pair order: float32 [4, P] with the values of the low and
    the high threshold, factor and weight; int64 [4, P] with their cuts, the key (its bits) and the limit."""
    import torch

    numbers = [(r.low.value, r.high.value, r.factor, weight[p % len(weight)]) for p, r in enumerate(keep)]
    keys = [r.key - (1 << 64) if r.key >> 63 else r.key for r in keep]
    integers = [(r.low.cut, r.high.cut, key, r.limit) for r, key in zip(keep, keys, strict=True)]
    return to_device(torch.tensor(numbers, dtype=torch.float32).T.contiguous(), device), upload(integers, device)


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """A small host tensor on the device, without waiting for it."""
    return x if device.type == "cpu" else x.pin_memory().to(device, non_blocking=True)


def is_aligned(x: Tensor | None) -> bool:
    if x is None:
        return True
    return x.data_ptr() % VECTOR == 0 and (x.shape[0] <= 1 or x.stride(0) * x.element_size() % VECTOR == 0)


def row_stride(x: Tensor) -> int:
    """Elements from one row to the next; a single row may carry any stride."""
    return int(x.stride(0)) if x.shape[0] > 1 else int(x.shape[1])


def _columns(x: Tensor | None) -> list[int]:
    return [0, 0] if x is None else [x.data_ptr(), row_stride(x)]


def check_alike(tensors: Sequence[Tensor], like: Tensor, name: str) -> None:
    check_matrix(like, name)
    if not is_torch(like):
        raise TypeError(f"{name}: expected torch tensors, got {describe(like)}")
    for x in tensors:
        if x is not like:
            check_same_place(like, x, name)
            check_matrix(x, name, shape=like.shape, dtypes=(dtype_name(like),))
