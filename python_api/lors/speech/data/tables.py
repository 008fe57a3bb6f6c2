"""Tables of corpora: TSV with a header, and a JSON object per line."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from ...errors import LorsError, shown
from ...files import strict_json
from .left_out import LeftOut

AUDIO_COLUMNS = ("audio", "path", "audio_path", "file", "file_name")
TEXT_COLUMNS = ("text", "sentence", "transcription", "transcript", "raw_transcription", "normalized_text", "txt")
SPEAKER_COLUMNS = ("speaker", "speaker_id", "client_id")

_LONGEST_LINE = 1 << 20  # characters


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


def tsv_rows(
    path: Path,
    required: Iterable[str],
    left_out: LeftOut,
    escape: str | None = None,
    header: Sequence[str] | None = None,
) -> Iterator[tuple[int, dict[str, str]]]:
    """(line, row) of a TSV file, whose first line is its header unless one is given. Quotes are text: corpora hold
    unbalanced ones."""
    with _opened(path, newline="") as stream:
        lines = _lines(stream, path)
        reader = csv.DictReader(lines, header, delimiter="\t", quoting=csv.QUOTE_NONE, escapechar=escape)
        try:
            names = list(reader.fieldnames or [])
            found = ", ".join(map(repr, names)) or "nothing"
            for column in required:
                if column not in names:
                    raise LorsError(f"{path}: expected a column {column!r} between tabs, got {found}")
            if len(set(names)) != len(names):
                raise LorsError(f"{path}: expected columns of different names, got {found}")
            for row in reader:
                if None in row or None in row.values():
                    left_out.note([f"{path}:{reader.line_num}: expected {len(names)} columns, got another number"])
                else:
                    yield reader.line_num, row
        except csv.Error as error:
            raise LorsError(f"{path}:{reader.line_num}: expected a row of a table: {error}") from error


def json_rows(path: Path, left_out: LeftOut) -> Iterator[tuple[int, dict[str, Any]]]:
    with _opened(path) as stream:
        for number, line in enumerate(_lines(stream, path), 1):
            row: Any = None
            with left_out.unless_unusable():
                if text := line.strip():
                    row = strict_json.parse(
                        text, f"{path}:{number}", infinite=True
                    )  # pandas writes NaN for what is missing
                    if not isinstance(row, dict):
                        raise LorsError(f"{path}:{number}: expected one JSON object per line, got {shown(row)}")
            if isinstance(row, dict):
                yield number, row
