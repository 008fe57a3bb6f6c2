"""The kernel operations on many same-shaped matrices at once: what a GPU needs to be busy.

A group is G matrices, each with T tuned versions: P = G * T pairs, pair p = i * T + t being delta_p = tuned[i][t] -
base[i]. One launch per operation and pass covers all pairs; the kernels find the matrices through a table of addresses.
On `cpu` and `reference` the same functions loop over the pairs, so that code written for groups runs anywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from . import dispatch
from .arrays import check_out, check_same_place, describe, dtype_name, is_torch, overlap, plain, span
from .group import GroupKeepStats, GroupStats, GroupSVD, GroupThreshold, MatrixGroup, check_alike
from .scalars import check_number, check_whole
from .ties_update import check_consensus, check_keep
from .types import KEEP_ALL, Keep, Threshold

if TYPE_CHECKING:
    from torch import Tensor


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


def _check_out(out: Sequence[Tensor], group: MatrixGroup, *factors: Tensor | None) -> tuple[Tensor, ...]:
    """`check_out` of every output, which may be its own matrix's base or tuned but nobody else's."""
    if len(out) != group.matrices:
        raise ValueError(f"out: expected {group.matrices} matrices, got {len(out)}")
    check_same_place(group.like, out[0], "out")
    check_alike([plain(x) for x in out], plain(out[0]), "out")
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
