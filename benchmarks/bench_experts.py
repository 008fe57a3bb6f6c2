"""Expert files: bytes and error of every option, and whole commands against merging from checkpoints."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path
from typing import Any

from .bench_merge import LORS, Scene, lors_command, python_path
from .compare import difference
from .generate import Spec, generate
from .process import Case, interleave, measure, ratio
from .results import Results

# values, index, remainder
OPTIONS = (
    ("float32", "mask", "float32"),
    ("float16", "mask", "float16"),
    ("float16", "gaps", "float16"),
    ("float16", "mask", "int8"),
    ("bfloat16", "mask", "float16"),
    ("float16", "mask", "none"),
)


def decompose_command(scene: Scene, name: str, out: Path, values: str, index: str, remainder: str) -> list[str]:
    options = ["--values", values, "--index", index, "--remainder", remainder, "--name", name, "--force"]
    return [*LORS, "decompose", str(scene.inputs.base), str(scene.inputs.experts[name]), "-o", str(out), *options]


def merge_command(scene: Scene, out: Path, files: dict[str, Path]) -> list[str]:
    """`lors merge` with the files in the place of the checkpoints."""
    command = lors_command(scene, out)
    for name, path in scene.inputs.experts.items():
        if name in files:
            command[command.index(f"{name}={path}")] = f"{name}={files[name]}"
    return command


def measure_options(scene: Scene) -> dict[str, Any]:
    """{option: {"bytes", "share" of the checkpoint, "error" of the merged model's update}}, one expert merged."""
    env = {"PYTHONPATH": python_path(), "XDG_CACHE_HOME": str(scene.out / "cache")}
    names = list(scene.inputs.experts)
    want = scene.output("from checkpoints")
    measure(lors_command(scene, want), env=env)
    size = sum(path.stat().st_size for path in scene.inputs.experts[names[0]].glob("*.safetensors"))
    found = {}
    for options in OPTIONS:
        files = {name: scene.out / f"{name}.lors.safetensors" for name in names}
        for name, path in files.items():
            measure(decompose_command(scene, name, path, *options), env=env)
        out = scene.output("from files")
        shutil.rmtree(out, ignore_errors=True)
        measure(merge_command(scene, out, files), env=env)
        stored = files[names[0]].stat().st_size
        error = difference(out, want, scene.inputs.base)["relative"]
        found[", ".join(options)] = {"bytes": stored, "share": stored / size, "error": error}
        print(f"  {', '.join(options)}: {100 * stored / size:.1f} %, error {error:.1e}", flush=True)
    return found


def measure_commands(scene: Scene, repeats: int) -> dict[str, Any]:
    """Merging from checkpoints and from files; adding one expert against merging all again."""
    env = {"PYTHONPATH": python_path(), "XDG_CACHE_HOME": str(scene.out / "cache")}
    files = {name: scene.out / f"{name}.lors.safetensors" for name in scene.inputs.experts}
    for name, path in files.items():
        measure(decompose_command(scene, name, path, "float16", "mask", "float16"), env=env)
    *most, last = files
    grown = scene.output("grown")
    small = merge_command(scene, grown, files)
    at = small.index(f"{last}={files[last]}")
    del small[at - 1 : at + 1]

    def restart() -> None:
        shutil.rmtree(grown, ignore_errors=True)
        measure(small, env=env)

    first = decompose_command(scene, last, scene.out / "again.lors.safetensors", "float16", "mask", "float16")
    cases = [
        scene.case("merge from checkpoints", lors_command(scene, scene.output("merge from checkpoints")), repeats, env),
        scene.case("merge from files", merge_command(scene, scene.output("merge from files"), files), repeats, env),
        Case("decompose one", first, repeats, env),
        Case("add one", [*LORS, "add", str(grown), str(files[last])], repeats, env, prepare=restart),
    ]
    warm = [*scene.inputs.files, *files.values()]
    measured = interleave(cases, warm, lambda line: print(f"  {line}", flush=True))
    whole = measured["merge from checkpoints"]["wall_s"]
    ratios = {
        f"checkpoints / {name}": ratio(whole, measured[name]["wall_s"]) for name in ("merge from files", "add one")
    }
    return {"commands": measured, "ratios": ratios, "experts": len(most) + 1}


def run(results: Results, data: Path, repeats: int) -> None:
    """Both pieces, on whisper-small-sized checkpoints."""
    size, experts = ("tiny", 2) if results.quick else ("small", 5)
    spec = Spec(size)
    scene = Scene(generate(data, spec, experts), spec, data / "out" / f"experts-{spec.folder}")
    shutil.rmtree(scene.out, ignore_errors=True)
    scene.out.mkdir(parents=True)
    try:
        results.record("options", partial(measure_options, scene))
        results.record("commands", partial(measure_commands, scene, repeats))
    finally:
        shutil.rmtree(scene.out, ignore_errors=True)
