"""Corpora as lists of utterances: a manifest of one's own, CoVoST 2, Common Voice, FLEURS.

Loaders read the formats these corpora have on disk and nothing of the audio itself; samples are read when features are
computed. Every loader takes Whisper's language codes and returns them.
"""

from __future__ import annotations

import csv
import functools
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from ...errors import LorsError, first_line, nearest, shown
from ...files import strict_json
from .audio import AudioBytes, AudioFile, AudioSource, duration
from .languages import common_voice_code, fleurs_code, parse_languages, whisper_code

__all__ = ["TASKS", "Corpus", "Utterance", "by_task", "load_corpus", "parse_tasks"]

TASKS = ("transcribe", "translate")
_AUDIO_COLUMNS = ("audio", "path", "audio_path", "file")
_LONGEST_LINE = 1 << 20  # characters
_TEXT_COLUMNS = ("text", "sentence", "transcription")


@dataclass(frozen=True, slots=True)
class Utterance:
    """One recording, what is said in it, and what that is in English (None where the corpus does not tell)."""

    id: str
    audio: AudioSource
    text: str
    translation: str | None
    language: str
    split: str | None = None

    def reference(self, task: str) -> str | None:
        """What a perfect model answers."""
        return self.text if task == "transcribe" else self.translation


Corpus = list[Utterance]


def by_task(corpus: Iterable[Utterance], task: str) -> Corpus:
    """The utterances that have a reference for the task."""
    return [utterance for utterance in corpus if utterance.reference(task) is not None]


def parse_tasks(text: str | Iterable[str]) -> tuple[str, ...]:
    """``transcribe,translate`` (or a sequence, or ``both``) -> tasks, in order, without repeats."""
    parts = text.split(",") if isinstance(text, str) else text
    tasks = TASKS if text == "both" else tuple(dict.fromkeys(part.strip() for part in parts))
    for task in tasks:
        if task not in TASKS:
            raise LorsError(f"task: expected transcribe, translate or both, got {task!r}")
    if not tasks:
        raise LorsError("task: expected transcribe, translate or both, got none")
    return tasks


def load_corpus(
    source: str | Path | Corpus,
    *,
    languages: str | Iterable[str],
    split: str | None = "train",
    limit: int | None = None,
    max_seconds: float | None = None,
) -> Corpus:
    """Utterances of `languages`, in the corpus's order; `limit` is per language, `max_seconds` drops longer recordings.

    `source` is a manifest (``.tsv``, ``.jsonl``; a directory with ``manifest.tsv``), or a kind and a place:
    ``covost2:DIR`` (``DIR`` holds Common Voice's ``<code>/clips`` and CoVoST's ``covost_v2.<code>_en.<split>.tsv``, or
    ``covost_v2.<code>_en.tsv`` with ``validated.tsv``), ``common_voice:DIR``, ``fleurs:DIR`` (Parquet) or ``fleurs:``
    for the hub; or utterances loaded before, which are chosen from in the same way. An utterance without a split
    belongs to all of them; `split` None takes every one of a manifest or a loaded corpus. LorsError when a file, a column or a language is missing, an id comes twice, or nothing is left.
    """
    name, of = "corpus" if isinstance(source, list) else str(source), f" in split {split!r}" if split else ""
    if limit is not None and limit < 1:
        raise LorsError(f"{name}: expected a limit of at least 1, got {limit}")
    corpus: Corpus = []
    for language, utterances in _by_language(source, parse_languages(languages), split):
        chosen = list(_cut(utterances, limit, max_seconds))
        if not chosen:
            within = "" if max_seconds is None else f" of at most {max_seconds:g} s"
            raise LorsError(f"{name}: expected utterances of {language!r}{of}{within}, got none")
        corpus += chosen
    return _unique(corpus, name)


def _by_language(
    source: str | Path | Corpus, wanted: tuple[str, ...], split: str | None
) -> Iterator[tuple[str, Iterable[Utterance]]]:
    """(language, its utterances of the split) for each of `wanted`."""
    if isinstance(source, list):
        name, everything = "corpus", source
    else:
        name = str(source)
        kind, _, place = name.partition(":")
        if kind in _LOADERS:
            if split is None:
                raise LorsError(f"{name}: expected a split of the corpus, got none")
            yield from ((language, _LOADERS[kind](place, language, split)) for language in wanted)
            return
        everything = list(_manifest(Path(source)))
    here = [utterance for utterance in everything if split is None or utterance.split in (None, split)]
    spoken, of = dict.fromkeys(u.language for u in here), f" in split {split!r}" if split else ""
    if not here:
        splits = ", ".join(dict.fromkeys(str(u.split) for u in everything)) or "nothing"
        raise LorsError(f"{name}: expected utterances{of}, got {splits}")
    for language in wanted:
        if language not in spoken:
            raise LorsError(f"{name}: no {language!r}{of}{nearest(language, spoken)}")
        yield language, (utterance for utterance in here if utterance.language == language)


def _cut(utterances: Iterable[Utterance], limit: int | None, max_seconds: float | None) -> Iterator[Utterance]:
    taken = 0
    for utterance in utterances:
        if taken == limit:
            return
        if max_seconds is None or duration(utterance.audio) <= max_seconds:
            taken += 1
            yield utterance


def _unique(corpus: Corpus, name: str) -> Corpus:
    seen: set[str] = set()
    for utterance in corpus:
        if utterance.id in seen:
            raise LorsError(f"{name}: expected ids that differ, got {utterance.id!r} twice")
        seen.add(utterance.id)
    return corpus


# ----------------------------------------------------------------------------------------------------- tables


@contextmanager
def _opened(path: Path, newline: str | None = None) -> Iterator[TextIO]:
    """A UTF-8 text file, with or without a byte order mark; LorsError when it cannot be read as one."""
    try:
        with path.open(encoding="utf-8-sig", newline=newline) as stream:
            yield stream
    except OSError as error:
        raise LorsError(f"cannot read {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise LorsError(f"{path}: expected UTF-8 text, got byte {error.object[error.start]:#x}") from error


def _lines(stream: TextIO, path: Path) -> Iterator[str]:
    """The lines of a text file; LorsError for one that is longer than any row of a corpus."""
    for number, line in enumerate(iter(lambda: stream.readline(_LONGEST_LINE), ""), 1):
        if len(line) == _LONGEST_LINE:
            raise LorsError(f"{path}:{number}: expected lines of less than {_LONGEST_LINE} characters")
        yield line


def _rows(path: Path, required: Iterable[str], escape: str | None = None) -> Iterator[tuple[int, dict[str, str]]]:
    """(line, row) of a TSV file with a header. Quotes are text: corpora hold unbalanced ones."""
    with _opened(path, newline="") as stream:
        reader = csv.DictReader(_lines(stream, path), delimiter="\t", quoting=csv.QUOTE_NONE, escapechar=escape)
        try:
            header = list(reader.fieldnames or [])
            found = ", ".join(map(repr, header)) or "nothing"
            for column in required:
                if column not in header:
                    raise LorsError(f"{path}: expected a column {column!r} between tabs, got {found}")
            if len(set(header)) != len(header):
                raise LorsError(f"{path}: expected columns of different names, got {found}")
            for row in reader:
                if None in row or None in row.values():
                    raise LorsError(f"{path}:{reader.line_num}: expected {len(header)} columns, got another number")
                yield reader.line_num, row
        except csv.Error as error:
            raise LorsError(f"{path}:{reader.line_num}: expected a row of a table: {error}") from error


def _json_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with _opened(path) as stream:
        for number, line in enumerate(_lines(stream, path), 1):
            if text := line.strip():
                row = strict_json.parse(
                    text, f"{path}:{number}", infinite=True
                )  # pandas writes NaN for what is missing
                if not isinstance(row, dict):
                    raise LorsError(f"{path}:{number}: expected one JSON object per line, got {shown(row)}")
                yield number, row


def _manifest(path: Path) -> Iterator[Utterance]:
    if path.is_dir():
        path = path / "manifest.tsv"
    if path.suffix not in (".tsv", ".jsonl"):
        raise LorsError(f"{path}: expected a .tsv or .jsonl manifest, a directory with manifest.tsv, or KIND:DIR "
                        f"with KIND one of {', '.join(_LOADERS)}")  # fmt: skip
    rows = _json_rows(path) if path.suffix == ".jsonl" else _rows(path, ["language"])
    for number, row in rows:
        where = f"{path}:{number}"
        audio = _text(where, row, *_AUDIO_COLUMNS)
        yield Utterance(
            id=_id(where, row) or audio,
            audio=_audio(where, path.parent, row, audio),
            text=_text(where, row, *_TEXT_COLUMNS),
            translation=_text(where, row, "translation", required=False) or None,
            language=_language(where, row),
            split=_text(where, row, "split", required=False) or None,
        )


def _id(where: str, row: dict[str, Any]) -> str:
    """A text, or a whole number as some corpora have; "" where there is none."""
    value = row.get("id")
    return str(value) if type(value) is int else _text(where, row, "id", required=False)


def _language(where: str, row: dict[str, Any]) -> str:
    language = whisper_code(_text(where, row, "language"))
    if not language:
        raise LorsError(f"{where}: expected a language, got {shown(row['language'])}")
    return language


def _audio(where: str, directory: Path, row: dict[str, Any], audio: str) -> AudioFile:
    """The recording of a row; with columns `start` and `seconds`, a part of it."""
    if not audio:
        raise LorsError(f"{where}: expected the path of a recording, got {audio!r}")
    file = directory / audio
    if not row.get("seconds"):
        return AudioFile(file)
    try:
        start, seconds = _number(row.get("start") or 0), _number(row["seconds"])
    except (TypeError, ValueError, OverflowError):
        start, seconds = 0.0, 0.0
    if not (0 <= start < math.inf and 0 < seconds < math.inf):
        got = f"{shown(row.get('start'))} and {shown(row['seconds'])}"
        raise LorsError(f"{where}: expected start and seconds, got {got}")
    return AudioFile(file, start, seconds)


def _number(value: Any) -> float:
    return math.nan if isinstance(value, bool) else float(value)


def _text(where: str, row: dict[str, Any], *names: str, required: bool = True) -> str:
    """The text in the first of the columns that is there. JSON's null is none, and NaN, a number, is an error."""
    name = next((name for name in names if name in row), None)
    if name is None:
        if not required:
            return ""
        raise LorsError(f"{where}: expected a column {' or '.join(map(repr, names))}, got {', '.join(row)}")
    value = row[name]
    if value is None:
        return ""
    if not isinstance(value, str) or "\0" in value:
        raise LorsError(f"{where}: expected text in {name!r}, got {shown(value)}")
    return value


# ------------------------------------------------------------------------------- Common Voice and CoVoST 2


def _common_voice_root(place: str, language: str) -> Path:
    code = common_voice_code(language)
    for root in (Path(place, code), Path(place)):
        if (root / "clips").is_dir():
            return root
    raise LorsError(f"{place}: expected {code}/clips or clips (Common Voice as unpacked), got neither")


def _common_voice(place: str, language: str, split: str) -> Iterator[Utterance]:
    root = _common_voice_root(place, language)
    for _, row in _rows(root / f"{split}.tsv", ["path", "sentence"]):
        yield _clip(root, row["path"], row["sentence"], None, language, split)


def _clip(root: Path, name: str, text: str, translation: str | None, language: str, split: str) -> Utterance:
    return Utterance(name, AudioFile(root / "clips" / name), text, translation, language, split)


def _covost2(place: str, language: str, split: str) -> Iterator[Utterance]:
    """X -> English, from the split's own table or made by the release's rule from its table and Common Voice's.

    The rule of version 2: the rows of ``validated.tsv`` that ``covost_v2.ca_en.tsv`` has as well, joined on ``path``, in
    the order of the former; split s is what the latter's column ``split`` says, and train is ``train_covost`` too. A
    backslash escapes in these tables: the release's script writes them so.
    """
    root = _common_voice_root(place, language)
    code = common_voice_code(language)
    ready = _first_file([d / f"covost_v2.{code}_en.{split}.tsv" for d in (root, Path(place))])
    if ready is not None:
        for _, row in _rows(ready, ["path", "sentence", "translation"], escape="\\"):
            yield _clip(root, row["path"], row["sentence"], row["translation"] or None, language, split)
        return
    table = _first_file([d / f"covost_v2.{code}_en.tsv" for d in (root, Path(place))])
    if table is None:
        raise LorsError(f"{place}: expected covost_v2.{code}_en.{split}.tsv or covost_v2.{code}_en.tsv, got neither")
    accepted = {split, "train_covost"} if split == "train" else {split}
    rows = _rows(table, ["path", "translation", "split"], escape="\\")
    translations = {row["path"]: row["translation"] for _, row in rows if row["split"] in accepted}
    for _, row in _rows(root / "validated.tsv", ["path", "sentence"], escape="\\"):
        if row["path"] in translations:
            yield _clip(root, row["path"], row["sentence"], translations[row["path"]] or None, language, split)


def _first_file(paths: Iterable[Path]) -> Path | None:
    return next((path for path in paths if path.is_file()), None)


# ---------------------------------------------------------------------------------------------------- FLEURS


@dataclass(frozen=True, slots=True)
class ParquetAudio:
    """Audio bytes in one row of a Parquet file; read when opened, one row group at a time."""

    path: Path
    group: int
    row: int
    name: str

    def open(self) -> Any:
        audio = _row_group(self.path, self.group)[self.row]
        if not audio or not audio.get("bytes"):
            raise LorsError(f"cannot read audio {self.name}: expected bytes in the column 'audio', got none")
        return AudioBytes(self.name, audio["bytes"]).open()

    @property
    def key(self) -> str:
        return f"{AudioFile(self.path).key}:{self.group}:{self.row}"

    @property
    def span(self) -> tuple[float, float | None]:
        return 0.0, None


@contextmanager
def _parquet(path: Path) -> Iterator[Any]:
    """A Parquet file; LorsError when it cannot be read as one."""
    try:
        import pyarrow.parquet as pq
    except ImportError as error:
        raise LorsError(f"FLEURS is Parquet and needs pyarrow: pip install 'lors-merging[speech]' ({error})") from error
    try:
        yield pq.ParquetFile(path)
    except (OSError, ValueError) as error:  # pyarrow's own errors are ValueErrors
        raise LorsError(f"cannot read {path}: {first_line(error)}") from error


@functools.lru_cache(maxsize=1)  # a group of FLEURS is tens of megabytes
def _row_group(path: Path, group: int) -> list[Any]:
    with _parquet(path) as table:
        return list(table.read_row_group(group, columns=["audio"])["audio"].to_pylist())


def _fleurs(place: str, language: str, split: str) -> Iterator[Utterance]:
    """X -> English by FLEURS's sentence ids: the English split with the same id is the translation."""
    english = {row["id"]: row["raw_transcription"] for *_, row in _fleurs_rows(place, "en", split)}
    for path, group, index, row in _fleurs_rows(place, language, split):
        name = f"{fleurs_code(language)}/{split}/{row['id']}/{path.name}:{group}:{index}"
        audio = ParquetAudio(path, group, index, name)
        yield Utterance(name, audio, row["raw_transcription"], english.get(row["id"]), language, split)


def _fleurs_rows(place: str, language: str, split: str) -> Iterator[tuple[Path, int, int, dict[str, Any]]]:
    stem = {"dev": "validation"}.get(split, split)
    files = _fleurs_files(place, fleurs_code(language), stem)
    if not files and language != "en":
        raise LorsError(f"{place}: expected {fleurs_code(language)}/{stem}-*.parquet, got none")
    for path in files:
        with _parquet(path) as table:
            names = table.schema_arrow.names
            missing = {"id", "raw_transcription", "audio"} - set(names)
            if missing:
                raise LorsError(f"{path}: expected a column {min(missing)!r}, got {', '.join(names)}")
            for group in range(table.num_row_groups):
                rows = table.read_row_group(group, columns=["id", "raw_transcription"]).to_pylist()
                for index, row in enumerate(rows):
                    if not isinstance(row["raw_transcription"], str) or row["id"] is None:
                        raise LorsError(f"{path}:{group}:{index}: expected an id and a text, got {row}")
                    yield path, group, index, row


def _fleurs_files(place: str, code: str, stem: str) -> list[Path]:
    root = Path(place) if place else _fleurs_hub(code, stem)
    return next((found for pattern in _fleurs_patterns(code, stem) if (found := sorted(root.glob(pattern)))), [])


def _fleurs_patterns(code: str, stem: str) -> list[str]:
    return [f"{code}/{stem}-*.parquet", f"{code}/{stem}/*.parquet"]


@functools.cache
def _fleurs_hub(code: str, stem: str) -> Path:
    from huggingface_hub import snapshot_download

    # The hub keeps a Parquet conversion of script data sets beside them, in this revision.
    revision, patterns = "refs/convert/parquet", _fleurs_patterns(code, stem)
    try:
        return Path(snapshot_download("google/fleurs", repo_type="dataset", revision=revision, allow_patterns=patterns))
    except Exception as error:  # network and HTTP errors come from several libraries
        raise LorsError(f"fleurs: cannot fetch google/fleurs from the hub: {first_line(error)}") from error


_LOADERS: dict[str, Callable[[str, str, str], Iterable[Utterance]]] = {
    "covost2": _covost2,
    "common_voice": _common_voice,
    "fleurs": _fleurs,
}
