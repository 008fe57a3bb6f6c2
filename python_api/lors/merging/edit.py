"""Adding an expert to a merged model in place, or taking it out.

    lors add MERGED expert.lors.safetensors         W + lambda * weight * (L + S)
    lors remove MERGED expert.lors.safetensors      W - lambda * weight * (L + S)

Both write a new directory beside the old one and swap the two in one step. Weights, card, recipe and ledger are new;
everything else in the directory is carried over as it is.

A merge sums the updates before it adds the base, and rounds once. A merged model no longer knows that sum, so every edit
rounds once more: an add or remove moves an entry by at most half a unit in the last place of the model's dtype from the
exact W +- update, plus 2^-24 of the update. Adding what was removed, or removing what was added, again and again goes to
and fro between the same two models. docs/expert-files.md has the bounds.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..checkpoints.hub import SourceNotFound
from ..checkpoints.reader import Checkpoint, open_checkpoint, require_unchanged
from ..engine.report import MergeReport, peak_memory
from ..engine.work import Work
from ..errors import LorsError, SettingError
from ..experts.expert_source import ExpertSource
from ..files.directory import RECIPE_FILE, OutputDirectory
from ..files.writing import writing
from ..recipes.parameters import LARGEST
from ..recipes.recipe import written_beside
from .card import Input, carried_over, is_untouched, write_card
from .ledger import LEDGER_FILE, Ledger, write_ledger

__all__ = ["edit"]


def edit(
    merged: str | os.PathLike[str],
    expert: str | os.PathLike[str],
    *,
    remove: bool = False,
    weight: float | None = None,
    name: str | None = None,
    backend: str | None = None,
    threads: int | None = None,
    durable: bool = True,
) -> MergeReport:
    """Adds an expert file to a merged model in place, or takes it out again.

    The settings (rank, density, lambda ...) are those of the recipe in the directory. `weight`: of the added expert, 1
    when not given. `name`: what it is called, or which of the model's experts is removed. LorsError before anything is
    written when the expert file was made from another base or, on removal, is not what was merged.
    """
    begun = time.perf_counter()
    if weight is not None and not abs(weight) <= LARGEST:
        raise SettingError("weight", f"expected a number that float32 can hold, got {weight:g}")
    target = Path(os.path.realpath(os.path.expanduser(merged)))
    if not target.is_dir():
        turned = (Path(expert).expanduser() / LEDGER_FILE).exists()
        hint = f"; the model comes first: {expert} {merged}" if turned else ""
        raise LorsError(f"{merged}: expected the directory of a merged model{hint}")
    with contextlib.ExitStack() as stack:
        source = _expert_of(target, expert, name)
        stack.enter_context(source.checkpoint)
        output = stack.enter_context(OutputDirectory(target, keep=True, inputs=[expert], durable=durable))
        ledger = Ledger.load(target)  # under the lock of the output: nobody changes it any more
        source.require_base(ledger.base.sha256)
        checkpoint = stack.enter_context(open_checkpoint(str(target)))
        output.outdated([*(file.name for file in checkpoint.files), "model.safetensors.index.json"])
        carried, notices = carried_over(checkpoint.card())
        change = _removal if remove else _addition
        model = written_beside(target, os.fspath(expert))
        recipe, bound, index, experts = change(_recipe(target), ledger, source, model, weight)
        if remove:
            _require_exact(checkpoint, source, bound, ledger, experts)
        report = _apply(checkpoint, source, bound, index, remove, output, backend, threads)
        require_unchanged((checkpoint, source.checkpoint))
        report.experts = [one.name for one in experts]
        report.notices += [f"{'removed' if remove else 'added'} {source.name}", *notices]
        _describe(output, checkpoint, recipe, Ledger(ledger.base, experts, ledger.edits + 1), report, carried)
        output.commit()
    report.seconds, report.peak_memory = time.perf_counter() - begun, peak_memory()
    return report


def _expert_of(target: Path, expert: str | os.PathLike[str], name: str | None) -> ExpertSource:
    """The expert file; when there is none, what the model is made of helps to find it."""
    from ..experts.expert_source import open_expert

    try:
        return open_expert(expert, name)
    except SourceNotFound as error:
        known = ", ".join(one.name for one in Ledger.load(target).experts)
        raise LorsError(
            f"{error}; expected an expert file, as `lors decompose` writes it; {target} has {known}"
        ) from None


def _recipe(target: Path) -> dict[str, Any]:
    from ..files import strict_json
    from ..recipes import strict_yaml

    try:
        text = strict_json.read_bytes(target / RECIPE_FILE, strict_yaml.MAX_BYTES).decode("utf-8")
    except UnicodeDecodeError as error:
        raise LorsError(f"{target / RECIPE_FILE}: cannot read the recipe: {error}") from None
    data = strict_yaml.parse(text, str(target / RECIPE_FILE))
    if not isinstance(data, dict) or not isinstance(data.get("models"), list):
        raise LorsError(f"{target / RECIPE_FILE}: expected a recipe with models")
    return data


def _bound(data: Mapping[str, Any]) -> Any:
    import yaml

    from ..methods import METHODS, SPECS
    from ..recipes.recipe import Recipe

    recipe = Recipe.from_yaml(yaml.safe_dump(dict(data), sort_keys=False, allow_unicode=True), SPECS)
    if recipe.vocabulary == "union":
        raise LorsError("vocabulary: union: an expert file has no tokens: merge again instead of editing")
    if recipe.boosted:
        raise LorsError("boost: what it adds cannot be taken apart: merge again instead of editing")
    if not METHODS[recipe.merge_method].relative or recipe.rest == "average" or not _separable(recipe):
        rule = "rest: average" if _separable(recipe) else f"method {recipe.merge_method}"
        raise LorsError(f"{rule}: one expert's share depends on the others: merge again instead of editing")
    return recipe


def _separable(recipe: Any) -> bool:
    from ..methods import METHODS

    normalized = "normalize" in recipe.parameters and recipe.parameters["normalize"].data() is not False
    return METHODS[recipe.merge_method].separable and not normalized


def _addition(
    data: dict[str, Any], ledger: Ledger, source: ExpertSource, model: str, weight: float | None
) -> tuple[Any, Any, int, tuple[Input, ...]]:
    label = source.name
    if label in [expert.name for expert in ledger.experts]:
        raise LorsError(f"{label}: is merged already; --name gives this one another name")
    entry: dict[str, Any] = {"model": model, "name": label}
    if weight is not None:
        entry["parameters"] = {"weight": weight}
    recipe = _bound(data | {"models": [*data["models"], entry]})
    added = Input.of(source.checkpoint, source.checkpoint.sha256(), 1.0 if weight is None else weight)
    return recipe, recipe, len(recipe.models) - 1, (*ledger.experts, added)


def _removal(
    data: dict[str, Any], ledger: Ledger, source: ExpertSource, model: str, weight: float | None
) -> tuple[Any, Any, int, tuple[Input, ...]]:
    digests = [sorted(d.values()) for d in (source.checkpoint.sha256(), source.layout.expert)]
    found = [expert for expert in ledger.experts if sorted(expert.sha256.values()) in digests]
    named = [expert for expert in found if expert.name == source.name] or found
    if not named:
        known = ", ".join(expert.name for expert in ledger.experts)
        raise LorsError(
            f"{source.name}: is not part of this model, neither this file nor its checkpoint; it has {known}"
        )
    if len(ledger.experts) == 1:
        raise LorsError(f"{source.name}: is the only expert of this model; without it there is only the base")
    before = _bound(data)
    index = next((i for i in before.experts if before.labels[i] == named[0].name), None)
    if index is None:
        known = ", ".join(before.labels[i] for i in before.experts)
        raise LorsError(f"{RECIPE_FILE}: expected the model {named[0].name!r} that {LEDGER_FILE} has, it has {known}")
    models = [entry for at, entry in enumerate(data["models"]) if at != index]
    return _bound(data | {"models": models}), before, index, tuple(e for e in ledger.experts if e is not named[0])


def _require_exact(
    merged: Checkpoint, source: ExpertSource, recipe: Any, ledger: Ledger, experts: Sequence[Input]
) -> None:
    """LorsError when the expert was merged from its checkpoint and the file holds only a part of what went in."""
    from ..methods import METHODS

    gone = next(expert for expert in ledger.experts if expert not in experts)
    if sorted(gone.sha256.values()) == sorted(source.checkpoint.sha256().values()):
        return
    if METHODS[recipe.merge_method].everywhere and any(source.stands_in(name) for name in merged.tensors):
        raise LorsError(
            f"{source.name}: method {recipe.merge_method} merged all of its checkpoint, the expert file holds rank "
            f"{source.layout.rank:g} and density {source.layout.density:g} of it: merge again without it"
        )


def _apply(
    merged: Checkpoint,
    source: ExpertSource,
    recipe: Any,
    index: int,
    remove: bool,
    output: OutputDirectory,
    backend: str | None,
    threads: int | None,
) -> MergeReport:
    """W +- the expert's term, into the output."""
    from ..experts.opening import source_of
    from .job import new_report, planned
    from .publish import weight_writer

    report = new_report(recipe, str(output.target), backend, threads)
    source.require_names(merged)
    position, sign = recipe.experts.index(index), -1.0 if remove else 1.0

    def single(work: Work) -> Work:
        if not work.reductions:
            return work
        mine = work.reductions[position]
        return replace(work, out_dtype=work.spec.dtype, reductions=(mine._replace(weight=sign * mine.weight),))

    job = planned(recipe, [source_of(merged, merged), source], merged.naming, merged.config, report, single)
    with weight_writer(recipe, merged, output.path, job.works) as writer:
        job.engine(writer.write).run(job.works)
        writer.finish()
    return report


def _describe(
    output: OutputDirectory,
    merged: Checkpoint,
    recipe: Any,
    ledger: Ledger,
    report: MergeReport,
    carried: Mapping[str, Any],
) -> None:
    """Card, recipe and ledger; all else beside the weights is carried over, and so is a card with a user's words."""
    if (card := merged.card()) is not None and not is_untouched(card):
        kept = f"README.before-{ledger.edits}.md"
        output.copy(card, kept)
        report.notices.append(f"README.md was changed by hand and is written anew; what it was is kept in {kept}")
    write_ledger(output, ledger.base, ledger.experts, ledger.edits)
    from .publish import parameters_of

    with writing(output.path):
        write_card(
            output.path,
            base=ledger.base,
            experts=ledger.experts,
            method=recipe.merge_method,
            parameters=parameters_of(recipe),
            recipe=recipe.published().to_yaml(),
            backend=report.backend,
            naming=merged.naming,
            carried=carried,
        )
