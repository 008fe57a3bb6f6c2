"""Does the residual that comes with a truncated SVD hold? 20,000 hard matrices for every backend, against float64.

Each is decomposed and judged by a float64 SVD of the same float32 matrix: the relative error of L must not exceed the claim,
and L may be called not unique only where the singular values at the cut agree to 1e-6. `worst` is the largest error over its
claim. The instruction sets of the CPU backend run as they are, NEON under qemu (tests/native/svd_cases.cpp, where a
cross-compiler is installed), and the batched driver of the GPU backends with the CPU's products, in blocks of 8 and of 16
vectors and on matrices large enough for it to iterate. The dense solvers, whose float32 one has a certificate too, get every
rank. Of wider matrices there are fewer, for one instruction set.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import subprocess
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import numpy as np

from .errors import BenchmarkError
from .machine import ROOT, usable_cores
from .results import Results

COUNT, CHUNK = 20_000, 250
NEON = ROOT / "build" / "svd-aarch64"


class Found(NamedTuple):
    left: np.ndarray
    right: np.ndarray
    residual: float
    unique: bool
    method: str
    passes: int


def run(results: Results, count: int = COUNT) -> None:
    os.environ["OMP_NUM_THREADS"] = os.environ["OPENBLAS_NUM_THREADS"] = "1"  # of the processes that do the work
    from lors_kernels.backends.cpu import instruction_sets

    isas = instruction_sets()
    backends = {f"cpu {isa}": (count, 8, 160) for isa in isas}  # name -> matrices, smallest and largest side
    backends[f"cpu {isas[0]}, over 256 columns"] = (count // 20, 260, 420)  # where large ranks go to a dense solver
    backends |= {f"dense {isa}, any rank": (count, 52, 200) for isa in isas}
    if build_neon():
        backends["cpu neon, emulated"] = (count, 8, 160)
    else:
        print("cpu neon: no aarch64 cross-compiler or qemu here; left out", flush=True)
    backends |= {f"batched, blocks of {width}": (count, 160, 230) for width in (8, 16)}
    for name, sizes in backends.items():
        piece = results.record(name, partial(measure, name, *sizes))
        print(f"  {summary(piece)}", flush=True)
    wrong = sum(len(piece.get("wrong", ())) for piece in results.pieces.values())
    if wrong:
        raise BenchmarkError(f"certificate: expected every claim to hold, got {wrong} that do not")


def measure(name: str, count: int, smallest: int, largest: int) -> dict[str, Any]:
    """All classes in turn, in processes of one thread each."""
    begun = time.perf_counter()
    starts = range(0, count, CHUNK)
    with ProcessPoolExecutor(usable_cores(), multiprocessing.get_context("spawn")) as pool:
        sizes = [min(CHUNK, count - first) for first in starts]
        parts = list(
            pool.map(judge_chunk, [name] * len(sizes), starts, sizes, [smallest] * len(sizes), [largest] * len(sizes))
        )
    kinds: dict[str, Counter[str]] = defaultdict(Counter)
    wrong, worst, passes = list[str](), defaultdict[str, float](float), 0
    for kind, facts, ratio, used, fault in (case for part in parts for case in part):
        kinds[kind].update(facts)
        worst[kind] = max(worst[kind], ratio)
        passes += used
        wrong += [fault] if fault else []
    total = sum(kinds.values(), Counter[str]())
    return {
        "matrices": count, "sides": [smallest, largest], "wrong": wrong, "worst": max(worst.values()),
        **share(total), "passes": passes / count, "seconds": time.perf_counter() - begun,
        "classes": {kind: {"worst": worst[kind], **share(counts)} for kind, counts in sorted(kinds.items())},
    }  # fmt: skip


def share(counts: Counter[str]) -> dict[str, int]:
    return {what: counts[what] for what in ("krylov", "krylov64", "eigh32", "dense", "not unique", "refused")}


def summary(piece: dict[str, Any]) -> str:
    return (
        f"{len(piece['wrong'])} of {piece['matrices']:,} wrong, largest error over claim {piece['worst']:.2f}; "
        f"krylov {piece['krylov']:,}, krylov64 {piece['krylov64']:,}, eigh32 {piece['eigh32']:,}, dense {piece['dense']:,}; "
        f"not unique {piece['not unique']:,}, refused {piece['refused']:,}; {piece['seconds']:.0f} s"
        if "matrices" in piece
        else f"failed: {piece['failed']}"
    )


def judge_chunk(
    name: str, first: int, count: int, smallest: int, largest: int
) -> list[tuple[str, list[str], float, int, str]]:
    """(class, what to count, error over claim, passes, what is wrong) of each matrix."""
    from lors_kernels.testing.numerics import judge_claim
    from lors_kernels.testing.spectra import hard_cases

    cases = list(hard_cases(count, first, smallest, largest, any_rank=name.endswith("any rank")))
    judged = []
    for case, found in zip(cases, decompose(name, cases), strict=True):
        if found is None:
            judged.append((case.kind, ["refused"], 0.0, 0, ""))
            continue
        verdict = judge_claim(case.delta, found.left, found.right, found.residual, found.unique)
        facts = ["dense" if found.method in ("eigh64", "svd64") else found.method]
        facts += [] if found.unique else ["not unique"]
        fault = "" if verdict.ok else f"{case.kind} {case.seed}, rank {case.rank}: {found.method}: {verdict}"
        judged.append((case.kind, facts, verdict.error / (verdict.claim or 1.0), found.passes, fault))
    return judged


def decompose(name: str, cases: list[Any]) -> Iterator[Found | None]:
    """None where float32 cannot hold the factors."""
    kind, _, variant = name.partition(" ")
    if kind == "batched,":
        return batched(cases, int(variant.split()[-1]))
    isa = variant.split(",")[0]
    if kind == "dense":
        return dense(cases, isa)
    return neon(cases) if isa == "neon" else native(cases, isa)


def native(cases: list[Any], isa: str) -> Iterator[Found | None]:
    from lors_kernels.backends import cpu
    from lors_kernels.types import FactorOverflowError

    for case in cases:
        try:
            with mock.patch.object(cpu, "library", lambda: cpu.load(isa)):
                svd = cpu.truncated_svd(None, case.delta, case.rank, seed=case.seed, threads=1)
        except FactorOverflowError:
            yield None
        else:
            yield Found(svd.left, svd.right, svd.residual, svd.unique, svd.method, svd.passes)


def dense(cases: list[Any], isa: str) -> Iterator[Found | None]:
    from lors_kernels.backends import cpu

    for case in cases:
        with mock.patch.object(cpu, "library", lambda: cpu.load(isa)):
            yield solved_densely(case)


def solved_densely(case: Any) -> Found | None:
    from lors_kernels.backends import cpu

    m, n = case.delta.shape
    left, right, sigma = (np.empty(shape, np.float32) for shape in ((m, case.rank), (n, case.rank), (case.rank,)))
    method, residual, unique, overflows = cpu._dense(None, case.delta, left, right, sigma)
    return None if overflows else Found(left, right, residual, unique, method, 0)


def batched(cases: list[Any], width: int) -> Iterator[Found | None]:
    import torch

    from lors_kernels.backends import cpu
    from lors_kernels.backends.loop import Loop
    from lors_kernels.backends.truncated_svd import decompose as decompose_group
    from lors_kernels.group import MatrixGroup
    from lors_kernels.types import FactorOverflowError

    torch.set_num_threads(1)
    ops = Loop(cpu)
    ops.width = width
    for case in cases:
        try:
            svd = decompose_group(ops, MatrixGroup(None, [[torch.from_numpy(case.delta)]]), case.rank, case.seed)
        except FactorOverflowError:
            yield None
        else:
            left, right = svd.left[0].numpy(), svd.right[0].numpy()
            yield Found(left, right, svd.residual[0], svd.unique[0], svd.method[0], svd.passes[0])


def build_neon() -> bool:
    if not (shutil.which("aarch64-linux-gnu-g++") and shutil.which("qemu-aarch64")):
        return False
    subprocess.run(["make", "-s", str(NEON.relative_to(ROOT))], cwd=ROOT, check=True)
    return True


def neon(cases: list[Any]) -> Iterator[Found | None]:
    """Through files of numbers, since no Python runs there; what is left to a dense solver is solved here."""
    from lors_kernels.backends import cpu

    numbers = b"".join(
        np.array([*case.delta.shape, case.rank, case.seed], np.int64).tobytes() + case.delta.tobytes() for case in cases
    )
    reply = subprocess.run(["qemu-aarch64", str(NEON)], input=numbers, capture_output=True, check=True).stdout
    at = 0

    def take(dtype: Any, *shape: int) -> np.ndarray:
        nonlocal at
        x = np.frombuffer(reply, dtype, int(np.prod(shape)), at).reshape(shape)
        at += x.nbytes
        return x

    for case in cases:
        m, n = case.delta.shape
        code, passes, unique, overflows = (int(x) for x in take(np.int64, 4))
        residual = float(take(np.float64, 1)[0])
        left, right = take(np.float32, m, case.rank).copy(), take(np.float32, n, case.rank).copy()
        method = cpu._METHODS[code]
        if method == "not converged":
            yield solved_densely(case)
        else:
            yield None if overflows else Found(left, right, residual, bool(unique), method, passes)
