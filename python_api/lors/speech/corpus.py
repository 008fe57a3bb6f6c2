"""Corpora as lists of utterances: a manifest of one's own, CoVoST 2, Common Voice, FLEURS.

Loaders read the formats these corpora have on disk and nothing of the audio itself; samples are read when features are
computed. Every loader takes Whisper's language codes and returns them.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import LorsError
from ..messages import nearest
from .audio import AudioBytes, AudioFile, AudioSource, duration
from .languages import common_voice_code, fleurs_code, parse_languages, whisper_code

__all__ = ["TASKS", "Corpus", "Utterance", "by_task", "load_corpus"]

TASKS = ("transcribe", "translate")
_AUDIO_COLUMNS = ("audio", "path", "audio_path", "file")
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
    """The utterances that have a reference for the task; LorsError for an unknown task."""
    if task not in TASKS:
        raise LorsError(f"task: expected transcribe or translate, got {task!r}")
    return [utterance for utterance in corpus if utterance.reference(task) is not None]


def load_corpus(
    source: str | Path,
    *,
    languages: str | Iterable[str],
    split: str = "train",
    limit: int | None = None,
    max_seconds: float | None = None,
) -> Corpus:
    """Utterances of `languages`, in the corpus's order; `limit` is per language, `max_seconds` drops longer recordings.

    `source` is a manifest (``.tsv``, ``.jsonl``; a directory with ``manifest.tsv``), or a kind and a place:
    ``covost2:DIR`` (``DIR`` holds Common Voice's ``<code>/clips`` and CoVoST's ``covost_v2.<code>_en.<split>.tsv``, or
    ``covost_v2.<code>_en.tsv`` with ``validated.tsv``), ``common_voice:DIR``, ``fleurs:DIR`` (Parquet) or ``fleurs:``
    for the hub. LorsError when a file, a column or a language is missing, an id comes twice, or nothing is left.
    """
    kind, _, place = str(source).partition(":")
    wanted = parse_languages(languages)
    if kind in _LOADERS:
        if limit is not None and limit < 1:
            raise LorsError(f"{source}: expected a limit of at least 1, got {limit}")
        corpus = [u for language in wanted for u in _cut(_LOADERS[kind](place, language, split), limit, max_seconds)]
    else:
        everything = list(_manifest(Path(source), split))
        corpus = [
            u
            for language in wanted
            for u in _cut((u for u in everything if u.language == language), limit, max_seconds)
        ]
        spoken = dict.fromkeys(u.language for u in everything)
        for language in wanted:
            if language not in spoken:
                raise LorsError(f"{source}: no {language!r} in split {split!r}{nearest(language, spoken)}")
    if not corpus:
        raise LorsError(f"{source}: expected utterances of {', '.join(wanted)} in split {split!r}, got none")
    return _unique(corpus, str(source))


def _cut(utterances: Iterable[Utterance], limit: int | None, max_seconds: float | None) -> Iterator[Utterance]:
    taken = 0
    for utterance in utterances:
        if taken == limit:
            return
        if max_seconds is None or duration(utterance.audio) <= max_seconds:
            taken += 1
            yield utterance


def _unique(corpus: Corpus, source: str) -> Corpus:
    seen: set[str] = set()
    for utterance in corpus:
        if utterance.id in seen:
            raise LorsError(f"{source}: expected ids that differ, got {utterance.id!r} twice")
        seen.add(utterance.id)
    return corpus


# ----------------------------------------------------------------------------------------------------- tables


def _rows(path: Path, required: Iterable[str]) -> Iterator[dict[str, str]]:
    """Rows of a TSV file with a header. Quotes are text: corpora hold unbalanced ones."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.DictReader(stream, delimiter="\t", quoting=csv.QUOTE_NONE)
            header = reader.fieldnames or []
            for column in required:
                if column not in header:
                    raise LorsError(f"{path}: expected a column {column!r}, got {', '.join(header) or 'nothing'}")
            for number, row in enumerate(reader, 2):
                if None in row or None in row.values():
                    raise LorsError(f"{path}:{number}: expected {len(header)} columns, got another number")
                yield row
    except OSError as error:
        raise LorsError(f"cannot read {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise LorsError(f"{path}: expected UTF-8 text, got byte {error.object[error.start]:#x}") from error


def _json_rows(path: Path) -> Iterator[dict[str, Any]]:
    try:
        with path.open(encoding="utf-8-sig") as stream:
            for number, line in enumerate(stream, 1):
                if line.strip():
                    row = json.loads(line)
                    if not isinstance(row, dict):
                        raise LorsError(f"{path}:{number}: expected an object, got {type(row).__name__}")
                    yield row
    except OSError as error:
        raise LorsError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:  # not JSON, not UTF-8
        raise LorsError(f"{path}: expected one JSON object per line: {error}") from error


def _manifest(path: Path, split: str) -> Iterator[Utterance]:
    if path.is_dir():
        path = path / "manifest.tsv"
    if path.suffix not in (".tsv", ".jsonl"):
        raise LorsError(f"{path}: expected a .tsv or .jsonl manifest, a directory with manifest.tsv, or KIND:DIR "
                        f"with KIND one of {', '.join(_LOADERS)}")  # fmt: skip
    rows = _json_rows(path) if path.suffix == ".jsonl" else _rows(path, ["language"])
    for number, row in enumerate(rows, 1):
        audio = _column(path, row, _AUDIO_COLUMNS, number)
        text = _column(path, row, _TEXT_COLUMNS, number)
        if (row.get("split") or split) != split:
            continue
        language = row.get("language")
        if not language:
            raise LorsError(f"{path}: row {number}: expected a language, got {language!r}")
        yield Utterance(
            id=str(row.get("id") or audio),
            audio=_audio(path, row, audio, number),
            text=text,
            translation=row.get("translation") or None,
            language=whisper_code(str(language)),
            split=row.get("split") or None,
        )


def _audio(manifest: Path, row: dict[str, Any], audio: str, number: int) -> AudioFile:
    """The recording of a row; with columns `start` and `seconds`, a part of it."""
    if not audio:
        raise LorsError(f"{manifest}: row {number}: expected the path of a recording, got {audio!r}")
    file = manifest.parent / audio
    if not row.get("seconds"):
        return AudioFile(file)
    try:
        start, seconds = float(row.get("start") or 0), float(row["seconds"])
    except (TypeError, ValueError):
        start, seconds = 0.0, 0.0
    if not (0 <= start < math.inf and 0 < seconds < math.inf):
        where = f"{manifest}: row {number}"
        raise LorsError(f"{where}: expected start and seconds, got {row.get('start')!r} and {row['seconds']!r}")
    return AudioFile(file, start, seconds)


def _column(path: Path, row: dict[str, Any], names: tuple[str, ...], number: int) -> str:
    for name in names:
        if name in row:
            return "" if row[name] is None else str(row[name])  # JSON's null is no text
    raise LorsError(f"{path}: row {number}: expected a column {' or '.join(map(repr, names))}, got {', '.join(row)}")


# ------------------------------------------------------------------------------- Common Voice and CoVoST 2


def _common_voice_root(place: str, language: str) -> Path:
    code = common_voice_code(language)
    for root in (Path(place, code), Path(place)):
        if (root / "clips").is_dir():
            return root
    raise LorsError(f"{place}: expected {code}/clips or clips (Common Voice as unpacked), got neither")


def _common_voice(place: str, language: str, split: str) -> Iterator[Utterance]:
    root = _common_voice_root(place, language)
    for row in _rows(root / f"{split}.tsv", ["path", "sentence"]):
        yield _clip(root, row["path"], row["sentence"], None, language, split)


def _clip(root: Path, name: str, text: str, translation: str | None, language: str, split: str) -> Utterance:
    return Utterance(name, AudioFile(root / "clips" / name), text, translation, language, split)


def _covost2(place: str, language: str, split: str) -> Iterator[Utterance]:
    """X -> English. With the release's own table (``covost_v2.ca_en.tsv``) splits follow its ``split`` column.

    The official rule: a row belongs to split s when its column says s or ``s_covost`` (CoVoST's own additions), and
    sentences come from Common Voice's ``validated.tsv`` by an inner join on ``path``.
    """
    root = _common_voice_root(place, language)
    code = common_voice_code(language)
    ready = _first_file([d / f"covost_v2.{code}_en.{split}.tsv" for d in (root, Path(place))])
    if ready is not None:
        for row in _rows(ready, ["path", "sentence", "translation"]):
            yield _clip(root, row["path"], row["sentence"], row["translation"] or None, language, split)
        return
    table = _first_file([d / f"covost_v2.{code}_en.tsv" for d in (root, Path(place))])
    if table is None:
        raise LorsError(f"{place}: expected covost_v2.{code}_en.{split}.tsv or covost_v2.{code}_en.tsv, got neither")
    sentences = {row["path"]: row["sentence"] for row in _rows(root / "validated.tsv", ["path", "sentence"])}
    accepted = {split, f"{split}_covost"}
    for row in _rows(table, ["path", "translation", "split"]):
        if row["split"] in accepted and row["path"] in sentences:
            yield _clip(root, row["path"], sentences[row["path"]], row["translation"] or None, language, split)


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
        return AudioBytes(self.name, _row_group(self.path, self.group)[self.row]["bytes"]).open()

    @property
    def key(self) -> str:
        return f"{AudioFile(self.path).key}:{self.group}:{self.row}"

    @property
    def span(self) -> tuple[float, float | None]:
        return 0.0, None


_GROUPS: dict[tuple[Path, int], list[Any]] = {}


def _row_group(path: Path, group: int) -> list[Any]:
    import pyarrow.parquet as pq

    if (path, group) not in _GROUPS:
        _GROUPS.clear()  # one at a time: a group of FLEURS is a few hundred megabytes
        _GROUPS[path, group] = pq.ParquetFile(path).read_row_group(group, columns=["audio"])["audio"].to_pylist()
    return _GROUPS[path, group]


def _fleurs(place: str, language: str, split: str) -> Iterator[Utterance]:
    """X -> English by FLEURS's sentence ids: the English split with the same id is the translation."""
    english = {int(row["id"]): str(row["raw_transcription"]) for *_, row in _fleurs_rows(place, "en", split)}
    for path, group, index, row in _fleurs_rows(place, language, split):
        name = f"{fleurs_code(language)}/{split}/{row['id']}/{path.name}:{group}:{index}"
        audio = ParquetAudio(path, group, index, name)
        translation = english.get(int(row["id"]))
        yield Utterance(name, audio, str(row["raw_transcription"]), translation, language, split)


def _fleurs_rows(place: str, language: str, split: str) -> Iterator[tuple[Path, int, int, dict[str, Any]]]:
    try:
        import pyarrow.parquet as pq
    except ImportError as error:
        raise LorsError(f"FLEURS is Parquet and needs pyarrow: pip install 'lors-merging[speech]' ({error})") from error

    stem = {"dev": "validation"}.get(split, split)
    files = _fleurs_files(place, fleurs_code(language), stem)
    if not files and language != "en":
        raise LorsError(f"{place}: expected {fleurs_code(language)}/{stem}-*.parquet, got none")
    for path in files:
        table = pq.ParquetFile(path)
        missing = {"id", "raw_transcription", "audio"} - set(table.schema_arrow.names)
        if missing:
            raise LorsError(f"{path}: expected a column {min(missing)!r}, got {', '.join(table.schema_arrow.names)}")
        for group in range(table.num_row_groups):
            rows = table.read_row_group(group, columns=["id", "raw_transcription"]).to_pylist()
            yield from ((path, group, index, row) for index, row in enumerate(rows))


def _fleurs_files(place: str, code: str, stem: str) -> list[Path]:
    root = Path(place) if place else _fleurs_hub(code, stem)
    patterns = (f"{code}/{stem}-*.parquet", f"{code}/{stem}/*.parquet", f"{stem}-*.parquet" if not place else "")
    return next((found for p in patterns if p and (found := sorted(root.glob(p)))), [])


def _fleurs_hub(code: str, stem: str) -> Path:
    from huggingface_hub import snapshot_download

    patterns = [f"{code}/{stem}-*.parquet", f"{code}/{stem}/*.parquet"]
    try:
        # The hub keeps a Parquet conversion of script data sets beside them, in this revision.
        return Path(
            snapshot_download(
                "google/fleurs", repo_type="dataset", revision="refs/convert/parquet", allow_patterns=patterns
            )
        )
    except (OSError, ValueError) as error:
        raise LorsError(f"fleurs: cannot fetch google/fleurs from the hub: {error}") from error


_LOADERS: dict[str, Callable[[str, str, str], Iterable[Utterance]]] = {
    "covost2": _covost2,
    "common_voice": _common_voice,
    "fleurs": _fleurs,
}
