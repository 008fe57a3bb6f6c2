"""What is written of a merge: weights, digests, card, ledger, recipe and the base's files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..checkpoints.hub import NEMO, OPENAI
from ..checkpoints.reader import Checkpoint
from ..checkpoints.writer import TorchWriter, WeightWriter
from ..engine.work import Work
from ..methods import SPECS
from ..recipes.parameters import REQUIRED, Setting
from ..recipes.recipe import Recipe
from .card import Input, write_card
from .job import DirectoryJob
from .ledger import write_ledger

SHARD_BYTES = 5_000_000_000


def weight_writer(
    recipe: Recipe, base: Checkpoint, directory: Path, works: Sequence[Work], over: bool = False
) -> WeightWriter | TorchWriter:
    tensors = [(work.name, work.out_dtype, work.spec.shape) for work in works]
    if base.dims is not None:
        return TorchWriter(directory / OPENAI, tensors, dims=base.dims)
    if base.archive is not None:
        return TorchWriter(directory / NEMO, tensors, archive=base.archive)
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
        if path.name not in job.documents:
            output.copy(path)
    for name, content in job.documents.items():
        output.write_text(name, content)
    labels = list(recipe.labels)
    listed = [labels.index(expert.name) if expert.name in labels else None for expert in experts]
    weights = {expert.name: plain_value(recipe, "weight", index) for expert, index in zip(experts, listed, strict=True)}
    sources = [Input.of(expert, hashes[expert], weights[expert.name]) for expert in experts]
    write_ledger(output, Input.of(base, hashes[base]), sources)
    write_card(
        output.path,
        base=Input.of(base, hashes[base]),
        experts=sources,
        method=recipe.merge_method,
        parameters=parameters_of(recipe),
        recipe=text,
        backend=job.report.backend,
        naming=base.naming,
        carried=job.carried,
        spoken=[] if job.models.alignment is None else job.models.alignment.languages(),
    )


def parameters_of(recipe: Recipe) -> dict[str, str]:
    """The parameters of a card but the weight, which stands with each expert: what the merge took, or the default, in words."""
    found = {}
    for spec in SPECS[recipe.merge_method].parameters:
        default = None if spec.default in (None, REQUIRED) else str(spec.default)
        shared = _worded(recipe.parameters[spec.name]) if spec.name in recipe.parameters else default
        own = {recipe.labels[i]: recipe.models[i].parameters.get(spec.name) for i in recipe.experts}
        if any(own.values()):
            each = {label: shared if setting is None else _worded(setting) for label, setting in own.items()}
            shared = "; ".join(f"{label}: {text}" for label, text in each.items() if text is not None)
        if shared is not None and spec.name != "weight":
            found[spec.name] = shared
    return found


def _worded(setting: Setting) -> str:
    """0.2; 0.1 to 0.3 over the depth; 0.1 where a name has fc1, else 0.2."""
    texts: list[str] = []
    for one in setting.conditions:
        value = f"{' to '.join(map(str, one.value))} over the depth" if isinstance(one.value, tuple) else str(one.value)
        place = "else " if texts else ""
        texts.append(f"{place}{value}" if one.filter in (None, "*") else f"{value} where a name has {one.filter}")
    return ", ".join(texts)


def plain_value(recipe: Recipe, name: str, model: int | None) -> Any:
    """A parameter as one value where the recipe gives one; None where it depends on the tensor."""
    places = [recipe.parameters] if model is None else [recipe.models[model].parameters, recipe.parameters]
    for parameters in places:
        if name in parameters:
            value = parameters[name].data()
            return None if isinstance(value, list) else value
    spec = SPECS[recipe.merge_method].parameter(name)
    return spec.default if spec is not None and isinstance(spec.default, (bool, int, float, str)) else None
