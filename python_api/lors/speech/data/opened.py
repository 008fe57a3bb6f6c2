"""Corpora that the library `datasets` opens: of the hub, saved to disk, Parquet, folders of recordings, WebDataset, streams.

The library finds, fetches and keeps the rows, in files that are mapped into memory. It decodes no sound: for that it wants
torchcodec and FFmpeg, and soundfile is here.
"""

from __future__ import annotations

import hashlib
import io
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...errors import LorsError, first_line, nearest, shown
from .audio import AudioFile, require
from .languages import common_voice_code, language_name, spoken_code
from .left_out import LeftOut
from .tables import AUDIO_COLUMNS, SPEAKER_COLUMNS, TEXT_COLUMNS
from .utterance import Utterance

__all__ = ["RowAudio", "archived", "by_datasets", "opened", "rows"]

_SPLITS = {"dev": ("dev", "validation", "valid", "val")}
_COLUMNS = {  # what they hold -> names that are looked for
    "audio": AUDIO_COLUMNS,
    "text": TEXT_COLUMNS,
    "translation": ("translation",),
    "language": ("language", "locale", "lang"),
    "speaker": SPEAKER_COLUMNS,
    "id": ("id", "__key__", "segment_id"),
}
_OPTIONS = ("config", "revision", "streaming", "language", "train", "dev", "test",
            *(f"{held}_column_name" for held in _COLUMNS))  # fmt: skip
_FILES = {".parquet": "parquet", ".tar": "webdataset"}
_BATCH = 1000  # rows


@dataclass(frozen=True, slots=True)
class RowAudio:
    """The recording in one row of a table, as encoded bytes or as the path of a file; read when opened."""

    name: str
    table: Any  # datasets.Dataset
    column: str
    row: int
    size: int | None  # bytes, None where there are none

    def open(self) -> Any:
        sound = self._sound()
        return sound.open() if isinstance(sound, AudioFile) else io.BytesIO(sound)

    @property
    def key(self) -> str:
        sound = self._sound()
        return sound.key if isinstance(sound, AudioFile) else hashlib.sha256(sound).hexdigest()

    @property
    def span(self) -> tuple[float, float | None]:
        return 0.0, None

    def _sound(self) -> bytes | AudioFile:
        sound = _bytes_or_path(self.table[self.row][self.column])
        if sound.get("bytes"):
            return bytes(sound["bytes"])
        if sound.get("path"):
            return AudioFile(Path(sound["path"]))
        raise LorsError(f"cannot read audio {self.name}: expected bytes or a path in {self.column!r}, got neither")


def by_datasets(place: str, language: str, split: str, left_out: LeftOut) -> Iterator[Utterance]:
    """`place`: a hub id or a path, and ``,KEY=VALUE`` as often as needed (`_OPTIONS`).

    ``{language}``, ``{name}`` and ``{common_voice}`` in it become ``sv``, ``swedish`` and ``sv-SE``. The language of a row is
    what its column says; with `language` that, and with a placeholder the one that was asked for. `streaming` keeps the
    first so many rows of the language. A column whose name is not given is found by type or by its usual names.
    """
    path, *given = re.split(r",(?=\w+=)", _filled(place, language))
    where, options = f"datasets:{path}", dict(pair.split("=", 1) for pair in given)
    for name in options:
        if name not in _OPTIONS:
            raise LorsError(f"{where}: no option {name!r}{nearest(name, _OPTIONS)}")
    if "language" in options and spoken_code(options["language"]) != language:
        return
    streaming = _count(where, options["streaming"]) if "streaming" in options else 0
    table = _split(where, _at(where, path, options, streaming > 0), split, options)
    columns = _columns(where, table, options)
    if "language" in options or place != _filled(place, language):
        columns.pop("language", None)
    elif "language" not in columns:
        raise LorsError(
            f"{where}: expected a column 'language', ,language=CODE or {{language}} in the name, got "
            f"{', '.join(table.column_names or columns.values())}"
        )
    if streaming:
        table = _kept(where, table, columns, language, streaming)
    for audio, _, cells in rows(where, table, columns):
        if "language" in cells and spoken_code(str(cells["language"])) != language:
            continue
        text, translation = cells["text"], cells.get("translation") or None
        if not isinstance(text, str) or not isinstance(translation, str | None):
            left_out.note([f"{audio.name}: expected texts, got {shown(text)} and {shown(translation)}"])
            continue
        name = "/".join([language, split, str(audio.row), *([str(cells["id"])] if cells.get("id") is not None else [])])
        speaker = None if cells.get("speaker") in (None, "") else str(cells["speaker"])
        yield Utterance(name, audio, text, translation, language, split, speaker)


def opened(where: str, path: str, config: str | None = None, **more: Any) -> Any:
    """What the library finds there: tables by split, or one table. LorsError with its reason where it finds nothing."""
    datasets = require("datasets")
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    with _told(f"{where}: cannot be opened by datasets"), _undecoded():
        if any(Path(path, name).is_file() for name in ("dataset_dict.json", "state.json")):
            return datasets.load_from_disk(path)
        return datasets.load_dataset(path, config, **more)


def rows(where: str, table: Any, columns: Mapping[str, str]) -> Iterator[tuple[RowAudio, str | None, dict[str, Any]]]:
    """(recording, name of its file, what the other columns hold) of each row; no sound is read."""
    import pyarrow as pa
    import pyarrow.compute as pc

    audio = columns["audio"]
    table = _encoded(where, table, audio)
    others = {held: name for held, name in columns.items() if held != "audio"}
    number = 0
    for batch in table.with_format("arrow").iter(_BATCH):
        sound = batch[audio]
        inside = pa.types.is_struct(sound.type)  # else a path
        sizes = pc.binary_length(pc.struct_field(sound, "bytes")).to_pylist() if inside else [None] * len(sound)
        files = (pc.struct_field(sound, "path") if inside else sound).to_pylist()
        texts = batch.select(list({_top(name, batch.column_names) for name in others.values()})).to_pylist()
        for size, file, row in zip(sizes, files, texts, strict=True):
            cells = {held: _cell(row, name, table.features) for held, name in others.items()}
            length = AudioFile(Path(file)).size if size is None and file else size
            yield RowAudio(f"{where}:{number}", table, audio, number, length), file and os.path.basename(file), cells
            number += 1


def archived(where: str, archives: Sequence[Path]) -> dict[str, RowAudio]:
    """File name -> recording, of tar archives (compressed or not) that hold nothing but recordings of one format."""
    table = opened(where, "webdataset", data_files=[str(path) for path in archives], split="train")
    columns = {"audio": _columns(where, table, {"text_column_name": "__key__"})["audio"], "id": "__key__"}
    return {
        f"{os.path.basename(cells['id'])}.{columns['audio']}": audio for audio, _, cells in rows(where, table, columns)
    }


# ---------------------------------------------------------------------------------------------------- where and what


def _filled(place: str, language: str) -> str:
    codes = {"language": language, "name": language_name(language), "common_voice": common_voice_code(language)}
    return re.sub(r"\{(language|name|common_voice)\}", lambda found: codes[found[1]], place)


def _count(where: str, text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise LorsError(f"{where}: expected the number of rows in streaming, got {text!r}")
    return int(text)


def _at(where: str, path: str, options: Mapping[str, str], streaming: bool) -> Any:
    config, revision, kind = options.get("config"), options.get("revision"), _FILES.get(Path(path).suffix)
    if kind is not None:
        return opened(where, kind, config, data_files=path, streaming=streaming)
    return opened(where, path, config, revision=revision, streaming=streaming)


def _split(where: str, found: Any, split: str, options: Mapping[str, str]) -> Any:
    if not isinstance(found, dict):
        return found  # without splits: of all of them
    names = (options[split],) if split in options else _SPLITS.get(split, (split,))
    name = next((name for name in names if name in found), None)
    if name is None:
        raise LorsError(f"{where}: expected a split {' or '.join(names)}, got {', '.join(found)}; name it by ,{split}=")
    return found[name]


def _columns(where: str, table: Any, options: Mapping[str, str]) -> dict[str, str]:
    """What is held -> the name of its column; of a column of JSON the part, ``json.text``."""
    with _told(f"{where}: cannot be read by datasets"):
        features = table.features or dict.fromkeys(next(iter(table)))  # a stream may not know before it has begun
    names = [
        *features,
        *(f"{name}.{part}" for name, kind in features.items() if isinstance(kind, dict) for part in kind),
    ]
    found: dict[str, str] = {}
    for held, usual in _COLUMNS.items():
        wanted = options.get(f"{held}_column_name")
        if wanted is not None and wanted not in names:
            raise LorsError(f"{where}: expected a column {wanted!r}, got {', '.join(names)}{nearest(wanted, names)}")
        typed = [name for name, kind in features.items() if type(kind).__name__ == "Audio"] if held == "audio" else []
        guessed = [name for one in usual for name in names if name.rpartition(".")[2] == one]
        name = next(iter([*([wanted] if wanted else []), *typed, *guessed]), None)
        if name is not None:
            found[held] = name
        elif held in ("audio", "text"):
            raise LorsError(
                f"{where}: expected a column {' or '.join(map(repr, usual))}, got {', '.join(names)}; name it by "
                f",{held}_column_name="
            )
    return found


def _top(name: str, columns: Iterable[str]) -> str:
    return name if name in columns else name.partition(".")[0]


def _cell(row: Mapping[str, Any], name: str, features: Mapping[str, Any] | None) -> Any:
    """What a row holds under a name; the name of a class that is stored as a number."""
    if name not in row:
        top, _, part = name.partition(".")
        return (row[top] or {}).get(part)
    names, cell = getattr((features or {}).get(name), "names", None), row[name]
    return names[cell] if names and isinstance(cell, int) and 0 <= cell < len(names) else cell


# ------------------------------------------------------------------------------------------------- inside the library


@contextmanager
def _undecoded() -> Iterator[None]:
    """Lets the library note recordings as they come: it asks for torchcodec even where it has nothing to encode."""
    audio = require("datasets").Audio
    before = audio.encode_example
    audio.encode_example = lambda _, value: _as_it_is(value)
    try:
        yield
    finally:
        audio.encode_example = before


def _as_it_is(value: Any) -> dict[str, Any]:
    if isinstance(value, dict):
        return {"bytes": value.get("bytes"), "path": value.get("path")}
    return {"bytes": value, "path": None} if isinstance(value, bytes) else {"bytes": None, "path": str(value)}


def _encoded(where: str, table: Any, column: str) -> Any:
    """With the recordings as bytes or paths, whatever the library would make of them."""
    if type((table.features or {}).get(column)).__name__ in ("Value", "NoneType"):
        return table  # paths already, or a stream that makes nothing of them
    with _told(f"{where}: expected encoded recordings or paths in {column!r}"):
        return table.cast_column(column, require("datasets").Audio(decode=False))


def _kept(where: str, stream: Any, columns: Mapping[str, str], language: str, count: int) -> Any:
    """The first `count` rows of the language, as a table on the disk: the library's cache, which knows them again."""
    datasets = require("datasets")
    text, sound = datasets.Value("string"), {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
    features = datasets.Features({name: sound if held == "audio" else text for held, name in columns.items()})
    options = {
        "stream": _encoded(where, stream, columns["audio"]),
        "columns": dict(columns),
        "language": language,
        "count": count,
    }
    with _told(f"{where}: cannot be read by datasets"):
        return datasets.Dataset.from_generator(_first, features=features, gen_kwargs=options)


def _first(stream: Any, columns: Mapping[str, str], language: str, count: int) -> Iterator[dict[str, Any]]:
    with _undecoded():
        for row in stream:
            cells = {name: _cell(row, name, stream.features) for name in columns.values()}
            if "language" in columns and spoken_code(str(cells[columns["language"]])) != language:
                continue
            yield {name: _fetched(cell) if name == columns["audio"] else cell for name, cell in cells.items()}
            count -= 1
            if count == 0:
                return


def _bytes_or_path(sound: dict[str, Any] | str | None) -> dict[str, Any]:
    return {"path": sound} if isinstance(sound, str) else sound or {}


def _fetched(cell: dict[str, Any] | str | None) -> dict[str, Any]:
    """With the bytes of a recording that is not on this machine."""
    sound = {"bytes": None, "path": None} | _bytes_or_path(cell)
    if sound["bytes"] or not sound["path"] or os.path.isfile(sound["path"]):
        return sound
    with require("fsspec").open(sound["path"]) as stream:
        return {"bytes": stream.read(), "path": os.path.basename(sound["path"])}


@contextmanager
def _told(what: str) -> Iterator[None]:
    """Errors of the network, of formats and of the library, which come from several libraries, in one line."""
    try:
        yield
    except Exception as error:
        cause: BaseException = error
        while cause.__cause__ is not None:
            cause = cause.__cause__  # the library says that something went wrong; its cause says what
        raise LorsError(f"{what}: {first_line(cause)}") from error
