"""A manifest of one's own: .tsv or .jsonl, a row per utterance."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ...errors import LorsError, shown
from .audio import AudioFile
from .languages import whisper_code
from .left_out import LeftOut
from .tables import AUDIO_COLUMNS, SPEAKER_COLUMNS, TEXT_COLUMNS, json_rows, tsv_rows
from .utterance import Utterance


def read_manifest(path: Path, kinds: Iterable[str], left_out: LeftOut) -> Iterator[Utterance]:
    """kinds: of the corpora that could have been meant."""
    if path.is_dir():
        path = path / "manifest.tsv"
    if path.suffix not in (".tsv", ".jsonl"):
        raise LorsError(f"{path}: expected a .tsv or .jsonl manifest, a directory with manifest.tsv, or KIND:DIR "
                        f"with KIND one of {', '.join(kinds)}")  # fmt: skip
    rows = json_rows(path, left_out) if path.suffix == ".jsonl" else tsv_rows(path, ["language"], left_out)
    for number, row in rows:
        utterance = None
        with left_out.unless_unusable():
            utterance = _utterance(f"{path}:{number}", path.parent, row)
        if utterance is not None:
            yield utterance


def _utterance(where: str, directory: Path, row: dict[str, Any]) -> Utterance:
    audio = _text(where, row, *AUDIO_COLUMNS)
    return Utterance(
        id=_id(where, row) or audio,
        audio=_audio(where, directory, row, audio),
        text=_text(where, row, *TEXT_COLUMNS),
        translation=_text(where, row, "translation", required=False) or None,
        language=_language(where, row),
        split=_text(where, row, "split", required=False) or None,
        speaker=_text(where, row, *SPEAKER_COLUMNS, required=False) or None,
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
