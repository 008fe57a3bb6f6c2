"""Every kernel operation of a backend against the reference, on the shared cases, on this machine."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import ml_dtypes
import numpy as np

import lors_kernels as kernels

from ..arrays import BFLOAT16
from ..dispatch import availability, available_backends
from ..types import KEEP_ALL, KEEP_NONE
from .cases import CASES, Case, interesting_k
from .numerics import delta_of, exact_selection, judge_low_rank, selected

SUM_ERROR = 2e-6  # of a float32 sum over at most a few thousand products, relative to ||delta||^2 ||x||
ADD_ERROR = 4e-7  # of out, relative to its largest entry: a few float32 roundings


@dataclass
class Check:
    backend: str
    operation: str
    case: str
    ok: bool
    error: float
    bound: float
    seconds: float


def checks(backend: str, cases: tuple[Case, ...] = CASES) -> Iterator[Check]:
    """Runs every operation on every case."""
    for case in cases:
        for operation, check in _CHECKS.items():
            begun = time.perf_counter()
            error, bound = check(backend, case)
            yield Check(
                backend,
                operation,
                case.name,
                bool(error <= bound),
                float(error),
                float(bound),
                time.perf_counter() - begun,
            )


def _gram_apply(backend: str, case: Case) -> tuple[float, float]:
    base, tuned = case.matrices()
    delta = delta_of(base, tuned).astype(np.float64)
    rng = np.random.default_rng(1)
    worst = 0.0
    for side, length in (("right", tuned.shape[1]), ("left", tuned.shape[0])):
        x = rng.standard_normal((length, 5)).astype(np.float32)
        z = kernels.gram_apply(base, tuned, x, side=side, backend=backend)
        exact = delta.T @ (delta @ x) if side == "right" else delta @ (delta.T @ x)
        scale = np.linalg.norm(delta) ** 2 * np.linalg.norm(x)
        # below the smallest normal float32 nothing relative can be promised
        worst = max(worst, float(np.linalg.norm(z - exact) / max(scale, np.sqrt(z.size) * 2.0**-126 / SUM_ERROR)))
    return worst, SUM_ERROR


def _truncated_svd(backend: str, case: Case) -> tuple[float, float]:
    base, tuned = case.matrices()
    svd = kernels.truncated_svd(base, tuned, case.rank, backend=backend)
    low = svd.left.astype(np.float64) @ svd.right.astype(np.float64).T
    verdict = judge_low_rank(delta_of(base, tuned), low, case.rank)
    return verdict.error, verdict.bound


def _residual_threshold(backend: str, case: Case) -> tuple[float, float]:
    """Number of wrongly selected entries over all k, with and without a low-rank part."""
    base, tuned = case.matrices()
    delta = delta_of(base, tuned)
    wrong = 0
    svd = kernels.truncated_svd(base, tuned, case.rank, backend="cpu")
    for left, right in ((None, None), (svd.left, svd.right)):
        residual = delta if left is None or right is None else residual_of(backend, base, tuned, left, right)
        for k in interesting_k(delta.size):
            threshold = kernels.residual_threshold(base, tuned, left, right, k, backend=backend)
            mask = selected(residual, threshold)
            wrong += int(np.count_nonzero(mask != exact_selection(residual, k)))
    return float(wrong), 0.0


def residual_of(backend: str, base: np.ndarray, tuned: np.ndarray, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """delta - L with the very bits the backend computes: adding L alone to zeros makes its bits visible."""
    low = np.zeros(tuned.shape, np.float32)
    kernels.merge_update(low, base, tuned, left, right, KEEP_NONE, 1.0, backend=backend)
    return delta_of(base, tuned) - low


def _merge_update(backend: str, case: Case) -> tuple[float, float]:
    """Two experts at once, the case's own and its mirror image, against float64 sums over the backend's own selection."""
    base, tuned = case.matrices()
    mirror = np.ascontiguousarray(tuned[::-1, ::-1])
    svd = kernels.truncated_svd(base, tuned, case.rank, backend="cpu")
    k = tuned.size // 5
    threshold = kernels.residual_threshold(base, tuned, svd.left, svd.right, k, backend=backend)
    out = base.astype(np.float32)
    stats = kernels.merge_update(
        out,
        base,
        [tuned, mirror],
        [svd.left, None],
        [svd.right, None],
        [threshold, KEEP_ALL],
        [0.3, -1.7],
        backend=backend,
    )
    if stats[0].kept != k or stats[1].kept != tuned.size:
        return float("inf"), ADD_ERROR
    residual = residual_of(backend, base, tuned, svd.left, svd.right)
    low = (delta_of(base, tuned) - residual).astype(np.float64)
    kept = np.where(selected(residual, threshold), residual, 0).astype(np.float64)
    exact = (
        base.astype(np.float64)
        + np.float64(np.float32(0.3)) * (low + kept)
        + np.float64(np.float32(-1.7)) * delta_of(base, mirror)
    )
    scale = max(np.abs(exact).max(), np.abs(delta_of(base, tuned)).max(), 2.0**-120)
    return float(np.abs(out - exact).max() / scale), ADD_ERROR


def _apply_update(backend: str, case: Case) -> tuple[float, float]:
    """base + tuned in every type, in units of half the last place: one rounding to float32, one to the type."""
    base, tuned = case.matrices()
    exact = tuned.astype(np.float64) + (0 if base is None else base)
    worst = 0.0
    for dtype, unit, least in (
        (np.dtype(np.float32), 2.0**-24, 2.0**-149), (np.dtype(np.float16), 2.0**-11, 2.0**-24),
        (BFLOAT16, 2.0**-8, 2.0**-133),
    ):  # fmt: skip
        out = np.empty(tuned.shape, dtype)
        largest = kernels.apply_update(out, base, tuned, backend=backend)
        if largest != np.abs(exact.astype(np.float32)).max():
            return float("inf"), 1.0
        fits = np.abs(exact) <= float(ml_dtypes.finfo(dtype).max)
        allowed = (unit + 2.0**-24) * np.abs(exact) + least
        worst = max(worst, float((np.abs(out.astype(np.float64) - exact) / allowed)[fits].max(initial=0.0)))
    return worst, 1.0


_CHECKS: dict[str, Callable[[str, Case], tuple[float, float]]] = {
    "gram_apply": _gram_apply,
    "truncated_svd": _truncated_svd,
    "residual_threshold": _residual_threshold,
    "merge_update": _merge_update,
    "apply_update": _apply_update,
}


def validate_command(backends: list[str] | None, *, quick: bool = False, as_json: bool = False) -> bool:
    """Prints a table and returns whether everything is right. A backend asked for by name must be available."""
    names = backends or [name for name, status in available_backends().items() if status.ok and name != "reference"]
    cases = tuple(case for case in CASES if not (quick and case.large))
    results: list[Check] = []
    for name in names:
        if name not in available_backends():
            raise ValueError(f"backend: expected one of {', '.join(available_backends())}, got {name!r}")
        if not availability(name).ok:
            raise kernels.BackendUnavailable(f"{name}: {availability(name).reason}")
        results += checks(name, cases)
    if as_json:
        print(json.dumps([asdict(check) for check in results], indent=2))
    else:
        _print_table(results)
    return all(check.ok for check in results)


def _print_table(results: list[Check]) -> None:
    print(
        f"{'backend':10} {'operation':20} {'cases':>5} {'wrong':>5}  {'largest error':>13} {'allowed':>9} {'seconds':>8}"
    )
    for backend, operation in dict.fromkeys((check.backend, check.operation) for check in results):
        group = [check for check in results if (check.backend, check.operation) == (backend, operation)]
        worst = max(group, key=lambda check: check.error / (check.bound or 1))
        wrong = [check for check in group if not check.ok]
        seconds = sum(check.seconds for check in group)
        print(
            f"{backend:10} {operation:20} {len(group):5} {len(wrong):5}  {worst.error:13.1e} {worst.bound:9.1e} {seconds:8.1f}"
        )
        for check in wrong:
            print(f"  WRONG {check.case}: error {check.error:.2e}, allowed {check.bound:.2e}")
