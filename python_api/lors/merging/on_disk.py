"""Merging: checkpoints to a checkpoint, or state dicts to a state dict.

    W = W0 + lambda * sum_t weight_t * (L_t + S_t)        for every decomposed matrix
    W = W0 + lambda * sum_t weight_t * (W_t - W0)         for everything else (`rest`)

Everything that can be known beforehand (names, shapes, dtypes, parameters, ranks, room on the disk) is checked before
the first weight is read, and nothing appears under the output's name until all of it is there.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import lors_kernels
from lors_kernels.arrays import BFLOAT16, is_torch

from ..checkpoints import layers
from ..checkpoints.compatibility import compare
from ..checkpoints.hub import SourceNotFound
from ..checkpoints.reader import Checkpoint, open_checkpoint, require_unchanged
from ..checkpoints.writer import OpenAIWriter, WeightWriter
from ..engine.cpu import Engine, FactorCache, Sink
from ..engine.report import MergeReport, peak_memory
from ..engine.work import Work, plan
from ..errors import LorsError, SettingError
from ..experts.expert_file import is_expert_file
from ..experts.expert_source import ExpertSource
from ..experts.opening import source_of
from ..experts.source import MemorySource, Source
from ..files.directory import OutputDirectory
from ..files.remote import is_url, placed
from ..methods import METHODS, SPECS, Method, Reduction
from ..methods.operands import Combination
from ..public import public
from ..recipes.parameters import rank_of
from ..recipes.recipe import BASE, Recipe
from .card import Source as CardSource
from .card import carried_over, write_card
from .companions import companions, dims
from .ledger import write_ledger
from .suspicions import of_digests, of_values

DTYPES: dict[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": BFLOAT16,
}
SHARD_BYTES = 5_000_000_000

Progress = Callable[[int, int], None]  # entries done, entries in all


def merge(
    base: str | os.PathLike[str],
    experts: Mapping[str, str | os.PathLike[str]],
    out: str | os.PathLike[str],
    method: str = "lors",
    *,
    backend: str | None = None,
    threads: int | None = None,
    device: str | None = None,
    device_memory: int | None = None,
    force: bool = False,
    durable: bool = True,
    check: bool = False,
    progress: Progress | None = None,
    **settings: Any,
) -> MergeReport:
    """W = W0 + lambda * sum_t weight_t * (L_t + S_t): merges checkpoints into a new one.

    Args:
        base: W0: a Hugging Face directory, a hub id, a .safetensors file or an openai-whisper .pt.
        experts: label -> W_t, fine-tuned from the base: same names and shapes; float32, float16 and bfloat16 may be mixed.
        out: directory to write; must not exist unless `force`.
        method: "lors", "task_arithmetic", "ties", "tsv", ...: `docs/methods.md` has all with their formulas.
        backend: kernels to use (see `lors_kernels.available_backends`); None chooses.
        threads: None: LORS_THREADS, else OMP_NUM_THREADS, else all cores. The output has the same bits for every number.
        device: "cuda", "cuda:1" or "cuda:0,cuda:1": decompose on GPUs, tensors split by bytes; None: the CPU. `backend` then
            names the GPU's kernels.
        device_memory: bytes to use on each GPU; None: 80 % of what is free.
        durable: survive a power failure right after the merge (fsync).
        check: reload the output and compare it with the definition (`verify`).
        progress: called with (entries done, entries in all).
        settings: parameters of the method (`rank=7, density=0.2, lam=0.2, weight={"ca": 1.0, "de": 0.5}`, ...) and
            `target`, `rest`, `seed`, `dtype`, `out_dtype`, `out_shard_size`, as in a recipe.

    Raises:
        LorsError: anything wrong with the inputs, in one line; then `out` is as it was before.
    """
    recipe = Recipe.from_arguments(base, experts, method, methods=SPECS, **settings)
    return merge_recipe(
        recipe, out, backend=backend, threads=threads, device=device, device_memory=device_memory, force=force,
        durable=durable, check=check, progress=progress,
    )  # fmt: skip


def merge_recipe(
    recipe: Recipe,
    out: str | os.PathLike[str],
    *,
    backend: str | None = None,
    threads: int | None = None,
    device: str | None = None,
    device_memory: int | None = None,
    force: bool = False,
    durable: bool = True,
    check: bool = False,
    progress: Progress | None = None,
    factors: FactorCache | None = None,
    ray: str | None = None,
) -> MergeReport:
    """`merge` by a recipe that is bound to its method (`Recipe.load(path, SPECS)`).

    factors: decompositions that are known already, for sweeps.
    ray: "local" or a cluster's address: decompositions run there; the result has the same bits.
    """
    begun = time.perf_counter()
    with contextlib.ExitStack() as stack:
        _check_device(device)
        kernels = None if device else backend
        place = stack.enter_context(placed(out, force, inputs=[recipe.base_source, *recipe.sources]))
        job = _prepare(recipe, place, stack, backend=kernels, threads=threads, force=force, durable=durable)
        shown = recipe.published()
        text = shown.to_yaml(resolved=True) if is_url(out) else shown.to_yaml(beside=job.output.target)
        stack.enter_context(job.output)
        writer = _writer(recipe, job.base, job.output.path, job.works)
        stack.enter_context(writer)
        hashes: dict[Checkpoint, dict[str, str]] = {}
        hashing = [_hasher(checkpoint, hashes, job) for checkpoint in dict.fromkeys((job.base, *job.experts))]
        engine = _engine(recipe, job.sources, writer.write, job.report, job.works, progress)
        engine.cached = factors
        if ray is not None:
            engine.cached = stack.enter_context(_on_cluster(ray, recipe, job, backend, engine.stop))
        if device:
            engine = _on_devices(engine, device, device_memory, backend)
        suspected: list[str] = []
        looking = [lambda: suspected.extend(of_values(job.sources, job.works))] if job.works[0].relative else []
        engine.run(job.works, [*hashing, *looking])
        job.report.notices += [*of_digests(job.base, job.experts, hashes), *suspected]
        writer.finish()
        require_unchanged((job.base, *job.experts))  # a base that is gone is told as such
        _accompany(recipe, job, hashes, text)
        require_unchanged((job.base, *job.experts))
        job.output.commit()
    job.report.out = public(str(out))
    job.report.seconds = time.perf_counter() - begun
    job.report.peak_memory = peak_memory()
    if check:
        from .verify import verify

        job.report.notices.append(verify(recipe, out, job.report))
    return job.report


def dry_run(
    recipe: Recipe,
    out: str | os.PathLike[str],
    *,
    backend: str | None = None,
    threads: int | None = None,
    device: str | None = None,
    force: bool = False,
) -> MergeReport:
    """Every check of `merge_recipe` that needs no weights; reads headers only and writes nothing."""
    with contextlib.ExitStack() as stack:
        _check_device(device)
        place = stack.enter_context(placed(out, force, inputs=[recipe.base_source, *recipe.sources]))
        job = _prepare(recipe, place, stack, backend=backend, threads=threads, force=force, durable=False)
        size = sum(work.spec.numel * work.out_dtype.itemsize for work in job.works)
        job.output.require_space(size)
        job.report.tensors = len(job.works)
        job.report.decomposed = sum(work.matrix for work in job.works)
        job.report.notices.append(f"dry run: nothing was read or written; the result takes {size / 1e6:.1f} MB")
        return job.report


def merge_state_dicts(
    base: Mapping[str, Any],
    experts: Mapping[str, Mapping[str, Any]],
    method: str = "lors",
    *,
    config: Mapping[str, Any] | None = None,
    backend: str | None = None,
    threads: int | None = None,
    device: str | None = None,
    device_memory: int | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """`merge` on tensors in memory (numpy arrays or torch tensors); returns new tensors of the base's kind.

    base, experts: name -> tensor. config: the model's configuration, which tells architectures apart that names do not.
    settings: as for `merge`. Tensors on a GPU are merged there, and so is the result; `device` may name that GPU.
    """
    states = _states(base, experts)
    # without a base for a method that sums the models: this one gives names and types alone
    named = "base" if method not in METHODS or METHODS[method].relative else None
    recipe = Recipe.from_arguments(named, {label: label for label in experts}, method, methods=SPECS, **settings)
    chosen = METHODS[method]
    if any(is_torch(value) for _, state in states for value in state.values()):
        from ..engine.resident import place_of

        place = place_of(states)
        if place not in (None, "cpu") or device == place:
            return _merge_resident(recipe, chosen, states, str(place), config, device, device_memory, backend)
    sources = [MemorySource(label, state) for label, state in states]
    for source in sources[1:]:
        _compare_specs(sources[0], source)
    kernels = _backend(None if device else backend)
    report = MergeReport(method, kernels, None, list(experts), threads=_threads(threads))
    works = _plan(recipe, chosen, sources[0], layers.naming(base), config, report)

    def engine(sink: Sink) -> Engine:
        made = _engine(recipe, sources, sink, report, works, None)
        return _on_devices(made, device, device_memory, backend) if device else made

    return {name: _like(base[name], array) for name, array in _collect(works, engine).items()}


def _merge_resident(
    recipe: Recipe,
    method: Method,
    states: Sequence[tuple[str, Mapping[str, Any]]],
    place: str,
    config: Mapping[str, Any] | None,
    device: str | None,
    device_memory: int | None,
    backend: str | None,
) -> dict[str, Any]:
    """`merge_state_dicts` of tensors that stay on their device."""
    from ..engine.device import parse_devices
    from ..engine.resident import DeviceSource, ResidentEngine

    if device is not None and parse_devices(device) != [place]:
        raise SettingError("device", f"expected {place}, where the tensors are, or None, got {device!r}")
    if not method.on_device:
        raise LorsError(f"method {recipe.merge_method}: expected tensors in main memory, got tensors on {place}")
    sources = [DeviceSource(label, state) for label, state in states]
    for source in sources[1:]:
        _compare_specs(sources[0], source)
    report = MergeReport(recipe.merge_method, "", None, [label for label, _ in states[1:]], threads=1)
    works = _plan(recipe, method, sources[0], layers.naming(states[0][1]), config, report)
    engine = Engine(sources[0], sources[1:], lambda *_: None, report, None, 1, recipe.seed)
    resident = _on_devices(engine, place, device_memory, backend, ResidentEngine)
    resident.run(works)
    return {work.name: resident.merged[work.name] for work in works}


def merge_in_memory(
    base: str | os.PathLike[str],
    experts: Mapping[str, str | os.PathLike[str]],
    method: str = "lors",
    *,
    backend: str | None = None,
    threads: int | None = None,
    **settings: Any,
) -> tuple[dict[str, np.ndarray], Checkpoint]:
    """`merge` of files into arrays: (name -> merged tensor, the base, closed but for its names and configuration)."""
    recipe = Recipe.from_arguments(base, experts, method, methods=SPECS, **settings)
    report = MergeReport(method, _backend(backend), None, list(experts), threads=_threads(threads))
    with contextlib.ExitStack() as stack:
        opened, others = _open(recipe, METHODS[method], stack)
        sources = [source_of(checkpoint, opened) for checkpoint in (opened, *others)]
        works = _plan(recipe, METHODS[method], sources[0], opened.naming, opened.config, report)
        merged = _collect(works, lambda sink: _engine(recipe, sources, sink, report, works, None))
        require_unchanged((opened, *others))
        return merged, opened


def _collect(works: Sequence[Work], engine: Callable[[Sink], Engine]) -> dict[str, np.ndarray]:
    """Runs an engine that writes into arrays."""
    merged = {work.name: np.empty(work.spec.numel, work.out_dtype) for work in works}

    def keep(name: str, values: np.ndarray, start: int) -> None:
        merged[name][start : start + values.size] = values

    engine(keep).run(works)
    return {work.name: merged[work.name].reshape(work.spec.shape) for work in works}


def _states(base: Any, experts: Any) -> list[tuple[str, Mapping[str, Any]]]:
    if not isinstance(experts, Mapping):
        raise LorsError(f"experts: expected a mapping of labels to state dicts, got {type(experts).__name__}")
    states = [("base", base), *experts.items()]
    for label, state in states:
        if not isinstance(state, Mapping):
            hint = "; pass its state_dict()" if hasattr(state, "state_dict") else ""
            raise LorsError(f"{label}: expected a mapping of names to tensors, got {type(state).__name__}{hint}")
        for name, value in state.items():
            if not isinstance(name, str):
                raise LorsError(f"{label}: expected names that are strings, got {name!r}")
            if not (is_torch(value) or isinstance(value, np.ndarray)):
                kind = type(value).__name__
                raise LorsError(f"{label}: tensor {name!r}: expected a torch tensor or a numpy array, got {kind}")
    return states


# --- checks and planning ---------------------------------------------------------------------------------------------


class _Job(NamedTuple):
    """A merge that has passed every check."""

    base: Checkpoint
    experts: list[Checkpoint]
    sources: list[Source]
    works: list[Work]
    companions: list[Path]
    output: OutputDirectory
    report: MergeReport
    carried: dict[str, Any]  # of the base's model card


def _prepare(
    recipe: Recipe,
    out: str | os.PathLike[str],
    stack: contextlib.ExitStack,
    *,
    backend: str | None,
    threads: int | None,
    force: bool,
    durable: bool,
) -> _Job:
    method = METHODS[recipe.merge_method]
    report = MergeReport(recipe.merge_method, _backend(backend), public(str(out)), [], threads=_threads(threads))
    base, experts = _open(recipe, method, stack)
    report.experts = [expert.name for expert in experts]
    base.sidecars(), base.card()  # a link that is refused is refused before the work
    sources = [source_of(checkpoint, base) for checkpoint in (base, *experts)]
    works = _plan(recipe, method, sources[0], base.naming, base.config, report)
    require_parts(sources[1:], works, report)
    beside = companions(base, experts, report.notices)
    base.dims = dims(base, experts, report.notices)
    carried, notices = carried_over(base.card())
    report.notices += notices
    inputs = [path for checkpoint in (base, *experts) for path in (checkpoint.path, *checkpoint.files)]
    output = OutputDirectory(out, force=force, inputs=inputs, durable=durable)
    return _Job(base, experts, sources, works, beside, output, report, carried)


def _threads(threads: int | None) -> int:
    try:
        return lors_kernels.thread_count(threads)
    except ValueError as error:
        raise LorsError(str(error)) from None


def _backend(name: str | None) -> str:
    """The backend that will run, by name; LorsError when the one that was asked for cannot."""
    from lors_kernels.dispatch import BackendUnavailable, select

    try:
        return str(select(name, np.empty((1, 1), np.float32)).NAME)
    except (ValueError, BackendUnavailable) as error:
        raise _no_backend(name, error) from None


def _no_backend(name: str | None, error: Exception) -> LorsError:
    """The error for kernels that cannot run: about the setting only where there is one."""
    problem = str(error).removeprefix("backend: ")
    return LorsError(f"backend {problem}") if name is None else SettingError("backend", problem)


def _open(recipe: Recipe, method: Method, stack: contextlib.ExitStack) -> tuple[Checkpoint, list[Checkpoint]]:
    """Opens the checkpoints. Names, types, files and configuration are the base's, where there is none the first model's."""
    recipe.require_parameters()
    indices = recipe.experts if method.relative else recipe.inputs
    opened = {index: stack.enter_context(_open_source(recipe, index)) for index in indices}
    experts = list(opened.values())
    listed = BASE if recipe.base_index is None else recipe.base_index
    base = opened.get(listed, experts[0])
    if listed not in opened and recipe.base_source is not None:
        base = stack.enter_context(_open_source(recipe, BASE))
    if base.adapter is not None:
        raise LorsError(f"{base.name}: expected a full checkpoint as the base, got a PEFT adapter")
    if base not in experts and is_expert_file(base):
        raise LorsError(f"{base.path}: expected a checkpoint as the base, got an expert file")
    for expert in experts:
        if is_expert_file(expert):
            if not method.relative:
                raise LorsError(
                    f"{expert.name}: method {recipe.merge_method} needs whole checkpoints, got an expert file"
                )
        elif expert is not base and expert.adapter is None:
            compare(base, expert)
    return base, experts


def _open_source(recipe: Recipe, model: int) -> Checkpoint:
    source = str(recipe.base_source) if model == BASE else recipe.sources[model]
    try:
        return open_checkpoint(source, name="base" if model == BASE else recipe.labels[model])
    except SourceNotFound as error:
        raise recipe.missing(model, error.reason) from error


def require_parts(experts: Sequence[Source], works: Sequence[Work], report: MergeReport) -> None:
    """LorsError unless every expert file holds what is asked of it."""
    for index, source in enumerate(experts):
        if not isinstance(source, ExpertSource):
            continue
        partly = approximated = False
        for work in works:
            if work.reductions and (reduction := work.reductions[index]).weight:
                source.require(work.name, work.matrix, reduction.rank, reduction.density)
                smaller = work.matrix and source.approximates(work.name, reduction.rank, reduction.density)
                approximated = approximated or smaller
            asked = work.reductions[index].weight if work.reductions else 0
            whole = work.combination is not None or (bool(asked) and not work.matrix)
            partly = partly or (whole and source.stands_in(work.name))
        if partly:
            report.notices.append(
                f"{source.name}: the expert file stands for its rank {source.layout.rank:g} and density "
                f"{source.layout.density:g} where the whole difference is asked for"
            )
        if approximated:
            report.notices.append(
                f"{source.name}: a smaller rank is asked for than the expert file's {source.layout.rank:g}: S is chosen from "
                f"what the file holds (density {source.layout.density:g}), not from the whole difference; "
                "docs/expert-files.md says how far off that is"
            )
        if source.layout.remainder == "none":
            report.notices.append(
                f"{source.name}: the expert file leaves out what is not decomposed; the base's is kept"
            )


def _plan(
    recipe: Recipe,
    method: Method,
    base: Source,
    naming: str,
    config: Mapping[str, Any] | None,
    report: MergeReport,
) -> list[Work]:
    for name, spec in base.tensors.items():
        if not spec.floating and np.dtype(spec.dtype).kind not in "iub":
            raise LorsError(f"{base.name}: tensor {name!r}: expected float32, float16 or bfloat16, got {spec.dtype}")
    matrices: set[str] = set()
    everywhere = method.everywhere and recipe.target is None
    if recipe.target is not None and not method.targets:
        raise SettingError("target", f"method {recipe.merge_method} treats all tensors alike, expected no target")
    if not everywhere:
        selection = layers.select(base.tensors, naming, config, recipe.target)
        matrices = set(selection.names)
        if selection.notice:
            report.notices.append(selection.notice)
    report.notices += recipe.unmatched_filters(base.tensors)
    depth = layers.positions(base.tensors)
    indices = recipe.experts if method.relative else recipe.inputs
    rest = recipe.rest or method.spec.rest

    def treatments(name: str, matrix: bool) -> list[Reduction] | Combination:
        at: dict[str, Any] = {"tensor": name, "position": depth[name]}
        models = [recipe.params_for(model=index, **at) for index in indices]
        shared = recipe.params_for(**at)
        return method.treatment(models, shared) if matrix or everywhere else _rest(rest, models, shared)

    dtype = None if recipe.output_dtype is None else DTYPES[recipe.output_dtype]
    return plan(base.tensors, matrices, treatments, dtype, method.relative)


def _rest(rule: str, models: Sequence[Mapping[str, Any]], shared: Mapping[str, Any]) -> list[Reduction]:
    """What happens to a tensor that the method does not treat."""
    if rule == "base":
        return []
    if rule == "average":
        return [Reduction(1 / len(models)) for _ in models]
    return [Reduction(shared.get("lambda", 1.0) * model.get("weight", 1.0)) for model in models]


def _compare_specs(base: Source, expert: Source) -> None:
    if odd := sorted(base.tensors.keys() ^ expert.tensors.keys()):
        raise LorsError(f"{expert.name}: expected the tensors of the base, {len(odd)} differ, first {odd[0]!r}")
    for name, spec in base.tensors.items():
        got = expert.tensors[name]
        if got.shape != spec.shape or got.floating != spec.floating:
            raise LorsError(
                f"{expert.name}: tensor {name!r}: expected {list(spec.shape)} {spec.dtype} as in the base, "
                f"got {list(got.shape)} {got.dtype}"
            )


def _engine(
    recipe: Recipe,
    sources: Sequence[Source],
    sink: Sink,
    report: MergeReport,
    works: Sequence[Work],
    progress: Progress | None,
) -> Engine:
    base, experts = sources[0], sources[1:]
    engine = Engine(base, experts, sink, report, report.backend, report.threads, recipe.seed)
    if progress is not None:
        done, total = 0, sum(work.spec.numel for work in works)

        def advance(entries: int) -> None:
            nonlocal done
            done += entries
            progress(done, total)

        engine.progress = advance
    return engine


def _on_cluster(
    address: str, recipe: Recipe, job: _Job, backend: str | None, stop: threading.Event
) -> contextlib.AbstractContextManager[FactorCache]:
    """Every decomposition of the merge as a task of a Ray cluster."""
    from ..cluster import Wanted, decompositions

    wanted: dict[str, list[Wanted]] = {}
    for index, source in enumerate(job.sources[1:]):
        if isinstance(source, ExpertSource):
            continue
        wanted[source.name] = [
            Wanted(work.name, rank_of(reduction.rank, *work.spec.shape), work.spec.numel * 8)
            for work in job.works
            if work.matrix and work.reductions and (reduction := work.reductions[index]).rank and reduction.weight
        ]
    paths = {expert.name: expert.location for expert in job.experts}
    options: dict[str, Any] = {"seed": recipe.seed, "backend": backend, "cpus": job.report.threads, "stop": stop}
    return decompositions(address, job.base.location, paths, wanted, **options)


def _check_device(device: str | None) -> None:
    """LorsError, before anything is opened, unless the GPUs that are asked for are there."""
    if device:
        from ..engine.device import parse_devices

        parse_devices(device)


def _on_devices(
    engine: Engine, device: str, device_memory: int | None, backend: str | None, kind: type[Any] | None = None
) -> Any:
    """The same engine with its matrices on GPUs (a `GpuEngine`, or `kind`); LorsError if a device or the backend is not
    there."""
    from lors_kernels.dispatch import BackendUnavailable, select

    from ..engine.device import parse_devices
    from ..engine.gpu import GpuEngine

    if files := [source.name for source in engine.experts if isinstance(source, ExpertSource)]:
        raise LorsError(f"--device: {files[0]}: expert files are merged on the CPU, expected checkpoints")

    devices = parse_devices(device)
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


# --- writing ---------------------------------------------------------------------------------------------------------


def _writer(
    recipe: Recipe, base: Checkpoint, directory: Path, works: Sequence[Work], over: bool = False
) -> WeightWriter | OpenAIWriter:
    tensors = [(work.name, work.out_dtype, work.spec.shape) for work in works]
    if base.dims is not None:
        return OpenAIWriter(directory / "model.pt", tensors, base.dims)
    return WeightWriter(directory, tensors, shard_bytes=recipe.shard_bytes or SHARD_BYTES, over=over)


def _hasher(checkpoint: Checkpoint, hashes: dict[Checkpoint, dict[str, str]], job: _Job) -> Callable[[], None]:
    def task() -> None:
        hashes[checkpoint] = checkpoint.sha256()
        if checkpoint is job.base:
            for source in job.sources:
                if isinstance(source, ExpertSource):
                    source.require_base(hashes[checkpoint])

    return task


def _accompany(recipe: Recipe, job: _Job, hashes: Mapping[Checkpoint, Mapping[str, str]], text: str) -> None:
    """Configuration, tokenizer, processor, model card and recipe."""
    base, experts, output = job.base, job.experts, job.output
    for path in job.companions:
        output.copy(path)
    labels = list(recipe.labels)
    listed = [labels.index(expert.name) if expert.name in labels else None for expert in experts]
    weights = {expert.name: _plain(recipe, "weight", index) for expert, index in zip(experts, listed, strict=True)}
    shared = {spec.name: _plain(recipe, spec.name, None) for spec in SPECS[recipe.merge_method].parameters}
    sources = [CardSource.of(expert, hashes[expert], weights[expert.name]) for expert in experts]
    write_ledger(output, CardSource.of(base, hashes[base]), sources)
    write_card(
        output.path,
        base=CardSource.of(base, hashes[base]),
        experts=sources,
        method=recipe.merge_method,
        parameters={name: value for name, value in shared.items() if value is not None and name != "weight"},
        recipe=text,
        backend=job.report.backend,
        naming=base.naming,
        carried=job.carried,
    )


def _plain(recipe: Recipe, name: str, model: int | None) -> Any:
    """A parameter as one value where the recipe gives one; None where it depends on the tensor."""
    places = [recipe.parameters] if model is None else [recipe.models[model].parameters, recipe.parameters]
    for parameters in places:
        if name in parameters:
            value = parameters[name].data()
            return None if isinstance(value, list) else value
    spec = SPECS[recipe.merge_method].parameter(name)
    return spec.default if spec is not None and isinstance(spec.default, (bool, int, float, str)) else None


def _like(original: Any, array: np.ndarray) -> Any:
    if not is_torch(original):
        return array
    from lors_kernels.arrays import to_torch

    return to_torch(array)
