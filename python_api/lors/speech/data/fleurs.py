"""FLEURS: Parquet files, from a directory or the hub."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import LorsError, first_line, shown
from .audio import AudioBytes, AudioFile
from .languages import fleurs_code
from .left_out import LeftOut
from .utterance import Utterance


@dataclass(frozen=True, slots=True)
class ParquetAudio:
    """Audio bytes in one row of a Parquet file; read when opened, one row group at a time."""

    path: Path
    group: int
    row: int
    name: str

    def open(self) -> Any:
        audio = _row_group(self.path, self.group, AudioFile(self.path).key)[self.row]
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


@functools.lru_cache(maxsize=8)  # a group of FLEURS is tens of megabytes; a few batches lie in so many
def _row_group(path: Path, group: int, version: str) -> list[Any]:
    with _parquet(path) as table:
        return list(table.read_row_group(group, columns=["audio"])["audio"].to_pylist())


def fleurs(place: str, language: str, split: str, left_out: LeftOut) -> Iterator[Utterance]:
    """X -> English by FLEURS's sentence ids: the English split with the same id is the translation."""
    english = {row["id"]: row["raw_transcription"] for *_, row in _fleurs_rows(place, "en", split, left_out)}
    for path, group, index, row in _fleurs_rows(place, language, split, left_out):
        name = f"{fleurs_code(language)}/{split}/{row['id']}/{path.name}:{group}:{index}"
        audio = ParquetAudio(path, group, index, name)
        yield Utterance(name, audio, row["raw_transcription"], english.get(row["id"]), language, split)


def _fleurs_rows(
    place: str, language: str, split: str, left_out: LeftOut
) -> Iterator[tuple[Path, int, int, dict[str, Any]]]:
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
                    if isinstance(row["raw_transcription"], str) and row["id"] is not None:
                        yield path, group, index, row
                    else:
                        got = f"{shown(row['id'])} and {shown(row['raw_transcription'])}"
                        left_out.note([f"{path}:{group}:{index}: expected an id and a text, got {got}"])


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
