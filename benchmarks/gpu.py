"""Everything there is to know about the GPU backends, in one command on a machine that has one:

    python -m benchmarks.gpu --out benchmarks/results/gpu-<device>.json

Sections run one after the other, each filed on its own: one that fails is recorded with its reason and the others go on;
`--only` and `--resume` repeat or continue. `--dry-run` goes through the same code on the CPU with tiny sizes, to try the
harness; its numbers say nothing and its file says so.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from lors_kernels.dispatch import availability
from lors_kernels.grouped import (
    GroupThreshold,
    MatrixGroup,
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
    tune_lowrank,
)
from .shapes import SIZES, WhisperSize

RANK, DENSITY, LAMBDA = PAPER["rank"], PAPER["density"], PAPER["lam"]
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
OPERATION_SHAPES = ((768, 768), (1280, 1280), (3072, 768), (5120, 1280))
RESERVE = 0.45  # of the free device memory for inputs; the rest is workspace


class Bench:
    """The device, the clock and the sizes."""

    def __init__(self, dry: bool) -> None:
        self.dry = dry
        if not dry and not torch.cuda.is_available():
            raise BenchmarkError("device: expected a GPU, found none (--dry-run tries the harness on the CPU)")
        self.device = torch.device("cpu" if dry else "cuda:0")
        self.repeats = 2 if dry else 20
        # Writing this much between runs leaves nothing of the last one in L2.
        self.flush = None if dry else torch.empty(256 << 20, dtype=torch.uint8, device=self.device)

    @cached_property
    def backends(self) -> list[str]:
        """Asked for after the build: what is found once is remembered."""
        return ["reference"] if self.dry else [name for name in ("cuda", "triton") if availability(name).ok]

    def ms(self, call: Callable[[], object], repeats: int | None = None) -> dict[str, float]:
        """Median, least and greatest milliseconds of a call, L2 cold; by device events where there is a device."""
        times = []
        for number in range((repeats or self.repeats) + 2):
            if self.flush is not None:
                self.flush.zero_()
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                call()
                end.record()
                end.synchronize()
                elapsed = start.elapsed_time(end)
            else:
                begun = time.perf_counter()
                call()
                elapsed = 1e3 * (time.perf_counter() - begun)
            if number >= 2:
                times.append(elapsed)
        return {"median": statistics.median(times), "min": min(times), "max": max(times), "repeats": len(times)}

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


# --- sections: each returns what is filed under its name ---------------------------------------------------------------


def build(bench: Bench, options: argparse.Namespace) -> dict[str, Any]:
    begun = time.perf_counter()
    if not bench.dry:
        environment = {**os.environ, "LORS_BUILD_CUDA": "1"}
        _run([sys.executable, "setup.py", "build_ext", "--inplace"], 240, environment)
        importlib.invalidate_caches()
    reasons = {name: list(availability(name)) for name in ("cuda", "triton")}
    return {"seconds": time.perf_counter() - begun, "backends": reasons}


def tests(bench: Bench, options: argparse.Namespace) -> dict[str, Any]:
    if bench.dry:
        return {"skipped": "dry run"}
    environment = {**os.environ, "LORS_REQUIRE": "cpu,triton,cuda"}
    return _run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options.tests.split()], 240, environment
    )


def sanitizer(bench: Bench, options: argparse.Namespace) -> dict[str, Any]:
    tool = shutil.which("compute-sanitizer")
    if bench.dry or tool is None:
        return {"skipped": "dry run" if bench.dry else "compute-sanitizer: not found"}
    chosen = "cuda and (odd or bit-ladder or fp16-bf16 or strided or ties or group_of) and not svd"
    pytest = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "tests/test_gpu_backends.py",
        "-k",
        chosen,
    ]
    found = {}
    for check in ("memcheck", "racecheck", "initcheck"):
        try:
            found[check] = _run([tool, "--tool", check, "--error-exitcode", "86", *pytest], 60, dict(os.environ))
        except BenchmarkError as error:
            found[check] = {"failed": str(error)}
    return found


def bandwidth(bench: Bench, options: argparse.Namespace) -> dict[str, Any]:
    size = (1 << 20) if bench.dry else (2 << 30)
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    ms = bench.ms(lambda: target.copy_(source))
    return {"ms": ms, "bytes": 2 * size, "GB/s": 2 * size / ms["median"] / 1e6}


def operations(bench: Bench, options: argparse.Namespace) -> dict[str, Any]:
    """One matrix, and as many as keep the device busy; one expert, and five for merge_update."""
    rows: dict[str, Any] = {}
    shapes = ((48, 48),) if bench.dry else OPERATION_SHAPES
    for shape in shapes:
        for name, dtype in DTYPES.items():
            for matrices in (
                (1, 2) if bench.dry else (1, max(8, (1 << 30) // (shape[0] * shape[1] * dtype.itemsize * 2)))
            ):
                group = bench.group(shape, matrices, 1, dtype)
                five = bench.group(shape, max(1, matrices // 5), 5, dtype)
                for backend in bench.backends:
                    for operation, (call, counted) in _calls(bench, group, five, backend).items():
                        ms = bench.ms(call, None if matrices == 1 else max(3, bench.repeats // 2))
                        key = f"{operation} {backend} {name} {shape[0]}x{shape[1]} x{matrices}"
                        rows[key] = {"ms": ms, "bytes": counted, "GB/s": counted / ms["median"] / 1e6}
                del group, five
    return rows


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
    passes = 3 if backend == "cuda" else 4  # over delta; the pass for ties is one more where there are any
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


def accuracy(bench: Bench, options: argparse.Namespace) -> dict[str, Any]:
    """Relative error of L against float64, of ours and of svd_lowrank with its usual setting."""
    rows: dict[str, Any] = {}
    for shape in ((96, 64),) if bench.dry else ((768, 768), (3072, 768), (1280, 1280)):
        group = bench.group(shape, 2, 2, torch.float32, seed=5)
        deltas = [tuned - base for base, tuned in group.each() if base is not None]
        for backend in bench.backends:
            svd = truncated_svd_group(group, RANK, backend=backend)
            errors = [relative_error(l @ r.T, d, RANK) for l, r, d in zip(svd.left, svd.right, deltas, strict=True)]
            rows[f"{shape[0]}x{shape[1]} {backend}"] = {
                "error": max(errors),
                "passes": max(svd.passes),
                "method": svd.method,
            }
        usual = lowrank_svd(min(RANK + 8, *shape), 2)
        errors = [relative_error(usual(d, RANK), d, RANK) for d in deltas]
        rows[f"{shape[0]}x{shape[1]} svd_lowrank(q=15, niter=2)"] = {"error": max(errors)}
    return rows


def merges(bench: Bench, options: argparse.Namespace) -> dict[str, Any]:
    """Computing a whole merge, everything on the device; rivals on a sample of matrices of each shape, scaled."""
    cases = {"small float32 x 5": ("small", torch.float32, 5), "large-v3 float16 x 10": ("large-v3", torch.float16, 10)}
    if bench.dry:
        cases = {"micro float32 x 2": ("micro", torch.float32, 2)}
    rows: dict[str, Any] = {}
    for title, (size, dtype, experts) in cases.items():
        for backend in bench.backends:
            rows[f"{title}: {backend}"] = _ours(bench, SIZES[size], dtype, experts, backend)
        for name, (decompose, prune) in _rivals(bench, SIZES[size], dtype).items():
            rows[f"{title}: {name}"] = _rival(bench, SIZES[size], dtype, experts, decompose, prune)
        torch.cuda.empty_cache()
    return rows


def _ours(bench: Bench, size: WhisperSize, dtype: torch.dtype, experts: int, backend: str) -> dict[str, Any]:
    """Every matrix where memory holds them all, else the most that fit, scaled and said so."""
    free = 1 << 30 if bench.dry else torch.cuda.mem_get_info()[0]
    rows, total, measured = {}, 0.0, 1.0
    for shape, count in size.matrices().items():
        each = shape[0] * shape[1] * dtype.itemsize * (experts + 1)
        held = min(count, max(1, int(RESERVE * free) // each))
        group, step = bench.group(shape, held, experts, dtype), max(1, (1 << 29) // each)
        parts = [list(range(i, min(held, i + step))) for i in range(0, held, step)]
        groups = [MatrixGroup([group.bases[i] for i in p], [group.tuned[i] for i in p]) for p in parts if group.bases]
        outs = [[base.clone() for base in part.bases or ()] for part in groups]

        def work(groups: list[MatrixGroup] = groups, outs: list[Any] = outs, shape: tuple[int, int] = shape) -> None:
            for part, out in zip(groups, outs, strict=True):
                svd = truncated_svd_group(part, RANK, backend=backend)
                k = int(DENSITY * shape[0] * shape[1])
                threshold = residual_threshold_group(part, svd.left, svd.right, k, backend=backend)
                merge_update_group(part, out, svd.left, svd.right, threshold, [LAMBDA] * experts, backend=backend)

        ms = bench.ms(work, 2 if bench.dry else 5)
        rows[f"{shape[0]}x{shape[1]}"] = {"ms": ms, "matrices": count, "measured": held}
        total += ms["median"] * count / held
        measured = min(measured, held / count)
        del group, groups, outs
    return {"seconds": total / 1e3, "shapes": rows, "scaled": measured < 1}


def resident(bench: Bench, arguments: argparse.Namespace) -> dict[str, Any]:
    """`lors.merge_state_dicts` of state dicts that are on the device: planning, matrices and all other tensors."""
    import lors

    size, experts = ("micro", 2) if bench.dry else ("small", 5)
    states = _states(bench, SIZES[size], experts)
    labels = {f"e{number}": state for number, state in enumerate(states[1:])}
    place = str(bench.device)
    rows = {}
    for method, settings in (
        ("lors", {"rank": RANK, "density": DENSITY, "lam": LAMBDA}),
        ("task_arithmetic", {"lam": LAMBDA}),
        ("ties", {"density": DENSITY}),
        ("dare_ties", {"density": DENSITY}),
    ):
        for backend in bench.backends:
            options = {"device": place, "backend": backend, **settings}

            def merge(method: str = method, options: dict[str, Any] = options) -> dict[str, Any]:
                return lors.merge_state_dicts(states[0], labels, method, **options)

            merged = merge()
            assert all(str(x.device) == place for x in merged.values())
            ms = bench.ms(merge, 2 if bench.dry else 5)
            rows[f"{method} {size} float32 x {experts}: {backend}"] = {"ms": ms}
    return rows


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
        ("model.decoder.embed_tokens.weight", size.vocabulary),
        ("model.encoder.layer_norm.weight", 1),
    ):
        group = bench.group((length, size.width), 1, experts, torch.float32, seed=7)
        for state, value in zip(states, (*(group.bases or ()), *group.tuned[0]), strict=True):
            state[name] = value if length > 1 else value[0]
    return states


def _rivals(bench: Bench, size: WhisperSize, dtype: torch.dtype) -> dict[str, tuple[Any, Any]]:
    shape = next(iter(size.matrices()))
    group = bench.group(shape, 1, 2, dtype, seed=9)
    tuned = tune_lowrank([t.float() - b.float() for b, t in group.each() if b is not None], min(RANK, *shape))
    return {
        "as released": (full_svd, topk_prune),
        "thin SVD + kthvalue": (thin_svd, kthvalue_prune),
        f"svd_lowrank(q={tuned['q']}, niter={tuned['niter']}, error {tuned['error']:.0e})": (
            lowrank_svd(tuned["q"], tuned["niter"]), kthvalue_prune,
        ),
    }  # fmt: skip


def _rival(
    bench: Bench, size: WhisperSize, dtype: torch.dtype, experts: int, decompose: Any, prune: Any
) -> dict[str, Any]:
    total, rows = 0.0, {}
    for shape, count in size.matrices().items():
        base, tuned = bench.group(shape, 1, 1, dtype).pair(0)
        out = torch.zeros(shape, device=bench.device)
        assert base is not None

        def work(base: Any = base, tuned: Any = tuned, out: Any = out) -> None:
            delta = tuned.float() - base.float()
            low = decompose(delta, RANK)
            out.add_(low + prune(delta - low, int(DENSITY * delta.numel())), alpha=LAMBDA)

        ms = bench.ms(work, 2)
        rows[f"{shape[0]}x{shape[1]}"] = {"ms": ms, "matrices": count * experts, "measured": 2}
        total += ms["median"] * count * experts
    return {"seconds": total / 1e3, "shapes": rows, "scaled": True}


def files(bench: Bench, options: argparse.Namespace) -> dict[str, Any]:
    """`lors.merge` from files to files with the matrices on the device; the share that is not computing."""
    import lors

    from .generate import Spec, generate

    size, experts = ("micro", 2) if bench.dry else ("small", 5)
    made = generate(options.data, Spec(size), experts)
    paths = {path.name: path for path in made.directories[1:]}
    out, seconds = options.data / "gpu-out", []
    for _ in range(2 if bench.dry else 4):
        begun = time.perf_counter()
        device = "cpu" if bench.dry else "cuda:0"
        lors.merge(made.directories[0], paths, out, force=True, durable=False, device=device)
        seconds.append(time.perf_counter() - begun)
    shutil.rmtree(out, ignore_errors=True)
    return {"size": size, "experts": experts, "seconds": min(seconds[1:]), "first": seconds[0]}


SECTIONS = {
    "build": build, "bandwidth": bandwidth, "accuracy": accuracy, "operations": operations, "merges": merges,
    "resident": resident, "files": files, "tests": tests, "sanitizer": sanitizer,
}  # fmt: skip


def _run(command: list[str], limit: int, environment: dict[str, str]) -> dict[str, Any]:
    begun = time.perf_counter()
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=limit, check=False
        )
    except subprocess.TimeoutExpired:
        raise BenchmarkError(f"{Path(command[0]).name} {command[1]}: expected to end in {limit} s") from None
    tail = (done.stdout + done.stderr).strip().splitlines()[-15:]
    if done.returncode:
        raise BenchmarkError(f"{' '.join(command[1:4])}: exit code {done.returncode}: " + " | ".join(tail)[-1500:])
    return {"seconds": time.perf_counter() - begun, "last": tail[-1] if tail else ""}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", default=",".join(SECTIONS), help="sections, separated by commas")
    parser.add_argument("--resume", action="store_true", help="keep the sections that the file has")
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU, to try the harness")
    parser.add_argument("--tests", default="tests", help="what pytest is given")
    parser.add_argument("--data", type=Path, default=ROOT / "bench-data")
    options = parser.parse_args(arguments)
    try:
        bench = Bench(options.dry_run)
    except BenchmarkError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    device = "CPU, dry run: these numbers say nothing" if bench.dry else torch.cuda.get_device_name(bench.device)
    data: dict[str, Any] = {"machine": describe_machine(), "device": device, "dry_run": bench.dry, "results": {}}
    if options.resume and options.out.exists():
        data["results"] = json.loads(options.out.read_text())["results"]
    for name in options.only.split(","):
        if name in data["results"] and "failed" not in data["results"][name]:
            continue
        begun = time.perf_counter()
        try:
            data["results"][name] = SECTIONS[name](bench, options)
        except (Exception, SystemExit) as error:  # noqa: BLE001 - filed under the section's name; the others go on
            data["results"][name] = {"failed": f"{type(error).__name__}: {error}"[:2000]}
        print(f"{name}: {time.perf_counter() - begun:.1f} s", flush=True)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(data, indent=1) + "\n")
    print("\n".join(table(data)))
    return 1 if any("failed" in found for found in data["results"].values()) else 0


def table(data: dict[str, Any]) -> list[str]:
    """The short table, last."""
    results, lines = data["results"], ["", data["device"]]
    copy = results.get("bandwidth", {}).get("GB/s")
    if copy:
        lines.append(f"copy bandwidth {copy:.0f} GB/s")
    for key, row in results.get("operations", {}).items():
        if "ms" in row and copy:
            share = row["GB/s"] / copy
            lines.append(f"{key:58s} {row['ms']['median']:9.3f} ms {row['GB/s']:8.0f} GB/s {share:5.0%} of copy")
    for key, row in results.get("merges", {}).items():
        if "seconds" in row:
            lines.append(f"{key:72s} {row['seconds']:10.3f} s{' (scaled)' if row['scaled'] else ''}")
    for key, row in results.get("resident", {}).items():
        if "ms" in row:
            lines.append(f"merge_state_dicts on the device, {key:40s} {row['ms']['median']:10.1f} ms")
    for key, row in results.get("accuracy", {}).items():
        if "error" in row:
            lines.append(f"{key:44s} error of L {row['error']:.1e}")
    for name, found in results.items():
        if "failed" in found:
            lines.append(f"{name} FAILED: {found['failed'][:300]}")
        elif name in ("tests", "files", "sanitizer"):
            lines.append(f"{name}: {json.dumps(found)[:300]}")
    return lines


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
