"""FLEURS: the Parquet files of the hub, or tables and archives of recordings, of a directory or fetched."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...errors import LorsError, first_line, shown
from .audio import AudioFile, AudioSource
from .languages import fleurs_code
from .left_out import LeftOut
from .opened import archived, opened, rows
from .tables import tsv_rows
from .utterance import Utterance

__all__ = ["fleurs"]

_TSV = ("id", "file_name", "raw_transcription", "transcription", "characters", "num_samples", "gender")
_PARQUET = {"audio": "audio", "id": "id", "text": "raw_transcription"}

_Sentence = tuple[Any, str, str, AudioSource | None]  # id, name of the file, text, recording


def fleurs(place: str, language: str, split: str, left_out: LeftOut) -> Iterator[Utterance]:
    """X -> English by FLEURS's sentence ids: the English split with the same id is the translation."""
    english = {number: text for number, _, text, _ in _sentences(place, "en", split, left_out, sound=False)}
    code = fleurs_code(language)
    for number, file, text, audio in _sentences(place, language, split, left_out):
        assert audio is not None
        yield Utterance(f"{code}/{split}/{number}/{file}", audio, text, english.get(number), language, split)


def _sentences(place: str, language: str, split: str, left_out: LeftOut, *, sound: bool = True) -> Iterator[_Sentence]:
    code, stems = fleurs_code(language), ("validation", "dev") if split == "dev" else (split,)
    root = Path(place) if place else _of_hub(code, stems)
    for home in (root / code, root / "data" / code, root / "parquet-data" / code):
        files = [
            path for stem in stems for shape in (f"{stem}-*", f"{stem}/*") for path in home.glob(f"{shape}.parquet")
        ]
        if files:
            yield from _of_parquet(sorted(files), left_out, sound)
            return
        if (home / f"{split}.tsv").is_file():
            yield from _of_tsv(home, split, left_out, sound)
            return
    if language != "en":
        raise LorsError(
            f"{place or 'google/fleurs'}: expected {code}/{stems[0]}-*.parquet or {code}/{split}.tsv, got neither"
        )


def _of_parquet(files: list[Path], left_out: LeftOut, sound: bool) -> Iterator[_Sentence]:
    where = str(files[0].parent)
    names = [name for held, name in _PARQUET.items() if sound or held != "audio"]
    table = opened(where, "parquet", data_files=[str(file) for file in files], columns=names, split="train")
    for row in rows(where, table, _PARQUET) if sound else ((None, None, _renamed(row)) for row in table):
        audio, file, cells = row
        if isinstance(cells["text"], str) and cells["id"] is not None:
            yield cells["id"], file or str(audio and audio.row), cells["text"], audio
        else:
            name = where if audio is None else audio.name
            left_out.note([f"{name}: expected an id and a text, got {shown(cells['id'])} and {shown(cells['text'])}"])


def _renamed(row: dict[str, Any]) -> dict[str, Any]:
    return {held: row.get(name) for held, name in _PARQUET.items()}


def _of_tsv(home: Path, split: str, left_out: LeftOut, sound: bool) -> Iterator[_Sentence]:
    archives = [path for path in (home / "audio" / f"{split}.tar.gz", home / f"{split}.tar.gz") if path.is_file()]
    unpacked = next((path for path in (home / "audio" / split, home / split) if path.is_dir()), home / "audio" / split)
    inside = archived(str(home), archives[:1]) if sound and archives and not unpacked.is_dir() else {}
    for _, row in tsv_rows(home / f"{split}.tsv", _TSV, left_out, header=_TSV):
        file = row["file_name"]
        yield row["id"], file, row["raw_transcription"], inside.get(file) or AudioFile(unpacked / file)


@functools.cache
def _of_hub(code: str, stems: tuple[str, ...]) -> Path:
    from huggingface_hub import snapshot_download

    wanted = [f"parquet-data/{code}/{stem}-*.parquet" for stem in stems]
    try:
        return Path(snapshot_download("google/fleurs", repo_type="dataset", allow_patterns=wanted))
    except Exception as error:  # network and HTTP errors come from several libraries
        raise LorsError(f"fleurs: cannot fetch google/fleurs from the hub: {first_line(error)}") from error
