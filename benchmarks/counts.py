"""What can be known of the CUDA kernels without a device: counts from their machine code, and what those predict.

`python -m benchmarks counts` compiles csrc/cuda for sm_80, sm_90 and sm_100, reads the machine code, counts calls of the host in
one decomposition and one merge, and writes benchmarks/results/counts.json and docs/gpu-counts.md. Nothing here is measured:
predictions follow from the counts and the few assumptions of `MODEL`, and stand beside them.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from .errors import BenchmarkError
from .machine import ROOT
from .results import RESULTS
from .shapes import SIZES

ARCHS = ("80", "90", "100")
CLASSES = {
    "fma": ("FFMA", "FFMA2"), "tensor": ("HMMA",), "double": ("DFMA", "DMUL", "DADD"), "barriers": ("BAR",),
    "shared": ("LDS", "STS", "ATOMS", "LDSM", "STSM"), "shuffles": ("SHFL", "MOVM"), "copies": ("LDGSTS",),
    "loads": ("LDG",), "stores": ("STG",),
}  # fmt: skip
KINDS = {"0": "float32", "1": "float16", "2": "bfloat16", "3": "any"}
MODEL = {
    "processors": 132, "GHz": 1.98, "TB/s": 4.3, "issue": 0.6,
    "said": "time = max(bytes / 4.3 TB/s, warp instructions / (132 processors x 4 schedulers x 1.98 GHz x 0.6)): every scheduler "
    "issues an instruction in 60 % of its cycles; both numbers of the device are assumed, not measured by us",
}  # fmt: skip


class Instruction(NamedTuple):
    address: int
    text: str

    @property
    def name(self) -> str:
        return re.sub(r"^@!?U?P\w+\s+", "", self.text).split()[0].split(".")[0]


class Loop(NamedTuple):
    first: int
    last: int


class Kernel(NamedTuple):
    name: str  # as in the source
    variant: str  # its template arguments
    code: list[Instruction]
    loops: list[Loop]

    def inside(self, loop: Loop) -> list[Instruction]:
        return [i for i in self.code if loop.first <= i.address <= loop.last]


def parse(sass: str) -> Iterator[Kernel]:
    """The kernels of `cuobjdump -sass`."""
    for part in sass.split("Function : ")[1:]:
        name, variant = demangle(part.split("\n", 1)[0].strip())
        code = [
            Instruction(int(address, 16), text)
            for address, text in re.findall(r"^\s+/\*([0-9a-f]{4,6})\*/\s+([^;]+?)\s*;", part, re.MULTILINE)
        ]
        loops = []
        for at, text in code:
            target = re.search(r"0x([0-9a-f]+)", text) if re.search(r"\bBRA\b", text) else None
            if target and int(target.group(1), 16) < at:
                loops.append(Loop(int(target.group(1), 16), at))
        yield Kernel(name, variant, code, sorted(loops))


def demangle(symbol: str) -> tuple[str, str]:
    """(kernel, what tells its instances apart) of a mangled name."""
    found = re.search(r"\d([a-z][a-z_]*_kernel)(I.*?EEv|E)", symbol)
    if not found:
        raise BenchmarkError(f"machine code: expected a kernel's name, got {symbol!r}")
    arguments = re.findall(r"4KindE(\d)|L([bi])(\d+)", found.group(2))
    parts = []
    for kind, what, value in arguments:
        parts.append(KINDS[kind] if kind else {"b0": "rows", "b1": "columns"}.get(what + value, f"x{value}"))
    return found.group(1), " ".join(parts)


def classes(code: list[Instruction]) -> dict[str, int]:
    names = Counter(i.name for i in code)
    return {"instructions": len(code)} | {label: sum(names[name] for name in group) for label, group in CLASSES.items()}


def main_loop(kernel: Kernel) -> Loop | None:
    """The longest; of kernels on strips the longest without a barrier, which is that of one strip."""
    loops = kernel.loops
    if kernel.name in RANKED:
        free = [loop for loop in loops if all(i.name != "BAR" for i in kernel.inside(loop))]
        loops = free or loops
    return max(loops, key=lambda loop: len(kernel.inside(loop)), default=None)


def resources(text: str) -> dict[str, tuple[int, int, int]]:
    """mangled name -> (registers, bytes of stack, bytes of shared memory), of `cuobjdump -res-usage`."""
    found = re.findall(r"Function (\S+?):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)", text)
    return {name: (int(registers), int(stack), int(shared)) for name, registers, stack, shared in found}


def blocks_per_processor(registers: int, shared: int, threads: int, arch: str) -> int:
    """How many blocks fit, by registers (given to warps in units of 256), shared memory (and 1 KiB of the system's) and
    the 64 warps of a processor."""
    warps = threads // 32
    by_registers = 65536 // (-(-registers * 32 // 256) * 256) // warps
    by_shared = (164 << 10 if arch == "80" else 228 << 10) // (shared + 1024)
    return min(by_registers, by_shared, 64 // warps, 32)


# --- what a warp does in one turn of its longest loop, and the deltas it covers by that

RANK = 7
STRIP = 4 * 8 * 32  # deltas of a warp at a time, in kernels on strips
RANKED = ("merge_kernel", "sweep_kernel")  # strips, with a loop over the rank


def turn(kernel: Kernel, loop: Loop) -> int:
    """Instructions of one turn, without what stands behind LORS_RARELY, and with the loops inside run once, but for those over
    the rank of kernels on strips, which are run as often as `RANK` takes (elsewhere that loop is unrolled by four, so that
    once is what rank 7 takes, its rest being straight code)."""
    count = len(kernel.inside(loop))
    if kernel.name not in RANKED:
        return count
    inner = [i for i in kernel.loops if i != loop and loop.first <= i.first and i.last <= loop.last]
    rank = [
        i
        for i in inner
        if multiplications(kernel.inside(i)) >= STRIP // 32
        and not any(j != i and i.first <= j.first and j.last <= i.last for j in inner)
    ]
    if not rank:
        raise BenchmarkError(f"{kernel.name} {kernel.variant}: expected a loop over the rank, found none")
    left = RANK  # the widest first, its rest by the next
    for one in sorted(rank, key=lambda i: -multiplications(kernel.inside(i))):
        times, left = divmod(left, multiplications(kernel.inside(one)) // (STRIP // 32))
        count += (times - 1) * len(kernel.inside(one))
    return count


def multiplications(code: list[Instruction]) -> int:
    """Multiply-adds of a lane."""
    names = Counter(i.name for i in code)
    return names["FFMA"] + 2 * names["FFMA2"]


def deltas_of(kernel: Kernel) -> int | None:
    chunks = int(kernel.variant.split("x")[-1]) if kernel.name.startswith("gram") else 0
    return {
        "gram_kernel": 4 * chunks * 32, "gram_tensor_kernel": 16 * chunks * 32,
        "histogram_kernel": 16 * 32, "tie_kernel": 16 * 32, "ties_kernel": 8 * 32,
        "merge_kernel": STRIP, "sweep_kernel": STRIP, "measure_kernel": STRIP,
    }.get(kernel.name)  # fmt: skip


THREADS = {
    "cut_kernel": 32, "orthonormalise_kernel": 384, "bracket_kernel": 512, "choose_kernel": 512,
}  # fmt: skip


def count_arch(arch: str, folder: Path) -> dict[str, Any]:
    rows = {}
    for source in sorted((ROOT / "csrc/cuda").glob("*.cu")):
        cubin = compile_one(source, arch, folder)
        used = {demangle(name): usage for name, usage in resources(_dump("-res-usage", cubin)).items()}
        usual = {}
        if "LORS_RARELY" in source.read_text():
            found = parse(_dump("-sass", compile_one(source, arch, folder, "-DLORS_WITHOUT_RARE")))
            usual = {(kernel.name, kernel.variant): kernel for kernel in found}
        for kernel in parse(_dump("-sass", cubin)):
            if "any" in kernel.variant.split() or kernel.name.startswith("plain"):
                continue  # for mixed dtypes and odd rows: slow on purpose
            registers, stack, shared = used[kernel.name, kernel.variant]
            threads = THREADS.get(kernel.name, 256)
            row: dict[str, Any] = {
                "all": classes(kernel.code),
                "registers": registers,
                "stack": stack,
                "shared": shared,
            }
            row["blocks"] = blocks_per_processor(registers, shared + dynamic_shared(kernel), threads, arch)
            whole, kernel = kernel, usual.get((kernel.name, kernel.variant), kernel)
            if loop := main_loop(kernel):
                row["loop"] = classes(kernel.inside(loop))
                if deltas := deltas_of(kernel):
                    row["per delta"] = turn(kernel, loop) / deltas
                    if kernel is not whole and kernel.name == "gram_tensor_kernel":  # the account of a first pass
                        longest = main_loop(whole)
                        assert longest is not None
                        row["account per delta"] = (len(whole.inside(longest)) - len(kernel.inside(loop))) / deltas
            rows[f"{kernel.name} {kernel.variant}".strip()] = row
    return rows


def dynamic_shared(kernel: Kernel) -> int:
    """Of the largest matrix an instance takes; 80 x 80 and 1280 rows of the kernels that take every size."""
    if kernel.name == "gram_kernel":
        return 4 * 16 * 256 * int(kernel.variant.split("x")[-1])
    if kernel.name == "gram_tensor_kernel":
        item = 4 if kernel.variant.startswith("float32") else 2
        return 32 * item * 256 * int(kernel.variant.split("x")[-1])
    return {"eigh_kernel": 80 * 81 * 8, "orthonormalise_kernel": 1280 * 96}.get(kernel.name, 0)


def compile_one(source: Path, arch: str, folder: Path, *options: str) -> Path:
    """The machine code of one file, kept for as long as no source changes."""
    sums = hashlib.sha256(source.read_bytes() + repr(options).encode())
    for header in sorted([*(ROOT / "csrc").rglob("*.h"), *(ROOT / "csrc").rglob("*.cuh")]):
        sums.update(header.read_bytes())
    target = folder / f"{source.stem}-{arch}-{sums.hexdigest()[:16]}.cubin"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        print(f"nvcc {source.name} sm_{arch} {' '.join(options)}".rstrip(), flush=True)
        part = target.with_suffix(".part")
        command = ["nvcc", "-std=c++17", "-O3", "-cubin", f"-arch=sm_{arch}", '-DLORS_CUDA_ARCHS="counts"', *options]
        _run([*command, "-o", str(part), str(source)])
        part.rename(target)
    return target


def _dump(what: str, cubin: Path) -> str:
    return _run([tool("cuobjdump"), what, str(cubin)])


def tool(name: str) -> str:
    """On the PATH, or the one that Triton brings."""
    found = shutil.which(name)
    if found is None:
        with contextlib.suppress(ImportError):
            import triton

            here = Path(triton.__file__).parent / "backends/nvidia/bin" / name
            found = str(here) if here.exists() else None
    if found is None:
        raise BenchmarkError(f"counts: expected {name} on the PATH or in triton, found none")
    return found


def _run(command: list[str]) -> str:
    environment = {**os.environ, "PATH": f"{Path(tool('cuobjdump')).parent}:{os.environ['PATH']}"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    except FileNotFoundError:
        raise BenchmarkError(f"counts: expected {command[0]} on the PATH, found none") from None
    if done.returncode:
        raise BenchmarkError(f"{' '.join(command)}: exit code {done.returncode}: {done.stderr[-2000:]}")
    return done.stdout


# --- calls of the host


def count_calls() -> dict[str, Any]:
    """Calls into torch and into our kernels of a decomposition and of a merge of one group, by running both on the CPU with a
    backend that counts. A view costs the host a call and the device nothing; everything else is at least one launch."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    from lors_kernels import grouped, reference
    from lors_kernels.backends import truncated_svd
    from lors_kernels.backends.loop import Loop
    from lors_kernels.group import MatrixGroup

    class Calls(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.calls: Counter[str] = Counter()

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            views = any(r.alias_info is not None and not r.alias_info.is_write for r in function._schema.returns)
            if "empty" not in function._schema.name:  # memory is taken from torch's own
                self.calls["views" if views else "launches"] += 1
            return function(*args, **(kwargs or {}))

    class Counting(Loop):
        """Our kernels count as the launches they are, and not as the torch calls that stand in for them here."""

        width = 8

        def __getattribute__(self, name: str) -> Any:
            found = super().__getattribute__(name)
            launches = {
                "gram_apply": 1, "first_pass": 1, "measure": 1, "residual_threshold": 11, "merge_update": 1,
            }.get(name)  # fmt: skip
            if launches is None:
                return found

            def call(*arguments: Any, **options: Any) -> Any:
                calls.calls["own kernels"] += launches
                counted = calls.calls.copy()
                with torch.utils._python_dispatch._disable_current_modes():
                    result = found(*arguments, **options)
                calls.calls = counted  # what stands in for a kernel may call another that does
                return result

            return call

    generator = torch.Generator().manual_seed(1)
    strong = torch.arange(1, 33) ** -0.5
    deltas = [
        (torch.randn(256, 32, generator=generator) * strong) @ torch.randn(32, 192, generator=generator)
        + 0.2 * torch.randn(256, 192, generator=generator)
        for _ in range(2)
    ]
    group = MatrixGroup(None, [deltas])
    backend = Counting(reference)
    calls = Calls()
    found: dict[str, Any] = {}
    expand = truncated_svd.Krylov.expand
    expansions: list[Counter[str]] = []

    def counted(self: Any, *arguments: Any) -> Any:
        before = calls.calls.copy()
        result = expand(self, *arguments)
        expansions.append(calls.calls - before)
        return result

    operations, tolist = grouped.operations, torch.Tensor.tolist

    def read(self: torch.Tensor) -> Any:
        calls.calls["reads"] += 1
        return tolist(self)

    def own(function: Any) -> Any:
        def call(*arguments: Any) -> Any:
            calls.calls["own kernels"] += 1
            counted = calls.calls.copy()
            with torch.utils._python_dispatch._disable_current_modes():
                result = function(*arguments)
            calls.calls = counted  # what stands in for a kernel may call another that does
            return result

        return call

    # a launch each where the CUDA module is; what stands in for them is the same in torch
    patched = {
        (truncated_svd, "eigh"): own(truncated_svd.eigh),
        (truncated_svd, "orthonormalise"): own(truncated_svd.orthonormalise),
        (truncated_svd, "expand"): own(truncated_svd.expand),
    }
    before = {place: getattr(*place) for place in patched}
    for (module, name), value in patched.items():
        setattr(module, name, value)
    truncated_svd.Krylov.expand = counted  # type: ignore[method-assign]
    grouped.operations = lambda *_: backend
    torch.Tensor.tolist = read  # type: ignore[method-assign]
    try:
        with calls:
            factors = grouped.truncated_svd_group(group, 7)
        found["decompose"] = dict(calls.calls)
        found["expand"] = dict(sorted(expansions, key=lambda one: one.total())[len(expansions) // 2])
        with calls:
            threshold = grouped.residual_threshold_group(group, factors.left, factors.right, 9830)
            grouped.merge_update_group(group, [deltas[0].clone()], factors.left, factors.right, threshold, [1.0, 1.0])
        found["merge"] = dict(calls.calls)
    finally:
        for (module, name), value in before.items():
            setattr(module, name, value)
        truncated_svd.Krylov.expand = expand  # type: ignore[method-assign]
        grouped.operations = operations
        torch.Tensor.tolist = tolist  # type: ignore[method-assign]
    found["passes"] = max(factors.passes)
    return found


# --- the prediction


GOALS = {  # ms, of the issue
    "gram_apply, a pass": 10, "residual_threshold": 30, "merge_update": 15, "eigenpairs, a check": 10, "the whole merge": 200,
}  # fmt: skip
PASSES, CHECKS = 11, 3  # of a decomposition whose singular values fall by a power law


def predict(rows: dict[str, Any]) -> dict[str, Any]:
    """whisper-large-v3 with 10 float16 experts on an H200."""
    experts, item = 10, 2
    matrices = SIZES["large-v3"].matrices()
    entries = sum(m * n * count for (m, n), count in matrices.items())
    turned = sum(m * n * count for (m, n), count in matrices.items() if m < n) / entries  # taken by their columns
    factors = sum((m + n) * RANK * 4 * count * experts for (m, n), count in matrices.items())
    pairs = sum(matrices.values()) * experts
    deltas, once = entries * experts, entries * (experts + 1) * item

    def each(kernel: str) -> float:
        return float(rows[kernel]["per delta"])

    rows_of, columns_of = (each(f"gram_tensor_kernel float16 {side} x5") for side in ("rows", "columns"))
    gram = (1 - turned) * rows_of + turned * columns_of
    # bytes, warp instructions
    # of other numbers than float16 nothing but the account stands behind LORS_RARELY, and it is the same for all
    account = float(rows["gram_tensor_kernel bfloat16 rows x5"]["account per delta"])
    steps: dict[str, tuple[float, float]] = {
        "gram_apply, the first pass": (once, (gram + account) * deltas),
        "gram_apply, a pass": (once, gram * deltas),
        # w, result, and a basis of 40 columns (the mean), six times
        "expand, a pass": (pairs * 1280 * (8 * 8 + 6 * 40 * 4), pairs * EXPAND),
        "eigenpairs, a check": (pairs * 80 * 80 * 16, pairs * EIGENPAIRS),
        # the sample, in pieces of 64 bytes, and the candidates, written and read twice
        "residual_threshold": (
            once + factors + pairs * 16384 * 2 * item + 0.04 * deltas * 4 * 3,
            each("sweep_kernel float16") * deltas + pairs * SEARCH,
        ),
        "merge_update": (once + 2 * entries * item + factors, each("merge_kernel float16") * deltas),
    }
    rate = MODEL["processors"] * 4 * MODEL["GHz"] * 1e9 * MODEL["issue"]  # type: ignore[operator]
    found: dict[str, Any] = {}
    for name, (size, instructions) in steps.items():
        by_bytes, by_issue = size / (MODEL["TB/s"] * 1e9), 1e3 * instructions / rate  # type: ignore[operator]
        found[name] = {"bytes": size, "warp instructions": instructions} | {
            "ms by bytes": by_bytes, "ms by issue": by_issue, "ms predicted": max(by_bytes, by_issue),
        }  # fmt: skip
    # one matrix after the other per block: as many at once as fit, each as long as its rotations follow one another
    at_once = MODEL["processors"] * rows["eigh_kernel"]["blocks"]  # type: ignore[operator]
    chain = -(-pairs // at_once) * ROTATIONS * ROTATION / (MODEL["GHz"] * 1e6)  # type: ignore[operator]
    eigen = found["eigenpairs, a check"]
    eigen["ms by latency"] = chain
    eigen["ms predicted"] = max(eigen["ms predicted"], chain)
    times = {"gram_apply, a pass": PASSES, "expand, a pass": PASSES, "eigenpairs, a check": CHECKS}
    whole = sum(row["ms predicted"] * times.get(name, 1) for name, row in found.items())
    found["the whole merge"] = {"ms predicted": whole}
    for name, goal in GOALS.items():
        found[name]["ms wanted"] = goal
    return found


# Counted on a Krylov projection of 80 x 80: rotations of implicit QL. Cycles of one: assumed, two dozen dependent
# operations in float64 with a root.
ROTATIONS, ROTATION = 5400, 250
# Warp instructions of a pair, from the loops of the machine code and how often they run.
EIGENPAIRS, EXPAND, SEARCH = 925_000, 270_000, 380_000


def run(archs: tuple[str, ...] = ARCHS, directory: Path = RESULTS) -> dict[str, Any]:
    folder = ROOT / "build" / "counts"
    data: dict[str, Any] = {"part": "counts", "quick": True, "compiler": _compiler(), "model": MODEL}
    data["kernels"] = {f"sm_{arch}": count_arch(arch, folder) for arch in archs}
    data["calls"] = count_calls()
    data["predicted"] = predict(data["kernels"]["sm_90"])
    (directory / "counts.json").write_text(json.dumps(data, indent=1) + "\n")
    return data


def _compiler() -> str:
    return re.findall(r"release \S+, (\S+)", _run(["nvcc", "--version"]))[0]


def render(data: dict[str, Any]) -> str:
    lines = [
        "# GPU kernels: counted", "",
        "Written by `python -m benchmarks counts` from the machine code; **no number on this page was measured on a device.**",
        f"nvcc {data['compiler']}. Kernels for mixed dtypes and odd rows are left out.", "",
    ]  # fmt: skip
    for arch, rows in data["kernels"].items():
        lines += [
            f"## {arch}",
            "",
            "Of the longest loop, with the loops inside it run once; per delta: warp instructions with rank 7.",
            "",
        ]
        head = (
            "kernel",
            "instructions",
            "per delta",
            "FMA",
            "tensor",
            "shared",
            "shuffles",
            "barriers",
            "registers",
            "blocks",
        )
        lines += [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
        for name, row in rows.items():
            loop = row.get("loop", row["all"])
            each = f"{row['per delta']:.2f}" if "per delta" in row else ""
            cells = [
                name, loop["instructions"], each, loop["fma"] + loop["double"], loop["tensor"], loop["shared"],
                loop["shuffles"], loop["barriers"], row["registers"], row["blocks"],
            ]  # fmt: skip
            lines.append(f"| {' | '.join(map(str, cells))} |")
        lines.append("")
    lines += [
        "## Calls of the host, a group",
        "",
        "| step | launches by torch | views | own kernels | reads |",
        "|---|---|---|---|---|",
    ]
    for step in ("expand", "decompose", "merge"):
        row = data["calls"][step]
        cells = [str(row.get(key, 0)) for key in ("launches", "views", "own kernels", "reads")]
        lines.append(f"| {step} | {' | '.join(cells)} |")
    lines += ["", f"`decompose` with {data['calls']['passes']} passes; `merge` is everything of a group.", ""]
    lines += [
        "## Predicted: whisper-large-v3 x 10 in float16 on an H200",
        "",
        f"{data['model']['said'][0].upper()}{data['model']['said'][1:]}. Of the eigenpairs also by latency: as many matrices at "
        f"once as fit, each {ROTATIONS} rotations of {ROTATION} cycles, which is assumed as well.",
        "",
        f"The whole merge: {PASSES} passes and one that forms the factors, {CHECKS} checks, everything else once; what torch does "
        "at the checks, copies, and gaps between launches are not in it.",
        "",
    ]
    lines += ["| step | GB | ms by bytes | ms by issue | predicted, ms | goal, ms |", "|---|---|---|---|---|---|"]
    for name, row in data["predicted"].items():
        numbers = [row.get("bytes"), row.get("ms by bytes"), row.get("ms by issue"), row["ms predicted"]]
        numbers[0] = numbers[0] and numbers[0] / 1e9
        cells = ["" if x is None else f"{x:.1f}" for x in numbers] + [str(row.get("ms wanted", ""))]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def write() -> None:
    data = run()
    (ROOT / "docs" / "gpu-counts.md").write_text(render(data))
    print(render(data))
