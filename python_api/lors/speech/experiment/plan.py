"""The whole experiment: corpus -> experts and baselines -> merges chosen on dev -> test -> report.

Rules that make it a fair comparison: every method is tried with the same number of settings, its best is chosen by mean
dev WER over the experts' languages and the tasks, and only the chosen models (and base, experts, baselines) see test.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ...errors import LorsError
from ...files.digest import sha256_file
from ...files.replaceable import PAGE, RESULTS, require_file
from ..data.corpus import corpus_digest, is_kind, load_corpus
from ..data.domain import SPLITS
from ..data.left_out import SHARE, LeftOut
from ..data.utterance import Corpus, by_task
from ..model.whisper import gpus, quiet, require_languages, resolve_model
from ..scoring.evaluation import Decoder
from . import ray_stages
from .config import Config, Setting, load_config
from .stages import Stage, exclusive, run_stage, run_stages

__all__ = ["build_stages", "run_experiment"]

_RESTS = ("task_arithmetic", "average", "base")
_FINETUNE_VERSION = 2  # 2: the encoder's positions are frozen
_ACCUMULATED_VERSION = 3  # 3: where batches accumulate, a step's loss is the mean over all their tokens


def run_experiment(
    config: str | Path | Config,
    out: str | Path,
    *,
    jobs: int | None = None,
    stage: str | None = None,
    ray: str | None = None,
    report: Callable[[str], None] = print,
) -> Path:
    """Runs what is missing of the experiment in directory `out` and returns its ``report.html``.

    `jobs` stages run at a time, one thread each (default: one per core; with the device cuda one per GPU, and at most so
    many: each sees a GPU of its own). `stage` runs that one alone, in this process.
    `ray`: "local" or the address of a cluster whose nodes all see `out`: stages run there.
    """
    if stage is not None and ray is not None:
        raise LorsError("--stage: runs in this process, expected no --ray")
    settings = config if isinstance(config, Config) else load_config(config)
    root = Path(out)
    stages = build_stages(settings)
    require_languages(settings.base, settings.languages)
    require_file(root / "report.html", PAGE, force=True)
    require_file(root / "results.json", RESULTS, force=True)
    places = [] if ray is not None else gpus(settings.device)
    if places and jobs is not None and jobs > len(places):
        raise LorsError(f"--jobs: expected at most {len(places)} with --device cuda, a stage per GPU, got {jobs}")
    with exclusive(root, shared=stage is not None):  # stages alone may run beside each other
        if stage is not None:
            quiet()
            run_stage(stages, stage, root, report)
            return root / "report.html"
        if ray is None:
            run_stages(stages, root, jobs or len(places) or os.cpu_count() or 1, report, places)
        else:
            ray_stages.run_stages(ray, settings, stages, root.absolute(), jobs or os.cpu_count() or 1, report)
        from .report import write_report

        return write_report(settings, root, {s.name: s.directory(root) for s in stages})


def build_stages(config: Config) -> list[Stage]:
    """All stages, each after the ones it needs."""
    data = config.data
    if (data.synth is None) == (data.source is None):
        raise LorsError(
            f"{config.name}: expected data.synth or data.source (--data), got {'both' if data.synth else 'neither'}"
        )
    plan = _Plan(config, _identity(config))
    stages = [*plan.corpus, plan.stage("test-base", _test_model, plan.evaluated("test", model=config.base), ())]
    for seed in config.seeds:
        stages += plan.of_seed(seed)
    return stages


@dataclass(frozen=True)
class _Plan:
    """What the stages of one configuration have in common; `identity` is that of the files it names."""

    config: Config
    identity: str
    digests: dict[str, str] = field(default_factory=dict)  # of the rows of a split, once they were read

    @property
    def of_kind(self) -> bool:
        """The corpus is KIND:PLACE, whose rows `_identity` has not seen as it sees a manifest."""
        return self.config.data.source is not None and is_kind(self.config.data.source)

    def rows(self, split: str) -> str:
        """Digest of the rows of the split, in the languages that it is read in."""
        if split not in self.digests:
            languages = self.config.languages if split == "test" else self.config.experts
            self.digests[split] = corpus_digest(str(self.config.data.source), languages=languages, split=split)
        return self.digests[split]

    @cached_property
    def corpus(self) -> tuple[Stage, ...]:
        """The stage that makes the corpus, if one does."""
        data = self.config.data
        if data.synth is None:
            return ()
        parameters = {
            "experts": self.config.experts,
            "languages": self.config.languages,
            "sizes": {"train": data.train, "dev": data.dev, "test": data.test},
            **data.synth.model_dump(),
        }
        return (Stage("corpus", _synthesise, parameters),)

    def of_seed(self, seed: int) -> list[Stage]:
        """Dev grids before the slow baselines and tests: with several jobs the longest chain starts first."""
        config = self.config
        experts = [self.training(f"expert-{language}-s{seed}", (language,), seed) for language in config.experts]
        baselines = []
        if (steps := config.multi_task_steps) is not None:
            baselines.append(self.training(f"multi_task-s{seed}", config.experts, seed, max_steps=steps))
        if (steps := config.sequential_steps) is not None:
            baselines.append(
                self.training(f"sequential-s{seed}", config.experts, seed, sequential=True, max_steps=steps)
            )
        merges = [stage for label in config.grids for stage in self.merges(label, seed, experts)]
        tests = [
            # The model comes from the stage before, whose key holds the base's digest already.
            Stage(f"test-{s.name}", _test_model, self.evaluated("test", model=None), (*self.corpus, s))
            for s in (*experts, *baselines)
        ]
        return [*experts, *merges, *baselines, *tests]

    def merges(self, label: str, seed: int, experts: Sequence[Stage]) -> tuple[Stage, Stage]:
        """The search on dev, and the test of what it chose."""
        config, grid, first = self.config, self.config.grids[label], seed == self.config.seeds[0]
        common = {"base": config.base, "method": grid.method, "rest": config.rest}
        parameters = self.evaluated("dev", **common, settings=grid.settings())
        parameters |= {"languages": config.experts, "compare_rest": config.compare_rest and first}
        search = self.stage(f"dev-{label}-s{seed}", _search, parameters, experts)
        parameters = self.evaluated("test", **common, check_reference=label == "lors" and first)
        return search, self.stage(f"test-{label}-s{seed}", _test_merge, parameters, (*experts, search))

    def training(
        self, name: str, languages: Sequence[str], seed: int, sequential: bool = False, **changes: Any
    ) -> Stage:
        training = self.config.make_training(seed, **changes)
        parameters = {
            "base": self.config.base,
            "data": self.data("train", *(["dev"] if training.eval_steps else [])),
            "languages": languages,
            "tasks": self.config.tasks,
            "training": training.record(),
            "sequential": sequential,
        }
        version = _FINETUNE_VERSION if training.gradient_accumulation_steps == 1 else _ACCUMULATED_VERSION
        return self.stage(name, _finetune, parameters, (), version)

    def evaluated(self, split: str, **more: Any) -> dict[str, Any]:
        """Parameters of a stage that decodes the split."""
        config = self.config
        return {
            "data": self.data(split),
            "languages": config.languages,
            "tasks": config.tasks,
            "batch_size": config.batch_size,
            "device": config.device,
            # keys from before there was a choice stay
            **({} if config.dtype == "float32" else {"dtype": config.dtype}),
            **({} if config.beams == 1 else {"beams": config.beams}),
            **more,
        }

    def data(self, *splits: str) -> dict[str, Any]:
        """What a stage that reads these splits depends on: speech made for one is made for all."""
        everything = self.config.data.model_dump()
        seed = everything.pop("sample_seed")
        chosen = {k: v for k, v in everything.items() if self.corpus or k not in SPLITS or k in splits}
        if self.corpus:
            return chosen  # all of it is used
        rows = {split: self.rows(split) for split in splits} if self.of_kind else {}
        sampled = any(everything[split] is not None for split in splits)
        return chosen | ({"rows": rows} if rows else {}) | ({"sample_seed": seed} if sampled else {})

    def stage(
        self, name: str, work: Callable[..., None], parameters: dict[str, Any], needs: Sequence[Stage], version: int = 1
    ) -> Stage:
        return Stage(name, work, parameters, (*self.corpus, *needs), self.identity, version)


def _identity(config: Config) -> str:
    """Digests of what the configuration names: the base's weights and the manifest, where they are local files."""
    base = Path(resolve_model(config.base))
    source = Path(config.data.source) if config.data.source else None
    manifest = [] if source is None else [source / "manifest.tsv" if source.is_dir() else source]
    files = [path for path in [*sorted(base.glob("*.safetensors")), *manifest] if path.is_file()]
    return " ".join(sha256_file(path) for path in files)


# ---------------------------------------------------------------------------------------------------- the stages


def _synthesise(
    out: Path, _: Mapping[str, Path], *, experts: Sequence[str], languages: Sequence[str], sizes: Mapping[str, int],
    condition: str, seed: int,
) -> None:  # fmt: skip
    from ..data.synth import speak

    # Only the experts' languages need training speech.
    others = [language for language in languages if language not in experts]
    speak(out, [(experts, sizes), (others, {"test": sizes["test"]})], condition, seed, workers=2)


def _finetune(
    out: Path, inputs: Mapping[str, Path], *, base: str, data: Setting, languages: Sequence[str], tasks: Sequence[str],
    training: Setting, sequential: bool,
) -> None:  # fmt: skip
    from ..training.finetune import finetune
    from ..training.settings import Training

    finetune(
        base,
        out / "model",
        data=_load(data, inputs, languages, "train", LeftOut(SHARE)),
        dev=_load(data, inputs, languages, "dev", LeftOut(SHARE)) if training.get("eval_steps") else None,
        unusable=SHARE,
        languages=languages,
        tasks=tasks,
        training=Training(**training),
        sequential=sequential,
        cache=_features(out),
        force=True,
        progress=True,
    )


def _load(
    data: Setting, inputs: Mapping[str, Path], languages: Sequence[str], split: str, left_out: LeftOut | None = None
) -> Corpus:
    return load_corpus(
        inputs.get("corpus", data["source"]),
        languages=languages,
        split=split,
        limit=data[split],
        max_seconds=data["max_seconds"],
        seed=data.get("sample_seed", 0),
        left_out=left_out,
    )


def _test_model(
    out: Path, inputs: Mapping[str, Path], *, data: Setting, languages: Sequence[str], tasks: Sequence[str],
    batch_size: int, device: str, model: str | None, dtype: str = "float32", beams: int = 1,
) -> None:  # fmt: skip
    from ..model.whisper import load_model, load_processor

    trained = next((path / "model" for name, path in inputs.items() if name != "corpus"), None)
    source = str(trained) if model is None else model
    left_out = LeftOut(SHARE)
    corpus = _load(data, inputs, languages, "test", left_out)
    network, processor = load_model(source, device=device, dtype=dtype), load_processor(source)
    decoder = Decoder.of(network, processor, _features(out), batch_size, beams, left_out=left_out)
    _write_answers(out, decoder, corpus, tasks)


def _search(
    out: Path, inputs: Mapping[str, Path], *, data: Setting, languages: Sequence[str], tasks: Sequence[str],
    batch_size: int, device: str, base: str, method: str, settings: Sequence[Setting], rest: str, compare_rest: bool,
    dtype: str = "float32", beams: int = 1,
) -> None:  # fmt: skip
    """``grid.json``: mean dev WER of every setting; the best is first in the list of ties."""
    from .merged import Merger
    from .variants import weights

    merger = Merger.load(base, inputs, device, dtype)
    left_out = LeftOut(SHARE)
    corpus = _load(data, inputs, languages, "dev", left_out)
    decoder = Decoder.of(merger.network, merger.processor, _features(out), batch_size, beams, left_out=left_out)

    def tried(setting: Setting) -> Setting:
        path = out / f"try-{json.dumps(setting, sort_keys=True)}.json".replace("/", "_")
        if not path.exists():
            merger.holding(weights(merger, method, setting))
            cells = _dev_cells(decoder, corpus, tasks)
            record = {"setting": setting, "wer": sum(cells.values()) / len(cells), "cells": cells}
            path.write_text(json.dumps(record), "utf-8")
        return dict(json.loads(path.read_text("utf-8")))

    grid = [tried({**setting, "rest": rest}) for setting in settings]
    best = min(grid, key=lambda record: record["wer"])
    others = [tried({**best["setting"], "rest": r}) for r in _RESTS if r != rest] if compare_rest else []
    (out / "grid.json").write_text(json.dumps({"grid": grid, "best": best, "rest": others}, indent=1) + "\n", "utf-8")


def _dev_cells(decoder: Decoder, corpus: Corpus, tasks: Sequence[str]) -> dict[str, float]:
    return {
        f"{task} {part[0].language}": decoder.result("", part, task).score.wer for task, part in _parts(corpus, tasks)
    }


def _parts(corpus: Corpus, tasks: Sequence[str]) -> Iterator[tuple[str, Corpus]]:
    """(task, utterances of one language) for each cell."""
    for task in tasks:
        for language in dict.fromkeys(u.language for u in corpus):
            yield task, by_task((u for u in corpus if u.language == language), task)


def _test_merge(
    out: Path, inputs: Mapping[str, Path], *, data: Setting, languages: Sequence[str], tasks: Sequence[str],
    batch_size: int, device: str, base: str, method: str, rest: str, check_reference: bool, dtype: str = "float32",
    beams: int = 1,
) -> None:  # fmt: skip
    from .merged import Merger
    from .variants import weights

    merger = Merger.load(
        base, {name: path for name, path in inputs.items() if name.startswith("expert-")}, device, dtype
    )
    search = next(path for name, path in inputs.items() if name.startswith("dev-"))
    setting = json.loads((search / "grid.json").read_text("utf-8"))["best"]["setting"]
    left_out = LeftOut(SHARE)
    corpus = _load(data, inputs, languages, "test", left_out)
    decoder = Decoder.of(merger.network, merger.processor, _features(out), batch_size, beams, left_out=left_out)
    merger.holding(weights(merger, method, setting))
    answers = _write_answers(out, decoder, corpus, tasks)
    if check_reference:
        merger.holding(weights(merger, method, setting, backend="reference"))
        again = _write_answers(out / "reference", decoder, corpus, tasks)
        differing = sum(a != b for a, b in zip(answers, again, strict=True))
        record = {"utterances": len(answers), "differing": differing}
        (out / "reference.json").write_text(json.dumps(record) + "\n", "utf-8")


def _write_answers(out: Path, decoder: Decoder, corpus: Corpus, tasks: Sequence[str]) -> list[str]:
    """``answers.jsonl``: every answer and what its scores are sums of; ``scores.json``; ``left_out.json``. Returns the answers."""
    out.mkdir(exist_ok=True)
    scores, lines = [], []
    for task, part in _parts(corpus, tasks):
        r = decoder.result("", part, task)
        scores.append({"task": task, "language": r.language, **asdict(r.score), "real_time_factor": r.real_time_factor})
        speakers = {u.id: u.speaker for u in part if u.speaker is not None}
        for i, answer in enumerate(r.answers):
            bleu = None if r.statistics.bleu is None else r.statistics.bleu[i].tolist()
            counted: dict[str, Any] = {
                "errors": int(r.statistics.errors[i]),
                "words": int(r.statistics.words[i]),
                "bleu": bleu,
            }
            said = {"speaker": speakers[answer.id]} if answer.id in speakers else {}
            lines.append({"task": task, "language": r.language, **asdict(answer), **counted, **said})
    decoder.left_out.require_few(out.name, len(corpus))
    with (out / "answers.jsonl").open("w", encoding="utf-8") as stream:
        stream.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    (out / "scores.json").write_text(json.dumps(scores, indent=1) + "\n", "utf-8")
    (out / "left_out.json").write_text(json.dumps(asdict(decoder.left_out), indent=1) + "\n", "utf-8")
    return [line["hypothesis"] for line in lines]


def _features(out: Path) -> Path:
    """The directory of features that all stages share."""
    return next(parent for parent in out.parents if parent.name == "stages").parent / "features"
