"""Which token each row of a model's token tables belongs to, by the tokenizer beside its weights.

A token table has a row for each token: the embedding, and the output projection where it is stored apart. A tokenizer is
what it was trained to (tokens and merges, which decide what becomes of a text) and tokens that were added to it, which are
found whole. `unite` makes one vocabulary of several that differ in what was added:

    every token of the base keeps its id; the others follow, model by model, each in the order of its own ids

Rows that no token has (padding, holes) go by their ids, and the first of those at the end are what new tokens take.
"""

from __future__ import annotations

import re
from collections import ChainMap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..errors import LorsError, shown
from ..files import strict_json
from .layers import HF_WHISPER
from .reader import Checkpoint

__all__ = [
    "BASE", "FRESH", "OWN", "Run", "United", "Vocabulary", "read_vocabulary", "rows_of_tables", "token_tables", "unite",
]  # fmt: skip

_TABLE = re.compile(
    r"(^|[._])(embed_tokens|token_embedding|word_embeddings|shared|wte|lm_head|proj_out)\.(weight|bias)$"
)
TOKENIZER, VOCAB, MERGES, ADDED = "tokenizer.json", "vocab.json", "merges.txt", "added_tokens.json"
_PLAIN = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of one model.

    name: of the model, for messages. ids: token -> row. rows: of its token tables. added: token -> its entry among
    the added tokens of tokenizer.json. trained, merges: the trained part; None where it is not known.
    """

    name: str
    ids: Mapping[str, int]
    rows: int
    added: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    trained: Mapping[str, int] | None = None
    merges: Sequence[str] | None = None

    @property
    def end(self) -> int:
        """The id after the last token's."""
        return 1 + max(self.ids.values(), default=-1)


# Where a run of rows comes from: the model itself, the base, or the rows of new tokens, which are the same for all models.
OWN, BASE, FRESH = range(3)


class Run(NamedTuple):
    """Rows [start, start + length) of a united table are the rows from `place` on of `origin`."""

    start: int
    length: int
    origin: int
    place: int


@dataclass(frozen=True)
class United:
    """One vocabulary of several.

    rows: of its tables. new: tokens that the base lacks -> id, in order. holders: for each of them (expert, row there).
    runs: for the base and each expert, where the rows of a table come from.
    """

    rows: int
    new: Mapping[str, int]
    holders: Sequence[Sequence[tuple[int, int]]]
    runs: Sequence[Sequence[Run]]


# --- tables ----------------------------------------------------------------------------------------------------------


def token_tables(name: str, shapes: Mapping[str, Sequence[int]], config: Mapping[str, Any] | None) -> frozenset[str]:
    """Names of a model's token tables: by their names, and by the rows that config.json says, or else the embedding has.

    LorsError when there is none of so many rows.
    """
    found = {table: shape[0] for table, shape in shapes.items() if _TABLE.search(table) and shape}
    rows = next(iter(found.values()), None) if config is None else vocab_size(name, config)
    tables = frozenset(table for table, count in found.items() if count == rows)
    if not tables:
        got = ", ".join(f"{table!r} with {count}" for table, count in found.items()) or "no embedding"
        wanted = "a token embedding" if rows is None else f"a token embedding of {rows} rows, as config.json says"
        raise LorsError(f"{name}: expected {wanted}, got {got}")
    return tables


def rows_of_tables(name: str, shapes: Mapping[str, Sequence[int]], tables: Iterable[str]) -> int:
    """How many rows a model's token tables have; LorsError where two differ."""
    rows = {table: int(shapes[table][0]) for table in sorted(tables) if table in shapes and shapes[table]}
    first = next(iter(rows), None)
    if first is None:
        raise LorsError(f"{name}: expected the token table {min(tables)!r} of the base, it has none")
    for table, count in rows.items():
        if count != rows[first]:
            raise LorsError(f"{name}: tensor {table!r}: expected {rows[first]} rows as {first!r} has, got {count}")
    return rows[first]


def vocab_size(name: str, config: Mapping[str, Any]) -> int:
    """vocab_size of a config.json, or of the part in it that describes the text model."""
    value = vocabulary_part(config).get("vocab_size")
    if type(value) is not int:
        raise LorsError(f"{name}: config.json: vocab_size: expected an integer, got {shown(value)}")
    return value


def vocabulary_part(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The object of a config.json that has vocab_size."""
    parts = (config, config.get("text_config"), config.get("decoder"), config.get("thinker_config"))
    return next((part for part in parts if isinstance(part, Mapping) and part.get("vocab_size") is not None), config)


# --- reading ---------------------------------------------------------------------------------------------------------


def read_vocabulary(checkpoint: Checkpoint, tables: frozenset[str], base: Vocabulary | None = None) -> Vocabulary:
    """The vocabulary of a model, from tokenizer.json or from vocab.json and what lies beside that.

    base: what a model without a tokenizer of its own has, where its tables have as many rows. LorsError: no tokenizer; one
    that contradicts itself, the tables or config.json.
    """
    shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    stored = frozenset(table for name in tables if (table := checkpoint.resolve(name)) is not None)
    rows = rows_of_tables(checkpoint.name, shapes, stored or tables)
    if checkpoint.config is not None and (said := vocab_size(checkpoint.name, checkpoint.config)) != rows:
        table = min(stored)
        raise LorsError(
            f"{checkpoint.name}: config.json: vocab_size: expected {rows}, the rows of {table!r}, got {said}"
        )
    files = {path.name: path for path in checkpoint.sidecars()}
    if TOKENIZER in files:
        found = _of_tokenizer(checkpoint.name, files[TOKENIZER], rows)
    elif VOCAB in files and MERGES in files:
        found = _of_tables(checkpoint.name, files, rows)
    elif base is not None and rows == base.rows:
        return Vocabulary(checkpoint.name, base.ids, rows)
    else:
        raise LorsError(
            f"{checkpoint.path}: expected {TOKENIZER}, or {VOCAB} and {MERGES}, beside the weights, to know which token each of the "
            f"{rows} rows belongs to"
        )
    if checkpoint.naming == HF_WHISPER and found.end < rows:
        raise LorsError(
            f"{checkpoint.name}: expected a token for each of the {rows} rows of the embedding, its tokenizer has "
            f"{found.end}: the other rows are Whisper's times, or padding that would be taken for times; add <|0.00|>, "
            f"<|0.02|> ... as tokens, or cut the padding, with resize_token_embeddings"
        )
    return found if base is None else _lean(base, found)


def _of_tokenizer(name: str, path: Path, rows: int) -> Vocabulary:
    content = strict_json.read(path)
    model = content.get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocab, list):  # unigram: [token, score], its id is its place
        vocab = {item[0]: place for place, item in enumerate(vocab) if isinstance(item, list) and item}
    trained = _token_ids(vocab, f"{path}: model.vocab")
    merges = model.get("merges") if isinstance(model, dict) else None
    added: dict[str, dict[str, Any]] = {}
    listed = content.get("added_tokens") or []
    if not isinstance(listed, list):
        raise LorsError(f"{path}: added_tokens: expected a list, got {shown(listed)}")
    for place, entry in enumerate(listed):
        if not isinstance(entry, dict) or not isinstance(entry.get("content"), str):
            raise LorsError(
                f"{path}: added_tokens[{place}]: expected an object with content and id, got {shown(entry)}"
            )
        added[entry["content"]] = entry
    ids = _token_ids({token: entry.get("id") for token, entry in added.items()}, f"{path}: added_tokens")
    return _checked(name, str(path), trained, ids, rows, added, _lines(merges, f"{path}: model.merges"))


def _lines(merges: object, where: str) -> list[str] | None:
    """Merges as merges.txt has them; None where a tokenizer of another kind has none."""
    if merges is None:
        return None
    pairs: list[Any] = (
        [m.split(" ") if isinstance(m, str) else m for m in merges] if isinstance(merges, list) else [merges]
    )
    for pair in pairs:
        if not (isinstance(pair, list) and len(pair) == 2 and all(isinstance(part, str) for part in pair)):
            raise LorsError(f"{where}: expected pairs of tokens, got {shown(pair)}")
    return [" ".join(pair) for pair in pairs]


def _of_tables(name: str, files: Mapping[str, Path], rows: int) -> Vocabulary:
    trained = _token_ids(strict_json.read(files[VOCAB]), str(files[VOCAB]))
    ids = _token_ids(strict_json.read(files[ADDED]), str(files[ADDED])) if ADDED in files else {}
    added = {token: {"content": token, **_PLAIN} for token in ids}
    try:
        text = strict_json.read_bytes(files[MERGES]).decode("utf-8")
    except UnicodeDecodeError as error:
        raise LorsError(f"{files[MERGES]}: not UTF-8 (byte {error.start})") from None
    lines = [line for line in text.split("\n") if line and not line.startswith("#version")]
    return _checked(name, str(files[VOCAB]), trained, ids, rows, added, lines)


def _token_ids(found: object, where: str) -> dict[str, int]:
    if not isinstance(found, dict) or not found and where.endswith("vocab"):
        raise LorsError(f"{where}: expected tokens and their ids, got {shown(found)}")
    for token, number in found.items():
        if type(number) is not int or number < 0:
            raise LorsError(f"{where}: token {shown(token)}: expected an id, a whole number, got {shown(number)}")
    return found


def _checked(
    name: str,
    where: str,
    trained: dict[str, int],
    ids: dict[str, int],
    rows: int,
    added: dict[str, dict[str, Any]],
    merges: list[str] | None,
) -> Vocabulary:
    for token, number in ids.items():
        if trained.get(token, number) != number:
            raise LorsError(f"{where}: token {shown(token)}: expected one id, got {trained[token]} and {number}")
    every = {**trained, **ids}
    require_rows(name, where, every, rows)
    return Vocabulary(name, every, rows, added, trained, merges)


def require_rows(name: str, where: str, ids: Mapping[str, int], rows: int) -> None:
    """LorsError unless each token has a row of its own."""
    owner: dict[int, str] = {}
    for token, number in ids.items():
        if number >= rows:
            raise LorsError(
                f"{where}: token {shown(token)} has id {number}: expected ids below {rows}, the rows of {name}'s embedding"
            )
        if (other := owner.setdefault(number, token)) != token:
            raise LorsError(f"{where}: expected one token for id {number}, got {shown(other)} and {shown(token)}")


# --- uniting ---------------------------------------------------------------------------------------------------------


def unite(base: Vocabulary, experts: Sequence[Vocabulary]) -> United:
    """One vocabulary; LorsError where two contradict each other."""
    for expert in experts:
        _require_same_training(base, expert)
    entries: dict[str, tuple[Vocabulary, Mapping[str, Any]]] = {}
    new: dict[str, int] = {}
    for expert in experts:
        for token in sorted(expert.ids.keys() - base.ids.keys(), key=expert.ids.__getitem__):
            new.setdefault(token, base.end + len(new))
            entry = {key: value for key, value in expert.added.get(token, {}).items() if key != "id"}
            first, known = entries.setdefault(token, (expert, entry))
            if entry != known:
                key = next(key for key in sorted({*entry, *known}) if entry.get(key) != known.get(key))
                raise LorsError(
                    f"{expert.name}: token {shown(token)}: expected {key} {shown(known.get(key))} as in {first.name}, "
                    f"got {shown(entry.get(key))}"
                )
    rows = max(base.rows, base.end + len(new))
    holders = [[(e, expert.ids[token]) for e, expert in enumerate(experts) if token in expert.ids] for token in new]
    return United(rows, new, holders, [_runs(base, model, new, rows) for model in (base, *experts)])


def _lean(base: Vocabulary, expert: Vocabulary) -> Vocabulary:
    """An expert's vocabulary without what the base's says too, of which many experts would fill the memory."""
    _require_same_training(base, expert)
    ids = expert.ids
    if base.ids.keys() <= ids.keys():
        ids = ChainMap({token: number for token, number in ids.items() if base.ids.get(token) != number}, base.ids)  # type: ignore[arg-type]  # is only read
    added = {token: entry for token, entry in expert.added.items() if token not in base.ids}
    return Vocabulary(expert.name, ids, expert.rows, added)


def _require_same_training(base: Vocabulary, expert: Vocabulary) -> None:
    if base.trained is None or expert.trained is None or expert is base:
        return
    told = f"only tokens that were added, without training the tokenizer anew, can be united with those of {base.name}"
    loose = {*base.added, *expert.added}  # some files list added tokens as trained ones too
    for token in (base.trained.keys() | expert.trained.keys()) - loose:
        if (ours := base.trained.get(token)) != (theirs := expert.trained.get(token)):
            raise LorsError(
                f"{expert.name}: another tokenizer: token {shown(token)}: expected id {shown(ours)}, got {shown(theirs)}; {told}"
            )
    if base.merges is not None and expert.merges is not None and list(base.merges) != list(expert.merges):
        raise LorsError(
            f"{expert.name}: another tokenizer: expected the {len(base.merges)} merges of {base.name}, got "
            f"{len(expert.merges)}{' others' if len(base.merges) == len(expert.merges) else ''}; {told}"
        )


def _runs(base: Vocabulary, model: Vocabulary, new: Mapping[str, int], rows: int) -> list[Run]:
    origin, place = np.full(rows, BASE), np.arange(rows)
    named = np.zeros(max(rows, model.rows), bool)
    named[list(model.ids.values())] = True
    unnamed = np.ones(rows, bool)
    for token, number in base.ids.items():
        unnamed[number] = False
        if (own := model.ids.get(token)) is not None:
            origin[number], place[number] = OWN, own
    alike = unnamed & ~named[:rows] & (place < min(base.rows, model.rows))
    origin[alike] = OWN
    fresh = slice(base.end, base.end + len(new))
    origin[fresh], place[fresh] = FRESH, np.arange(len(new))
    cut = (np.diff(origin) != 0) | (np.diff(place) != 1)
    starts = [0, *(np.flatnonzero(cut) + 1).tolist(), rows]
    return [
        Run(start, stop - start, int(origin[start]), int(place[start]))
        for start, stop in zip(starts, starts[1:], strict=False)
        if stop > start
    ]
