"""The door to every merge: models opened and compared, the backend named, the work planned, an engine made for it.

Everything that can be known beforehand (names, shapes, dtypes, parameters, ranks, room on the disk) is checked before
the first weight is read.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import lors_kernels
from lors_kernels.types import MisconfiguredError

from ..checkpoints import layers
from ..checkpoints.compatibility import compare
from ..checkpoints.hub import SourceNotFound
from ..checkpoints.reader import Checkpoint, open_checkpoint
from ..checkpoints.tensor_info import FLOATS
from ..engine.cpu import Engine, Sink
from ..engine.report import MergeReport
from ..engine.work import Work, plan
from ..errors import LorsError, SettingError
from ..experts.boosted import Boosted
from ..experts.opening import kind_of, source_of
from ..experts.source import Source
from ..files.directory import OutputDirectory
from ..methods import METHODS, Reduction, rest_of
from ..methods.operands import Combination
from ..public import public
from ..recipes.parameters import BOOST, BOOST_MERGED
from ..recipes.recipe import BASE, Recipe
from .card import carried_over
from .companions import companions, dims
from .older_files import older_files
from .united import Alignment, align, documents, tables_of

Progress = Callable[[int, int], None]  # entries done, entries in all


class Models(NamedTuple):
    """The checkpoints of a recipe, compared with each other, and what the engine reads of them, the base first."""

    base: Checkpoint
    experts: list[Checkpoint]
    sources: list[Source]
    alignment: Alignment | None = None  # of their vocabularies, where these are united

    @property
    def checkpoints(self) -> tuple[Checkpoint, ...]:
        return self.base, *self.experts


@dataclass
class Job:
    """A merge that has passed every check that needs no weights: what is done with which sources."""

    recipe: Recipe
    sources: Sequence[Source]  # the base first
    works: list[Work]
    report: MergeReport
    shares: Sequence[Mapping[str, float]]  # per expert: which of its matrices are boosted, and how far

    def engine(self, sink: Sink, progress: Progress | None = None, boosted: type[Boosted] = Boosted) -> Engine:
        base, *experts = self.sources
        for index, share in enumerate(self.shares):
            if share:
                experts[index] = boosted(experts[index], base, share)
        report = self.report
        engine = Engine(base, experts, sink, report, report.backend, report.threads, self.recipe.seed)
        if progress is not None:
            done, total = 0, sum(work.spec.numel for work in self.works)

            def advance(entries: int) -> None:
                nonlocal done
                done += entries
                progress(done, total)

            engine.progress = advance
        return engine


@dataclass
class DirectoryJob(Job):
    """A merge of checkpoints into a directory."""

    models: Models
    companions: list[Path]
    documents: dict[str, str]  # texts of other companions, by name
    output: OutputDirectory
    carried: dict[str, Any]  # of the base's model card


def prepare(
    recipe: Recipe,
    out: str | os.PathLike[str],
    stack: contextlib.ExitStack,
    *,
    backend: str | None,
    threads: int | None,
    force: bool,
    durable: bool,
) -> DirectoryJob:
    """The job of a recipe that is merged into a directory."""
    report = new_report(recipe, public(str(out)), backend, threads)
    models = open_models(recipe, stack)
    base, experts = models.base, models.experts
    report.experts = [expert.name for expert in experts if expert is not base or recipe.base_model is None]
    base.sidecars(), base.card()  # a link that is refused is refused before the work
    job = planned(recipe, models.sources, base.naming, base.config, report)
    beside = companions(base, experts, report.notices)
    base.dims = dims(base, experts, report.notices)
    changed: dict[str, str] = {}
    if models.alignment is not None:
        changed = documents(models.alignment, models.checkpoints, beside)
        report.notices.append(models.alignment.notice())
    if base.naming == layers.HF_WHISPER:
        changed |= older_files(beside, report.notices, changed)
    carried, notices = carried_over(base.card())
    report.notices += notices
    inputs = [path for checkpoint in models.checkpoints for path in (checkpoint.path, *checkpoint.files)]
    output = OutputDirectory(out, force=force, inputs=inputs, durable=durable)
    return DirectoryJob(recipe, models.sources, job.works, report, job.shares, models, beside, changed, output, carried)


def planned(
    recipe: Recipe,
    sources: Sequence[Source],
    naming: str,
    config: Mapping[str, Any] | None,
    report: MergeReport,
    change: Callable[[Work], Work] | None = None,
) -> Job:
    """The job of a recipe. change: makes of the work for the recipe's models that for `sources`, where they are others."""
    works, shares = _plan(recipe, sources[0], naming, config, report)
    if change is not None:
        works, shares = [replace(change(work), boost=None) for work in works], []
    _require_parts(sources[1:], works, shares or [{} for _ in sources[1:]], report)
    return Job(recipe, sources, works, report, shares)


def new_report(recipe: Recipe, out: str | None, backend: str | None, threads: int | None) -> MergeReport:
    """An empty report that names the backend and counts the threads; LorsError where they cannot be had."""
    return MergeReport(recipe.merge_method, _backend_name(backend), out, [], threads=_thread_count(threads))


def _thread_count(threads: int | None) -> int:
    try:
        return lors_kernels.thread_count(threads)
    except ValueError as error:
        raise LorsError(str(error)) from None


def _backend_name(name: str | None) -> str:
    """The backend that will run, by name; LorsError when the one that was asked for cannot."""
    from lors_kernels.dispatch import BackendUnavailable, select

    try:
        return str(select(name, np.empty((1, 1), np.float32)).NAME)
    except (ValueError, BackendUnavailable) as error:
        raise _no_backend(name, error) from None


def _no_backend(name: str | None, error: Exception) -> LorsError:
    """The error for kernels that cannot run: about the setting only where there is one."""
    if isinstance(error, MisconfiguredError):
        return LorsError(str(error))
    problem = str(error).removeprefix("backend: ")
    return LorsError(f"backend {problem}") if name is None else SettingError("backend", problem)


def open_models(recipe: Recipe, stack: contextlib.ExitStack) -> Models:
    """Opens the checkpoints. Names, types, files and configuration are the base's, where there is none the first model's."""
    recipe.require_parameters()
    method = METHODS[recipe.merge_method]
    indices = recipe.experts if method.relative else recipe.inputs
    opened = {index: stack.enter_context(_open_source(recipe, index)) for index in indices}
    experts = list(opened.values())
    listed = BASE if recipe.base_index is None else recipe.base_index
    base = opened.get(listed, experts[0])
    if listed not in opened and recipe.base_source is not None:
        base = stack.enter_context(_open_source(recipe, BASE))
    if kind_of(base) == "adapter":
        raise LorsError(f"{base.name}: expected a full checkpoint as the base, got a PEFT adapter")
    if base not in experts and kind_of(base) == "expert file":
        raise LorsError(f"{base.path}: expected a checkpoint as the base, got an expert file")
    tables = tables_of(base) if recipe.vocabulary == "union" else frozenset[str]()
    for expert in experts:
        if kind_of(expert) == "expert file" and not method.relative:
            raise LorsError(f"{expert.name}: method {recipe.merge_method} needs whole checkpoints, got an expert file")
        if kind_of(expert) == "checkpoint" and expert is not base:
            compare(base, expert, tables, advice="vocabulary: union merges models with tokens of their own")
    sources = [source_of(checkpoint, base) for checkpoint in (base, *experts)]
    if recipe.vocabulary == "base":
        return Models(base, experts, sources)
    alignment = align(base, experts, tables)
    return Models(base, experts, alignment.sources(sources, recipe, indices), alignment)


def _open_source(recipe: Recipe, model: int) -> Checkpoint:
    source = str(recipe.base_source) if model == BASE else recipe.sources[model]
    try:
        return open_checkpoint(source, name="base" if model == BASE else recipe.labels[model])
    except SourceNotFound as error:
        raise recipe.missing(model, error.reason) from error


def _require_parts(
    experts: Sequence[Source], works: Sequence[Work], shares: Sequence[Mapping[str, float]], report: MergeReport
) -> None:
    """LorsError unless every expert file holds what is asked of it."""
    for index, source in enumerate(experts):
        if (parts := source.parts) is None:
            continue
        partly = approximated = False
        for work in works:
            boosted = work.name in shares[index]
            if not boosted and work.reductions and (reduction := work.reductions[index]).weight:
                parts.require(work.name, work.matrix, reduction.rank, reduction.density)
                smaller = work.matrix and parts.approximates(work.name, reduction.rank, reduction.density)
                approximated = approximated or smaller
            asked = work.reductions[index].weight if work.reductions else 0
            whole = work.combination is not None or boosted or (bool(asked) and not work.matrix)
            partly = partly or (whole and parts.stands_in(work.name))
        report.notices += parts.notices(partly, approximated)


def _plan(
    recipe: Recipe, base: Source, naming: str, config: Mapping[str, Any] | None, report: MergeReport
) -> tuple[list[Work], list[dict[str, float]]]:
    """All work, and per expert the shares to which its matrices are boosted."""
    method = METHODS[recipe.merge_method]
    for name, spec in base.tensors.items():
        if not spec.floating and np.dtype(spec.dtype).kind not in "iub":
            raise LorsError(f"{base.name}: tensor {name!r}: expected float32, float16 or bfloat16, got {spec.dtype}")
    matrices: set[str] = set()
    everywhere = method.everywhere and not recipe.confined
    if recipe.confined and not method.targets:
        key = "target" if recipe.target is not None else "rest"
        raise SettingError(key, f"method {recipe.merge_method} treats all tensors alike, expected no {key}")
    if not everywhere or recipe.boosted:
        selection = layers.select(base.tensors, naming, config, recipe.target)
        matrices = set(selection.names)
        if selection.notice:
            report.notices.append(selection.notice)
    report.notices += recipe.unmatched_filters(base.tensors)
    depth = layers.positions(base.tensors)
    indices = recipe.experts if method.relative else recipe.inputs
    rest = recipe.rest or method.spec.rest
    shares: list[dict[str, float]] = [{} for _ in indices]
    merged: dict[str, float | None] = {}

    def treatments(name: str, matrix: bool) -> list[Reduction] | Combination:
        at: dict[str, Any] = {"tensor": name, "position": depth[name]}
        models = [recipe.params_for(model=index, **at) for index in indices]
        shared = recipe.params_for(**at)
        if matrix:
            for share, model in zip(shares, models, strict=True):
                share |= {name: model[BOOST]} if BOOST in model else {}
            merged[name] = shared.get(BOOST_MERGED)
        return method.treatment(models, shared) if matrix or everywhere else rest_of(rest, models, shared)

    dtype = None if recipe.output_dtype is None else FLOATS[recipe.output_dtype]
    works = plan(base.tensors, matrices, treatments, dtype, method.relative)
    return [replace(work, boost=merged.get(work.name)) for work in works], shares


def compare_specs(base: Source, expert: Source, tables: frozenset[str] = frozenset()) -> None:
    """LorsError unless the tensors of two sources are alike; those of `tables` may differ in their rows."""
    if odd := sorted(base.tensors.keys() ^ expert.tensors.keys()):
        raise LorsError(f"{expert.name}: expected the tensors of the base, {len(odd)} differ, first {odd[0]!r}")
    for name, spec in base.tensors.items():
        got = expert.tensors[name]
        skip = int(name in tables)
        if got.shape[skip:] != spec.shape[skip:] or got.floating != spec.floating:
            raise LorsError(
                f"{expert.name}: tensor {name!r}: expected {list(spec.shape)} {spec.dtype} as in the base, "
                f"got {list(got.shape)} {got.dtype}"
            )


def on_devices(
    engine: Engine, device: str, device_memory: int | None, backend: str | None, kind: type[Any] | None = None
) -> Any:
    """The same engine on GPUs (a `GpuEngine`, or `kind`); LorsError if a device or the backend is not there."""
    from lors_kernels.dispatch import BackendUnavailable, select

    from ..engine.device import parse_devices
    from ..engine.gpu import GpuEngine

    devices = parse_devices(device)
    if not METHODS[engine.report.method].on_device:
        raise SettingError("device", f"method {engine.report.method} works in main memory alone, got {device!r}")
    import torch

    try:
        kernels = select(backend, torch.empty((1, 1), device=devices[0])).NAME
    except (ValueError, BackendUnavailable) as error:
        raise _no_backend(backend, error) from None
    engine.report.backend = f"{kernels} on {', '.join(devices)}, {engine.backend} for the rest"
    return (kind or GpuEngine)(
        engine.base, engine.experts, engine.sink, engine.report, engine.backend, engine.threads, engine.seed,
        progress=engine.progress, devices=devices, device_memory=device_memory, device_backend=kernels,
    )  # fmt: skip
