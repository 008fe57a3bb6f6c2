"""What `python -m benchmarks.gpu` measures: a function per stage, each given a `Bench` and a `Recorder` for its rows."""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from lors_kernels.dispatch import availability
from lors_kernels.group import GroupThreshold, MatrixGroup
from lors_kernels.grouped import (
    gram_apply_group,
    merge_update_group,
    residual_threshold_group,
    ties_update_group,
    truncated_svd_group,
)
from lors_kernels.types import Keep, Threshold

from .errors import BenchmarkError
from .machine import ROOT, describe_machine
from .released import (
    PAPER,
    full_svd,
    kthvalue_prune,
    lowrank_svd,
    relative_error,
    thin_svd,
    topk_prune,
)
from .shapes import SIZES, WhisperSize
from .stages import Recorder, die_with_parent

RANK, DENSITY, LAMBDA = PAPER["rank"], PAPER["density"], PAPER["lam"]
DTYPES = {"float16": torch.float16, "float32": torch.float32, "bfloat16": torch.bfloat16}
OPERATION_SHAPES = ((1280, 1280), (5120, 1280), (768, 768), (3072, 768))
RESERVE = 0.45  # of the free device memory for inputs; the rest is workspace
GROUP = 8 << 30  # bytes of inputs that are merged at a time: fewer launches, and workspace for as much
PATIENCE = 3.0  # seconds of repeats of one call


class Bench:
    """The device, the clock and the sizes."""

    def __init__(self, dry: bool) -> None:
        self.dry = dry
        if dry and (emulation := os.environ.get("LORS_TEST_CUDA_EMULATION")):
            sys.path.append(str(ROOT / "tests" / "support"))
            from cuda_emulation import install

            install(emulation)
        if not dry and not torch.cuda.is_available():
            raise BenchmarkError("device: expected a GPU, found none (--dry-run tries the harness on the CPU)")
        self.device = torch.device("cpu" if dry else "cuda:0")
        self.repeats = 2 if dry else 20
        # Writing this much between runs leaves nothing of the last one in L2.
        self.flush = None if dry else torch.empty(256 << 20, dtype=torch.uint8, device=self.device)

    @cached_property
    def backends(self) -> list[str]:
        """Ours; asked for after the build: what is found once is remembered."""
        if self.dry:
            return ["cuda"] if os.environ.get("LORS_TEST_CUDA_EMULATION") else ["reference"]
        return [name for name in ("cuda", "triton") if availability(name).ok]

    def ms(self, call: Callable[[], object], repeats: int | None = None) -> dict[str, float]:
        """Median, least and greatest milliseconds of a call, L2 cold; by device events where there is a device. Fewer
        repeats where one takes long."""
        once = self._ms(call)
        wanted = max(1, min(repeats or self.repeats, int(1e3 * PATIENCE / max(once, 1e-3))))
        if wanted > 1:
            self._ms(call)
        times = [self._ms(call) for _ in range(wanted)]
        return {"median": statistics.median(times), "min": min(times), "max": max(times), "repeats": wanted}

    def _ms(self, call: Callable[[], object]) -> float:
        if self.flush is None:
            begun = time.perf_counter()
            call()
            return 1e3 * (time.perf_counter() - begun)
        self.flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)  # type: ignore[no-any-return]

    def group(
        self, shape: tuple[int, int], matrices: int, experts: int, dtype: torch.dtype, seed: int = 0
    ) -> MatrixGroup:
        """Power-law deltas (a few strong directions and noise) on the device, fresh numbers for every matrix."""
        generator = torch.Generator(self.device).manual_seed(seed)
        make = lambda *size: torch.randn(size, generator=generator, device=self.device)
        m, n = shape
        strong = torch.arange(1, 33, device=self.device) ** -0.5
        bases, tuned = [], []
        for _ in range(matrices):
            base = (make(m, n) * 0.03).to(dtype)
            row = []
            for _ in range(experts):
                delta = (make(m, 32) * strong) @ make(32, n) * 5e-4 + make(m, n) * 1e-4
                row.append((base.float() + delta).to(dtype))
            bases.append(base)
            tuned.append(row)
        return MatrixGroup(bases, tuned)


# --- the ground: what the machine has, and the module on it ------------------------------------------------------------


def machine(bench: Bench, record: Recorder) -> None:
    """Device, versions, and every package there is: `python -m benchmarks.wheels` says from that what to bring."""
    record.measure("machine", describe_machine)
    record.measure("device", lambda: _device(bench))
    packages = {found.metadata["Name"]: found.version for found in metadata.distributions()}
    python = {"python": ".".join(map(str, sys.version_info[:2]))}
    record.measure("packages", lambda: {**python, "packages": packages})


def _device(bench: Bench) -> dict[str, Any]:
    if bench.dry:
        return {"name": "CPU, dry run: these numbers say nothing"}
    found = torch.cuda.get_device_properties(bench.device)
    return {
        "name": found.name, "processors": found.multi_processor_count, "bytes": found.total_memory,
        "capability": f"{found.major}.{found.minor}", "torch": torch.__version__, "cuda": torch.version.cuda,
    }  # fmt: skip


def build(bench: Bench, record: Recorder) -> None:
    """The modules, for this device alone; always, because the machine may be another one than last time."""

    def run() -> dict[str, Any]:
        if bench.dry:
            return {"skipped": "dry run"}
        arch = "{}{}".format(*torch.cuda.get_device_capability(bench.device))
        environment = {"LORS_BUILD_CUDA": "1", "LORS_CUDA_ARCHS": arch}
        found = _run([sys.executable, "setup.py", "build_ext", "--inplace"], environment)
        return {**found, "backends": {name: list(availability(name)) for name in ("cuda", "triton")}}

    record.measure("build", run, always=True)
    record.measure("doctor", lambda: _doctor(), always=True)


def _doctor() -> dict[str, Any]:
    from lors_kernels.__main__ import diagnosis

    return diagnosis()


def smoke(bench: Bench, record: Recorder) -> None:
    """A minute of tests: whether numbers of these kernels mean anything."""
    for backend in ("cuda", "triton"):
        chosen = f"{backend} and (strided or group_of or every_length or long_rows or several_experts)"
        record.measure(
            backend, lambda chosen=chosen: _pytest(bench, ["tests/kernels/test_gpu_backends.py", "-k", chosen])
        )  # type: ignore[misc]


def tests(bench: Bench, record: Recorder) -> None:
    """What knows of a GPU; `tests` on the CPU is no matter of this machine."""
    for backend in ("cuda", "triton"):
        record.measure(backend, lambda b=backend: _pytest(bench, ["tests/kernels/test_gpu_backends.py", "-k", b]))  # type: ignore[misc]
    names = (
        "native/test_cuda_build",
        "kernels/test_truncated_svd_group",
        "kernels/test_precision",
        "engine/test_streams",
        "engine/test_gpu",
    )
    for name in names:
        path = f"tests/{name}.py"
        record.measure(name, lambda path=path: _pytest(bench, [path]))  # type: ignore[misc]


def sanitizer(bench: Bench, record: Recorder) -> None:
    """Our kernels alone, each allocation by itself: torch's caching would hide what is read beside a tensor."""
    tool = shutil.which("compute-sanitizer")
    command = [sys.executable, "-m", "benchmarks.sanitized"]
    for check in ("memcheck", "racecheck", "initcheck", "synccheck"):

        def run(check: str = check) -> dict[str, Any]:
            if bench.dry:
                return _run([*command, "--dry-run"], {}) if check == "memcheck" else {"skipped": "dry run"}
            if tool is None:
                return {"skipped": "compute-sanitizer: not found"}
            return _run([tool, "--tool", check, "--error-exitcode", "86", *command], {})

        record.measure(check, run)


def _pytest(bench: Bench, arguments: list[str]) -> dict[str, Any]:
    if bench.dry:
        return {"skipped": "dry run"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments]
    return _run(command, {"LORS_REQUIRE": "triton,cuda"})


def _run(command: list[str], variables: dict[str, str]) -> dict[str, Any]:
    """A command whose output goes where ours goes, and whose last lines are filed."""
    begun, tail = time.perf_counter(), list[str]()
    process = subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, **variables}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, errors="replace", preexec_fn=die_with_parent,
    )  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:
        print(line, end="", flush=True)
        tail = [*tail[-14:], line.rstrip()]
    if code := process.wait():
        raise BenchmarkError(f"{' '.join(command[1:4])}: exit code {code}: " + " | ".join(tail)[-1500:])
    return {"seconds": time.perf_counter() - begun, "last": tail[-1] if tail else ""}


# --- the operations ----------------------------------------------------------------------------------------------------


def bandwidth(bench: Bench, record: Recorder) -> None:
    """What a copy moves: the measure of every other number."""

    def copy() -> dict[str, Any]:
        size = (1 << 20) if bench.dry else (2 << 30)
        source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=bench.device)
        target = torch.empty_like(source)
        ms = bench.ms(lambda: target.copy_(source))
        return {"ms": ms, "bytes": 2 * size, "GB/s": 2 * size / ms["median"] / 1e6}

    record.measure("copy", copy)


def eigenproblems(bench: Bench, record: Recorder) -> None:
    """Batches of small symmetric eigenproblems in float64, the library's and ours: the largest risk to every merge."""
    from lors_kernels.backends.eigh import eigh

    for size in (16, 32, 64, 80, 96, 128):
        for name, solve in (("ours", eigh), ("torch.linalg.eigh", torch.linalg.eigh)):

            def run(size: int = size, name: str = name, solve: Any = solve) -> dict[str, Any]:
                count = 2 if bench.dry else 64 if name != "ours" else 5120
                generator = torch.Generator(bench.device).manual_seed(size)
                a = torch.randn(count, size, size, generator=generator, dtype=torch.float64, device=bench.device)
                a = a @ a.mT
                ms = bench.ms(lambda: solve(a))
                return {"ms": ms, "matrices": count, "us each": 1e3 * ms["median"] / count}

            record.measure(f"{name} {size}x{size}", run)


def operations(bench: Bench, record: Recorder) -> None:
    """As many matrices as keep the device busy, then one alone; plain torch ("reference") beside ours."""
    shapes = ((48, 48),) if bench.dry else OPERATION_SHAPES
    for busy in (True, False):
        for shape in shapes:
            for name, dtype in DTYPES.items():
                for key, call in _operation_rows(bench, shape, name, dtype, busy):
                    record.measure(key, call)
                _release(bench)


def _operation_rows(
    bench: Bench, shape: tuple[int, int], name: str, dtype: torch.dtype, busy: bool
) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    matrices = (2 if bench.dry else max(8, (1 << 30) // (shape[0] * shape[1] * dtype.itemsize * 2))) if busy else 1
    group = bench.group(shape, matrices, 1, dtype)
    five = bench.group(shape, max(1, matrices // 5), 5, dtype)
    for backend in dict.fromkeys([*bench.backends, "reference"]):
        for operation, (call, counted) in _calls(bench, group, five, backend).items():

            def run(call: Callable[[], Any] = call, counted: int = counted) -> dict[str, Any]:
                ms = bench.ms(call, max(3, bench.repeats // 2) if busy else None)
                return {"ms": ms, "bytes": counted, "GB/s": counted / ms["median"] / 1e6}

            yield f"{operation} {backend} {name} {shape[0]}x{shape[1]} x{matrices}", run


def _release(bench: Bench) -> None:
    if not bench.dry:
        torch.cuda.empty_cache()


def _calls(
    bench: Bench, group: MatrixGroup, five: MatrixGroup, backend: str
) -> dict[str, tuple[Callable[[], Any], int]]:
    """operation -> (call, bytes that have to move: inputs once, outputs once, by the kind of pass)."""
    m, n, pairs, item = group.m, group.n, group.pairs, group.like.element_size()
    short, side = (n, "right") if n <= m else (m, "left")
    x = torch.randn(pairs, short, 8, device=bench.device)
    left, right = torch.randn(pairs, m, RANK, device=bench.device), torch.randn(pairs, n, RANK, device=bench.device)
    left5 = torch.randn(five.pairs, m, RANK, device=bench.device) * 1e-3
    right5 = torch.randn(five.pairs, n, RANK, device=bench.device) * 1e-3
    out = [base.clone() for base in five.bases or ()]
    threshold = GroupThreshold.of([Threshold(1e-3, 0, 0)] * five.pairs, five.device)
    k = int(DENSITY * m * n)
    passes = {"cuda": 1, "triton": 4}.get(backend, 1)  # over delta; the pass for ties is one more where there are any
    rules, kept = [Keep(Threshold(1e-3, 0, 0))] * 5, [LAMBDA] * 5
    weights = five.matrices * m * n * item * 3 + five.pairs * m * n * item  # base, out twice, every expert
    return {
        "gram_apply": (
            lambda: gram_apply_group(group, x, side=side, backend=backend),
            pairs * (2 * m * n * item + 2 * short * 8 * 4),
        ),
        "residual_threshold": (
            lambda: residual_threshold_group(group, left, right, k, backend=backend),
            passes * pairs * (2 * m * n * item + (m + n) * RANK * 4),
        ),
        "merge_update": (
            lambda: merge_update_group(five, out, left5, right5, threshold, [LAMBDA] * 5, backend=backend),
            weights + five.pairs * (m + n) * RANK * 4,
        ),
        "ties_update": (lambda: ties_update_group(five, out, rules, kept, backend=backend), weights),
    }


def accuracy(bench: Bench, record: Recorder) -> None:
    """Relative error of L against float64, of ours and of svd_lowrank with its usual setting."""
    for shape in ((96, 64),) if bench.dry else ((768, 768), (3072, 768), (1280, 1280)):
        for dtype in ("float32", "float16"):
            for name in (*bench.backends, "svd_lowrank(q=15, niter=2)"):

                def judge(shape: tuple[int, int] = shape, dtype: str = dtype, name: str = name) -> dict[str, Any]:
                    return _accuracy(bench, bench.group(shape, 2, 2, DTYPES[dtype], seed=5), name)

                record.measure(f"{shape[0]}x{shape[1]} {dtype} {name}", judge)


def _accuracy(bench: Bench, group: MatrixGroup, name: str) -> dict[str, Any]:
    deltas = [tuned.float() - base.float() for base, tuned in group.each() if base is not None]
    if name not in bench.backends:
        usual = lowrank_svd(min(RANK + 8, group.m, group.n), 2)
        return {"error": max(relative_error(usual(d, RANK), d, RANK) for d in deltas)}
    svd = truncated_svd_group(group, RANK, backend=name)
    errors = [relative_error(l @ r.T, d, RANK) for l, r, d in zip(svd.left, svd.right, deltas, strict=True)]
    return {"error": max(errors), "passes": max(svd.passes), "method": svd.method}


# --- merges ------------------------------------------------------------------------------------------------------------


def _cases(bench: Bench) -> dict[str, tuple[WhisperSize, torch.dtype, int]]:
    if bench.dry:
        return {"micro float32 x 2": (SIZES["micro"], torch.float32, 2)}
    return {
        "large-v3 float16 x 10": (SIZES["large-v3"], torch.float16, 10),
        "small float32 x 5": (SIZES["small"], torch.float32, 5),
    }


def merges(bench: Bench, record: Recorder) -> None:
    """Computing a whole merge, everything on the device, a shape at a time."""
    for title, (size, dtype, experts) in _cases(bench).items():
        for backend in bench.backends:
            for shape, count in size.matrices().items():
                key = f"{title} {shape[0]}x{shape[1]}: {backend}"
                record.measure(
                    key,
                    lambda s=shape, c=count, d=dtype, e=experts, b=backend: _ours(bench, s, c, d, e, b),  # type: ignore[misc]
                )
                _release(bench)


def _ours(
    bench: Bench, shape: tuple[int, int], count: int, dtype: torch.dtype, experts: int, backend: str
) -> dict[str, Any]:
    """Every matrix of a shape where memory holds them all, else the most that fit, scaled and said so."""
    free = 1 << 30 if bench.dry else torch.cuda.mem_get_info()[0]
    each = shape[0] * shape[1] * dtype.itemsize * (experts + 1)
    held = min(count, max(1, int(RESERVE * free) // each))
    groups = _parts(bench.group(shape, held, experts, dtype), max(1, GROUP // each))
    outs = [[base.clone() for base in part.bases or ()] for part in groups]
    steps: dict[str, float] = {}

    def work(clock: Callable[[str], None] = lambda step: None) -> None:
        for part, out in zip(groups, outs, strict=True):
            svd = truncated_svd_group(part, RANK, backend=backend)
            clock("decompose")
            k = int(DENSITY * shape[0] * shape[1])
            threshold = residual_threshold_group(part, svd.left, svd.right, k, backend=backend)
            clock("threshold")
            merge_update_group(part, out, svd.left, svd.right, threshold, [LAMBDA] * experts, backend=backend)
            clock("update")

    def timed() -> None:
        now = time.perf_counter()

        def clock(step: str) -> None:
            nonlocal now
            if not bench.dry:
                torch.cuda.synchronize()
            then, now = now, time.perf_counter()
            steps[step] = steps.get(step, 0.0) + 1e3 * (now - then)

        work(clock)

    ms = bench.ms(work, 2 if bench.dry else 5)
    timed()
    seconds = ms["median"] * count / held / 1e3
    return {"ms": ms, "matrices": count, "measured": held, "seconds": seconds, "steps in ms, one after another": steps}


def _parts(group: MatrixGroup, step: int) -> list[MatrixGroup]:
    bases, starts = group.bases or (), range(0, group.matrices, step)
    return [MatrixGroup(list(bases[i : i + step]), group.tuned[i : i + step]) for i in starts]


def profile(bench: Bench, record: Recorder) -> None:
    """Launches, and the time of each kernel, of one group's merge."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiled

    shape, experts = ((64, 64), 2) if bench.dry else ((1280, 1280), 10)
    activities = [ProfilerActivity.CPU, *([] if bench.dry else [ProfilerActivity.CUDA])]
    for backend in bench.backends:

        def run(backend: str = backend) -> dict[str, Any]:
            group = bench.group(shape, 2 if bench.dry else 16, experts, DTYPES["float16"])
            outs = [base.clone() for base in group.bases or ()]

            def merge() -> None:
                svd = truncated_svd_group(group, RANK, backend=backend)
                threshold = residual_threshold_group(
                    group, svd.left, svd.right, int(DENSITY * shape[0] * shape[1]), backend=backend
                )
                merge_update_group(group, outs, svd.left, svd.right, threshold, [LAMBDA] * experts, backend=backend)

            merge()
            with profiled(activities=activities) as found:
                merge()
                if not bench.dry:
                    torch.cuda.synchronize()
            rows = {}
            for event in found.key_averages():
                spent = getattr(event, "self_device_time_total", 0.0) or event.self_cpu_time_total
                rows[event.key[:120]] = {"us": spent, "calls": event.count}
            return {"rows": dict(sorted(rows.items(), key=lambda row: -row[1]["us"])[:60]), "pairs": group.pairs}

        record.measure(f"{shape[0]}x{shape[1]} x {experts}: {backend}", run)


# --- rivals: on the device, a matrix of each shape ---------------------------------------------------------------------


def rivals(bench: Bench, record: Recorder) -> None:
    """Other ways to the same L and S; "seconds" is what a whole merge would take at this rate."""
    for title, (size, dtype, experts) in _cases(bench).items():
        for shape, count in size.matrices().items():
            for name, (decompose, batch) in _decompositions(bench, shape, dtype).items():
                key = f"{title} {shape[0]}x{shape[1]}: {name}"
                record.measure(
                    key,
                    lambda s=shape, c=count * experts, d=dtype, f=decompose, b=batch: _rival(bench, s, c, d, f, b),  # type: ignore[misc]
                )
            for name, prune in (("topk mask", topk_prune), ("kthvalue", kthvalue_prune)):
                key = f"{title} {shape[0]}x{shape[1]}: prune, {name}"
                record.measure(key, lambda s=shape, c=count * experts, p=prune: _prune(bench, s, c, p))  # type: ignore[misc]
            _release(bench)


def _decompositions(
    bench: Bench, shape: tuple[int, int], dtype: torch.dtype
) -> dict[str, tuple[Callable[[torch.Tensor], Any], int]]:
    """name -> (L of deltas [batch, m, n], batch)."""
    found: dict[str, tuple[Callable[[torch.Tensor], Any], int]] = {
        "full SVD, as released": (lambda d: full_svd(d[0], RANK), 1),
        "thin SVD": (lambda d: thin_svd(d[0], RANK), 1),
        "torch.linalg.svd of a batch": (lambda d: torch.linalg.svd(d, full_matrices=False), 2 if bench.dry else 8),
    }
    for q, niter in ((RANK + 8, 2), (2 * RANK + 8, 4), (4 * RANK, 8)):
        low = lowrank_svd(min(q, *shape), niter)
        found[f"svd_lowrank(q={q}, niter={niter})"] = (lambda d, low=low: low(d[0], RANK), 1)  # type: ignore[misc]
    for driver in () if bench.dry else ("gesvd", "gesvdj", "gesvda"):
        found[f"cuSOLVER {driver}"] = (
            lambda d, driver=driver: torch.linalg.svd(d[0], full_matrices=False, driver=driver), 1,  # type: ignore[misc]
        )  # fmt: skip
    return found


def _rival(
    bench: Bench, shape: tuple[int, int], count: int, dtype: torch.dtype, decompose: Any, batch: int
) -> dict[str, Any]:
    group = bench.group(shape, 1, batch, dtype)
    deltas = torch.stack([tuned.float() - base.float() for base, tuned in group.each() if base is not None])
    ms = bench.ms(lambda: decompose(deltas), 5)
    found = decompose(deltas)
    row = {"ms": ms, "matrices": count, "measured": batch, "seconds": ms["median"] * count / batch / 1e3}
    if isinstance(found, torch.Tensor):
        row["error"] = relative_error(found, deltas[0], RANK)
    return row


def _prune(bench: Bench, shape: tuple[int, int], count: int, prune: Any) -> dict[str, Any]:
    residual = torch.randn(shape, device=bench.device)
    ms = bench.ms(lambda: prune(residual, int(DENSITY * residual.numel())), 5)
    return {"ms": ms, "matrices": count, "measured": 1, "seconds": ms["median"] * count / 1e3}


# --- the package -------------------------------------------------------------------------------------------------------


def resident(bench: Bench, record: Recorder) -> None:
    """`lors.merge_state_dicts` of state dicts that are on the device: planning, matrices and all other tensors."""
    size, experts = ("micro", 2) if bench.dry else ("small", 5)
    states: list[dict[str, torch.Tensor]] = []
    for method, settings in (
        ("lors", {"rank": RANK, "density": DENSITY, "lam": LAMBDA}),
        ("task_arithmetic", {"lam": LAMBDA}),
        ("ties", {"density": DENSITY}),
        ("dare_ties", {"density": DENSITY}),
    ):
        for backend in bench.backends:
            options = {"device": str(bench.device), "backend": backend, **settings}

            def run(method: str = method, options: dict[str, Any] = options) -> dict[str, Any]:
                import lors

                states[:] = states or _states(bench, SIZES[size], experts)
                labels = {f"e{number}": state for number, state in enumerate(states[1:])}
                merge: Callable[[], Any] = lambda: lors.merge_state_dicts(states[0], labels, method, **options)
                assert all(str(x.device) == options["device"] for x in merge().values())
                return {"ms": bench.ms(merge, 2 if bench.dry else 5)}

            record.measure(f"{method} {size} float32 x {experts}: {backend}", run)


def _states(bench: Bench, size: WhisperSize, experts: int) -> list[dict[str, torch.Tensor]]:
    """Base and experts with every matrix of one size under a projection's name, an embedding and layer norms."""
    states: list[dict[str, torch.Tensor]] = [{} for _ in range(experts + 1)]
    for kind, (shape, count) in enumerate(size.matrices().items()):
        group = bench.group(shape, count, experts, torch.float32, seed=kind)
        for i, (base, row) in enumerate(zip(group.bases or (), group.tuned, strict=True)):
            part = ("self_attn.q_proj", "fc1", "fc2")[kind]
            for state, value in zip(states, (base, *row), strict=True):
                state[f"model.encoder.layers.{i}.{part}.weight"] = value
    for name, length in (
        ("model.decoder.embed_tokens.weight", 64 if bench.dry else size.vocabulary),
        ("model.encoder.layer_norm.weight", 1),
    ):
        group = bench.group((length, size.width), 1, experts, torch.float32, seed=7)
        for state, value in zip(states, (*(group.bases or ()), *group.tuned[0]), strict=True):
            state[name] = value if length > 1 else value[0]
    return states


def files(bench: Bench, record: Recorder) -> None:
    """`lors.merge` from files to files with the matrices on the device; the share that is not computing."""
    record.measure("small float32 x 5" if not bench.dry else "micro float32 x 2", lambda: _files(bench))


def _files(bench: Bench) -> dict[str, Any]:
    import lors

    from .generate import Spec, generate

    size, experts = ("micro", 2) if bench.dry else ("small", 5)
    seconds = []
    with tempfile.TemporaryDirectory() as place:
        made = generate(Path(place), Spec(size), experts)
        paths = {path.name: path for path in made.directories[1:]}
        for _ in range(2 if bench.dry else 4):
            begun = time.perf_counter()
            device = "cpu" if bench.dry else "cuda:0"
            lors.merge(made.directories[0], paths, Path(place) / "out", force=True, durable=False, device=device)
            seconds.append(time.perf_counter() - begun)
    return {"seconds": min(seconds[1:]), "first": seconds[0]}
