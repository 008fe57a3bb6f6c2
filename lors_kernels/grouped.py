"""The kernel operations on many same-shaped matrices at once: what a GPU needs to be busy.

A group is G matrices, each with T tuned versions: P = G * T pairs, pair p = i * T + t being delta_p = tuned[i][t] -
base[i]. One launch per operation and pass covers all pairs; the kernels find the matrices through a table of addresses.
On `cpu` and `reference` the same functions loop over the pairs, so that code written for groups runs anywhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from . import dispatch
from .arrays import check_matrix, check_out, check_same_place, describe, dtype_name, is_torch, overlap, plain, span
from .scalars import check_number, check_whole
from .ties_update import check_consensus, check_keep
from .types import KEEP_ALL, Keep, KeepStats, Threshold, UpdateStats

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
        _check_alike([x for row in self.tuned for x in row], like, "tuned")
        if self.bases is not None:
            check_same_place(like, self.bases[0], "bases")
            _check_alike(self.bases, self.bases[0], "bases")
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


def gram_apply_group(group: MatrixGroup, x: Tensor, *, side: str = "right", backend: str | None = None) -> Tensor:
    """z_p = delta_p.T @ (delta_p @ x_p), or delta_p @ (delta_p.T @ x_p) for `side="left"`.

    x: [P, n, b] float32 ([P, m, b] for "left"), on the group's device. Returns z of the same shape. Accuracy and errors
    as in `gram_apply`.
    """
    if side not in ("right", "left"):
        raise ValueError(f"side: expected 'right' or 'left', got {side!r}")
    x = plain(x)
    _check_stack(x, "x", (group.pairs, group.n if side == "right" else group.m, None), group)
    if x.numel() == 0 or group.m * group.n == 0:
        return x.new_zeros(x.shape)
    return operations("gram_apply", group, backend).gram_apply(group, x.contiguous(), side=side)[0]  # type: ignore[no-any-return]


def residual_threshold_group(
    group: MatrixGroup, left: Tensor | None, right: Tensor | None, k: int, *, backend: str | None = None
) -> GroupThreshold:
    """The exact k-th largest |delta_p - left_p @ right_p.T| of every pair; see `residual_threshold`.

    left [P, m, r], right [P, n, r] float32 or both None; k is common to the group. Nothing is raised for NaN or
    infinity and nothing waits for the device: `non_finite` counts them.
    """
    left, right = plain(left), plain(right)
    _check_stacks(left, right, group)
    k = check_whole(k, "k", 0, group.m * group.n, f" for matrices {[group.m, group.n]}")
    if group.m * group.n == 0:
        return GroupThreshold.of([Threshold(float("inf"), 0, 0)] * group.pairs, group.device)
    left, right = _contiguous(left), _contiguous(right)
    return operations("residual_threshold", group, backend).residual_threshold(group, left, right, k)  # type: ignore[no-any-return]


def merge_update_group(
    group: MatrixGroup,
    out: Sequence[Tensor],
    left: Tensor | None,
    right: Tensor | None,
    threshold: GroupThreshold | None,
    weight: Sequence[float],
    *,
    backend: str | None = None,
) -> GroupStats:
    """out_i += sum_t weight_t * (L_it + keep_it(delta_it - L_it)): bases, tuned and out each pass by once.

    out: G tensors [m, n] of one dtype, may be the bases themselves. weight: T numbers, or G * T in pair order.
    threshold None keeps everything. The experts are added in order in float32, with one rounding at the end.
    """
    left, right = plain(left), plain(right)
    _check_stacks(left, right, group)
    weights = [check_number(w, "weight") for w in weight]
    if len(weights) not in (group.experts, group.pairs):
        raise ValueError(f"weight: expected {group.experts} or {group.pairs} numbers, got {len(weights)}")
    if len(weights) != group.pairs:
        weights = weights * group.matrices
    if threshold is None:
        threshold = GroupThreshold.of([KEEP_ALL] * group.pairs, group.device)
    elif threshold.value.shape != (group.pairs,):
        raise ValueError(f"threshold: expected {group.pairs} entries, got {describe(threshold.value)}")
    left, right = _contiguous(left), _contiguous(right)
    out = _check_out(out, group, left, right)
    if group.m * group.n == 0:
        zeros = threshold.ties.new_zeros(group.pairs)
        return GroupStats(zeros.double().unsqueeze(1).expand(-1, 3), zeros, zeros)
    module = operations("merge_update", group, backend)
    return module.merge_update(group, out, left, right, threshold, weights)  # type: ignore[no-any-return]


def ties_update_group(
    group: MatrixGroup,
    out: Sequence[Tensor] | None,
    keep: Sequence[Keep],
    weight: Sequence[float],
    *,
    elect: bool = True,
    normalize: bool = True,
    scale: float = 1.0,
    start: int = 0,
    backend: str | None = None,
) -> GroupKeepStats:
    """`ties_update` of every matrix: bases, tuned and out each pass by once.

    out: G tensors [m, n] of one dtype, may be the bases themselves; None: only the account. keep: T rules, or G * T in
    pair order. weight: T numbers.
    """
    rules = list(keep)
    for rule in rules:
        check_keep(rule)
    if len(rules) not in (group.experts, group.pairs):
        raise ValueError(f"keep: expected {group.experts} or {group.pairs} rules, got {len(rules)}")
    if len(weight) != group.experts:
        raise ValueError(f"weight: expected {group.experts} numbers, got {len(weight)}")
    rules = rules if len(rules) == group.pairs else rules * group.matrices
    weights = [check_number(w, "weight") for w in weight]
    consensus = check_consensus(elect, normalize, scale, start, group.m * group.n)
    out = None if out is None else _check_out(out, group)
    if group.m * group.n == 0:
        import torch

        zeros = torch.zeros(group.pairs, dtype=torch.int64, device=group.device)
        return GroupKeepStats(zeros.double().unsqueeze(1).expand(-1, 4), zeros, zeros)
    module = operations("ties_update", group, backend)
    return module.ties_update(group, out, rules, weights, consensus)  # type: ignore[no-any-return]


def truncated_svd_group(group: MatrixGroup, rank: int, *, seed: int = 0, backend: str | None = None) -> GroupSVD:
    """The certified rank-r truncated SVD of every pair; contract and errors as in `truncated_svd`.

    All pairs iterate together; each stops when its own certificate holds. The host waits for the device only where
    certificates are read.
    """
    if isinstance(rank, bool) or not isinstance(rank, int):
        raise TypeError(f"rank: expected an integer, got {type(rank).__name__} {rank!r}")
    if not 1 <= rank <= min(group.m, group.n):
        raise ValueError(f"rank: expected 1 to {min(group.m, group.n)} for {[group.m, group.n]}, got {rank}")
    from .backends.truncated_svd import decompose

    return decompose(operations("gram_apply", group, backend), group, rank, seed)


def operations(operation: str, group: MatrixGroup, backend: str | None) -> Any:
    """The grouped form of the backend that runs `operation` on this group."""
    module = dispatch.select(backend, group.like, operation)
    grouped = getattr(module, "GROUPED", None)
    if grouped is None:
        from .backends.loop import Loop

        return Loop(module)
    return grouped


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


def _check_out(out: Sequence[Tensor], group: MatrixGroup, *factors: Tensor | None) -> tuple[Tensor, ...]:
    """`check_out` of every output, which may be its own matrix's base or tuned but nobody else's."""
    if len(out) != group.matrices:
        raise ValueError(f"out: expected {group.matrices} matrices, got {len(out)}")
    check_same_place(group.like, out[0], "out")
    _check_alike([plain(x) for x in out], plain(out[0]), "out")
    inputs = [[*row] if group.bases is None else [group.bases[i], *row] for i, row in enumerate(group.tuned)]
    _check_apart(out, inputs)
    flat = [x.flatten(0, 1) for x in factors if x is not None]
    pairs = zip(out, inputs, strict=True)
    return tuple(check_out(x, group.like, entrywise=read, others=flat) for x, read in pairs)


class _Place(NamedTuple):
    start: int  # address of its first byte
    end: int
    x: Tensor
    matrix: int
    written: bool


def _check_apart(out: Sequence[Tensor], inputs: Sequence[Sequence[Tensor]]) -> None:
    """Raises where the output of one matrix shares memory with what belongs to another."""
    places = [_Place(*span(x), x, i, True) for i, x in enumerate(out)]
    places += [_Place(*span(x), x, i, False) for i, row in enumerate(inputs) for x in row]
    before: list[_Place] = []  # those that reach beyond where the next begins
    for place in sorted(places, key=lambda place: place.start):
        before = [other for other in before if other.end > place.start]
        for other in before:
            matters = place.matrix != other.matrix and (place.written or other.written)
            if matters and overlap(place.x, other.x):
                raise ValueError(
                    f"out: expected memory of its own, got matrices {other.matrix} and {place.matrix} that overlap"
                )
        before.append(place)


def _check_alike(tensors: Sequence[Tensor], like: Tensor, name: str) -> None:
    check_matrix(like, name)
    if not is_torch(like):
        raise TypeError(f"{name}: expected torch tensors, got {describe(like)}")
    for x in tensors:
        if x is not like:
            check_same_place(like, x, name)
            check_matrix(x, name, shape=like.shape, dtypes=(dtype_name(like),))


def _check_stack(x: Any, name: str, shape: tuple[int | None, ...], group: MatrixGroup) -> None:
    wanted = f"a float32 tensor {['any' if s is None else s for s in shape]} on {group.device}"
    if not is_torch(x) or dtype_name(x) != "float32":
        raise TypeError(f"{name}: expected {wanted}, got {describe(x)}")
    fits = x.ndim == len(shape) and all(s is None or s == got for s, got in zip(shape, x.shape, strict=True))
    if not fits or x.device != group.device:
        raise ValueError(f"{name}: expected {wanted}, got {describe(x)} on {x.device}")


def _check_stacks(left: Any, right: Any, group: MatrixGroup) -> None:
    if (left is None) != (right is None):
        raise ValueError("left, right: expected both or neither, got one")
    if left is not None:
        _check_stack(left, "left", (group.pairs, group.m, None), group)
        _check_stack(right, "right", (group.pairs, group.n, int(left.shape[2])), group)


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()
