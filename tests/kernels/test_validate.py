"""`lors validate` must be able to fail: kernels with one deliberate fault each, and every fault is seen.

A fault is a function that turns an operation of the cpu backend, or a public one made of these, into a broken one.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import lors_kernels as kernels
from helpers import require_backend
from lors_kernels import ALWAYS, Keep, NonFiniteError, Threshold, dispatch
from lors_kernels.backends import cpu, loop, truncated_svd
from lors_kernels.certificate import Spectrum
from lors_kernels.testing.bench import OPERATIONS, _has
from lors_kernels.testing.cases import CASES, by_name, hard_spectra
from lors_kernels.testing.checks import CHECKS, Place
from lors_kernels.testing.oracle import nth_largest, selected
from lors_kernels.testing.validate import checks, validate_command

SMALL = [case for case in CASES if not case.large]
Operation = Callable[..., Any]
Fault = Callable[[Operation], Operation]


@pytest.fixture(autouse=True)
def _cpu() -> None:
    require_backend("cpu")


# --- what may go wrong with any operation ----------------------------------------------------------------------------


def scaled(factor: float = 1.0002) -> Fault:
    """Of an operation that adds to its first argument."""

    def fault(honest: Operation) -> Operation:
        def broken(out: Any, *args: Any, **options: Any) -> Any:
            before = None if out is None else out.copy()
            result = honest(out, *args, **options)
            if out is not None:
                change = out.astype(np.float64) - before.astype(np.float64)
                out[...] = (before + factor * change).astype(out.dtype)
            return result

        return broken

    return fault


def chunk_lost(honest: Operation) -> Operation:
    """What the second of several threads has added is gone."""

    def broken(out: Any, *args: Any, threads: int | None = None, **options: Any) -> Any:
        kept = None if out is None else out[16:32].copy()
        result = honest(out, *args, threads=threads, **options)
        if out is not None and threads != 1:
            out[16:32] = kept
        return result

    return broken


def written_around(place: int) -> Fault:
    """One entry before the first row, or behind the last, is overwritten."""

    def fault(honest: Operation) -> Operation:
        def broken(out: Any, *args: Any, **options: Any) -> Any:
            result = honest(out, *args, **options)
            if out is not None and len(out) > 1 and out.strides[0] > out.shape[1] * out.itemsize:  # there is room
                at = out[0] if place < 0 else out[-1]
                ctypes.memset(at.ctypes.data + (place if place < 0 else at.size) * out.itemsize, 0, out.itemsize)
            return result

        return broken

    return fault


def input_written(position: int) -> Fault:
    def fault(honest: Operation) -> Operation:
        def broken(*args: Any, **options: Any) -> Any:
            result = honest(*args, **options)
            x = args[position][0] if isinstance(args[position], list) else args[position]
            if x is not None:
                ctypes.memset(x.ctypes.data, 1, 1)
            return result

        return broken

    return fault


def of_argument(position: int, change: Callable[[Any], Any]) -> Fault:
    """Another argument than was given."""

    def fault(honest: Operation) -> Operation:
        def broken(*args: Any, **options: Any) -> Any:
            changed = list(args)
            changed[position] = change(args[position])
            return honest(*changed, **options)

        return broken

    return fault


def of_option(name: str, value: Any) -> Fault:
    return lambda honest: lambda *args, **options: honest(*args, **{**options, name: value})


def of_result(change: Callable[[Any], Any]) -> Fault:
    return lambda honest: lambda *args, **options: change(honest(*args, **options))


def field(name: str, change: Callable[[Any], Any]) -> Fault:
    """One number of the account is wrong."""

    def wrong(result: Any) -> Any:
        many = isinstance(result, list)
        found = [r._replace(**{name: change(getattr(r, name))}) for r in (result if many else [result])]
        return found if many else found[0]

    return of_result(wrong)


def packed(x: np.ndarray) -> np.ndarray:
    """The memory of a strided matrix read as if its rows lay behind each other."""
    return np.lib.stride_tricks.as_strided(x, x.shape, (x.shape[1] * x.itemsize, x.itemsize))


def without_chunk(x: np.ndarray) -> np.ndarray:
    short = x.copy()
    short[16:32] = 0
    return short


def finite(x: np.ndarray) -> np.ndarray:
    return np.nan_to_num(x.astype(np.float32), nan=0.0, posinf=0.0, neginf=0.0).astype(x.dtype)


def no_denormals(x: np.ndarray) -> np.ndarray:
    return np.where(np.abs(x.astype(np.float32)) < 2.0**-126, np.zeros(1, x.dtype), x)


def each(change: Callable[[Any], Any]) -> Callable[[list[Any]], list[Any]]:
    return lambda xs: [change(x) for x in xs]


def one_more(t: Threshold) -> Threshold:
    """The next smaller magnitude is kept too."""
    return t if t.value in (0, np.inf) else Threshold(float(np.nextafter(np.float32(t.value), np.float32(0))), 0, 2**62)


def cut_early(t: Threshold) -> Threshold:
    """The last of the kept ties is lost."""
    return t._replace(cut=max(0, t.cut - 1)) if t.cut < 2**40 or t.value else t


def tail_ties(residual: np.ndarray, t: Threshold) -> np.ndarray:
    """The mask of a threshold, of equal magnitudes those that come last."""
    magnitude = np.abs(residual)
    mask, equal = magnitude > t.value, np.flatnonzero(magnitude == t.value)
    count = np.count_nonzero(equal < t.cut)
    mask.flat[equal[len(equal) - count :]] = True
    return mask


# --- the faults of each operation ------------------------------------------------------------------------------------


def gram_on_threads(honest: Operation) -> Operation:
    def broken(base: Any, tuned: Any, x: Any, *, side: str, threads: int | None = None) -> Any:
        lost = threads != 1 and len(tuned) > 32
        return honest(None if base is None else base, _rows_of_base(base, tuned) if lost else tuned, x, side=side)

    return broken


def _rows_of_base(base: Any, tuned: Any) -> Any:
    short = tuned.copy()
    short[16:32] = 0 if base is None else base[16:32].astype(tuned.dtype)
    return short


GRAM: dict[str, Fault] = {
    "scaled": of_result(lambda z: z * np.float32(1.00001)),
    "rounded to bfloat16": of_result(lambda z: z.astype(kernels.arrays.BFLOAT16).astype(np.float32)),
    "last column lost": of_result(lambda z: np.concatenate([z[:, :-1], 0 * z[:, -1:]], axis=1)),
    "base ignored": of_argument(0, lambda base: None),
    "rows as if packed": of_argument(1, packed),
    "NaN hidden": of_argument(1, finite),
    "a thread's rows lost": gram_on_threads,
    "input written": input_written(1),
    "side ignored where square": lambda honest: (
        lambda base, tuned, x, *, side, threads=None: honest(
            base, tuned, x, side="right" if tuned.shape[0] == tuned.shape[1] else side, threads=threads
        )
    ),
    "other bits on threads": lambda honest: (
        lambda *args, threads=None, **options: (
            honest(*args, threads=threads, **options) * np.float32(1 if threads == 1 else 1 + 2**-23)
        )
    ),
    "raises": lambda honest: lambda *args, **options: 1 / 0,
}


def threshold_off(change: int) -> Fault:
    """The k - 1 or k + 1 largest."""

    def fault(honest: Operation) -> Operation:
        def broken(base: Any, tuned: Any, left: Any, right: Any, k: int, **options: Any) -> Any:
            return honest(base, tuned, left, right, min(max(0, k + change), tuned.size) if k else 0, **options)

        return broken

    return fault


def miscounted(honest: Operation) -> Operation:
    def broken(*args: Any, **options: Any) -> Any:
        try:
            return honest(*args, **options)
        except NonFiniteError as error:
            raise NonFiniteError(error.count - 1) from None

    return broken


def threshold_on_threads(honest: Operation) -> Operation:
    def broken(base: Any, tuned: Any, left: Any, right: Any, k: int, *, threads: int | None = None) -> Any:
        tuned = tuned if threads == 1 else _rows_of_base(base, tuned)
        return honest(base, tuned, left, right, k, threads=threads)

    return broken


THRESHOLD: dict[str, Fault] = {
    "one entry less": threshold_off(-1),
    "one entry more": threshold_off(1),
    "value one step up": of_result(
        lambda t: t._replace(value=float(np.nextafter(np.float32(t.value), np.float32(np.inf))))
    ),
    "all ties kept": of_result(lambda t: t._replace(cut=2**62 if t.cut else 0)),
    "last tie lost": of_result(cut_early),
    "ties from the end": of_result(lambda t: t._replace(cut=0)),
    "number of ties": of_result(lambda t: t._replace(ties=t.ties + 1 if t.ties else 0)),
    "L ignored": lambda honest: lambda base, tuned, left, right, k, **o: honest(base, tuned, None, None, k, **o),
    "base ignored": of_argument(0, lambda base: None),
    "rows as if packed": of_argument(1, packed),
    "denormals as zeros": of_argument(1, no_denormals),
    "NaN hidden": of_argument(1, finite),
    "NaN miscounted": miscounted,
    "a thread's rows lost": threshold_on_threads,
}


def merge_backwards(honest: Operation) -> Operation:
    """The last expert first: other roundings."""

    def broken(out: Any, base: Any, *experts: Any, **options: Any) -> Any:
        return honest(out, base, *(list(x)[::-1] for x in experts), **options)[::-1]

    return broken


def merge_one_by_one(honest: Operation) -> Operation:
    """Every expert in a pass of its own, although out may be the base that the next has yet to read."""

    def broken(out: Any, base: Any, *experts: Any, **options: Any) -> Any:
        return [
            stats for one in zip(*experts, strict=True) for stats in honest(out, base, *([x] for x in one), **options)
        ]

    return broken


def merge_of(change: Callable[..., np.ndarray]) -> Fault:
    """The sum of changed parts: change(low, residual, threshold) is added in the place of L + S."""

    def fault(honest: Operation) -> Operation:
        def broken(
            out: Any, base: Any, tuned: Any, left: Any, right: Any, threshold: Any, weight: Any, **options: Any
        ) -> Any:
            total = out.astype(np.float32)
            for t, x in enumerate(tuned):
                low = np.zeros(x.shape, np.float32)
                honest(low, base, [x], [left[t]], [right[t]], [kernels.KEEP_NONE], [1.0])
                residual = x.astype(np.float32) - (0 if base is None else base.astype(np.float32)) - low
                total += np.float32(weight[t]) * change(low, residual, threshold[t])
            stats = honest(out, base, tuned, left, right, threshold, weight, **options)
            out[...] = total.astype(out.dtype)
            return stats

        return broken

    return fault


def chopped(honest: Operation) -> Operation:
    """Half precision by leaving bits out instead of rounding to nearest."""

    def broken(out: Any, *args: Any, **options: Any) -> Any:
        wide = out.astype(np.float32)
        result = honest(wide, *args, **options)
        if out.dtype == np.float32:
            out[...] = wide
        else:
            low = wide.astype(out.dtype)
            beyond = np.abs(low.astype(np.float32)) > np.abs(wide)
            out[...] = np.where(beyond, (low.view(np.uint16) - 1).view(out.dtype), low)
        return result

    return broken


MERGE: dict[str, Fault] = {
    "scaled": scaled(),
    "L scaled": merge_of(lambda l, r, t: np.float32(1.0001) * l + np.where(selected(r, t), r, np.float32(0))),
    "S scaled": merge_of(lambda l, r, t: l + np.float32(1.0001) * np.where(selected(r, t), r, np.float32(0))),
    "ties from the end": merge_of(lambda l, r, t: l + np.where(tail_ties(r, t), r, np.float32(0))),
    "one entry more": of_argument(5, each(one_more)),
    "one entry less": of_argument(5, each(cut_early)),
    "second weight lost": of_argument(6, lambda w: w[:1] * len(w)),
    "weights as float16": of_argument(6, each(lambda w: float(np.float16(w)))),
    "base ignored": of_argument(1, lambda base: None),
    "rows as if packed": of_argument(2, each(packed)),
    "denormals as zeros": of_argument(2, each(no_denormals)),
    "chopped to half": chopped,
    "experts backwards": merge_backwards,
    "base read after it was written": merge_one_by_one,
    "a thread's rows lost": chunk_lost,
    "written before a row": written_around(-1),
    "written behind a row": written_around(1),
    "input written": input_written(2),
    "NaN not counted": of_argument(2, each(finite)),
    **{
        f"{name} wrong": field(name, lambda e: e * 1.0002)
        for name in ("delta_energy", "residual_energy", "kept_energy")
    },
    "kept miscounted": field("kept", lambda kept: kept + 1),
}


def apply_chunk_lost(honest: Operation) -> Operation:
    """The rows of the second of several threads are not written."""

    def broken(out: Any, *args: Any, threads: int | None = None, **options: Any) -> Any:
        kept = out[16:32].copy()
        result = honest(out, *args, threads=threads, **options)
        if threads != 1:
            out[16:32] = kept
        return result

    return broken


APPLY: dict[str, Fault] = {
    "scaled": scaled(),
    "chopped to half": chopped,
    "base ignored": of_argument(1, lambda base: None),
    "update ignored": of_argument(2, lambda update: None),
    "scale ignored": of_argument(3, lambda scale: 1.0),
    "rows as if packed": of_argument(2, packed),
    "denormals as zeros": of_argument(2, no_denormals),
    "a thread's rows lost": apply_chunk_lost,
    "written before a row": written_around(-1),
    "written behind a row": written_around(1),
    "input written": input_written(2),
    "largest wrong": of_result(lambda largest: largest * 1.0002),
    "largest without its sign": of_result(lambda largest: -largest),
    "NaN hidden": of_argument(2, finite),
}


def ties_rule(**change: Any) -> Fault:
    return of_argument(5, lambda rule: rule._replace(**change))


def ties_keep(change: Callable[[Keep], Keep]) -> Fault:
    return of_argument(3, each(change))


def elected_by(sign: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> Fault:
    """Another election: sign(values, total) says for each entry whether the positive side has won."""

    def fault(honest: Operation) -> Operation:
        def broken(out: Any, base: Any, tuned: Any, keep: Any, weight: Any, rule: Any, **options: Any) -> Any:
            if out is None or not rule.elect:
                return honest(out, base, tuned, keep, weight, rule, **options)
            plain, values = rule._replace(elect=False, normalize=False, scale=1.0), []
            for x, k, w in zip(tuned, keep, weight, strict=True):
                values.append(np.zeros(x.shape, np.float32))
                honest(values[-1], base, [x], [k], [w], plain)
            total = np.sum(values, axis=0, dtype=np.float32)
            positive = sign(np.array(values), total)
            agrees = [np.where(positive, v > 0, v < 0) for v in values]
            top = np.sum([np.where(a, v, 0) for a, v in zip(agrees, values, strict=True)], axis=0, dtype=np.float32)
            under = np.sum([np.where(a, w, 0) for a, w in zip(agrees, weight, strict=True)], axis=0, dtype=np.float32)
            before, stats = out.copy(), honest(out, base, tuned, keep, weight, rule, **options)
            under = np.where(under == 0, 1, under) if rule.normalize else 1
            out[...] = (before.astype(np.float32) + np.float32(rule.scale) * (top / under)).astype(out.dtype)
            return stats

        return broken

    return fault


TIES: dict[str, Fault] = {
    "scaled": scaled(),
    "a sum of zero elects the negative side": elected_by(lambda values, total: total > 0),
    "election by heads": elected_by(lambda values, total: (values > 0).sum(0) >= (values < 0).sum(0)),
    "election by the first": elected_by(lambda values, total: values[0] >= 0),
    "no election": ties_rule(elect=False),
    "always divided": ties_rule(normalize=True),
    "never divided": ties_rule(normalize=False),
    "scale ignored": ties_rule(scale=1.0),
    "start ignored": ties_rule(start=0),
    "start off by one": of_argument(5, lambda rule: rule._replace(start=rule.start + 1)),
    "one entry more": ties_keep(lambda k: k._replace(low=one_more(k.low))),
    "one entry less": ties_keep(lambda k: k._replace(low=cut_early(k.low))),
    "top not left out": ties_keep(lambda k: k._replace(high=kernels.KEEP_NONE)),
    "factor ignored": ties_keep(lambda k: k._replace(factor=1.0)),
    "nothing drawn": ties_keep(lambda k: k._replace(limit=ALWAYS)),
    "drawn up to the limit": ties_keep(lambda k: k._replace(limit=min(ALWAYS, k.limit + 1))),
    "another key": ties_keep(lambda k: k._replace(key=k.key ^ 1)),
    "key of 63 bits": ties_keep(lambda k: k._replace(key=k.key & (2**63 - 1))),
    "weights ignored": of_argument(4, lambda w: [1.0] * len(w)),
    "base ignored": of_argument(1, lambda base: None),
    "rows as if packed": of_argument(2, each(packed)),
    "denormals as zeros": of_argument(2, each(no_denormals)),
    "a thread's rows lost": chunk_lost,
    "written before a row": written_around(-1),
    "written behind a row": written_around(1),
    "input written": input_written(2),
    "NaN not counted": of_argument(2, each(finite)),
    **{
        f"{name} wrong": field(name, lambda e: e * 1.0002)
        for name in ("delta_energy", "kept_energy", "delta_sum", "kept_sum")
    },
    "kept miscounted": field("kept", lambda kept: kept + 1),
}


def part_with(change: Callable[[np.ndarray, np.ndarray], None]) -> Fault:
    """Something else in the mask [bytes] and values after an honest run."""

    def fault(honest: Operation) -> Operation:
        def broken(base: Any, tuned: Any, left: Any, right: Any, threshold: Any, mask: Any, values: Any) -> int:
            count = honest(base, tuned, left, right, threshold, mask, values)
            if count > 0:
                change(mask, values)
            return int(count)

        return broken

    return fault


def column_major(mask: np.ndarray, values: np.ndarray) -> None:
    values[:] = values[::-1].copy()


def other_bit_order(mask: np.ndarray, values: np.ndarray) -> None:
    mask[:] = np.packbits(np.unpackbits(mask, bitorder="little"))


def bit_moved(mask: np.ndarray, values: np.ndarray) -> None:
    mask[0] ^= 3


def padding_set(mask: np.ndarray, values: np.ndarray) -> None:
    mask[-1] |= 0x80


def last_value_lost(mask: np.ndarray, values: np.ndarray) -> None:
    values[-1] = 0


def value_scaled(mask: np.ndarray, values: np.ndarray) -> None:
    values *= np.float32(0.9)


def part_ties_from_the_end(honest: Operation) -> Operation:
    def broken(base: Any, tuned: Any, left: Any, right: Any, threshold: Any, mask: Any, values: Any) -> int:
        residual = tuned.astype(np.float32) - base.astype(np.float32)
        if left is not None:
            return int(honest(base, tuned, left, right, threshold, mask, values))
        chosen = tail_ties(residual, threshold)
        if np.count_nonzero(chosen) > values.size:
            return -1
        mask[:] = np.packbits(chosen, bitorder="little")
        values[: np.count_nonzero(chosen)] = residual[chosen]
        return int(np.count_nonzero(chosen))

    return broken


PART: dict[str, Fault] = {
    "values scaled": part_with(value_scaled),
    "values backwards": part_with(column_major),
    "last value lost": part_with(last_value_lost),
    "bits of a byte backwards": part_with(other_bit_order),
    "a bit moved": part_with(bit_moved),
    "padding set": part_with(padding_set),
    "ties from the end": part_ties_from_the_end,
    "one entry less": of_argument(4, cut_early),
    "one entry more": of_argument(4, one_more),
    "L ignored": lambda honest: lambda base, tuned, left, right, *rest: honest(base, tuned, None, None, *rest),
    "base ignored": of_argument(0, lambda base: None),
    "rows as if packed": of_argument(1, packed),
    "count of what was asked for": lambda honest: lambda *args: (honest(*args), args[-1].size)[1],
}


def around_flat(place: int) -> Fault:
    def fault(honest: Operation) -> Operation:
        def broken(out: Any, *args: Any) -> Any:
            result = honest(out, *args)
            if out.base is not None and out.base.size > out.size:
                ctypes.memset(out.ctypes.data + (-4 if place < 0 else 4 * out.size), 0, 4)
            return result

        return broken

    return fault


def half_written(honest: Operation) -> Operation:
    """What does not fit is noticed too late."""

    def broken(out: Any, mask: Any, values: Any, *rest: Any) -> Any:
        result = honest(out, mask, values, *rest)
        if result[1] != values.size:
            out[0] += 1
        return result

    return broken


UPDATE: dict[str, Fault] = {
    "scaled": scaled(),
    "scale ignored": of_argument(5, lambda scale: 1.0),
    "weight ignored": of_argument(6, lambda weight: 1.0),
    "values shifted": of_argument(2, lambda values: np.roll(values, 1)),
    "values of the other half type": of_argument(
        2, lambda v: v.view(kernels.arrays.BFLOAT16) if v.dtype == np.float16 else v
    ),
    "bits of a byte backwards": of_argument(1, lambda mask: np.packbits(np.unpackbits(mask, bitorder="little"))),
    "L ignored": lambda honest: lambda out, mask, values, left, right, *rest: honest(out, mask, values, None, None, *rest),
    "energy wrong": of_result(lambda r: (r[0] * 1.0002, *r[1:])),
    "energy of the unscaled values": lambda honest: (
        lambda out, mask, values, left, right, scale, weight: (
            lambda r: (r[0] / scale**2, *r[1:])
        )(honest(out, mask, values, left, right, scale, weight))
    ),
    "NaN not counted": of_result(lambda r: (*r[:2], 0)),
    "too many values accepted": lambda honest: lambda out, mask, values, *rest: (
        *((r := honest(out, mask, values, *rest))[:1]), values.size, r[2]
    ),
    "written before it fits": half_written,
    "written before the first entry": around_flat(-1),
    "written behind the last entry": around_flat(1),
}  # fmt: skip


def svd_with(**change: Callable[[Any], Any]) -> Fault:
    def wrong(found: Any) -> Any:
        return found._replace(**{name: f(getattr(found, name)) for name, f in change.items()})

    return of_result(wrong)


SVD: dict[str, Fault] = {
    "left scaled": svd_with(left=lambda x: x * np.float32(1.0001)),
    "right rounded": svd_with(right=lambda x: x.astype(np.float16).astype(np.float32)),
    "last component lost": svd_with(left=lambda x: np.concatenate([x[:, :-1], 0 * x[:, -1:]], axis=1)),
    "sigma scaled": svd_with(sigma=lambda x: x * np.float32(1.001)),
    "sigma rising": svd_with(sigma=lambda x: x[::-1].copy()),
    "scales in right": svd_with(left=lambda x: x * np.float32(0.5), right=lambda x: x * np.float32(2)),
    "energy wrong": svd_with(energy=lambda e: e * 1.0002),
    "nothing claimed": svd_with(residual=lambda r: 0.0),
    "a hundredth claimed": svd_with(residual=lambda r: 0.01 * r),
    "more claimed than is promised": svd_with(residual=lambda r: 1.1e-5),
    "equal values called different": svd_with(unique=lambda u: True),
    "different values called equal": svd_with(unique=lambda u: False),
    "base ignored": of_argument(0, lambda base: None),
    "NaN hidden": of_argument(1, finite),
    "other bits on threads": lambda honest: (
        lambda *args, threads=None, **options: (
            lambda found: found if threads == 1 else found._replace(left=found.left * np.float32(1 + 2**-23))
        )(honest(*args, threads=threads, **options))
    ),
}


TOPK: dict[str, Fault] = {
    "one entry less": lambda honest: lambda x, k, **o: honest(x, max(0, k - 1), **o),
    "largest, not of magnitude": lambda honest: (
        lambda x, k, **o: honest(np.where(x.astype(np.float32) < 0, np.zeros(1, x.dtype), x), k, **o)
    ),
    "ties from the end": lambda honest: (
        lambda x, k, **o: honest(x, k, **o) & False | tail_ties(x.astype(np.float32), nth_largest(x, k))
    ),
    "NaN accepted": lambda honest: lambda x, k, **o: honest(finite(x), k, **o),
}


DELTA: dict[str, Fault] = {
    "scaled": of_result(lambda x: x * np.float32(1.0001)),
    "rank one lower": lambda honest: lambda x, rank, density, **o: honest(x, max(0, rank - 1), density, **o),
    "no S": lambda honest: lambda x, rank, density, **o: honest(x, rank, 0.0, **o),
    "one entry less": lambda honest: lambda x, rank, density, **o: honest(x, rank, max(0.0, density - 1 / x.size), **o),
    "another seed": of_option("seed", 4),
    "NaN accepted": lambda honest: lambda x, rank, density, **o: honest(finite(x), rank, density, **o),
}


def swapped(x: Any) -> Any:
    """The first and the last pair in each other's place."""
    if x is None:
        return None
    order = [len(x) - 1, *range(1, len(x) - 1), 0]
    return x[order]


def all_found(spectrum: Any, count: Any, most: int) -> tuple[Any, Any]:
    """Nothing hides, and nothing lies beyond the cut."""
    return torch.ones_like(count, dtype=torch.bool), torch.zeros(count.shape, dtype=torch.float64)


CERTIFICATE: dict[str, tuple[Any, str, Fault]] = {
    "copies not asked for": (Spectrum, "unseen", of_result(torch.zeros_like)),
    "nothing beyond the cut": (Spectrum, "cut", lambda honest: all_found),
    "bound a tenth": (truncated_svd, "error_bound", of_result(lambda error: 0.1 * error)),
    "extra pairs count nothing": (
        truncated_svd, "error_bound", lambda honest: (
            lambda theta, rho, rank, *rest: honest(theta, rho * (torch.arange(rho.shape[-1]) < rank), rank, *rest)
        ),
    ),
    "equal without asking": (truncated_svd, "EQUAL", lambda honest: 1e-3),
}  # fmt: skip


GROUPED: dict[str, tuple[str, str, Fault]] = {
    "products swapped": ("reading groups", "gram_apply", of_result(lambda r: (swapped(r[0]), r[1]))),
    "thresholds swapped": ("reading groups", "residual_threshold", of_result(lambda t: type(t)(*map(swapped, t)))),
    "factors of the wrong pair": ("reading groups", "residual_threshold", of_argument(2, swapped)),
    "factors of the wrong pair in the sum": ("writing groups", "merge_update", of_argument(3, swapped)),
    "weights of the first expert": ("writing groups", "merge_update", of_argument(6, lambda w: [w[0]] * len(w))),
    "account swapped": ("writing groups", "merge_update", of_result(lambda s: type(s)(*map(swapped, s)))),
    "rules of the first matrix": (
        "writing groups",
        "ties_update",
        of_argument(3, lambda keep: keep[: len(keep) // 2] * 2),
    ),
    "account of ties swapped": ("writing groups", "ties_update", of_result(lambda s: type(s)(*map(swapped, s)))),
}

FAULTS: list[tuple[str, str, Any, str, Fault]] = [
    *(("gram_apply", name, cpu, "gram_apply", fault) for name, fault in GRAM.items()),
    *(("truncated_svd", name, cpu, "truncated_svd", fault) for name, fault in SVD.items()),
    *(("residual_threshold", name, cpu, "residual_threshold", fault) for name, fault in THRESHOLD.items()),
    *(("merge_update", name, cpu, "merge_update", fault) for name, fault in MERGE.items()),
    *(("apply_update", name, cpu, "apply_update", fault) for name, fault in APPLY.items()),
    *(("ties_update", name, cpu, "ties_update", fault) for name, fault in TIES.items()),
    *(("sparse_part", name, cpu, "sparse_part", fault) for name, fault in PART.items()),
    *(("sparse_update", name, cpu, "sparse_update", fault) for name, fault in UPDATE.items()),
    *(("topk_mask", name, kernels, "topk_mask", fault) for name, fault in TOPK.items()),
    *(("lors_delta", name, kernels, "lors_delta", fault) for name, fault in DELTA.items()),
    ("truncated_svd_group", "L of the wrong matrix", truncated_svd, "decompose", svd_with(left=lambda x: swapped(x))),
    *(("truncated_svd_group", name, *place) for name, place in CERTIFICATE.items()),
    *((kind, name, loop.Loop, method, fault) for name, (kind, method, fault) in GROUPED.items()),
]


@pytest.mark.parametrize(
    ("operation", "where", "name", "fault"),
    [pytest.param(op, where, name, fault, id=f"{op}-{title}") for op, title, where, name, fault in FAULTS],
)
def test_every_fault_is_seen(
    operation: str, where: Any, name: str, fault: Fault, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(where, name, fault(getattr(where, name)))
    wrong = next(check for check in checks("cpu", (*SMALL, *hard_spectra()), [operation]) if not check.ok)
    assert not re.match("(Index|Type|Attribute|Key|Name)Error", wrong.aspect), "the fault itself is broken"


def test_every_public_operation_has_a_check_and_every_check_faults() -> None:
    assert {operation for operation, *_ in FAULTS} == set(CHECKS)
    public = {name for name in kernels.__all__ if callable(getattr(kernels, name)) and name.islower()}
    helpers = {"available_backends", "keep_limit", "random_key", "thread_count"}
    assert public - helpers <= set(CHECKS)


# --- the command


def test_right_kernels_pass(capsys: pytest.CaptureFixture[str]) -> None:
    assert validate_command(None, quick=True)
    shown = capsys.readouterr().out.splitlines()
    assert {tuple(line.split()[0:1]) for line in shown[1:]} >= {("cpu",), ("reference",)}
    assert all(f"cpu        {operation} " in "\n".join(shown) for operation in CHECKS)


def test_a_wrong_entry_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(cpu, "merge_update", written_around(1)(cpu.merge_update))
    assert not validate_command(["cpu"], quick=True)
    assert "  WRONG odd: what lies around: error 2.00e+00, allowed 0.00e+00" in capsys.readouterr().out


def states(monkeypatch: pytest.MonkeyPatch, **found: dispatch.Availability) -> None:
    monkeypatch.setattr(dispatch, "available_backends", lambda: found)


def test_nothing_to_check_is_wrong(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    states(monkeypatch, cpu=dispatch.Availability(False, "not built"))
    assert not validate_command(None, quick=True, as_json=True)
    shown = capsys.readouterr()
    assert shown.out == "[]\n"
    assert shown.err == "cpu: not available: not built\nnothing was checked\n"


def test_a_broken_backend_is_wrong(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    good, junk = dispatch.Availability(True, ""), dispatch.Availability(False, "ImportError: junk", True)
    states(monkeypatch, cpu=good, cuda=junk)
    monkeypatch.setattr("lors_kernels.testing.validate.CASES", (by_name("2x3"),))
    monkeypatch.setattr("lors_kernels.testing.validate.hard_spectra", lambda: ())
    assert not validate_command(None)
    assert capsys.readouterr().err == "cuda: broken: ImportError: junk\n"
    assert validate_command(["cpu"])  # nobody asked for the other
    with pytest.raises(kernels.BackendUnavailable, match="cuda: ImportError: junk"):
        validate_command(["cuda"])


@pytest.mark.parametrize("backend", ["cpu", "reference", "triton"])
def test_a_backend_is_asked_for_what_it_has(backend: str) -> None:
    """On a GPU some operations are the reference's: a check that asks the kernels for them finds an error that is none."""
    place = Place(backend)
    asked = {operation for operation in CHECKS for case in CASES if place.runs(operation, case)}
    own = {"topk_mask", "lors_delta"}  # made of other operations
    missing = {name for name in asked - own if hasattr(kernels, name) and not hasattr(place.module, name)}
    assert not missing and {"gram_apply", "merge_update"} < asked
    assert {name for name in OPERATIONS if _has(backend, name, "cuda" if backend == "triton" else "cpu")} - own <= {
        *dir(place.module)
    }
