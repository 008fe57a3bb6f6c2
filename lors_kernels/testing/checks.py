"""The checks of `lors validate`: every public operation against its definition, on one case.

A check is a generator of findings: an aspect of the operation, its error and what is allowed. Selections, counts and
memory that is not the operation's own must be right to the last bit; sums may differ by what rounding explains (`oracle`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import numpy as np

import lors_kernels

from .. import dispatch, grouped
from ..arrays import BFLOAT16, is_torch, to_torch
from ..counter_random import random_bits
from ..types import KEEP_ALL, KEEP_NONE, Consensus, Keep, KeepStats, NonFiniteError, Threshold, UpdateStats
from . import oracle
from .cases import Case, interesting_k
from .numerics import delta_of, judge_claim, judge_low_rank

kernels: Any = lors_kernels  # looked up in the package at every call: a test may put something broken there
groups: Any = grouped

# Of two float32 sums over at most a few thousand products each, relative to ||delta||^2 ||x||. Seen: 1e-7 for random
# entries, 6e-7 for equal positive ones, whose roundings all go one way.
SUM_ERROR = 2e-6
SIGMA_ERROR = 1e-5  # of a singular value, relative to the largest: it moves no farther than L may (Weyl)
THREADS = 3  # more than one, and no divisor of most numbers of rows
RING = 5  # entries around a matrix, an odd number: its rows lie on no boundary


class Finding(NamedTuple):
    aspect: str
    error: float
    allowed: float = 0.0

    @property
    def ok(self) -> bool:
        return self.error <= self.allowed

    @property
    def share(self) -> float:
        """Of what is allowed."""
        return self.error / self.allowed if self.allowed else math.inf if self.error else 0.0


class Place:
    """Where a backend wants its tensors: numpy arrays, or torch tensors on its device."""

    def __init__(self, backend: str) -> None:
        self.backend = backend
        self.module = dispatch.load(backend)
        devices = self.module.DEVICES
        self.device = None if not devices or "cpu" in devices else devices[0]

    def runs(self, operation: str, case: Case) -> bool:
        """Stored parts and the last sum have no kernels on a GPU; groups that are a loop over single matrices are checked on small ones."""
        if case.hard and "truncated_svd" not in operation:
            return False
        if operation in ("sparse_part", "sparse_update"):
            return self.device is None and hasattr(self.module, operation)
        if operation == "apply_update":  # the reference's, on a GPU
            return hasattr(self.module, operation)
        return not (case.large and operation in GROUPS) or hasattr(self.module, "GROUPED")

    def put(self, x: Any) -> Any:
        """A copy: a kernel that writes where it should read must not change what it is compared with."""
        return x if x is None else x.copy() if self.device is None else to_torch(x).to(self.device)

    def tensor(self, x: Any) -> Any:
        """A torch tensor, for groups, even where numpy would do."""
        return x if x is None else to_torch(np.ascontiguousarray(x).copy()).to(self.device or "cpu")

    @staticmethod
    def get(x: Any) -> np.ndarray:
        if not is_torch(x):
            return x  # type: ignore[no-any-return]
        x = x.cpu()
        return x.view(_torch().uint16).numpy().view(BFLOAT16) if x.dtype == _torch().bfloat16 else x.numpy()  # type: ignore[no-any-return]


def _torch() -> Any:
    import torch

    return torch


class Ringed:
    """A matrix inside a larger buffer of NaN: what reads beyond its rows shows in the result, what writes there in `intact`."""

    def __init__(self, place: Place, x: np.ndarray, ring: int = RING) -> None:
        rows, cols = x.shape
        whole = np.full((rows + 2, cols + 2 * ring), np.nan, x.dtype)
        whole[1:-1, ring : ring + cols] = 77
        self._place, self._expected = place, whole.tobytes()
        whole[1:-1, ring : ring + cols] = x
        self._whole = place.put(whole)
        self.view = self._whole[1:-1, ring : ring + cols]

    def changed(self) -> float:
        """Number of bytes around the matrix that are not as they were; forgets the matrix."""
        self.view[...] = 77
        return _differing(self._place.get(self._whole).tobytes(), self._expected)


def _differing(a: bytes, b: bytes) -> float:
    return float(np.count_nonzero(np.frombuffer(a, np.uint8) != np.frombuffer(b, np.uint8)))


def _changed(place: Place, inputs: Sequence[np.ndarray], packed: Sequence[Any], rings: Sequence[Ringed]) -> float:
    """Number of bytes of the inputs that are not as they were given, packed and with strided rows."""
    given = [*packed, *(ring.view for ring in rings)]
    pairs = zip([*inputs, *inputs], given, strict=True)
    return sum(_differing(x.tobytes(), place.get(y).tobytes()) for x, y in pairs)


def _refused(call: Callable[[], object], error: type[Exception]) -> float:
    """0 if the call raises the error, else 1."""
    try:
        call()
    except error:
        return 0.0
    return 1.0


@cache
def _factors(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Low-rank factors near the best ones: delta projected on the image of a few random vectors."""
    delta = delta_of(*case.matrices()).astype(np.float64)
    x = np.random.default_rng(2).standard_normal((len(delta), case.rank))
    q = np.linalg.qr(delta.T @ x)[0]
    return (delta @ q).astype(np.float32), q.astype(np.float32)


def _with_bad_entries(x: np.ndarray) -> np.ndarray:
    """NaN at its first entry and infinity at its last."""
    bad = x.copy()
    bad.flat[0], bad.flat[-1] = np.nan, np.inf
    return bad


def low_bits(place: Place, base: np.ndarray, tuned: np.ndarray, left: Any, right: Any) -> np.ndarray:
    """L with the very bits the backend computes: adding it alone to zeros makes them visible."""
    out = place.put(np.zeros(tuned.shape, np.float32))
    arrays = [place.put(x) for x in (base, tuned, left, right)]
    kernels.merge_update(out, *arrays, KEEP_NONE, 1.0, backend=place.backend)
    return place.get(out)


def residual_of(backend: str, base: np.ndarray, tuned: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """delta - L with the very bits the backend computes."""
    return delta_of(base, tuned) - low_bits(Place(backend), base, tuned, left, right)


# --- one check per operation -----------------------------------------------------------------------------------------


def _gram_apply(place: Place, case: Case) -> Iterator[Finding]:
    base, tuned = case.matrices()
    delta = delta_of(base, tuned).astype(np.float64)
    rng = np.random.default_rng(1)
    for side, length in (("right", tuned.shape[1]), ("left", tuned.shape[0])):
        x = rng.standard_normal((length, 5)).astype(np.float32)
        exact = delta.T @ (delta @ x) if side == "right" else delta @ (delta.T @ x)
        scale = _product_scale(delta, x, exact)
        inputs = [place.put(y) for y in (base, tuned, x)]
        rings = [Ringed(place, y) for y in (base, tuned, x)]
        for name, arrays in (("sum", inputs), ("sum over strided rows", [ring.view for ring in rings])):
            options: dict[str, Any] = {"side": side, "backend": place.backend}
            z = place.get(kernels.gram_apply(*arrays, threads=THREADS, **options))
            yield Finding(f"{name}, {side}", float(np.linalg.norm(z - exact)) / scale, SUM_ERROR)
            again = place.get(kernels.gram_apply(*arrays, threads=1, **options))
            yield Finding("same bits on every run", _differing(z.tobytes(), again.tobytes()))
        yield Finding("inputs as they were", _changed(place, [base, tuned, x], inputs, rings))
        bad = place.put(_with_bad_entries(tuned))
        z = place.get(kernels.gram_apply(inputs[0], bad, inputs[2], **options))
        yield Finding("NaN shows", float(np.isfinite(z).any()))


def _product_scale(delta: np.ndarray, x: np.ndarray, exact: np.ndarray) -> float:
    """What SUM_ERROR is relative to; below the smallest normal float32 nothing relative can be promised."""
    return float(max(np.linalg.norm(delta) ** 2 * np.linalg.norm(x), np.sqrt(exact.size) * 2.0**-126 / SUM_ERROR))


def _truncated_svd(place: Place, case: Case) -> Iterator[Finding]:
    base, tuned = case.matrices()
    delta = delta_of(base, tuned)
    arrays = [place.put(x) for x in (base, tuned)]
    svd = kernels.truncated_svd(*arrays, case.rank, backend=place.backend, threads=THREADS)
    left, right, sigma = (place.get(x) for x in svd[:3])
    verdict = judge_low_rank(delta, left.astype(np.float64) @ right.astype(np.float64).T, case.rank)
    yield Finding("L", verdict.error, verdict.bound)
    yield from _claim(delta, left, right, svd.residual, svd.unique)
    yield from _svd_account(case, left, right, sigma, svd.energy)
    again = kernels.truncated_svd(*arrays, case.rank, backend=place.backend, threads=1)
    yield Finding("same bits on every run", _differing(left.tobytes(), place.get(again.left).tobytes()))
    bad = place.put(_with_bad_entries(tuned))
    call = partial(kernels.truncated_svd, arrays[0], bad, case.rank, backend=place.backend)
    yield Finding("NaN refused", _refused(call, NonFiniteError))


def _claim(delta: np.ndarray, left: np.ndarray, right: np.ndarray, residual: float, unique: bool) -> Iterator[Finding]:
    """What the decomposition says of itself."""
    verdict = judge_claim(delta, left, right, residual, unique)
    yield Finding("error within the residual", verdict.error, verdict.claim)
    yield Finding("residual within the contract, unique where it is", float(not verdict.ok))


def _svd_account(
    case: Case, left: np.ndarray, right: np.ndarray, sigma: np.ndarray, energy: float
) -> Iterator[Finding]:
    """The singular values, the length of the vectors that come with them, and the energy."""
    exact = _singular_values(case)[: case.rank]
    unit = max(exact[0], 2.0**-120)
    yield Finding("sigma", float(np.abs(sigma - exact).max() / unit), SIGMA_ERROR)
    yield Finding("sigma in order", float(np.diff(sigma).max(initial=0) / unit), 1e-6)  # noise where delta's rank ends
    length = np.linalg.norm(left.astype(np.float64), axis=0)
    yield Finding("length of left", float(np.abs(length - exact).max() / unit), SIGMA_ERROR)
    length = np.linalg.norm(right.astype(np.float64)[:, exact > max(1e-3 * unit, 2.0**-100)], axis=0)
    yield Finding("length of right", float(np.abs(length - 1).max(initial=0)), SIGMA_ERROR)
    yield Finding("energy", oracle.sum_error(energy, delta_of(*case.matrices()), 2), 1.0)


@cache
def _singular_values(case: Case) -> np.ndarray:
    return np.linalg.svd(delta_of(*case.matrices()).astype(np.float64), compute_uv=False)


def _residual_threshold(place: Place, case: Case) -> Iterator[Finding]:
    """The selection for every interesting k, of delta and of a residual."""
    base, tuned = case.matrices()
    delta = delta_of(base, tuned)
    rings = [Ringed(place, x) for x in (base, tuned)]
    for factors in ((None, None), _factors(case)):
        residual = delta if factors[0] is None else delta - low_bits(place, base, tuned, *factors)
        arrays = [place.put(x) for x in (base, tuned, *factors)]

        def found(pair: Sequence[Any], k: int, threads: int = THREADS, rest: Any = arrays[2:]) -> Threshold:
            return kernels.residual_threshold(*pair, *rest, k, backend=place.backend, threads=threads)

        for k in interesting_k(delta.size):
            threshold, exact = found(arrays[:2], k), oracle.nth_largest(residual, k)
            yield Finding(f"k = {k}", _miscounted(residual, threshold, exact))
            yield Finding("same on every run", float(found(arrays[:2], k, 1) != threshold))
        k = delta.size // 5
        strided = found([ring.view for ring in rings], k)
        yield Finding("strided rows", _miscounted(residual, strided, oracle.nth_largest(residual, k)))
    bad = place.put(_with_bad_entries(tuned))
    try:
        kernels.residual_threshold(place.put(base), bad, k=1, backend=place.backend)
        count = 0
    except NonFiniteError as error:
        count = error.count
    yield Finding("NaN and infinity counted", abs(count - min(2, delta.size)))


def _miscounted(residual: np.ndarray, found: Threshold, exact: Threshold) -> float:
    """Wrongly selected entries, or 1 where only the fields say something wrong."""
    wrong = np.count_nonzero(oracle.selected(residual, found) != oracle.selected(residual, exact))
    return float(wrong or (found.value, found.ties) != (exact.value, exact.ties))


class _Term(NamedTuple):
    """What one expert adds."""

    tuned: np.ndarray
    left: np.ndarray | None
    right: np.ndarray | None
    threshold: Threshold | None
    weight: float
    low: np.ndarray  # L with the backend's bits
    residual: np.ndarray
    kept: np.ndarray  # the residual where it is kept, else 0


def _terms(place: Place, case: Case) -> list[_Term]:
    """The case's own expert with L, and without: a threshold among ties that came about by no rounding; one whole."""
    base, tuned = case.matrices()
    mirror = np.ascontiguousarray(tuned[::-1, ::-1])
    terms = []
    for x, (left, right), k, weight in (
        (tuned, _factors(case), tuned.size // 5, 0.3), (mirror, (None, None), tuned.size // 2, -1.7),
        (tuned, (None, None), None, 0.7),
    ):  # fmt: skip
        low = np.zeros(x.shape, np.float32) if left is None else low_bits(place, base, x, left, right)
        residual = delta_of(base, x) - low
        threshold = None if k is None else oracle.nth_largest(residual, k)
        kept = np.where(oracle.selected(residual, threshold or KEEP_ALL), residual, np.float32(0))
        terms.append(_Term(x, left, right, threshold, weight, low, residual, kept))
    return terms


def _merge_update(place: Place, case: Case) -> Iterator[Finding]:
    """Three experts at once, over float32 and in place of the base."""
    base, _ = case.matrices()
    terms = _terms(place, case)
    exact = [(term.weight, term.low, term.kept) for term in terms]
    yield Finding("L", oracle.low_rank(*_factors(case)).error(terms[0].low), 1.0)
    rest: list[list[Any]] = [[place.put(term[c]) for term in terms] for c in (1, 2)]  # left, right
    rest += [[term.threshold for term in terms], [term.weight for term in terms]]
    options: dict[str, Any] = {"backend": place.backend}
    inputs, start = [place.put(x) for x in (base, *(term.tuned for term in terms))], base.astype(np.float32)
    outs = [place.put(start) for _ in range(3)]
    stats = kernels.merge_update(outs[0], inputs[0], inputs[1:], *rest, threads=THREADS, **options)
    kernels.merge_update(outs[1], inputs[0], inputs[1:], *rest, threads=1, **options)
    for x, *rule in zip(inputs[1:], *rest, strict=True):
        kernels.merge_update(outs[2], inputs[0], x, *rule, **options)
    bits = [place.get(out).tobytes() for out in outs]
    yield Finding("sum", oracle.merged(start, exact).error(place.get(outs[0])), 1.0)
    yield Finding("same bits on every run", _differing(*bits[:2]))
    yield Finding("bits of one expert after the other", _differing(*bits[::2]))
    for s, term in zip(stats, terms, strict=True):
        yield from _update_stats(s, base, term)
    rings = [Ringed(place, x) for x in (base, *(term.tuned for term in terms))]
    kernels.merge_update(rings[0].view, rings[0].view, [r.view for r in rings[1:]], *rest, threads=THREADS, **options)
    yield Finding("sum in place of the base", oracle.merged(base, exact).error(place.get(rings[0].view)), 1.0)
    yield Finding("inputs as they were", _changed(place, [term.tuned for term in terms], inputs[1:], rings[1:]))
    yield Finding("what lies around", sum(ring.changed() for ring in rings))
    bad = place.put(_with_bad_entries(terms[0].tuned))
    found = kernels.merge_update(outs[0], inputs[0], bad, **options).non_finite
    yield Finding("NaN and infinity counted", abs(found - min(2, base.size)))


def _update_stats(stats: UpdateStats, base: np.ndarray, term: _Term) -> Iterator[Finding]:
    mask = oracle.selected(term.residual, term.threshold or KEEP_ALL)
    yield Finding("kept, non_finite", abs(stats.kept - np.count_nonzero(mask)) + stats.non_finite)
    arrays = delta_of(base, term.tuned), term.residual, term.kept
    for name, energy, x in zip(stats._fields[:3], stats[:3], arrays, strict=True):
        yield Finding(name, oracle.sum_error(energy, x, 2), 1.0)


def _apply_update(place: Place, case: Case) -> Iterator[Finding]:
    """base + update in every type, with the base scaled and without one, packed and in place of the base."""
    base, update = case.matrices()
    inputs, rings = [place.put(x) for x in (base, update)], [Ringed(place, x) for x in (base, update)]
    options: dict[str, Any] = {"backend": place.backend}
    for dtype in (np.dtype(np.float32), np.dtype(np.float16), BFLOAT16):
        for scale, start in ((1.0, base), (-0.5, base), (1.0, None)):
            exact = oracle.applied(scale, start, update, dtype)
            outs = [Ringed(place, np.zeros(base.shape, dtype)) for _ in range(2)]
            first = None if start is None else inputs[0]
            found, again = (
                kernels.apply_update(out.view, first, inputs[1], scale=scale, threads=threads, **options)
                for out, threads in zip(outs, (THREADS, 1), strict=True)
            )
            bits = [place.get(out.view).tobytes() for out in outs]
            yield Finding(f"sum in {dtype}", exact.error(place.get(outs[0].view)), 1.0)
            yield Finding("largest", abs(found - np.abs(exact.value.astype(np.float32)).max(initial=0)))
            yield Finding("same bits on every run", _differing(*bits) + (found != again))
            yield Finding("what lies around", outs[0].changed())
    yield Finding("inputs as they were", _changed(place, [base, update], inputs, rings))
    exact = oracle.applied(1.0, base, update, base.dtype)
    kernels.apply_update(rings[0].view, rings[0].view, rings[1].view, threads=THREADS, **options)
    yield Finding("sum in place of the base", exact.error(place.get(rings[0].view)), 1.0)
    out = place.put(np.zeros(base.shape, np.float32))
    largest = kernels.apply_update(out, inputs[0], place.put(_with_bad_entries(update)), **options)
    yield Finding("NaN and infinity show", float(math.isfinite(largest)))


def _ties_settings(
    delta: np.ndarray, other: np.ndarray, start: int
) -> Iterator[tuple[list[Keep], list[float], Consensus]]:
    """Experts whose values cancel exactly; then a different kind of rule for each, with and without an election."""
    yield [Keep()] * 3, [1.0, 0.0, 1.0], Consensus(True, True, 1.0, 0)
    size, key = delta.size, 0xF123456789ABCDEF  # a key whose top bit is set

    def threshold(x: np.ndarray, k: int) -> Threshold:
        found = oracle.nth_largest(x, k)
        return found._replace(cut=found.cut + start)

    # the limit is the very number that is drawn for an entry in the middle, which is therefore not kept
    drawn = int(random_bits(key, start + size // 2, 1)[0])
    keep = [
        Keep(threshold(delta, size // 3)),
        Keep(threshold(other, size // 2), threshold(other, size // 10), factor=1.5),
        Keep(key=key, limit=drawn),
    ]
    weight = [0.5, -1.0, 2.0]
    for elect, normalize in ((True, True), (True, False), (False, True)):
        yield keep, weight, Consensus(elect, normalize, 0.7, start)


def _ties_update(place: Place, case: Case) -> Iterator[Finding]:
    """Three experts: the case's own, its mirror image, and the one whose delta is the negative of the first's."""
    base, tuned = case.matrices()
    mirror = np.ascontiguousarray(tuned[::-1, ::-1])
    negative = (base.astype(np.float32) - delta_of(base, tuned)).astype(tuned.dtype)
    experts = [tuned, mirror, negative]
    deltas = [delta_of(base, x) for x in experts]
    inputs = [place.put(x) for x in (base, *experts)]
    first = base.astype(np.float32)
    for keep, weight, rule in _ties_settings(deltas[0], deltas[1], 2**33 + 5):
        options: dict[str, Any] = {**rule._asdict(), "backend": place.backend}

        def update(
            out: Any, base: Any, *experts: Any, threads: int, o: Any = options, k: Any = keep, w: Any = weight
        ) -> Any:
            return kernels.ties_update(out, base, experts, k, w, threads=threads, **o)

        exact = oracle.agreed(first, deltas, keep, weight, rule)
        outs = [place.put(first.copy()) for _ in range(2)]
        stats = update(outs[0], *inputs, threads=THREADS)
        yield Finding("consensus", exact.error(place.get(outs[0])), 1.0)
        account = update(outs[1], *inputs, threads=1)
        yield Finding(
            "same bits on every run", _differing(*(place.get(out).tobytes() for out in outs)) + (account != stats)
        )
        yield Finding("account alone", float(update(None, *inputs, threads=THREADS) != stats))
        for s, delta, k in zip(stats, deltas, keep, strict=True):
            yield from _keep_stats(s, delta, oracle.kept(delta, k, rule.start))
    rings = [Ringed(place, x) for x in (base, *experts)]
    update(rings[0].view, *(ring.view for ring in rings), threads=THREADS)
    exact = oracle.agreed(base, deltas, keep, weight, rule)
    yield Finding("consensus in place of the base", exact.error(place.get(rings[0].view)), 1.0)
    yield Finding("inputs as they were", _changed(place, experts, inputs[1:], rings[1:]))
    yield Finding("what lies around", sum(ring.changed() for ring in rings))
    bad = place.put(_with_bad_entries(tuned))
    found = kernels.ties_update(None, inputs[0], [bad], [Keep()], [1.0], backend=place.backend)[0].non_finite
    yield Finding("NaN and infinity counted", abs(found - min(2, tuned.size)))


def _keep_stats(stats: KeepStats, delta: np.ndarray, mask: np.ndarray) -> Iterator[Finding]:
    yield Finding("kept, non_finite", abs(stats.kept - np.count_nonzero(mask)) + stats.non_finite)
    kept = np.where(mask, delta, np.float32(0))
    for name, power, x in (
        ("delta_energy", 2, delta),
        ("kept_energy", 2, kept),
        ("delta_sum", 1, delta),
        ("kept_sum", 1, kept),
    ):
        yield Finding(name, oracle.sum_error(getattr(stats, name), x, power), 1.0)


def _sparse_part(place: Place, case: Case) -> Iterator[Finding]:
    base, tuned = case.matrices()
    delta = delta_of(base, tuned)
    inputs, rings = [place.put(x) for x in (base, tuned)], [Ringed(place, x) for x in (base, tuned)]
    for factors in ((None, None), _factors(case)):
        residual = delta if factors[0] is None else delta - low_bits(place, base, tuned, *factors)
        for k in sorted({0, 1, delta.size // 5, delta.size}):
            threshold = oracle.nth_largest(residual, k)
            mask = oracle.selected(residual, threshold)
            for pair in (inputs, [ring.view for ring in rings]):
                part = kernels.sparse_part(*pair, *factors, threshold, k, backend=place.backend)
                bits = np.packbits(mask, bitorder="little")
                yield Finding(f"mask, k = {k}", _differing(part.mask.tobytes(), bits.tobytes()))
                yield Finding(f"values, k = {k}", _differing(part.values.tobytes(), residual[mask].tobytes()))
        for wrong in (k - 1, max(0, delta.size // 2 - 1)):
            arguments = [*inputs, *factors, threshold, wrong]
            call = partial(kernels.sparse_part, *arguments, backend=place.backend)
            yield Finding("another count refused", _refused(call, ValueError))
    yield Finding("inputs as they were", _changed(place, [base, tuned], inputs, rings))
    yield Finding("what lies around", sum(ring.changed() for ring in rings))


def _sparse_update(place: Place, case: Case) -> Iterator[Finding]:
    base, tuned = case.matrices()
    delta, (left, right) = delta_of(base, tuned), _factors(case)
    low = low_bits(place, base, tuned, left, right)
    mask = oracle.selected(delta, oracle.nth_largest(delta, delta.size // 5))
    bits, start = np.packbits(mask, bitorder="little"), base.astype(np.float32)
    for dtype, scale, factors in (
        (np.float32, 1.0, (left, right)), (np.float16, 0.5, (None, None)), (BFLOAT16, 3.0, (left, right)),
    ):  # fmt: skip
        values = np.clip(delta[mask], -6e4, 6e4).astype(dtype)
        sparse = np.zeros(delta.shape, np.float32)
        sparse[mask] = values.astype(np.float32) * np.float32(scale)
        whole = np.full(start.size + 2 * RING, np.nan, np.float32)
        out = whole[RING : RING + start.size].reshape(start.shape)
        out[...] = start
        part = kernels.SparsePart(bits, values)
        stats = kernels.sparse_update(out, part, *factors, scale=scale, weight=-0.3, backend=place.backend)
        term = (-0.3, np.float32(0) if factors[0] is None else low, sparse)
        yield Finding(f"sum, {np.dtype(dtype).name}", oracle.merged(start, [term]).error(out), 1.0)
        yield Finding("energy", oracle.sum_error(stats.energy, sparse, 2), 1.0)
        yield Finding("non_finite", stats.non_finite)
        yield Finding("what lies around", float(np.isfinite(whole[:RING]).sum() + np.isfinite(whole[-RING:]).sum()))
        before = out.copy()
        longer = part._replace(values=np.append(values, values[:1]) if values.size else np.ones(1, dtype))
        call = partial(kernels.sparse_update, out, longer, *factors, backend=place.backend)
        yield Finding("another count refused", _refused(call, ValueError) + _differing(out.tobytes(), before.tobytes()))
    if values.size:
        bad = part._replace(values=np.full(values.size, np.nan, np.float32))
        found = kernels.sparse_update(out, bad, backend=place.backend).non_finite
        yield Finding("NaN counted", abs(found - values.size))


def _topk_mask(place: Place, case: Case) -> Iterator[Finding]:
    _, tuned = case.matrices()
    x = place.put(tuned)
    for k in interesting_k(tuned.size):
        mask = place.get(kernels.topk_mask(x, k, backend=place.backend, threads=THREADS))
        exact = oracle.selected(tuned.astype(np.float32), oracle.nth_largest(tuned, k))
        yield Finding(f"k = {k}", float(np.count_nonzero(mask != exact)))
    bad = place.put(_with_bad_entries(tuned))
    call = partial(kernels.topk_mask, bad, 1, backend=place.backend)
    yield Finding("NaN refused", _refused(call, NonFiniteError))


def _lors_delta(place: Place, case: Case) -> Iterator[Finding]:
    """Against the parts it is made of: L of the same seed, S of what that leaves."""
    _, tuned = case.matrices()
    delta = tuned.astype(np.float32)
    x = place.put(tuned)
    for rank, density in ((case.rank, 0.2), (0, 0.2), (case.rank, 0.0)):
        found = place.get(kernels.lors_delta(x, rank, density, seed=3, backend=place.backend, threads=THREADS))
        low = np.zeros_like(delta)
        if rank:
            svd = kernels.truncated_svd(None, x, rank, seed=3, backend=place.backend)
            out = place.put(low)
            kernels.merge_update(out, None, x, svd.left, svd.right, KEEP_NONE, backend=place.backend)
            low = place.get(out)
        residual = delta - low
        mask = oracle.selected(residual, oracle.nth_largest(residual, int(density * delta.size)))
        exact = oracle.merged(np.zeros_like(delta), [(1.0, low, np.where(mask, residual, np.float32(0)))])
        yield Finding(f"L + S, rank {rank}, density {density}", exact.error(found), 1.0)
        again = place.get(kernels.lors_delta(x, rank, density, seed=3, backend=place.backend, threads=1))
        yield Finding("same bits on every run", _differing(found.tobytes(), again.tobytes()))
    bad = place.put(_with_bad_entries(tuned))
    call = partial(kernels.lors_delta, bad, 1, 0.5, backend=place.backend)
    yield Finding("NaN refused", _refused(call, NonFiniteError))


def _group(place: Place, case: Case) -> tuple[Any, list[Any]]:
    """Two matrices with two experts each, all unlike, and factors for every pair."""
    base, tuned = case.matrices()
    bases = [place.tensor(x) for x in (base, base[::-1])]
    experts = [[place.tensor(x) for x in row] for row in ((tuned, tuned[:, ::-1]), (tuned[::-1], tuned[::-1, ::-1]))]
    group = groups.MatrixGroup(bases, experts)
    left, right = (x[:, :1] for x in _factors(case))
    return group, [place.tensor(np.stack([left * p for p in (1, 2, 3, 4)])), place.tensor(np.stack([right] * 4))]


def _reading_groups(place: Place, case: Case) -> Iterator[Finding]:
    """gram_apply_group and residual_threshold_group: what each pair gives alone."""
    group, factors = _group(place, case)
    x = np.random.default_rng(4).standard_normal((4, group.n, 3)).astype(np.float32)
    products = place.get(groups.gram_apply_group(group, place.tensor(x), backend=place.backend))
    k = group.m * group.n // 5
    thresholds = groups.residual_threshold_group(group, *factors, k, backend=place.backend).thresholds()
    for p, (base, tuned) in enumerate(group.each()):
        delta = delta_of(place.get(base), place.get(tuned)).astype(np.float64)
        exact = delta.T @ (delta @ x[p])
        error = float(np.linalg.norm(products[p] - exact)) / _product_scale(delta, x[p], exact)
        yield Finding("gram_apply_group", error, SUM_ERROR)
        pair = [base, tuned, factors[0][p], factors[1][p]]
        alone = kernels.residual_threshold(*pair, k, backend=place.backend)
        yield Finding("residual_threshold_group", float(alone != thresholds[p]))


def _writing_groups(place: Place, case: Case) -> Iterator[Finding]:
    """merge_update_group and ties_update_group: what each matrix gives alone."""
    group, factors = _group(place, case)
    options: dict[str, Any] = {"backend": place.backend}
    deltas = [delta_of(place.get(base), place.get(tuned)) for base, tuned in group.each()]
    thresholds = [oracle.nth_largest(delta, delta.size // 5) for delta in deltas]
    keep, weight = [Keep(t) for t in thresholds], [0.5, -2.0]
    zeros = np.zeros((group.m, group.n), np.float32)
    merged, elected = ([place.tensor(zeros) for _ in range(2)] for _ in range(2))
    on_device = groups.GroupThreshold.of(thresholds, group.device)
    updated = groups.merge_update_group(group, merged, *factors, on_device, weight, **options).stats()
    kept = groups.ties_update_group(group, elected, keep, weight, **options).stats()
    for i, (base, row) in enumerate(zip(group.bases, group.tuned, strict=True)):
        span, out = slice(2 * i, 2 * i + 2), place.tensor(zeros)
        stats = kernels.merge_update(
            out, base, row, *([*f[span]] for f in factors), thresholds[span], weight, **options
        )
        yield Finding("merge_update_group", _unlike(place, out, merged[i], stats, updated[span]))
        out = place.tensor(zeros)
        account = kernels.ties_update(out, base, row, keep[span], weight, **options)
        yield Finding("ties_update_group", _unlike(place, out, elected[i], account, kept[span]))


def _unlike(place: Place, a: Any, b: Any, stats: Sequence[Any], others: Sequence[Any]) -> float:
    """Bytes that differ, and numbers of the accounts that differ by more than the order of a float64 sum."""
    pairs = zip(np.ravel(stats), np.ravel(others), strict=True)
    wrong = sum(not math.isclose(x, y, rel_tol=1e-9, abs_tol=1e-300) for x, y in pairs)
    return wrong + _differing(place.get(a).tobytes(), place.get(b).tobytes())


def _svd_groups(place: Place, case: Case) -> Iterator[Finding]:
    base, tuned = case.matrices()
    pairs = [(base, tuned), (base[::-1], tuned[::-1])]
    group = groups.MatrixGroup([place.tensor(b) for b, _ in pairs], [[place.tensor(t)] for _, t in pairs])
    svd = groups.truncated_svd_group(group, case.rank, backend=place.backend)
    for p, pair in enumerate(pairs):
        left, right = (place.get(x[p]) for x in (svd.left, svd.right))
        verdict = judge_low_rank(delta_of(*pair), left.astype(np.float64) @ right.astype(np.float64).T, case.rank)
        yield Finding("L", verdict.error, verdict.bound)
        yield from _claim(delta_of(*pair), left, right, svd.residual[p], svd.unique[p])


CHECKS: dict[str, Callable[[Place, Case], Iterator[Finding]]] = {
    "gram_apply": _gram_apply,
    "truncated_svd": _truncated_svd,
    "residual_threshold": _residual_threshold,
    "merge_update": _merge_update,
    "apply_update": _apply_update,
    "ties_update": _ties_update,
    "sparse_part": _sparse_part,
    "sparse_update": _sparse_update,
    "topk_mask": _topk_mask,
    "lors_delta": _lors_delta,
    "reading groups": _reading_groups,
    "writing groups": _writing_groups,
    "truncated_svd_group": _svd_groups,
}
GROUPS = ("reading groups", "writing groups", "truncated_svd_group")
