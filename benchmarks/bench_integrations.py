"""mergekit's TIES with and without our selection under it, and `lors merge` on the same recipe: whole commands.

All three read the same YAML file. mergekit's result with our kernels must be its own, and `lors merge`'s must be too, up
to entries at the threshold.
"""

from __future__ import annotations

import shutil
import sys
from functools import partial
from pathlib import Path
from typing import Any

from .bench_merge import LORS, SAME, Scene, python_path
from .compare import difference
from .errors import BenchmarkError
from .generate import Spec, generate
from .process import Case, interleave, ratio
from .released import PAPER
from .results import Results

PLAIN, FASTER, ALONE = "mergekit TIES", "mergekit TIES with our selection", "lors TIES"


def recipe(scene: Scene) -> Path:
    """One YAML for all: TIES at the paper's density and lambda."""
    import yaml

    parameters = {"weight": 1.0, "density": PAPER["density"]}
    document = {
        "merge_method": "ties",
        "base_model": str(scene.inputs.base),
        "models": [{"model": str(path), "parameters": parameters} for path in scene.inputs.experts.values()],
        "parameters": {"lambda": PAPER["lam"]},
        "dtype": scene.spec.dtype,
    }
    path = scene.out / "ties.yml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(document))
    return path


def cases(scene: Scene, repeats: int, slow: int) -> list[Case]:
    config, env = str(recipe(scene)), {"PYTHONPATH": python_path(), "XDG_CACHE_HOME": str(scene.out / "cache")}
    commands = {
        PLAIN: ([sys.executable, "-m", "benchmarks.peers.mergekit_whisper", config], slow),
        FASTER: ([*LORS, "mergekit-yaml", config], slow),
        ALONE: ([*LORS, "merge", config], repeats),
    }
    return [
        scene.case(name, [*command, str(scene.output(name)), "--quiet"], times, env)
        for name, (command, times) in commands.items()
    ]


def run_scene(data: Path, spec: Spec, experts: int, repeats: int, slow: int) -> dict[str, Any]:
    scene = Scene(generate(data, spec, experts), spec, data / "out" / f"integrations-{spec.folder}-{experts}")
    shutil.rmtree(scene.out, ignore_errors=True)
    try:
        measured = interleave(
            cases(scene, repeats, slow), scene.inputs.files, lambda line: print(f"  {line}", flush=True)
        )
        if failed := [f"{name}: {found['failed']}" for name, found in measured.items() if "failed" in found]:
            raise BenchmarkError("; ".join(failed))
        agreement = {
            f"{name} against {PLAIN}": difference(scene.output(name), scene.output(PLAIN), scene.inputs.base)
            for name in (FASTER, ALONE)
        }
    finally:
        shutil.rmtree(scene.out, ignore_errors=True)
    for title, apart in agreement.items():
        print(f"  {title}: {apart['relative']:.1e} apart", flush=True)
        if apart["relative"] > SAME[spec.dtype]:
            raise BenchmarkError(f"outputs: expected the same result, got a difference: {title}")
    ratios = {
        f"{PLAIN} / {name}": ratio(measured[PLAIN]["wall_s"], measured[name]["wall_s"]) for name in (FASTER, ALONE)
    }
    return {"commands": measured, "ratios": ratios, "agreement": agreement}


def run(results: Results, data: Path, repeats: int) -> None:
    size, experts = ("tiny", 2) if results.quick else ("small", 5)
    slow = 1 if results.quick else max(1, repeats // 2)
    results.record(f"{size} float32, {experts} experts", partial(run_scene, data, Spec(size), experts, repeats, slow))
