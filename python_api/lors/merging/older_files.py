"""The files that transformers wrote beside a Whisper before its version 5, made from those that it writes now.

    tokenizer.json         ->  vocab.json, merges.txt, added_tokens.json, special_tokens_map.json
    processor_config.json  ->  preprocessor_config.json

Converters, faster-whisper and transformers 4 read them. normalizer.json, which is in none of the new files, is copied where an input
has it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import LorsError
from ..files import strict_json

__all__ = ["Tokenizer", "older_files", "read_tokenizer"]

_TOKENIZER = ("added_tokens.json", "merges.txt", "special_tokens_map.json", "vocab.json")
_EXTRACTOR = "preprocessor_config.json"
_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True)
class Tokenizer:
    """A byte-level BPE: token -> id, the merges in their order, and the tokens that were added to it."""

    where: str
    vocab: dict[str, int]
    merges: list[tuple[str, str]]
    added: dict[str, int]


def older_files(files: Iterable[Path], notices: list[str], texts: Mapping[str, str] | None = None) -> dict[str, str]:
    """Name -> text of the older files that are not among `files`, the files beside one model, and can be made of them.

    texts: what files of these names hold, or will, where that is not what can be read at their paths. What cannot be made, because the tokenizer is no byte-level BPE or a file cannot be read, is said in `notices`.
    """
    paths, texts = {path.name: path for path in files}, texts or {}
    made: dict[str, str] = {}
    for new, names, make in (
        ("processor_config.json", (_EXTRACTOR,), _extractor_files),
        ("tokenizer.json", _TOKENIZER, _tokenizer_files),
    ):
        wanted = [name for name in names if name not in paths and name not in texts]
        if new in paths and wanted:
            try:
                found = make(paths, texts)
            except LorsError as error:
                notices.append(f"{error}: {', '.join(wanted)} are not written")
                continue
            made |= {name: found[name] for name in wanted if name in found}
    return made


def read_tokenizer(files: Iterable[Path]) -> Tokenizer | None:
    """The tokenizer among the files beside a model; None where there is none. LorsError for one that is no byte-level BPE."""
    paths = {path.name: path for path in files}
    if "tokenizer.json" in paths:
        return _tokenizer(paths["tokenizer.json"], strict_json.read(paths["tokenizer.json"]))
    if "vocab.json" not in paths:
        return None
    path = paths["vocab.json"]
    added = strict_json.read(paths["added_tokens.json"]) if "added_tokens.json" in paths else {}
    ids = _ids(added, str(path.with_name("added_tokens.json")))
    return Tokenizer(str(path), _ids(strict_json.read(path), str(path)), [], ids)


# --- the two kinds ---------------------------------------------------------------------------------------------------


def _content(paths: Mapping[str, Path], texts: Mapping[str, str], name: str) -> dict[str, Any]:
    return strict_json.parse(texts[name], name) if name in texts else strict_json.read(paths[name])


def _extractor_files(paths: Mapping[str, Path], texts: Mapping[str, str]) -> dict[str, str]:
    """Of a processor whose feature extractor is a part of it, as it is since transformers 5."""
    processor = _content(paths, texts, "processor_config.json")
    extractor = processor.get("feature_extractor")
    if not isinstance(extractor, dict):
        return {}
    named = {key: value for key, value in processor.items() if key == "processor_class"}
    return {_EXTRACTOR: strict_json.text_of(extractor | named)}


def _tokenizer_files(paths: Mapping[str, Path], texts: Mapping[str, str]) -> dict[str, str]:
    tokenizer = _tokenizer(paths["tokenizer.json"], _content(paths, texts, "tokenizer.json"))
    config = _content(paths, texts, "tokenizer_config.json") if "tokenizer_config.json" in paths else {}
    return {
        "vocab.json": json.dumps(tokenizer.vocab, ensure_ascii=False) + "\n",
        "merges.txt": "\n".join(["#version: 0.2", *map(" ".join, tokenizer.merges), ""]),
        "added_tokens.json": strict_json.text_of(tokenizer.added),
        "special_tokens_map.json": strict_json.text_of(_special_tokens(config)),
    }


def _special_tokens(config: Mapping[str, Any]) -> dict[str, Any]:
    found = {name: config[name] for name in _NAMED if config.get(name) is not None}
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens")
    return found | ({"additional_special_tokens": extra} if isinstance(extra, list) else {})


# --- tokenizer.json --------------------------------------------------------------------------------------------------


def _tokenizer(path: Path, content: Mapping[str, Any]) -> Tokenizer:
    model, decoder = content.get("model"), content.get("decoder")
    kinds = [part.get("type") if isinstance(part, dict) else None for part in (model, decoder)]
    if not isinstance(model, dict) or kinds != ["BPE", "ByteLevel"]:
        raise LorsError(f"{path}: expected a byte-level BPE")
    vocab = _ids(model.get("vocab"), f"{path}: model.vocab")
    merges = _merges(model.get("merges"), f"{path}: model.merges")
    added = content.get("added_tokens", [])
    if not isinstance(added, list) or not all(isinstance(token, dict) for token in added):
        raise LorsError(f"{path}: added_tokens: expected a list of objects")
    ids = _ids({token.get("content"): token.get("id") for token in added}, f"{path}: added_tokens")
    return Tokenizer(str(path), vocab, merges, {token: number for token, number in ids.items() if token not in vocab})


def _ids(tokens: object, where: str) -> dict[str, int]:
    """Token -> id, by id."""
    if not isinstance(tokens, dict) or not all(
        isinstance(token, str) and type(number) is int and number >= 0 for token, number in tokens.items()
    ):
        raise LorsError(f"{where}: expected tokens and their ids")
    if len(set(tokens.values())) < len(tokens):
        raise LorsError(f"{where}: expected an id of its own for every token")
    return dict(sorted(tokens.items(), key=lambda entry: entry[1]))


def _merges(found: object, where: str) -> list[tuple[str, str]]:
    """Pairs of tokens; older files have one text of both."""
    pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in found] if isinstance(found, list) else None
    whole = pairs is not None and all(isinstance(pair, list) and len(pair) == 2 for pair in pairs)
    if pairs is None or not whole or not all(isinstance(token, str) and token for pair in pairs for token in pair):
        raise LorsError(f"{where}: expected a list of pairs of tokens")
    return [(first, second) for first, second in pairs]
