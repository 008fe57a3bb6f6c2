"""`lors bench`: every operation on every backend that is there, timed beside plain torch and checked in the same run.

A row says how long one call takes on matrices that lie in the cache where they fit, how many counted bytes that is per
second, and which share it reaches of the floor: the time that reading those bytes from the level they lie in, or computing
with multiply-adds at the measured peak, would take at least. `benchmarks` measures what a merge costs; this says what the
kernels do here.
"""

from __future__ import annotations

import itertools
import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache, cached_property, partial
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np
import torch

import lors_kernels as kernels

from .. import dispatch
from ..__main__ import diagnosis
from ..sparse_part import SparsePart
from ..threads import thread_count
from ..types import Keep
from . import plain
from .cases import SHAPES
from .numerics import LOW_RANK_ERROR
from .peaks import Peaks, cpu_peaks, device_peaks

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
DEFAULT_SHAPES = {name: SHAPES[name] for name in ("small-attn", "small-fc1")}
EXPERTS, WEIGHT, VECTORS = 3, 0.2, 16
ENOUGH, ROUNDS = 0.1, 20  # seconds and calls after which a median is taken, whichever comes first, and at least three
LONG = 1.0  # seconds of a first call that is not repeated

Checked = tuple[float, float]  # (error, allowed)
Solution = tuple[Any, Any]  # (left, right)


class Work(NamedTuple):
    """An operation on given matrices."""

    ours: Callable[[str], Any]  # by the backend of this name
    plain: Callable[[], Any]
    check: Callable[[Any], Checked]  # of what ours returned
    nbytes: int  # read or written at least, once each
    flops: int
    rivals: dict[str, Callable[[], Solution]] = {}  # of the decomposition


@dataclass(frozen=True)
class Row:
    backend: str
    operation: str
    shape: tuple[int, int]
    dtype: str
    ms: float
    gb_per_s: float
    peak_share: float
    plain_ms: float
    rival: str | None  # the fastest one that is as right as is asked
    rival_ms: float | None
    error: float
    allowed: float

    @property
    def ok(self) -> bool:
        return self.error <= self.allowed


class Matrices:
    """A base and experts whose changes have singular values that fall as 1 / sqrt(i), or are noise; made from a seed."""

    def __init__(
        self, shape: tuple[int, int], dtype: str, device: str, rank: int, density: float, *, noise: bool = False
    ) -> None:
        self.device, self.dtype, self.rank = device, DTYPES[dtype], min(rank, *shape)
        self.m, self.n = shape
        self.k = int(self.m * self.n * density)
        generator = torch.Generator().manual_seed(0)
        base = torch.randn(shape, generator=generator) * 0.03
        self.base = self._put(base)
        self.tuned = [self._put(base + self._change(generator, noise)) for _ in range(EXPERTS)]

    def _change(self, generator: torch.Generator, noise: bool) -> torch.Tensor:
        if noise:
            return torch.randn(self.m, self.n, generator=generator) * 1e-3
        count = min(self.m, self.n)
        left = torch.randn(self.m, count, generator=generator) / torch.arange(1, count + 1).sqrt()
        return left @ torch.randn(count, self.n, generator=generator) * (1e-2 / count**0.5)

    def _put(self, x: torch.Tensor) -> torch.Tensor:
        return x.to(self.device, self.dtype)

    @cached_property
    def delta(self) -> torch.Tensor:
        return plain.delta(self.base, self.tuned[0])

    @cached_property
    def exact(self) -> torch.Tensor:
        """L in float64: the leading eigenvectors of the smaller Gram matrix."""
        d = self.delta.double() if self.n <= self.m else self.delta.double().T
        leading = torch.linalg.eigh(d.T @ d).eigenvectors[:, -self.rank :]
        low = d @ leading @ leading.T
        return low if self.n <= self.m else low.T

    @cached_property
    def factors(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        found = [kernels.truncated_svd(self.base, tuned, self.rank) for tuned in self.tuned]
        return [svd.left for svd in found], [svd.right for svd in found]

    @cached_property
    def thresholds(self) -> list[kernels.Threshold]:
        of = zip(self.tuned, *self.factors, strict=True)
        return [kernels.residual_threshold(self.base, tuned, left, right, self.k) for tuned, left, right in of]

    @property
    def pair_bytes(self) -> int:
        return 2 * self.base.nbytes

    @property
    def factor_bytes(self) -> int:
        return 4 * (self.m + self.n) * self.rank

    def zeros(self) -> torch.Tensor:
        return torch.zeros(self.m, self.n, device=self.device)


def close(found: torch.Tensor, truths: Sequence[torch.Tensor], naive: torch.Tensor) -> Checked:
    """Relative errors: of what was found, against the nearest of several float64 truths at every entry, and what is allowed,
    4 times (another order of the sums) that of plain float32. A tenth of a percent of the largest entry anywhere is wrong
    however small the sum over all entries leaves it."""
    nearest, plainly = (_nearest(x.double(), truths) for x in (found, naive))
    scale, largest = float(truths[0].norm()) or 1.0, float(truths[0].abs().max())
    error, allowed = float((found - nearest).norm()) / scale, 4 * float((naive - plainly).norm()) / scale + 1e-7
    far = float((found - nearest).abs().max())
    return (max(error, far / largest), allowed) if far > 1e-3 * largest else (error, allowed)


def _nearest(x: torch.Tensor, truths: Sequence[torch.Tensor]) -> torch.Tensor:
    best = truths[0]
    for truth in truths[1:]:
        best = torch.where((x - truth).abs() < (x - best).abs(), truth, best)
    return best


def around(values: Sequence[float]) -> Iterator[tuple[float, ...]]:
    """Thresholds with each a little lower or higher: an entry that lies on one, as at least one does, is kept or not by a
    rounding, or by its place among equals."""
    return itertools.product(*((value * (1 - 1e-5), value * (1 + 1e-5)) for value in values))


# --- the operations -------------------------------------------------------------------------------------------------


def gram_apply(of: Matrices) -> Work:
    x = torch.randn(of.n, VECTORS, generator=torch.Generator().manual_seed(1)).to(of.device)
    pair = of.base, of.tuned[0]
    return Work(
        lambda backend: kernels.gram_apply(*pair, x, backend=backend),
        lambda: plain.gram_apply(*pair, x),
        lambda z: close(z, [plain.gram_apply(*pair, x.double())], plain.gram_apply(*pair, x)),
        of.pair_bytes + 2 * x.nbytes,
        4 * of.m * of.n * VECTORS,
    )


def truncated_svd(of: Matrices) -> Work:
    """Counted as what any method needs at least: one pass that reads, and 2 r vectors applied once."""

    def error(left: Any, right: Any) -> float:
        low = left.double() @ right.double().T
        return float((low - of.exact).norm() / of.exact.norm())

    def rival(solve: Callable[[], tuple[Any, Any]]) -> Callable[[], tuple[Any, Any]]:
        left, right = solve()
        return solve if error(left, right) <= LOW_RANK_ERROR else _too_wrong

    solvers: dict[str, Callable[[], Solution]] = {"torch svd_lowrank": lambda: _svd_lowrank(of)}
    if of.device == "cpu" and _has_scipy():
        for name in ("arpack", "propack"):
            if solve := _as_right(of, name, error):
                solvers[f"scipy {name}"] = solve
    return Work(
        lambda backend: kernels.truncated_svd(of.base, of.tuned[0], of.rank, backend=backend),
        lambda: plain.thin_svd(plain.delta(of.base, of.tuned[0]), of.rank),
        lambda svd: (error(svd.left, svd.right), LOW_RANK_ERROR),
        of.pair_bytes + of.factor_bytes,
        8 * of.m * of.n * of.rank,
        {name: ready for name, solve in solvers.items() if (ready := rival(solve)) is not _too_wrong},
    )


def residual_threshold(of: Matrices) -> Work:
    args = of.base, of.tuned[0], of.factors[0][0], of.factors[1][0]
    largest = float(of.exact.abs().max())

    def expected() -> torch.Tensor:
        return plain.kth_largest(plain.residual_magnitudes(*args), of.k)

    return Work(
        lambda backend: kernels.residual_threshold(*args, of.k, backend=backend),
        expected,
        # L in another order of the rank's sum: a rounding of L apart, no more
        lambda threshold: (abs(threshold.value - float(expected())) / largest, 1e-6),
        of.pair_bytes + of.factor_bytes,
        2 * of.m * of.n * of.rank,
    )


def merge_update(of: Matrices) -> Work:
    left, right = of.factors
    values = [threshold.value for threshold in of.thresholds]
    out = of.zeros()

    def naive(dtype: torch.dtype, values: Sequence[float] = values) -> torch.Tensor:
        return plain.merge_update(of.zeros().to(dtype), of.base, of.tuned, left, right, values, WEIGHT)

    def ours(backend: str) -> torch.Tensor:
        out.zero_()
        kernels.merge_update(out, of.base, of.tuned, left, right, of.thresholds, [WEIGHT] * EXPERTS, backend=backend)
        return out

    truths = cache(lambda: [naive(torch.float64, each) for each in around(values)])
    return Work(
        ours,
        lambda: plain.merge_update(out, of.base, of.tuned, left, right, values, WEIGHT),
        lambda found: close(found, truths(), naive(torch.float32)),
        (1 + EXPERTS) * of.base.nbytes + 2 * out.nbytes + EXPERTS * of.factor_bytes,
        2 * EXPERTS * of.m * of.n * of.rank,
    )


def apply_update(of: Matrices) -> Work:
    update, out = of.delta, torch.empty_like(of.base)

    def ours(backend: str) -> torch.Tensor:
        kernels.apply_update(out, of.base, update, backend=backend)
        return out

    def wrong(found: torch.Tensor) -> Checked:
        return float((found != plain.apply_update(torch.empty_like(out), of.base, update)).sum()), 0.0

    return Work(
        ours,
        lambda: plain.apply_update(out, of.base, update),
        wrong,
        of.base.nbytes + update.nbytes + out.nbytes,
        2 * out.numel(),
    )


def ties_update(of: Matrices) -> Work:
    thresholds = [kernels.residual_threshold(of.base, tuned, k=of.k) for tuned in of.tuned]
    keep, values = [Keep(low=threshold) for threshold in thresholds], [threshold.value for threshold in thresholds]
    out = of.zeros()

    def naive(dtype: torch.dtype, values: Sequence[float] = values) -> torch.Tensor:
        return plain.ties_update(of.zeros().to(dtype), of.base, of.tuned, values, WEIGHT)

    def ours(backend: str) -> torch.Tensor:
        out.zero_()
        kernels.ties_update(out, of.base, of.tuned, keep, [1.0] * EXPERTS, scale=WEIGHT, backend=backend)
        return out

    # Where what is kept cancels, a rounding elects the sign: as in float32 is right too.
    truths = cache(
        lambda: [naive(dtype, each).double() for dtype in (torch.float64, torch.float32) for each in around(values)]
    )
    return Work(
        ours,
        lambda: plain.ties_update(out, of.base, of.tuned, values, WEIGHT),
        lambda found: close(found, truths(), naive(torch.float32)),
        (1 + EXPERTS) * of.base.nbytes + 2 * out.nbytes,
        4 * EXPERTS * out.numel(),
    )


def sparse_part(of: Matrices) -> Work:
    of_torch = of.base.float(), of.tuned[0].float(), of.factors[0][0], of.factors[1][0]
    base, tuned, left, right = (x.numpy() for x in of_torch)
    threshold = kernels.residual_threshold(*of_torch, of.k)

    def differing(found: SparsePart) -> Checked:
        flipped = found.mask ^ plain.sparse_part(*of_torch, threshold.value)[0]
        return float(sum(bin(byte).count("1") for byte in flipped[flipped > 0])), 1e-4 * of.m * of.n + 2

    return Work(
        lambda backend: kernels.sparse_part(base, tuned, left, right, threshold, of.k, backend=backend),
        lambda: plain.sparse_part(*of_torch, threshold.value),
        differing,
        2 * of_torch[0].nbytes + of.factor_bytes + of.m * of.n // 8 + 4 * of.k,
        2 * of.m * of.n * of.rank,
    )


def sparse_update(of: Matrices) -> Work:
    left, right = of.factors[0][0], of.factors[1][0]
    base, tuned, u, v = (x.numpy() for x in (of.base.float(), of.tuned[0].float(), left, right))
    part = kernels.sparse_part(base, tuned, u, v, kernels.residual_threshold(base, tuned, u, v, of.k), of.k)
    values, out = torch.from_numpy(part.values), of.zeros()

    def naive(dtype: torch.dtype) -> torch.Tensor:
        return plain.sparse_update(of.zeros().to(dtype), part.mask, values, left, right, WEIGHT)

    def ours(backend: str) -> torch.Tensor:
        out.zero_()
        kernels.sparse_update(out.numpy(), part, u, v, weight=WEIGHT, backend=backend)
        return out

    return Work(
        ours,
        lambda: plain.sparse_update(out, part.mask, values, left, right, WEIGHT),
        lambda found: close(found, [naive(torch.float64)], naive(torch.float32)),
        2 * out.nbytes + of.factor_bytes + part.mask.nbytes + part.values.nbytes,
        2 * of.m * of.n * of.rank,
    )


def topk_mask(of: Matrices) -> Work:
    x = of.delta.to(of.dtype)

    def wrong(found: torch.Tensor) -> Checked:
        magnitudes = x.float().abs()
        least = magnitudes.where(found, math.inf).min()
        left_out = int((magnitudes.where(~found, 0) > least).sum())
        return float(abs(int(found.sum()) - of.k) + left_out), 0.0

    return Work(
        lambda backend: kernels.topk_mask(x, of.k, backend=backend),
        lambda: plain.topk_mask(x, of.k),
        wrong,
        x.nbytes + x.numel(),
        0,
    )


def lors_delta(of: Matrices) -> Work:
    d, density = of.delta, of.k / (of.m * of.n)

    @cache
    def truths() -> list[torch.Tensor]:
        """Of entries that 1e-5 of L moves over the threshold, either outcome is right."""
        left, right = plain.thin_svd(d.double(), of.rank)
        low = left @ right.T
        residual = d - low
        value = float(plain.kth_largest(residual.abs().flatten(), of.k)) if of.k else math.inf
        return [low + residual * (residual.abs() >= each) for (each,) in around([value])]

    def error(found: torch.Tensor) -> Checked:
        nearest = _nearest(found.double(), truths())
        return float((found - nearest).norm() / nearest.norm()), 2 * LOW_RANK_ERROR

    return Work(
        lambda backend: kernels.lors_delta(d, of.rank, density, backend=backend),
        lambda: plain.lors_delta(d, of.rank, density),
        error,
        2 * d.nbytes,
        8 * of.m * of.n * of.rank,
    )


OPERATIONS: dict[str, Callable[[Matrices], Work]] = {
    work.__name__: work
    for work in (
        gram_apply, truncated_svd, residual_threshold, merge_update, apply_update, ties_update, sparse_part, sparse_update,
        topk_mask, lors_delta,
    )
}  # fmt: skip
HOST_ONLY = ("sparse_part", "sparse_update", "apply_update")  # no kernels on a GPU: these are plain torch there
DECOMPOSING = ("truncated_svd", "lors_delta")  # these are measured on noise too, where they take longest


def _too_wrong() -> tuple[Any, Any]:
    raise AssertionError("a rival that is not right enough is not timed")


def _has_scipy() -> bool:
    return find_spec("scipy") is not None


def _as_right(of: Matrices, solver: str, error: Callable[[Any, Any], float]) -> Callable[[], Solution] | None:
    """The loosest tolerance, in float32 if that will do, with which a solver of scipy's is as right as is asked."""
    for dtype in (torch.float32, torch.float64):
        for tol in (1e-2, 1e-3, 1e-4, 1e-5):
            solve = partial(_svds, of, solver, dtype, tol)
            try:
                if error(*solve()) <= LOW_RANK_ERROR:
                    return solve
            except (ArithmeticError, RuntimeError, np.linalg.LinAlgError):  # how they say that they did not converge
                continue
    return None


def _svds(of: Matrices, solver: str, dtype: torch.dtype, tol: float) -> Solution:
    from scipy.sparse.linalg import svds

    delta = plain.delta(of.base, of.tuned[0], dtype)
    if of.rank >= min(of.m, of.n):
        return plain.thin_svd(delta, of.rank)
    left, sigma, right = svds(delta.numpy(), k=of.rank, tol=tol, solver=solver, maxiter=min(delta.shape), rng=0)
    return torch.from_numpy(left * sigma), torch.from_numpy(right.T.copy())


def _svd_lowrank(of: Matrices) -> tuple[Any, Any]:
    q = min(of.rank + 8, of.m, of.n)
    left, sigma, right = torch.svd_lowrank(plain.delta(of.base, of.tuned[0]), q=q, niter=8)
    return left[:, : of.rank] * sigma[: of.rank], right[:, : of.rank]


# --- the run --------------------------------------------------------------------------------------------------------


def rows(
    backends: Sequence[str],
    shapes: Sequence[tuple[int, int]],
    dtype: str,
    rank: int,
    density: float,
    peaks: dict[str, Peaks],
) -> Iterator[Row]:
    """In the order in which they are measured: a shape, an operation, its backends."""
    places = {name: _device(name) for name in backends}
    for shape in shapes:
        for device in dict.fromkeys(places.values()):
            for noise in (False, True):
                of = Matrices(shape, dtype, device, rank, density, noise=noise)
                for name in DECOMPOSING if noise else OPERATIONS:
                    here = [b for b, place in places.items() if place == device and _has(b, name, device)]
                    if here:
                        yield from _measure(name, of, here, dtype, peaks[device], noise)


def _measure(name: str, of: Matrices, backends: list[str], dtype: str, peaks: Peaks, noise: bool) -> Iterator[Row]:
    work = OPERATIONS[name](of)
    own = _seconds(work.plain, of.device)
    rivals = {rival: _seconds(solve, of.device) for rival, solve in work.rivals.items()}
    best = min(rivals, key=lambda rival: rivals[rival], default=None)
    for backend in backends:
        error, allowed = work.check(work.ours(backend))
        seconds = _seconds(lambda backend=backend: work.ours(backend), of.device)  # type: ignore[misc]
        floor = peaks.floor(work.nbytes, work.flops, work.nbytes)
        yield Row(
            backend, name + (" (noise)" if noise else ""), (of.m, of.n), dtype, seconds * 1e3, work.nbytes / seconds / 1e9,
            floor / seconds, own * 1e3, best, rivals[best] * 1e3 if best else None, error, allowed,
        )  # fmt: skip


def _seconds(call: Callable[[], Any], device: str) -> float:
    """Median of a call after a first one, which counts alone where it takes long."""
    wait = torch.cuda.synchronize if device != "cpu" else lambda: None

    def timed() -> float:
        wait()
        begun = time.perf_counter()
        call()
        wait()
        return time.perf_counter() - begun

    first = timed()
    if first > LONG:
        return first
    taken: list[float] = []
    while len(taken) < 3 or (sum(taken) < ENOUGH and len(taken) < ROUNDS):
        taken.append(timed())
    return sorted(taken)[len(taken) // 2]


def _device(backend: str) -> str:
    devices = dispatch.load(backend).DEVICES
    return "cpu" if not devices or "cpu" in devices else str(devices[0])


def _has(backend: str, operation: str, device: str) -> bool:
    if operation in HOST_ONLY:
        return device == "cpu" and hasattr(dispatch.load(backend), operation)
    return True


@contextmanager
def _as_many_threads(count: int) -> Iterator[None]:
    """Of torch as of the kernels: the same freedom for both."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def bench_command(
    backends: list[str] | None,
    *,
    shapes: Sequence[tuple[int, int]] = tuple(DEFAULT_SHAPES.values()),
    dtype: str = "float32",
    rank: int = 7,
    density: float = 0.2,
    as_json: bool = False,
) -> bool:
    """Prints peaks and rows as they are measured and returns whether everything is right.

    Raises:
        ValueError: unknown backend or dtype, no shape, rank or density that fit nothing. BackendUnavailable: one asked for
            by name that is not there.
    """
    names = dispatch.named_or_available(backends)
    if dtype not in DTYPES:
        raise ValueError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
    if rank < 1:
        raise ValueError(f"rank: expected at least 1, got {rank}")
    if not 0 < density <= 1:
        raise ValueError(f"density: expected more than 0 and at most 1, got {density}")
    if not shapes:
        raise ValueError("shapes: expected at least one, got none")
    threads = thread_count()
    with _as_many_threads(threads):
        peaks = {place: _peaks(place, threads) for place in dict.fromkeys(map(_device, names))}
        measured = rows(names, shapes, dtype, rank, density, peaks)
        if as_json:
            found = list(measured)
            print(json.dumps(_document(found, peaks, threads), indent=2))
        else:
            found = _print_table(measured, peaks, threads)
    return all(row.ok for row in found)


def _peaks(place: str, threads: int) -> Peaks:
    return cpu_peaks(threads) if place == "cpu" else device_peaks(place)


def _document(found: list[Row], peaks: dict[str, Peaks], threads: int) -> dict[str, Any]:
    return {
        "machine": diagnosis(),
        "threads": threads,
        "peaks": {place: _levels(each) for place, each in peaks.items()},
        "rows": [asdict(row) | {"ok": row.ok} for row in found],
    }


def _levels(peaks: Peaks) -> dict[str, Any]:
    read = {"memory" if size == 1 << 62 else str(size): rate for size, rate in peaks.read.items()}
    return {"float32_per_s": peaks.multiply, "bfloat16_per_s": peaks.bfloat16, "read_bytes_per_s": read}


def _print_table(measured: Iterator[Row], peaks: dict[str, Peaks], threads: int) -> list[Row]:
    for place, each in peaks.items():
        read = ", ".join(
            f"{rate / 1e9:.0f} from {'memory' if size == 1 << 62 else f'{size / 2**20:.2g} MiB'}" for size, rate in each.read.items()
        )  # fmt: skip
        half = f", {each.bfloat16 / 1e9:.0f} of half precision" if each.bfloat16 else ""
        of = f"{threads} threads" if place == "cpu" else place
        print(f"peaks of {of}: {each.multiply / 1e9:.0f} GFLOP/s{half}; GB/s: {read}")
    print(
        f"{'backend':10}{'operation':24}{'shape':>11}{'ms':>9}{'GB/s':>7}{'of peak':>8}{'torch ms':>10}{'rival ms':>10}  error"
    )
    found = []
    for row in measured:
        found.append(row)
        rival = f"{row.rival_ms:10.3g}" if row.rival_ms is not None else f"{'':10}"
        wrong = "" if row.ok else f"  WRONG, allowed {row.allowed:.1e}"
        print(
            f"{row.backend:10}{row.operation:24}{'x'.join(map(str, row.shape)):>11}{row.ms:9.3g}{row.gb_per_s:7.1f}"
            f"{row.peak_share:8.0%}{row.plain_ms:10.3g}{rival}  {row.error:.0e}{wrong}",
            flush=True,
        )
    names = sorted({row.rival for row in found if row.rival})
    if names:
        print(f"rivals that are as right: {', '.join(names)}", file=sys.stderr)
    return found
