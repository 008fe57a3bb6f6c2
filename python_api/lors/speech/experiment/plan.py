"""The whole experiment: corpus -> experts and baselines -> merges chosen on dev -> test -> report.

Rules that make it a fair comparison: every method is tried with the same number of settings, its best is chosen by one
criterion on dev over the experts' languages and the tasks, and only the chosen models (and base, experts, baselines) see test.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ...errors import LorsError
from ...files.digest import sha256_file
from ...files.replaceable import require_file
from ..data.corpus import corpus_digest, is_kind
from ..data.domain import SPLITS
from ..model.whisper import gpus, quiet, require_languages, resolve_model
from . import ray_stages, work
from .config import Config, load_config
from .criterion import CRITERIA
from .stages import Stage, exclusive, run_stage, run_stages

__all__ = ["build_stages", "run_experiment"]

_LATER = ("dtype", "beams", "normaliser")  # of decoding; keys of stages from before there was a choice stay
_FINETUNE_VERSION = 2  # 2: the encoder's positions are frozen
_BOUNDS_VERSION = 2  # 2: by round
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
    from .report import FILES, write_report

    if stage is not None and ray is not None:
        raise LorsError("--stage: runs in this process, expected no --ray")
    settings = config if isinstance(config, Config) else load_config(config)
    root = Path(out)
    stages = build_stages(settings)
    require_languages(settings.base, settings.languages)
    for name, kind in FILES.items():
        require_file(root / name, kind, force=True)
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
        return write_report(settings, root, {s.name: s.directory(root) for s in stages})


def build_stages(config: Config) -> list[Stage]:
    """All stages, each after the ones it needs."""
    data = config.data
    if (data.synth is None) == (data.source is None):
        raise LorsError(
            f"{config.name}: expected data.synth or data.source (--data), got {'both' if data.synth else 'neither'}"
        )
    plan = _Plan(config, _identity(config))
    stages = [*plan.corpus, plan.stage("test-base", work.test_model, plan.evaluated("test", model=config.base), ())]
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
        return (Stage("corpus", work.synthesise, parameters),)

    def of_seed(self, seed: int) -> list[Stage]:
        """Dev grids before the slow baselines and tests: with several jobs the longest chain starts first."""
        config = self.config
        experts = [
            self.training(f"expert-{expert.name}-s{seed}", (expert.language,), seed, tasks=expert.tasks)
            for expert in config.trained()
        ]
        baselines = []
        if (steps := config.multi_task_steps) is not None:
            baselines.append(self.training(f"multi_task-s{seed}", config.experts, seed, max_steps=steps))
        if (steps := config.sequential_steps) is not None:
            baselines.append(
                self.training(f"sequential-s{seed}", config.experts, seed, sequential=True, max_steps=steps)
            )
        limits = [self.bounds(seed, experts)] if CRITERIA[config.criterion].relative and config.grids else []
        heard = {label: self.heard(label, seed, experts) for label, grid in config.grids.items() if grid.heard}
        merges = [
            stage
            for label in config.grids
            for stage in self.merges(label, seed, experts, [*limits, *([heard[label]] if label in heard else [])])
        ]
        tests = [
            # The model comes from the stage before, whose key holds the base's digest already.
            Stage(f"test-{s.name}", work.test_model, self.evaluated("test", model=None), (*self.corpus, s))
            for s in (*experts, *baselines)
        ]
        return [*experts, *limits, *heard.values(), *merges, *baselines, *tests]

    @property
    def halving(self) -> dict[str, Any]:
        """Parameters of the stages that it changes."""
        return {} if self.config.halving is None else {"halving": self.config.halving.model_dump()}

    def bounds(self, seed: int, experts: Sequence[Stage]) -> Stage:
        """What base and experts score on dev, where the criterion is relative to them."""
        config = self.config
        parameters = self.evaluated("dev", base=config.base, criterion=config.criterion, experts=self.each(experts))
        parameters |= self.halving
        parameters |= {"languages": config.experts}
        return self.stage(f"bounds-s{seed}", work.bounds, parameters, experts, _BOUNDS_VERSION)

    def each(self, experts: Sequence[Stage]) -> list[tuple[str, str, tuple[str, ...]]]:
        """(stage, language, tasks) of every expert."""
        pairs = zip(experts, self.config.trained(), strict=True)
        return [(stage.name, expert.language, expert.tasks) for stage, expert in pairs]

    def heard(self, label: str, seed: int, experts: Sequence[Stage]) -> Stage:
        """What a calibrated method is given of recordings."""
        config, heard = self.config, self.config.grids[label].heard
        assert heard is not None
        parameters = {
            "base": config.base, "data": self.data("train"), "experts": self.each(experts), "device": config.device, "seed": seed,
            **heard.model_dump(),
        }  # fmt: skip
        return self.stage(f"heard-{label}-s{seed}", work.hear, parameters, experts)

    def merges(self, label: str, seed: int, experts: Sequence[Stage], before: Sequence[Stage]) -> tuple[Stage, Stage]:
        """The search on dev, and the test of what it chose; `before`: other stages that they need."""
        config, grid, first = self.config, self.config.grids[label], seed == self.config.seeds[0]
        common = {"base": config.base, "method": grid.method, "rest": config.rest}
        parameters = self.evaluated("dev", **common, settings=config.settings(label))
        parameters |= {"languages": config.experts, "compare_rest": config.compare_rest and first, **self.halving}
        if config.criterion != "wer":  # as it always was, before there was a choice
            parameters["criterion"] = config.criterion
        search = self.stage(f"dev-{label}-s{seed}", work.search, parameters, (*experts, *before))
        parameters = self.evaluated("test", **common, check_reference=label == "lors" and first)
        heard = [stage for stage in before if stage.name.startswith("heard-")]
        return search, self.stage(f"test-{label}-s{seed}", work.test_merge, parameters, (*experts, search, *heard))

    def training(
        self,
        name: str,
        languages: Sequence[str],
        seed: int,
        *,
        tasks: Sequence[str] | None = None,
        sequential: bool = False,
        **changes: Any,
    ) -> Stage:
        training = self.config.make_training(seed, **changes)
        parameters = {
            "base": self.config.base,
            "data": self.data("train", *(["dev"] if training.eval_steps else [])),
            "languages": languages,
            "tasks": self.config.tasks if tasks is None else tasks,
            "training": training.record(),
            "sequential": sequential,
        }
        version = _FINETUNE_VERSION if training.gradient_accumulation_steps == 1 else _ACCUMULATED_VERSION
        return self.stage(name, work.finetune, parameters, (), version)

    def evaluated(self, split: str, **more: Any) -> dict[str, Any]:
        """Parameters of a stage that decodes the split."""
        config = self.config
        return {
            "data": self.data(split),
            "languages": config.languages,
            "tasks": config.tasks,
            "batch_size": config.batch_size,
            "device": config.device,
            **{
                name: getattr(config, name)
                for name in _LATER
                if getattr(config, name) != Config.model_fields[name].default
            },
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
