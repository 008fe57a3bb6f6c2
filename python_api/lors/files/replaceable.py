"""What may be replaced or removed: what lors, or transformers, writes itself. Every writer asks here first.

A directory goes as a whole, so each entry in it must bear a name that is written into directories of its kind. A single
file goes when it begins as lors begins such a file.
"""

from __future__ import annotations

import lzma
import os
import re
import stat
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ..errors import LorsError

__all__ = [
    "ANSWERS",
    "ANSWERS_XZ",
    "CHECKPOINTS",
    "COMPARISONS",
    "CORPUS",
    "CSV",
    "EXPERT_FILE",
    "EXPORT",
    "LEARNED",
    "LEFT_OUT",
    "MODEL",
    "PAGE",
    "RESULTS",
    "RUN",
    "SCORES",
    "TEX",
    "FileKind",
    "Kind",
    "foreign",
    "objection",
    "objection_to",
    "require_file",
]


@dataclass(frozen=True)
class Kind:
    """The entries of a directory, as regular expressions of their relative paths; a directory's path ends in "/"."""

    called: str
    entries: str
    telling: str | None = None  # at least one such entry must be there


_WEIGHTS = r"(model|pytorch_model|adapter_model)(-\d{5}-of-\d{5})?\.(safetensors|bin)(\.index\.json)?|model\.(pt|nemo)"
_CONFIG = r"config\.json|adapter_config\.json|lors_recipe\.yml"
_TOLD = (
    r"(generation|preprocessor|processor|feature_extractor|tokenizer)_config\.json|(tokenizer|vocab|normalizer)\.json|"
    r"merges\.txt|added_tokens\.json|special_tokens_map\.json|chat_template\.(jinja|json)|config\.json"
)
_BESIDE = rf"{_TOLD}|training_args\.bin|README\.md|lors_ledger\.json|training\.json"

MODEL = Kind(
    "a checkpoint",
    rf"{_WEIGHTS}|{_CONFIG}|{_BESIDE}|adapter/((adapter_model\.(safetensors|bin)|adapter_config\.json|README\.md)?)",
    rf"{_WEIGHTS}|{_CONFIG}",
)
# `lors export`: one of four programs' files
_GRAPHS = r"(encoder|decoder|decoder_with_past)_model\.onnx(\.data)?"
_EXPORTED = rf"model\.(bin|pt)|ggml-model\.bin|{_GRAPHS}"
EXPORT = Kind(
    "an export of `lors export`",
    rf"{_EXPORTED}|vocabulary\.(json|txt)|{_TOLD}",
    _EXPORTED,
)
# `lors synth`: manifest.tsv and <language>/<language>-<split>-<number>.<format>
CORPUS = Kind(
    "a corpus of `lors synth`",
    r"(?a)manifest\.tsv|(?P<code>\w+)/((?P=code)-(train|dev|test)-\d{5,}\.(flac|wav))?",
)
# `lors finetune`: OUT.checkpoints, whose directories are transformers' own
CHECKPOINTS = Kind(
    "checkpoints of `lors finetune`",
    r"(?s)run\.json|\.run\.json\.\d+-[0-9a-f]{8}\.tmp|run\.\d+\.tmp|features/.*|\d+-[\w-]+/.*",
)


def objection(directory: Path, kind: Kind = MODEL) -> str | None:
    """Why a directory must not be replaced; None when it may, as an empty one always may."""
    return objection_to(list(_entries(directory, kind)), kind)


def objection_to(entries: Collection[str], kind: Kind = MODEL) -> str | None:
    """`objection` to a listing of relative paths."""
    only = f"--force replaces only {kind.called} or an empty directory"
    if odd := _odd(entries, kind):
        return f"{only}, and {odd!r} is no part of one"
    if entries and kind.telling is not None and not any(re.fullmatch(kind.telling, name) for name in entries):
        return f"{only}, and this is neither: there is no model in it"
    return None


def foreign(directory: Path, kind: Kind = MODEL) -> str | None:
    """The first entry that is no part of a directory of this kind."""
    return _odd(_entries(directory, kind), kind)


def _odd(entries: Iterable[str], kind: Kind) -> str | None:
    return next((name for name in entries if not re.fullmatch(kind.entries, name)), None)


def _entries(directory: Path, kind: Kind) -> Iterator[str]:
    waiting = [""]
    while waiting:
        at = waiting.pop()
        with os.scandir(directory / at) as found:
            for entry in sorted(found, key=lambda entry: entry.name):
                inner = entry.is_dir(follow_symlinks=False)
                name = f"{at}{entry.name}/" if inner else f"{at}{entry.name}"
                yield name
                if inner and re.fullmatch(kind.entries, name):
                    waiting.append(name)


@dataclass(frozen=True)
class FileKind:
    """How lors begins a file of a kind: `begins` at byte `offset`, of what it holds where it is compressed (xz)."""

    called: str
    begins: bytes
    offset: int = 0
    xz: bool = False

    def head(self, path: Path) -> bytes:
        """As much of the file as tells; b"?" of one that is not compressed as it should be."""
        with lzma.open(path) if self.xz else path.open("rb") as stream:
            try:
                return stream.read(self.offset + len(self.begins))
            except (lzma.LZMAError, EOFError):
                return b"?"


HEAD = '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><meta name="generator" content="lors">'

EXPERT_FILE = FileKind("an expert file", b'{"__metadata__":{"lors.expert":', 8)
STATISTICS = FileKind("a file of statistics", b'{"__metadata__":{"lors.statistics":', 8)
LEARNED = FileKind("a recipe of `lors learn`", b"# lors learn")
PAGE = FileKind("a page of lors", HEAD.encode())
RESULTS = FileKind("a file of results of lors", b'{\n "lors": ')
SCORES = FileKind("a file of scores of lors", b'[\n {\n  "model": ')
LEFT_OUT = FileKind("a list of what lors left out", b'{\n "share": ')
ANSWERS = FileKind("a file of answers of lors", b'{"id": ')
ANSWERS_XZ = FileKind("a file of answers of `lors experiment`", b'{"lors": "answers"', xz=True)
COMPARISONS = FileKind("a table of `lors experiment`", b"merge,against,task,")
CSV = FileKind("a table of `lors experiment`", b"model,task,language,")
TEX = FileKind("a table of `lors experiment`", b"% lors experiment")
RUN = FileKind("a file of settings of `lors finetune`", b'{\n "model": ')


def require_file(path: Path, kind: FileKind, force: bool) -> None:
    """LorsError unless `path` may be written: it is not there, or with `force` is of this kind, or empty."""
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise LorsError(f"{path}: expected a file to write, it is a directory")
        if not stat.S_ISREG(status.st_mode):  # to open a pipe would wait
            raise LorsError(f"{path}: expected a file to write, it is a device, a pipe or a socket")
        if not force:
            raise LorsError(f"{path}: exists already; --force replaces it")
        head = kind.head(path)
    except FileNotFoundError:
        return
    except OSError as error:
        raise LorsError(f"cannot write {path}: what is there cannot be read: {error.strerror or error}") from error
    if head and head[kind.offset :] != kind.begins:
        raise LorsError(f"{path}: only {kind.called} may be replaced, and this is none")
