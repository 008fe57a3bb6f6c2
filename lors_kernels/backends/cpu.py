"""The compiled CPU backend: csrc/cpu, built once per instruction set, the best one this processor has chosen here."""

from __future__ import annotations

import math
import os
import platform
import sysconfig
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

import numpy as np

from ..arrays import (
    FLOATS,
    contiguous,
    dtype_name,
    new,
    to_torch,
)
from ..threads import one_torch_thread, thread_count
from ..types import (
    CONTRACT,
    DENORMAL,
    FACTORS,
    Consensus,
    FactorOverflowError,
    Keep,
    KeepStats,
    MisconfiguredError,
    NonFiniteError,
    Threshold,
    TruncatedSVD,
    UpdateStats,
    dense_claim,
)
from . import built, large_rank

NAME = "cpu"
DEVICES = ("cpu",)
NUMPY = True

_X86_NEEDS = {
    "avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl", "avx2", "fma", "f16c"},
    "avx2": {"avx2", "fma", "f16c"},
    "portable": set(),
}
_METHODS = ("krylov", "krylov64", "not converged")


def cpu_flags() -> set[str]:
    """Instruction set extensions the operating system reports; empty where it does not say."""
    try:
        with open("/proc/cpuinfo", encoding="ascii", errors="replace") as info:
            for line in info:
                if line.startswith("flags"):
                    return set(line.split(":", 1)[1].split())
    except OSError:
        pass  # not Linux: the portable build runs everywhere
    return set()


def instruction_sets() -> list[str]:
    """Those this processor runs, the best first."""
    flags = cpu_flags() if platform.machine().lower() in {"x86_64", "amd64"} else set()
    return [name for name, needs in _X86_NEEDS.items() if needs <= flags]


def instruction_set() -> str:
    """The best build for this processor, or LORS_ISA."""
    usable = instruction_sets()
    wanted = os.environ.get("LORS_ISA", usable[0])
    if wanted not in usable:
        raise MisconfiguredError(f"LORS_ISA: expected one of {', '.join(usable)} on this processor, got {wanted!r}")
    return wanted


@cache
def library() -> ModuleType:
    return load(instruction_set())


def load(isa: str) -> ModuleType:
    name = f"_cpu_{isa}"
    try:
        return import_module(f"lors_kernels.{name}")
    except ModuleNotFoundError as error:
        if error.name != f"lors_kernels.{name}":
            raise
        raise ImportError(
            f"{name}: none for {sysconfig.get_config_var('SOABI')}, got {', '.join(built('_cpu_'))}"
        ) from None


def probe() -> tuple[bool, str]:
    if not built("_cpu_"):
        return False, "not built"
    return True, str(library().isa)


def _matrix(x: Any) -> tuple[int, int, int, int, int]:
    rows, cols = x.shape
    stride = cols if rows < 2 else x.strides[0] // x.itemsize if isinstance(x, np.ndarray) else x.stride(0)
    return _address(x), FLOATS.index(dtype_name(x)), rows, cols, stride


def _address(x: Any) -> int:
    """numpy takes long to say it."""
    return int(library().address(x)) if isinstance(x, np.ndarray) else x.data_ptr()


def _pair(base: Any, tuned: Any) -> tuple[tuple[int, int, int, int, int], tuple[int, int, int, int, int]]:
    b = _matrix(tuned)
    return ((0, *b[1:]) if base is None else _matrix(base)), b


def _factors(left: Any, right: Any) -> tuple[int, int, int]:
    return (0, 0, 0) if left is None else (_address(left), _address(right), left.shape[1])


def gram_apply(base: Any, tuned: Any, x: Any, *, side: str, threads: int | None = None) -> Any:
    x = contiguous(x)
    z = new(tuned, x.shape)
    b, t = _pair(base, tuned)
    library().gram_apply(b, t, side == "left", _address(x), x.shape[1], _address(z), thread_count(threads))
    return z


def residual_threshold(
    base: Any, tuned: Any, left: Any, right: Any, k: int, *, threads: int | None = None
) -> Threshold:
    left, right = (None, None) if left is None else (contiguous(left), contiguous(right))
    b, t = _pair(base, tuned)
    value, ties, cut, bad = library().residual_threshold(b, t, _factors(left, right), k, thread_count(threads))
    if bad:
        raise NonFiniteError(bad)
    return Threshold(value, ties, cut)


def merge_update(
    out: Any,
    base: Any,
    tuned: Sequence[Any],
    left: Sequence[Any],
    right: Sequence[Any],
    threshold: Sequence[Threshold],
    weight: Sequence[float],
    *,
    threads: int | None = None,
) -> list[UpdateStats]:
    factors = [(None, None) if l is None else (contiguous(l), contiguous(r)) for l, r in zip(left, right, strict=True)]
    stats = library().merge_update(
        _matrix(out),
        _pair(base, tuned[0])[0],
        [_matrix(t) for t in tuned],
        [_factors(*pair) for pair in factors],
        [tuple(t) for t in threshold],
        list(weight),
        thread_count(threads),
    )
    return [UpdateStats(*s) for s in stats]


def apply_update(out: Any, base: Any, update: Any, scale: float, *, threads: int | None = None) -> float:
    like = _matrix(out)
    b, u = ((0, *like[1:]) if x is None else _matrix(x) for x in (base, update))
    return float(library().apply_update(like, b, u, scale, thread_count(threads)))


def ties_update(
    out: Any,
    base: Any,
    tuned: Sequence[Any],
    keep: Sequence[Keep],
    weight: Sequence[float],
    rule: Consensus,
    *,
    threads: int | None = None,
) -> list[KeepStats]:
    b, like = _pair(base, tuned[0])
    stats = library().ties_update(
        (0, *like[1:]) if out is None else _matrix(out),
        b,
        [_matrix(t) for t in tuned],
        [(tuple(k.low), tuple(k.high), k.key, k.limit, k.factor) for k in keep],
        list(weight),
        (rule.elect, rule.normalize, rule.scale, rule.divisor(weight)),
        rule.start,
        thread_count(threads),
    )
    return [KeepStats(*s) for s in stats]


def sparse_part(base: Any, tuned: Any, left: Any, right: Any, threshold: Threshold, mask: Any, values: Any) -> int:
    left, right = (None, None) if left is None else (contiguous(left), contiguous(right))
    b, t = _pair(base, tuned)
    addresses = _address(mask), _address(values), values.size
    return int(library().sparse_part(b, t, _factors(left, right), tuple(threshold), *addresses))


def sparse_update(
    out: Any, mask: Any, values: Any, left: Any, right: Any, scale: float, weight: float
) -> tuple[float, int, int]:
    left, right = (None, None) if left is None else (contiguous(left), contiguous(right))
    sparse = _address(mask), _address(values), FLOATS.index(dtype_name(values)), len(values), scale
    energy, used, bad = library().sparse_update(_matrix(out), _factors(left, right), sparse, weight)
    return energy, used, bad


def truncated_svd(base: Any, tuned: Any, rank: int, *, seed: int = 0, threads: int | None = None) -> TruncatedSVD:
    m, n = tuned.shape
    left, right, sigma = new(tuned, (m, rank)), new(tuned, (n, rank)), new(tuned, (rank,))
    b, t = _pair(base, tuned)
    addresses = [_address(x) for x in (left, right, sigma)]
    code, passes, residual, unique, energy, bad, overflows = library().truncated_svd(
        b, t, rank, seed, *addresses, thread_count(threads)
    )
    if bad:
        raise NonFiniteError(bad)
    method = _METHODS[code]
    if method == "not converged":
        method, residual, unique, overflows = _dense(base, tuned, left, right, sigma)
    if overflows:
        raise FactorOverflowError(overflows)
    return TruncatedSVD(left, right, sigma, passes, residual, method, energy, NAME, unique)


def eigh_single(a: Any, count: int) -> tuple[Any, Any]:
    """(theta [n] float64, vectors [n, count] float32), largest first: all eigenvalues of the symmetric torch tensor a [n, n]
    float32 and the first `count` eigenvectors, to 1e-6 of the largest value."""
    import torch

    n, a = len(a), a.contiguous()
    theta, vectors = torch.empty(n, dtype=torch.float64), torch.empty(count, n)
    library().eigh_single(a.data_ptr(), n, count, theta.data_ptr(), vectors.data_ptr())
    return theta, vectors.T


def _dense(base: Any, tuned: Any, left: Any, right: Any, sigma: Any) -> tuple[str, float, bool, int]:
    """By dense solvers: eigenvectors of A.T A in float32 where that can be certified, else in float64, or where that squares
    too much away the SVD. One thread, so that the bits are the same for any number. Returns the method, the residual, whether
    L is unique, and how many entries of `left` float32 cannot hold."""
    import torch

    base, tuned, left, right, sigma = (to_torch(x) for x in (base, tuned, left, right, sigma))
    with one_torch_thread():
        delta = tuned.float() if base is None else tuned.float() - base.float()
        wide, rank = delta.shape[0] < delta.shape[1], len(sigma)
        a = (delta.T if wide else delta).contiguous()
        scale = 2.0 ** -math.frexp(float(a.abs().max()))[1]
        inside = a * scale if scale < 2.0**100 else (a.double() * scale).float()  # a scale that float32 has not got
        found = large_rank.decompose(inside, rank, eigh_single)
        if found is not None:
            method, unique, vectors, product = "eigh32", True, found.vectors, found.product / scale
            values, residual = found.theta.sqrt() / scale, found.residual
            residual += FACTORS + DENORMAL * math.sqrt(left.numel()) / float(values.norm())
        else:
            method, residual, unique, vectors = _dense64(a.double(), rank, left.numel())
            product = a.double() @ vectors
            values = torch.linalg.vector_norm(product, dim=0)
        sigma[:] = values
        left[:] = vectors * values if wide else product
        right[:] = product / torch.where(values > 0, values, 1.0) if wide else vectors
        return method, residual, unique, int((~torch.isfinite(left)).sum())


def _dense64(a: Any, rank: int, entries: int) -> tuple[str, float, bool, Any]:
    """(method, residual, unique, right singular vectors [n, rank]) of a [m, n] float64."""
    import torch

    theta, vectors = torch.linalg.eigh(a.T @ a)
    residual, unique = dense_claim(theta.flip(0).clamp_min(0).sqrt().tolist(), rank, entries, squared=True)
    if residual <= CONTRACT:
        return "eigh64", residual, unique, vectors[:, -rank:].flip(1)
    _, values, vh = torch.linalg.svd(a, full_matrices=False)
    residual, unique = dense_claim(values.tolist(), rank, entries)
    return "svd64", residual, unique, vh[:rank].T
