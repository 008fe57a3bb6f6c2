"""Compiles every kernel ahead of time, without a GPU, and reports what it needs: `python -m ...triton.aot`.

Registers and stack come from the machine code itself (cuobjdump, which Triton carries). A kernel with a stack frame
spills registers to memory; the exit code is 1 if any does.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import gram_apply, merge_update, residual_threshold, ties_update
from .launch import TL_DTYPES

ARCHES = (80, 90, 100)
SCALARS = {"start": "i64", "scale": "fp32", "all_weights": "fp32"}  # the others are i32
PAIRS = (("float32", "float32"), ("float16", "float16"), ("bfloat16", "bfloat16"))


@dataclass(frozen=True)
class Job:
    name: str
    kernel: Any
    pointers: dict[str, str]  # argument -> pointee
    constants: dict[str, Any]
    options: dict[str, int]


@dataclass(frozen=True)
class Usage:
    job: str
    arch: int
    registers: int
    shared: int
    stack: int
    loads: str  # widest global load in the PTX
    wide_math: str  # tensor core instruction, if any
    flushes: bool  # whether any float32 operation flushes denormals


def _types(base: str, tuned: str, *, has_base: bool = True, aligned: bool = True) -> dict[str, Any]:
    return {"BASE": TL_DTYPES[base], "TUNED": TL_DTYPES[tuned], "HAS_BASE": has_base, "ALIGNED": aligned}


def jobs(every: bool = False) -> Iterator[Job]:
    """The configurations that `lors merge` meets; with `every`, also mixed dtypes, no base, unaligned, wide blocks."""
    pairs: list[tuple[str, dict[str, Any]]] = [(f"{base}-{tuned}", _types(base, tuned)) for base, tuned in PAIRS]
    if every:
        pairs += [(f"{b}-{t}", _types(b, t)) for b in TL_DTYPES for t in TL_DTYPES if b != t]
        pairs += [("no-base", _types("float32", "float32", has_base=False))]
        pairs += [("unaligned", _types("float16", "float16", aligned=False))]
    for label, types in pairs:
        yield from _jobs_of(label, types, every)
    for number, (_, bits) in enumerate(residual_threshold.DIGITS):
        if number in (0, 3) or every:
            yield Job(
                f"descend {number}", residual_threshold.descend_kernel,
                {"counts": "i64", "prefix": "i32", "wanted": "i64", "equal": "i64", "non_finite": "i64"},
                {"FIRST": number == 0, "BITS": bits, "BINS": residual_threshold.BINS}, {"num_warps": 4},
            )  # fmt: skip


def _jobs_of(label: str, types: dict[str, Any], every: bool) -> Iterator[Job]:
    table = {"table": "i64"}
    for side in ("right", "left"):
        for width, stored in ((16, False), (16, True), (32, False)) if every else ((16, False),):
            constants = {
                **types, "TRANSPOSED": side == "left", "STORE_Y": stored, "B": width,
                "PRECISION": gram_apply.PRECISION, **gram_apply.BLOCK,
            }  # fmt: skip
            name = f"gram_apply {side} b={width}{' y' if stored else ''} {label}"
            pointers = {**table, "x": "fp32", "y_out": "fp32", "partial": "fp32"}
            yield Job(name, gram_apply.gram_kernel, pointers, constants, gram_apply.OPTIONS)
    factors = {"left": "fp32", "right": "fp32"}
    blocks = {"": residual_threshold.BLOCK, " wide": residual_threshold.WIDE_BLOCK}
    for (number, (shift, bits)), (form, block) in product(enumerate(residual_threshold.DIGITS), blocks.items()):
        if number == 0 or every:
            yield Job(
                f"histogram{form} {number} {label}", residual_threshold.histogram_kernel,
                {**table, **factors, "prefix": "i32", "counts": "i64"},
                {**types, "SHIFT": shift, "BITS": bits, "BINS": residual_threshold.BINS, **block},
                residual_threshold.OPTIONS,
            )  # fmt: skip
    ties = {**table, **factors, "key_of": "i32", "ties": "i64", "equal": "i64", "counts": "i64"}
    for form, block in blocks.items():
        yield Job(
            f"ties{form} {label}", residual_threshold.tie_kernel, ties, {**types, **block}, residual_threshold.OPTIONS
        )
    yield Job(
        f"cut {label}", residual_threshold.cut_kernel, {**ties, "cut": "i64"},
        {**types, "TALL": residual_threshold.BLOCK["TALL"], **residual_threshold.CUT_BLOCK}, residual_threshold.OPTIONS,
    )  # fmt: skip
    yield Job(
        f"merge_update {label}", merge_update.merge_kernel,
        {**table, "out_table": "i64", **factors, "value": "fp32", "cut": "i64", "weight": "fp32", "energy": "fp32",
         "counts": "i32"},
        {**types, "OUT": types["TUNED"], **merge_update.BLOCK}, merge_update.OPTIONS,
    )  # fmt: skip
    for elect in (True, False) if every else (True,):
        yield Job(
            f"ties_update{'' if elect else ' linear'} {label}", ties_update.ties_kernel,
            {**table, "out_table": "i64", "numbers": "fp32", "integers": "i64", "energy": "fp32", "counts": "i32"},
            {**types, "OUT": types["TUNED"], "HAS_OUT": True, "ELECT": elect, "NORMALIZE": True, **ties_update.BLOCK},
            ties_update.OPTIONS,
        )  # fmt: skip
    yield Job(
        f"measure {label}", merge_update.measure_kernel, {**table, "energy": "fp32", "counts": "i32"},
        {**types, **merge_update.BLOCK}, merge_update.OPTIONS,
    )  # fmt: skip


def compile_job(job: Job, arch: int) -> Usage:
    """Compiled as for Whisper's shapes: sizes are multiples of 16, which Triton's launcher would find out by itself."""
    signature, attributes = {}, {}
    for place, name in enumerate(job.kernel.arg_names):
        if name in job.constants:
            signature[name] = "constexpr"
        else:
            signature[name] = f"*{job.pointers[name]}" if name in job.pointers else SCALARS.get(name, "i32")
        if name in job.pointers or name in ("n", "inner", "outer", "wide"):
            attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(job.kernel, signature, constexprs=job.constants, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=job.options)
    ptx = compiled.asm["ptx"]
    widths = [int(n or 1) * int(bits) for n, bits in re.findall(r"ld\.global[.\w:]*?(?:\.v(\d))?\.[bfsu](\d+)", ptx)]
    copies = [8 * int(size, 0) for size in re.findall(r"cp\.async\.\w+\.shared\.global[^;]*?\], (\w+)", ptx)]
    math = sorted(set(re.findall(r"(wgmma|tcgen05\.mma|mma\.sync)", ptx)))
    flushes = bool(re.search(r"(add|sub|mul|fma|cvt)[.\w]*\.ftz\.f32", ptx))
    registers, stack = _resources(compiled.asm["cubin"])
    shared = compiled.metadata.shared
    return Usage(
        job.name, arch, registers, shared, stack, f"{max(widths + copies, default=0)}b", " ".join(math), flushes
    )


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers and stack bytes of the one kernel in `cubin`."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run(
            [tool, "--dump-resource-usage", file.name], check=True, capture_output=True, text=True
        ).stdout
    found = [(int(r), int(s)) for r, s in re.findall(r"REG:(\d+) STACK:(\d+)", text)]
    if len(found) != 1:
        raise RuntimeError(f"cuobjdump: expected the resources of one kernel, got {text!r}")
    return found[0]


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", type=int, nargs="+", default=ARCHES)
    parser.add_argument("--every", action="store_true", help="mixed dtypes, no base, unaligned and wide blocks too")
    options = parser.parse_args(arguments)
    print(f"{'kernel':42s} {'arch':>5s} {'regs':>5s} {'shared':>7s} {'stack':>6s} {'load':>5s}  math")
    spilled = flushed = 0
    for arch in options.arch:
        for job in jobs(options.every):
            u = compile_job(job, arch)
            spilled, flushed = spilled + (u.stack > 0), flushed + u.flushes
            print(
                f"{u.job:42s} sm_{u.arch:3d} {u.registers:5d} {u.shared:7d} {u.stack:6d} {u.loads:>5s}  {u.wide_math}",
                flush=True,
            )
    print(f"{spilled} kernels with a stack frame, {flushed} that flush denormals")
    return 1 if spilled or flushed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
