"""Merging: checkpoints to a checkpoint.

    W = W0 + lambda * sum_t weight_t * (L_t + S_t)        for every decomposed matrix
    W = W0 + lambda * sum_t weight_t * (W_t - W0)         for everything else (`rest`)

Nothing appears under the output's name until all of it is there.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Mapping
from typing import Any

from typing_extensions import Unpack

from ..checkpoints.reader import Checkpoint, require_unchanged
from ..engine.cpu import FactorCache
from ..engine.report import MergeReport, peak_memory
from ..errors import SettingError
from ..files.remote import is_url, placed
from ..methods import SPECS
from ..public import public
from ..recipes.parameters import rank_of
from ..recipes.recipe import Recipe
from ..recipes.settings import Settings
from .job import DirectoryJob, Progress, on_devices, prepare
from .publish import accompany, hasher, weight_writer
from .suspicions import of_digests, of_values


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
    **settings: Unpack[Settings],
) -> MergeReport:
    """W = W0 + lambda * sum_t weight_t * (L_t + S_t): merges checkpoints into a new one.

    Args:
        base: W0: a Hugging Face directory, a hub id, a .safetensors file or an openai-whisper .pt.
        experts: label -> W_t, fine-tuned from the base: same names and shapes; float32, float16 and bfloat16 may be mixed.
        out: directory to write; must not exist unless `force`.
        method: "lors", "task_arithmetic", "ties", "tsv", ...: `docs/methods.md` has all with their formulas.
        backend: kernels to use (see `lors_kernels.available_backends`); None chooses.
        threads: None: LORS_THREADS, else OMP_NUM_THREADS, else all cores. The output has the same bits for every number.
        device: "cuda", "cuda:1" or "cuda:0,cuda:1": GPUs, tensors split by bytes, for what is worth the way there
            (`docs/gpu-notes.md`); None: the CPU. `backend` then names the GPU's kernels.
        device_memory: bytes to use on each GPU; None: 80 % of what is free.
        durable: survive a power failure right after the merge (fsync).
        check: reload the output and compare it with the definition (`verify`).
        progress: called with (entries done, entries in all).
        settings: parameters of the method (`rank=7, density=0.2, lam=0.2, weight={"ca": 1.0, "de": 0.5}`, ...) and
            `target`, `rest`, `vocabulary`, `seed`, `dtype`, `out_dtype`, `out_shard_size`, as in a recipe.

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
    if device and ray is not None:
        raise SettingError("ray", "expected no device beside it: what a cluster decomposes is merged on the CPU")
    with contextlib.ExitStack() as stack:
        _check_device(device)
        kernels = None if device else backend
        place = stack.enter_context(placed(out, force, inputs=[recipe.base_source, *recipe.sources]))
        job = prepare(recipe, place, stack, backend=kernels, threads=threads, force=force, durable=durable)
        shown = recipe.published()
        text = shown.to_yaml(resolved=True) if is_url(out) else shown.to_yaml(beside=job.output.target)
        stack.enter_context(job.output)
        writer = weight_writer(recipe, job.models.base, job.output.path, job.works)
        stack.enter_context(writer)
        hashes: dict[Checkpoint, dict[str, str]] = {}
        hashing = [hasher(checkpoint, hashes, job) for checkpoint in dict.fromkeys(job.models.checkpoints)]
        engine = job.engine(writer.write, progress)
        engine.cached = factors
        if ray is not None:
            engine.cached = stack.enter_context(_on_cluster(ray, recipe, job, backend, engine.stop))
        if device:
            engine = on_devices(engine, device, device_memory, backend)
        suspected: list[str] = []
        looking = [lambda: suspected.extend(of_values(job.sources, job.works))] if job.works[0].relative else []
        engine.run(job.works, [*hashing, *looking])
        job.report.notices += [*of_digests(job.models.base, job.models.experts, hashes), *suspected]
        writer.finish()
        require_unchanged(job.models.checkpoints)  # a base that is gone is told as such
        accompany(recipe, job, hashes, text)
        require_unchanged(job.models.checkpoints)
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
        job = prepare(recipe, place, stack, backend=backend, threads=threads, force=force, durable=False)
        size = sum(work.spec.numel * work.out_dtype.itemsize for work in job.works)
        job.output.require_space(size)
        job.report.tensors = len(job.works)
        job.report.decomposed = sum(work.matrix for work in job.works)
        job.report.notices.append(f"dry run: nothing was read or written; the result takes {size / 1e6:.1f} MB")
        return job.report


# --- checks and planning ---------------------------------------------------------------------------------------------


def _on_cluster(
    address: str, recipe: Recipe, job: DirectoryJob, backend: str | None, stop: threading.Event
) -> contextlib.AbstractContextManager[FactorCache]:
    """Every decomposition of the merge as a task of a Ray cluster."""
    from .on_cluster import Wanted, decompositions

    wanted: dict[str, list[Wanted]] = {}
    united = (
        job.models.alignment.tables if job.models.alignment else frozenset[str]()
    )  # not what the files hold: done here
    for index, source in enumerate(job.sources[1:]):
        if source.parts is not None:
            continue
        wanted[source.name] = [
            Wanted(work.name, rank_of(reduction.rank, *work.spec.shape), work.spec.numel * 8)
            for work in job.works
            if work.matrix
            and work.name not in united
            and work.reductions
            and (reduction := work.reductions[index]).rank
            and reduction.weight
        ]
    paths = {expert.name: expert.location for expert in job.models.experts}
    options: dict[str, Any] = {"seed": recipe.seed, "backend": backend, "cpus": job.report.threads, "stop": stop}
    return decompositions(address, job.models.base.location, paths, wanted, **options)


def _check_device(device: str | None) -> None:
    """LorsError, before anything is opened, unless the GPUs that are asked for are there."""
    if device:
        from ..engine.device import parse_devices

        parse_devices(device)
