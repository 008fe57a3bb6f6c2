"""What is written of a merge: weights, digests, card, ledger, recipe and the base's files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..checkpoints.reader import Checkpoint
from ..checkpoints.writer import OpenAIWriter, WeightWriter
from ..engine.work import Work
from ..methods import SPECS
from ..recipes.recipe import Recipe
from .card import Input, write_card
from .job import DirectoryJob
from .ledger import write_ledger

SHARD_BYTES = 5_000_000_000


def weight_writer(
    recipe: Recipe, base: Checkpoint, directory: Path, works: Sequence[Work], over: bool = False
) -> WeightWriter | OpenAIWriter:
    tensors = [(work.name, work.out_dtype, work.spec.shape) for work in works]
    if base.dims is not None:
        return OpenAIWriter(directory / "model.pt", tensors, base.dims)
    return WeightWriter(directory, tensors, shard_bytes=recipe.shard_bytes or SHARD_BYTES, over=over)


def hasher(checkpoint: Checkpoint, hashes: dict[Checkpoint, dict[str, str]], job: DirectoryJob) -> Callable[[], None]:
    def task() -> None:
        hashes[checkpoint] = checkpoint.sha256()
        if checkpoint is job.models.base:
            for source in job.sources:
                if (parts := source.parts) is not None:
                    parts.require_base(hashes[checkpoint])

    return task


def accompany(recipe: Recipe, job: DirectoryJob, hashes: Mapping[Checkpoint, Mapping[str, str]], text: str) -> None:
    """Configuration, tokenizer, processor, model card and recipe."""
    base, experts, output = job.models.base, job.models.experts, job.output
    for path in job.companions:
        output.copy(path)
    for name, text in job.older.items():
        output.write_text(name, text)
    labels = list(recipe.labels)
    listed = [labels.index(expert.name) if expert.name in labels else None for expert in experts]
    weights = {expert.name: plain_value(recipe, "weight", index) for expert, index in zip(experts, listed, strict=True)}
    shared = {spec.name: plain_value(recipe, spec.name, None) for spec in SPECS[recipe.merge_method].parameters}
    sources = [Input.of(expert, hashes[expert], weights[expert.name]) for expert in experts]
    write_ledger(output, Input.of(base, hashes[base]), sources)
    write_card(
        output.path,
        base=Input.of(base, hashes[base]),
        experts=sources,
        method=recipe.merge_method,
        parameters={name: value for name, value in shared.items() if value is not None and name != "weight"},
        recipe=text,
        backend=job.report.backend,
        naming=base.naming,
        carried=job.carried,
    )


def plain_value(recipe: Recipe, name: str, model: int | None) -> Any:
    """A parameter as one value where the recipe gives one; None where it depends on the tensor."""
    places = [recipe.parameters] if model is None else [recipe.models[model].parameters, recipe.parameters]
    for parameters in places:
        if name in parameters:
            value = parameters[name].data()
            return None if isinstance(value, list) else value
    spec = SPECS[recipe.merge_method].parameter(name)
    return spec.default if spec is not None and isinstance(spec.default, (bool, int, float, str)) else None
