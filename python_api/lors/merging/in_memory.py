"""Merging state dicts, and files into arrays."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from typing_extensions import Unpack

from lors_kernels.arrays import is_torch

from ..checkpoints import layers
from ..checkpoints.reader import Checkpoint, require_unchanged
from ..engine.cpu import Engine
from ..engine.report import MergeReport
from ..errors import LorsError, SettingError
from ..experts.source import MemorySource, Source
from ..methods import METHODS, SPECS
from ..recipes.recipe import Recipe
from ..recipes.settings import Settings
from .job import Job, compare_specs, new_report, on_devices, open_models, planned
from .united import align_states


def merge_state_dicts(
    base: Mapping[str, Any],
    experts: Mapping[str, Mapping[str, Any]],
    method: str = "lors",
    *,
    config: Mapping[str, Any] | None = None,
    vocabularies: Mapping[str, Mapping[str, int]] | None = None,
    backend: str | None = None,
    threads: int | None = None,
    device: str | None = None,
    device_memory: int | None = None,
    **settings: Unpack[Settings],
) -> dict[str, Any]:
    """`merge` on tensors in memory (numpy arrays or torch tensors); returns new tensors of the base's kind.

    base, experts: name -> tensor. config: the model's configuration, which tells architectures apart that names do not.
    vocabularies: with `vocabulary="union"`, label -> token -> id of every model, the base's under "base", such as tokenizers'
    `get_vocab()`. In the result the base's tokens keep their ids; those that only experts have follow, expert by expert, each
    in the order of its own ids.
    settings: as for `merge`. Tensors on a GPU are merged there, and so is the result; `device` may name that GPU.
    """
    states = _states(base, experts)
    # without a base for a method that sums the models: this one gives names and types alone
    named = "base" if method not in METHODS or METHODS[method].relative else None
    recipe = Recipe.from_arguments(named, {label: label for label in experts}, method, methods=SPECS, **settings)
    union = recipe.vocabulary == "union"
    if vocabularies is not None and not union:
        raise SettingError("vocabularies", "expected none, or vocabulary: union beside them")
    if any(is_torch(value) for _, state in states for value in state.values()):
        from ..engine.resident import place_of

        place = place_of(states)
        if place not in (None, "cpu") or device == place:
            if union:
                raise SettingError("vocabulary", f"union: expected tensors in main memory, got tensors on {place}")
            return _merge_resident(recipe, states, str(place), config, device, device_memory, backend)
    sources: list[Source] = [MemorySource(label, state) for label, state in states]
    alignment = align_states(states, vocabularies, config) if union else None
    for source in sources[1:]:
        compare_specs(sources[0], source, alignment.tables if alignment else frozenset())
    if alignment:
        sources = alignment.sources(sources, recipe, range(len(experts)))
    report = new_report(recipe, None, None if device else backend, threads)
    job = planned(recipe, sources, layers.naming(base), config, report)

    def placed(engine: Engine) -> Engine:
        return on_devices(engine, device, device_memory, backend) if device else engine

    return {name: _like(base[name], array) for name, array in _collect(job, placed).items()}


def _merge_resident(
    recipe: Recipe,
    states: Sequence[tuple[str, Mapping[str, Any]]],
    place: str,
    config: Mapping[str, Any] | None,
    device: str | None,
    device_memory: int | None,
    backend: str | None,
) -> dict[str, Any]:
    """`merge_state_dicts` of tensors that stay on their device."""
    from ..engine.device import parse_devices
    from ..engine.resident import BoostedOnDevice, DeviceSource, ResidentEngine

    if device is not None and parse_devices(device) != [place]:
        raise SettingError("device", f"expected {place}, where the tensors are, or None, got {device!r}")
    if not METHODS[recipe.merge_method].on_device:
        raise LorsError(f"method {recipe.merge_method}: expected tensors in main memory, got tensors on {place}")
    sources = [DeviceSource(label, state) for label, state in states]
    for source in sources[1:]:
        compare_specs(sources[0], source)
    report = MergeReport(recipe.merge_method, "", None, [], threads=1)  # on_devices names the backend
    job = planned(recipe, sources, layers.naming(states[0][1]), config, report)
    resident = on_devices(
        job.engine(lambda *_: None, boosted=BoostedOnDevice), place, device_memory, backend, ResidentEngine
    )
    resident.run(job.works)
    return {work.name: resident.merged[work.name] for work in job.works}


def merge_in_memory(
    base: str | os.PathLike[str],
    experts: Mapping[str, str | os.PathLike[str]],
    method: str = "lors",
    *,
    backend: str | None = None,
    threads: int | None = None,
    **settings: Unpack[Settings],
) -> tuple[dict[str, np.ndarray], Checkpoint]:
    """`merge` of files into arrays: (name -> merged tensor, the base, closed but for its names and configuration)."""
    recipe = Recipe.from_arguments(base, experts, method, methods=SPECS, **settings)
    if recipe.vocabulary == "union":
        raise SettingError("vocabulary", "union: the result needs a tokenizer of its own: merge into a directory")
    report = new_report(recipe, None, backend, threads)
    with contextlib.ExitStack() as stack:
        models = open_models(recipe, stack)
        job = planned(recipe, models.sources, models.base.naming, models.base.config, report)
        merged = _collect(job)
        require_unchanged(models.checkpoints)
        return merged, models.base


def _collect(job: Job, placed: Callable[[Engine], Engine] = lambda engine: engine) -> dict[str, np.ndarray]:
    """Merges into arrays."""
    merged = {work.name: np.empty(work.spec.numel, work.out_dtype) for work in job.works}

    def keep(name: str, values: np.ndarray, start: int) -> None:
        merged[name][start : start + values.size] = values

    placed(job.engine(keep)).run(job.works)
    return {work.name: merged[work.name].reshape(work.spec.shape) for work in job.works}


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


def _like(original: Any, array: np.ndarray) -> Any:
    if not is_torch(original):
        return array
    from lors_kernels.arrays import to_torch

    return to_torch(array)
