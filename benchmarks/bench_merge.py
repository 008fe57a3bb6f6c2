"""Whole commands, files to files: `lors merge` against mergekit, the released procedure and the hardware's floor.

Every command is a process of its own: import, reading, computing, hashing and writing are all in its time. Inputs are
in the page cache, repeats are interleaved, outputs are compared.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lors_kernels.backends import cpu

from .compare import difference
from .errors import BenchmarkError
from .generate import Checkpoints, Spec, generate
from .machine import ROOT
from .process import Case, interleave, measure, ratio
from .released import PAPER
from .results import Results
from .shapes import SIZES, WhisperSize

RIVALS = ("mergekit task arithmetic", "mergekit TIES", "as released")
# How far the same method in two programs may be apart, relative to the way from the base. A float32 result differs by
# the order of sums (1e-5), and by entries within a rounding of the threshold that one keeps and the other does not: one
# entry in a million is about 2e-3. A half precision one differs by roundings of the weight's last place.
SAME = {"float32": 5e-3, "float16": 0.1, "bfloat16": 0.5}

LORS = [sys.executable, "-c", "from lors.cli import main; main()"]  # what the console script `lors` runs


@dataclass(frozen=True)
class Scene:
    """Inputs on disk, and where outputs go."""

    inputs: Checkpoints
    spec: Spec
    out: Path

    def output(self, name: str) -> Path:
        return self.out / name.replace(" ", "-").replace(",", "")

    def case(self, name: str, command: Sequence[str], repeats: int, env: Mapping[str, str] | None = None) -> Case:
        out = self.output(name)
        return Case(name, command, repeats, env or {}, prepare=lambda: shutil.rmtree(out, ignore_errors=True))


def lors_command(scene: Scene, out: Path, method: str = "lors", **options: object) -> list[str]:
    """The command line a user types, with the paper's settings unless `options` say otherwise."""
    settings = {"lambda": PAPER["lam"]} | (
        {"rank": PAPER["rank"], "density": PAPER["density"]} if method == "lors" else {}
    )
    command = [*LORS, "merge", str(out), "--base", str(scene.inputs.base), "--method", method]
    for name, path in scene.inputs.experts.items():
        command += ["--expert", f"{name}={path}"]
    for option, value in (settings | options).items():
        command += [f"--{option}", str(value)]
    return [*command, "--quiet"]


def lors_case(scene: Scene, name: str, method: str, repeats: int, *, digests: bool, **options: object) -> Case:
    env = {"PYTHONPATH": python_path(), "XDG_CACHE_HOME": str(scene.out / "cache")}
    if not digests:
        env["LORS_DIGEST_CACHE"] = "0"
    return scene.case(name, lors_command(scene, scene.output(name), method, **options), repeats, env)


def python_path() -> str:
    """The repository first: what is measured is this commit."""
    return f"{ROOT / 'python_api'}:{ROOT}"


def mergekit_case(scene: Scene, name: str, method: str, repeats: int) -> Case:
    """mergekit-yaml with its defaults; TIES trims to the density that LoRS prunes to."""
    import yaml

    weights = {"weight": 1.0} | ({"density": PAPER["density"]} if method == "ties" else {})
    models = [{"model": str(path), "parameters": weights} for path in scene.inputs.experts.values()]
    recipe = {
        "merge_method": method,
        "base_model": str(scene.inputs.base),
        "models": models,
        "parameters": {"lambda": PAPER["lam"]},
        "dtype": scene.spec.dtype,
    }
    config = scene.output(name).with_suffix(".yml")
    config.parent.mkdir(parents=True, exist_ok=True)
    config.write_text(yaml.safe_dump(recipe))
    command = [sys.executable, "-m", "benchmarks.peers.mergekit_whisper", str(config), str(scene.output(name))]
    return scene.case(name, command, repeats, {"PYTHONPATH": python_path()})


def released_case(scene: Scene, repeats: int) -> Case:
    paths = [scene.inputs.base, scene.output("as released"), *scene.inputs.experts.values()]
    command = [sys.executable, "-m", "benchmarks.peers.as_released", *map(str, paths)]
    return scene.case("as released", command, repeats, {"PYTHONPATH": python_path()})


def floor_cases(scene: Scene, repeats: int) -> list[Case]:
    """Reading all inputs; writing one output, with and without waiting for the disk."""
    floor = [sys.executable, "-m", "benchmarks.floor"]
    env = {"PYTHONPATH": python_path()}
    size = str(scene.inputs.files[0].stat().st_size)
    target = scene.out / "floor.bin"
    target.parent.mkdir(parents=True, exist_ok=True)
    write = [*floor, "write", str(target), size]
    return [
        Case("floor: read inputs", [*floor, "read", *map(str, scene.inputs.files)], repeats, env),
        Case("floor: write output", write, repeats, env, prepare=lambda: target.unlink(missing_ok=True)),
        Case("floor: write output, fsync", [*write, "sync"], repeats, env, lambda: target.unlink(missing_ok=True)),
    ]


def ours(scene: Scene, repeats: int, *, task_arithmetic: bool = True) -> list[Case]:
    """Digests of unchanged inputs are remembered by default: "first time" is without that memory."""
    cases = [
        lors_case(scene, "lors", "lors", repeats, digests=True),
        lors_case(scene, "lors, first time", "lors", repeats, digests=False),
    ]
    if task_arithmetic:
        cases += [
            lors_case(scene, "lors task arithmetic", "task_arithmetic", repeats, digests=True),
            lors_case(scene, "lors task arithmetic, first time", "task_arithmetic", repeats, digests=False),
        ]
    return cases


def wudi_case(scene: Scene, repeats: int) -> Case:
    return lors_case(scene, "lors wudi", "wudi", repeats, digests=True, **{"lambda": 1})


def wudi_goal(scene: Scene, measured: Mapping[str, Any]) -> dict[str, Any]:
    """Processor seconds of `wudi`, and what it may take: four times task arithmetic's and its products at 70 % of the
    measured peak of one core."""
    mine, plain = (
        {key: sum(measured[name][part][key] for part in ("user_s", "system_s")) for key in ("median", "min", "max")}
        for name in ("lors wudi", "lors task arithmetic")
    )
    flops = wudi_flops(SIZES[scene.spec.size], len(scene.inputs.experts))
    peak = cpu.library().multiply_rate(1, 1.0)
    products = flops / (0.7 * peak)
    goal = 4 * plain["median"] + products
    print(f"  wudi: {mine['median']:.1f} s of processor time, goal {goal:.1f} s", flush=True)
    return {"cpu_s": mine, "goal_s": goal, "products_s": products, "flops": flops, "peak": peak}


def wudi_flops(size: WhisperSize, experts: int) -> float:
    """Half of the Gram matrix and delta times it, or where that is less half of the other Gram matrix and it times delta, of each
    expert; one Cholesky decomposition and its two triangular solutions."""
    total = 0.0
    for (m, n), count in size.matrices().items():
        each = m * n * n + min(2 * m * n * n, 3 * m * m * n)
        total += count * (experts * each + n**3 / 3 + 2 * m * n * n)
    return total


def compare_outputs(scene: Scene, measured: Mapping[str, Any]) -> dict[str, Any]:
    """Pairs that must agree, of those that ran."""
    pairs = {
        "lors against as released": ("lors", "as released"),
        "task arithmetic against mergekit": ("lors task arithmetic", "mergekit task arithmetic"),
    }
    found: dict[str, Any] = {}
    for title, (mine, other) in pairs.items():
        if all(name in measured and "failed" not in measured[name] for name in (mine, other)):
            apart = difference(scene.output(mine), scene.output(other), scene.inputs.base)
            found[title] = apart | {"same": apart["relative"] <= SAME[scene.spec.dtype]}
            print(
                f"  {title}: {apart['relative']:.1e} apart{'' if found[title]['same'] else ': NOT THE SAME'}",
                flush=True,
            )
    return found


def run_scene(data: Path, spec: Spec, experts: int, cases: Callable[[Scene], list[Case]]) -> dict[str, Any]:
    """Generate, measure, compare, clean up. Returns measurements by command, and ratios to `lors`."""
    scene = Scene(generate(data, spec, experts), spec, data / "out" / f"{spec.folder}-{experts}")
    shutil.rmtree(scene.out, ignore_errors=True)
    try:
        # Remembers the digests, and shows a merge that cannot run at all before the slow rivals do.
        measure(lors_command(scene, scene.output("lors")), env=lors_case(scene, "lors", "lors", 1, digests=True).env)
        measured = interleave(cases(scene), scene.inputs.files, lambda line: print(f"  {line}", flush=True))
        agreement = compare_outputs(scene, measured)
    finally:
        shutil.rmtree(scene.out, ignore_errors=True)
    ratios = {
        f"{other} / {mine}": ratio(measured[other]["wall_s"], measured[mine]["wall_s"])
        for mine in ("lors", "lors, first time")
        for other in (*RIVALS, "lors task arithmetic")
        if all(name in measured and "failed" not in measured[name] for name in (mine, other))
    }
    input_bytes = sum(path.stat().st_size for path in scene.inputs.files)
    found = {"commands": measured, "ratios": ratios, "agreement": agreement, "input_bytes": input_bytes}
    both = [measured.get(name, {"failed": ""}) for name in ("lors wudi", "lors task arithmetic")]
    return found if any("failed" in run for run in both) else found | {"wudi": wudi_goal(scene, measured)}


def run(results: Results, data: Path, repeats: int, *, peers: bool = True) -> None:
    """All scenes; each is one piece of the result file."""
    small = "tiny" if results.quick else "small"
    slow = 1 if results.quick else max(1, repeats // 2)

    def everything(scene: Scene) -> list[Case]:
        cases = [*ours(scene, repeats), wudi_case(scene, slow), *floor_cases(scene, repeats)]
        if peers:
            cases += [
                mergekit_case(scene, "mergekit task arithmetic", "task_arithmetic", slow),
                mergekit_case(scene, "mergekit TIES", "ties", 1),
                released_case(scene, 1),
            ]
        return cases

    def with_task_arithmetic(scene: Scene) -> list[Case]:
        cases = [*ours(scene, repeats), *floor_cases(scene, repeats)]
        return [*cases, mergekit_case(scene, "mergekit task arithmetic", "task_arithmetic", 1)] if peers else cases

    def with_wudi(scene: Scene) -> list[Case]:
        return [*with_task_arithmetic(scene), wudi_case(scene, 1)]

    few, many, large = (2, 3, None) if results.quick else (5, 10, "large-v3")
    scenes: list[tuple[str, Spec, int, Callable[[Scene], list[Case]]]] = [
        (f"{small} float32, {few} experts", Spec(small), few, everything),
        (f"{small} float32, {few} experts, cut in noise", Spec(small, deltas="buried"), few, with_task_arithmetic),
        (f"{small} float32, {few} experts, flat noise", Spec(small, deltas="flat"), few, with_task_arithmetic),
        (f"{small} float32, {many} experts", Spec(small), many, with_task_arithmetic),
    ]
    if large:
        scenes.append((f"{large} float16, 3 experts", Spec(large, "float16"), 3, with_wudi))
    # next to nothing to compute: what a command costs before and after
    scenes.append(("micro float32, 2 experts", Spec("micro"), 2, lambda scene: ours(scene, repeats)))
    for title, spec, experts, cases in scenes:
        results.record(title, partial(run_scene, data, spec, experts, cases))
    wrong = [
        title
        for piece in results.pieces.values()
        for title, found in piece.get("agreement", {}).items()
        if not found["same"]
    ]
    if wrong:
        raise BenchmarkError(
            f"outputs: expected the same result from both programs, got a difference: {', '.join(wrong)}"
        )
