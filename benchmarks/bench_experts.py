"""Expert files and sweeps: bytes, error and words of every option, whole commands, and what many settings cost."""

from __future__ import annotations

import csv
import shutil
import statistics
from functools import partial
from pathlib import Path
from typing import Any

from .bench_merge import LORS, Scene, lors_command, python_path
from .compare import difference
from .errors import BenchmarkError
from .generate import Spec, generate
from .process import Case, interleave, measure, ratio, spread
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
# Ten settings that need a merge each, and a hundred: the same ones at ten values of lambda.
SETTINGS = {"rank": "1,2,4,8,16", "density": "0.2,0.4"}
LAMBDAS = {10: "0.2", 100: "0.1:1:0.1"}
WORDS = {"rank": 2, "density": 0.4}  # of the merges whose words are scored; lambda is chosen on dev


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


def measure_sweeps(scene: Scene, repeats: int) -> dict[str, Any]:
    """Sweeps of 10 and 100 settings, scored by a shell's `echo`: whole commands, and the seconds that merging took."""
    import yaml

    env = {"PYTHONPATH": python_path(), "XDG_CACHE_HOME": str(scene.out / "cache")}
    recipe = scene.output("recipe").with_suffix(".yml")
    models = [{"model": str(path), "name": name} for name, path in scene.inputs.experts.items()]
    recipe.write_text(yaml.safe_dump({"merge_method": "lors", "base_model": str(scene.inputs.base), "models": models}))
    measure(lors_command(scene, scene.output("once")), env=env)  # remembers the digests of the inputs
    shutil.rmtree(scene.output("once"))
    merging: dict[str, list[float]] = {}

    def case(count: int) -> Case:
        name = f"{count} settings"
        home = scene.output(name)
        command = [*LORS, "sweep", str(recipe), "-o", str(home), "--score", "sh -c 'echo 1'", "--quiet"]
        for option, values in {**SETTINGS, "lambda": LAMBDAS[count]}.items():
            command += [f"--{option}", values]

        def check() -> None:
            with (home / "trials.csv").open(newline="", encoding="utf-8") as stream:
                rows = list(csv.DictReader(stream))
            if [row["state"] for row in rows] != ["complete"] * count:
                raise BenchmarkError(f"{name}: expected {count} complete trials, got {len(rows)} of them or fewer")
            merging.setdefault(name, []).append(sum(float(row["merge_seconds"]) for row in rows))

        return Case(name, command, repeats, env, lambda: shutil.rmtree(home, ignore_errors=True), check)

    one = scene.case("one merge", lors_command(scene, scene.output("one merge")), repeats, env)
    measured = interleave([case(10), case(100), one], scene.inputs.files, lambda line: print(f"  {line}", flush=True))
    few, many = (measured[f"{count} settings"]["wall_s"] for count in (10, 100))
    ten = {key: 10 * value for key, value in measured["one merge"]["wall_s"].items()}
    ratios = {"100 settings / 10 settings": ratio(many, few), "100 settings / 10 merges one by one": ratio(many, ten)}
    return {
        "commands": measured, "ratios": ratios, "merge_seconds": {name: spread(times) for name, times in merging.items()},
    }  # fmt: skip


def measure_words(data: Path, quick: bool) -> dict[str, Any]:
    """{option: {"bytes", "share", "error", "wer", "differing" answers}}: experts of the speech harness's tiny base.

    The experts are those of its experiment `quick`; lambda is the best on dev for a merge of their checkpoints; WER is the
    mean over the experts' languages on test. quick: three settings of a shorter training instead.
    """
    from lors.speech.scoring.evaluation import evaluate

    bench = _experts_of_speech(data, quick)
    found: dict[str, Any] = {}
    scores: dict[str, Any] = {}
    sources = {"checkpoints": bench["experts"]}
    for options in OPTIONS:
        sources[", ".join(options)] = {name: _stored(bench, name, options) for name in bench["experts"]}
    for title, experts in sources.items():
        out = _merged(bench, title, experts, bench["lam"])
        evaluation = evaluate(out, data=bench["corpus"], languages=list(bench["experts"]), cache=bench["features"])
        scores[title] = [answer.hypothesis for result in evaluation.results for answer in result.answers]
        wer = statistics.mean(result.score.wer for result in evaluation.results)
        sizes = [_weights(path) for path in experts.values()]
        apart = difference(out, bench["home"] / "merged-checkpoints", bench["base"])["relative"]
        changed = sum(a != b for a, b in zip(scores[title], scores["checkpoints"], strict=True))
        found[title] = {
            "bytes": sizes[0],
            "error": apart,
            "wer": wer,
            "answers": len(scores[title]),
            "differing": changed,
        }
        found[title]["share"] = sizes[0] / found["checkpoints"]["bytes"]
        print(f"  {title}: {wer:.2f} % WER, {changed} of {len(scores[title])} answers differ", flush=True)
    return {"lambda": bench["lam"], "languages": list(bench["experts"]), "options": found}


def _experts_of_speech(data: Path, quick: bool) -> dict[str, Any]:
    """Trains what is not there yet, and chooses lambda on dev."""
    import yaml

    from lors.speech.demo import RECORDINGS, demo_config
    from lors.speech.experiment.config import Data
    from lors.speech.experiment.plan import build_stages
    from lors.speech.experiment.stages import exclusive, run_stages
    from lors.speech.model.whisper import resolve_model
    from lors.speech.scoring.evaluation import evaluate

    config = demo_config()
    if quick:
        short = {**config.training, "max_steps": 30, "warmup_steps": 3}
        source = Data(source=str(RECORDINGS), dev=4, test=8)
        config = config.model_copy(update={"experts": ("ca", "es"), "training": short, "data": source})
    root = data / "speech" / ("short" if quick else "quick")
    stages = {stage.name: stage for stage in build_stages(config)}
    names = [name for name in ("corpus", *(f"expert-{language}-s0" for language in config.experts)) if name in stages]
    with exclusive(root):
        run_stages(
            [stages[name] for name in names], root, 1 if quick else 2, lambda line: print(f"  {line}", flush=True)
        )
    corpus = config.data.source or str(stages["corpus"].directory(root))
    experts = {language: stages[f"expert-{language}-s0"].directory(root) / "model" for language in config.experts}
    bench = {
        "home": root, "base": Path(resolve_model(config.base)), "experts": experts, "corpus": corpus,
        "features": root / "features",
    }  # fmt: skip
    tried = {}
    for lam in (0.6, 0.9) if quick else (0.35, 0.6, 0.9, 1.2):
        out = _merged(bench, "trial", experts, lam)
        options: dict[str, Any] = {"split": "dev", "limit": config.data.dev, "cache": bench["features"]}
        evaluation = evaluate(out, data=corpus, languages=list(experts), **options)
        tried[lam] = statistics.mean(result.score.wer for result in evaluation.results)
    print(f"  lambda on dev: {', '.join(f'{lam}: {wer:.1f} %' for lam, wer in tried.items())}", flush=True)
    shutil.rmtree(root / "merged-trial")
    (root / "chosen.yml").write_text(yaml.safe_dump(tried))
    return bench | {"lam": min(tried, key=lambda lam: tried[lam])}


def _merged(bench: dict[str, Any], title: str, experts: dict[str, Path], lam: float) -> Path:
    import lors

    out = Path(bench["home"], f"merged-{title.replace(', ', '-')}")
    lors.merge(bench["base"], experts, out, lam=lam, force=True, durable=False, **WORDS)
    return out


def _stored(bench: dict[str, Any], name: str, options: tuple[str, str, str]) -> Path:
    from lors.experts.decompose import decompose

    values, index, remainder = options
    out = Path(bench["home"], f"{name}-{'-'.join(options)}.lors.safetensors")
    decompose(
        bench["base"], bench["experts"][name], out, name=name, values=values, index=index, remainder=remainder,
        force=True, **WORDS,
    )  # fmt: skip
    return out


def _weights(path: Path) -> int:
    return sum(file.stat().st_size for file in ([path] if path.is_file() else path.glob("*.safetensors")))


def run(results: Results, data: Path, repeats: int) -> None:
    """All pieces, on whisper-small-sized checkpoints and, where words are scored, on the speech harness's own."""
    size, experts = ("tiny", 2) if results.quick else ("small", 5)
    spec = Spec(size)
    scene = Scene(generate(data, spec, experts), spec, data / "out" / f"experts-{spec.folder}")
    shutil.rmtree(scene.out, ignore_errors=True)
    scene.out.mkdir(parents=True)
    try:
        results.record("options", partial(measure_options, scene))
        results.record("commands", partial(measure_commands, scene, repeats))
        results.record("sweeps", partial(measure_sweeps, scene, max(1, repeats // 2)))
        results.record("words", partial(measure_words, data, results.quick))
    finally:
        shutil.rmtree(scene.out, ignore_errors=True)
