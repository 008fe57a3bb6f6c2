"""`vocabulary: union`: models with tokens of their own, their rows brought together by token, and the files that say so.

The base's tokens keep their ids; what only experts have follows (`checkpoints/vocabulary.py`). The tokenizer of the result is
the base's with these tokens added, in every form in which the base has it. Settings of the base stay; what experts say of
their new tokens (languages, tasks, what is not to be said) joins them, in the ids of the result.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..checkpoints.reader import Checkpoint
from ..checkpoints.tensor_info import FLOATS
from ..checkpoints.vocabulary import (
    ADDED,
    TOKENIZER,
    VOCAB,
    United,
    Vocabulary,
    read_vocabulary,
    require_rows,
    rows_of_tables,
    token_tables,
    unite,
    vocabulary_part,
)
from ..errors import LorsError, SettingError, shown
from ..experts.aligned import Aligned, FreshRows
from ..experts.opening import kind_of
from ..experts.source import Source
from ..files import strict_json
from ..recipes.recipe import Recipe

__all__ = ["Alignment", "align", "align_states", "documents", "tables_of"]

CONFIG, GENERATION, TOKENIZER_CONFIG, SPECIAL = (
    "config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json"
)  # fmt: skip
_LANGUAGES, _SUPPRESSED = ("lang_to_id", "task_to_id"), ("suppress_tokens", "begin_suppress_tokens")
_EXTRA = ("extra_special_tokens", "additional_special_tokens")  # of transformers 5, and before


@dataclass(frozen=True)
class Alignment:
    """How the models of a merge are brought to one vocabulary: that of the base, of each expert, and of all."""

    vocabularies: Sequence[Vocabulary]  # the base first
    united: United
    tables: frozenset[str]

    def notice(self) -> str:
        if not self.united.new:
            return "vocabulary: union: no expert has a token that the base lacks"
        tokens = list(self.united.new)
        more = f" and {len(tokens) - 3} more" if len(tokens) > 3 else ""
        first = self.united.new[tokens[0]]
        return f"vocabulary: {len(tokens)} new tokens from id {first} on: {', '.join(tokens[:3])}{more}"

    def languages(self) -> list[str]:
        """Codes of the languages whose tokens experts add: "ast" of <|ast|>."""
        return [found[1] for token in self.united.new if (found := re.fullmatch(r"<\|([a-z]{2,3})\|>", token))]

    def sources(self, sources: Sequence[Source], recipe: Recipe, indices: Sequence[int]) -> list[Source]:
        """The models' sources, the base's first, with united tables. indices: of the experts in the recipe."""

        def weights(table: str) -> list[float]:
            at: dict[str, Any] = {"tensor": table, "position": 0.0}
            return [float(recipe.params_for(model=index, **at).get("weight", 1.0)) for index in indices]

        base, *experts = sources
        tables = frozenset(name for name in self.tables if name in base.tensors)
        # what is written in another type is rounded once, not to the base's type before
        own = {name: FLOATS["float32"] if recipe.output_dtype else base.tensors[name].dtype for name in tables}
        own = {name: np.dtype(dtype) for name, dtype in own.items()}
        fresh = FreshRows(experts, list(self.united.new), self.united.holders, weights, own)
        for table in sorted(tables):
            fresh.require_weights(table)
        runs = self.united.runs
        aligned: list[Source] = [Aligned(base, base, tables, runs[0], fresh, own)]
        aligned += [Aligned(e, base, tables, r, fresh) for e, r in zip(experts, runs[1:], strict=True)]
        return aligned


def tables_of(base: Checkpoint) -> frozenset[str]:
    """Names of the token tables of a model that others are united with; LorsError where they cannot be known."""
    if base.config is None:
        raise LorsError(f"{base.path}: vocabulary: union: expected config.json beside the weights of the base")
    shapes = {name: info.shape for name, info in base.tensors.items()}
    return token_tables(base.name, shapes, base.config)


def align(base: Checkpoint, experts: Sequence[Checkpoint], tables: frozenset[str]) -> Alignment:
    """The one vocabulary of checkpoints, by the tokenizers beside their weights."""
    ours = read_vocabulary(base, tables)
    found = [ours]
    for expert in experts:
        if kind_of(expert) == "expert file":
            raise LorsError(
                f"{expert.name}: vocabulary: union: expected a checkpoint, got an expert file, which has no tokens"
            )
        if expert is base:
            found.append(ours)
        elif kind_of(expert) == "adapter":
            found.append(Vocabulary(expert.name, ours.ids, ours.rows))
        else:
            found.append(read_vocabulary(expert, tables, ours))
    return Alignment(found, unite(ours, found[1:]), tables)


def align_states(
    states: Sequence[tuple[str, Mapping[str, Any]]],
    vocabularies: Mapping[str, Mapping[str, int]] | None,
    config: Mapping[str, Any] | None,
) -> Alignment:
    """The same of state dicts, whose tokens are told: label -> token -> id, the base's under "base"."""
    if not isinstance(vocabularies, Mapping):
        raise SettingError(
            "vocabularies", f"expected label -> token -> id beside vocabulary: union, got {shown(vocabularies)}"
        )
    if odd := sorted(vocabularies.keys() ^ {label for label, _ in states}):
        raise SettingError(
            "vocabularies", f"expected those of {', '.join(label for label, _ in states)}; odd: {odd[0]!r}"
        )
    (label, base), found = states[0], []
    tables = token_tables(label, {name: tuple(value.shape) for name, value in base.items()}, config)
    for label, state in states:
        rows = rows_of_tables(label, {name: tuple(value.shape) for name, value in state.items()}, tables)
        if not isinstance(given := vocabularies[label], Mapping):
            raise SettingError("vocabularies", f"{label}: expected token -> id, got {shown(given)}")
        ids = dict(given)
        for token, number in ids.items():
            if type(number) is not int or number < 0:
                raise SettingError(
                    "vocabularies", f"{label}: token {shown(token)}: expected an id, got {shown(number)}"
                )
        require_rows(label, f"vocabularies: {label}", ids, rows)
        found.append(Vocabulary(label, ids, rows))
    return Alignment(found, unite(found[0], found[1:]), tables)


# --- the files of the result -----------------------------------------------------------------------------------------


def documents(alignment: Alignment, models: Sequence[Checkpoint], files: Sequence[Path]) -> dict[str, str]:
    """Texts of the files of the result that are not what they are in the model that they are taken from.

    models: the base and the experts. files: what is laid beside the merged weights.
    """
    result = _Result(alignment, models)
    writers: dict[str, Callable[[dict[str, Any], int], None]] = {
        CONFIG: result.config, GENERATION: result.generation, TOKENIZER: result.tokenizer,
        TOKENIZER_CONFIG: result.tokenizer_config, SPECIAL: result.special, ADDED: result.added,
    }  # fmt: skip
    texts = {}
    for path in files:
        if path.name in writers:
            content = strict_json.read(path, infinite=True)
            holder = next(place for place, model in enumerate(models) if path in model.sidecars())
            writers[path.name](content, holder)
            texts[path.name] = strict_json.text_of(content)
    if VOCAB in (names := {path.name for path in files}) and ADDED not in names and alignment.united.new:
        texts[ADDED] = strict_json.text_of(dict(alignment.united.new))
    return texts


class _Result:
    """Changes files of the model with a number (0: the base) into those of the result."""

    def __init__(self, alignment: Alignment, models: Sequence[Checkpoint]) -> None:
        self._vocabularies, self._united, self._models = alignment.vocabularies, alignment.united, models
        self._asked: tuple[int, dict[int, str]] = (-1, {})
        self._ids = {**alignment.vocabularies[0].ids, **alignment.united.new}
        self._entries = {
            token: next(v.added[token] for v in alignment.vocabularies if token in v.added)
            for token in alignment.united.new
            if any(token in v.added for v in alignment.vocabularies)
        }

    def config(self, content: dict[str, Any], holder: int) -> None:
        part = vocabulary_part(content)
        assert isinstance(part, dict)
        part["vocab_size"] = self._united.rows
        self._settings(content, holder, CONFIG)

    def generation(self, content: dict[str, Any], holder: int) -> None:
        self._settings(content, holder, GENERATION)

    def _settings(self, content: dict[str, Any], holder: int, name: str) -> None:
        """Languages and tasks of all models, and what those that have a new token suppress of them."""
        others = [self._read(model, name) for model in range(len(self._models))]
        for key in _LANGUAGES:
            tables = [(model, other[key]) for model, other in enumerate(others) if isinstance(other.get(key), dict)]
            ordered = sorted(tables, key=lambda item: item[0] != holder)  # what is already there comes first
            united: dict[str, int] = {}
            for model, table in ordered:
                for word, number in table.items():
                    united.setdefault(word, self._id(model, number, f"{name}: {key}: {word}"))
            if united:
                content[key] = united
        for key in _SUPPRESSED:
            if not isinstance(listed := content.get(key) or [], list):
                raise LorsError(
                    f"{self._vocabularies[holder].name}: {name}: {key}: expected a list, got {shown(listed)}"
                )
            kept = [self._id(holder, number, f"{name}: {key}") for number in listed]
            silent = [number for token, number in self._united.new.items() if self._suppressed(token, others, key)]
            if both := [*kept, *(number for number in silent if number not in kept)]:
                content[key] = both

    def _suppressed(self, token: str, others: Sequence[Mapping[str, Any]], key: str) -> bool:
        """Whether all models that have the token suppress it."""
        found = [
            isinstance(other.get(key), list) and vocabulary.ids[token] in other[key]
            for vocabulary, other in zip(self._vocabularies, others, strict=True)
            if token in vocabulary.ids
        ]
        return all(found)

    def _id(self, model: int, number: object, where: str) -> int:
        """The result's id of what has an id in a model."""
        vocabulary = self._vocabularies[model]
        if type(number) is not int or not -1 <= number < vocabulary.rows:
            raise LorsError(
                f"{vocabulary.name}: {where}: expected an id below {vocabulary.rows}, the rows of its embedding, got {shown(number)}"
            )
        if self._asked[0] != model:  # the names of one model at a time: those of many would fill the memory
            self._asked = model, {place: token for token, place in vocabulary.ids.items()}
        token = self._asked[1].get(number)
        return number if token is None else self._ids[token]

    def _read(self, model: int, name: str) -> dict[str, Any]:
        path = next((path for path in self._models[model].sidecars() if path.name == name), None)
        return {} if path is None else strict_json.read(path, infinite=True)

    # --- tokenizers: the base's

    def tokenizer(self, content: dict[str, Any], holder: int) -> None:
        entries = [{**self._entry(token), "id": number} for token, number in self._united.new.items()]
        content["added_tokens"] = [*(content.get("added_tokens") or []), *entries]

    def tokenizer_config(self, content: dict[str, Any], holder: int) -> None:
        if isinstance(decoder := content.get("added_tokens_decoder"), dict):
            for token, number in self._united.new.items():
                decoder[str(number)] = {key: value for key, value in self._entry(token).items() if key != "id"}
        self._list_special(content, TOKENIZER_CONFIG)

    def special(self, content: dict[str, Any], holder: int) -> None:
        self._list_special(content, SPECIAL)

    def added(self, content: dict[str, Any], holder: int) -> None:
        content.update(self._united.new)

    def _entry(self, token: str) -> Mapping[str, Any]:
        if token not in self._entries:
            raise LorsError(f"token {shown(token)}: expected it among the added tokens of the expert that has it")
        return self._entries[token]

    def _list_special(self, content: dict[str, Any], name: str) -> None:
        """Special tokens are listed once more. The last of them stays the last: WhisperTokenizer has times begin after it."""
        others = [self._read(model, name) for model in range(1, len(self._models))]
        key = next((key for one in (content, *others) for key in _EXTRA if isinstance(one.get(key), list)), None)
        if key is None or not isinstance(here := content.get(key) or [], list):
            return
        lists = [other[k] for other in others for k in _EXTRA if isinstance(other.get(k), list)]
        listed, known = {_content(item) for items in lists for item in items}, {_content(item) for item in here}
        if found := [token for token in self._united.new if token in listed and token not in known]:
            content[key] = [*here[:-1], *found, *here[-1:]]


def _content(item: object) -> str | None:
    found = item.get("content") if isinstance(item, dict) else item
    return found if isinstance(found, str) else None
