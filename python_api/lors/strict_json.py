"""JSON text to plain data, with a one-line error for anything but one sane value: bounded, no key twice, no NaN."""

from __future__ import annotations

import collections
import json
import stat
from pathlib import Path
from typing import Any, NoReturn

from .errors import LorsError
from .messages import shown

__all__ = ["MAX_BYTES", "MAX_VALUES", "parse", "read", "read_bytes"]

MAX_BYTES = 32 << 20  # the index of a model of 300,000 tensors
MAX_VALUES = 1_500_000  # an empty list takes 3 bytes of text and 64 of memory


def read_bytes(path: Path, limit: int = MAX_BYTES) -> bytes:
    """A file of at most `limit` bytes; LorsError when it is larger, no file, or cannot be read."""
    try:
        found = path.stat()
        if not stat.S_ISREG(found.st_mode):  # a named pipe would be waited for
            raise LorsError(f"{path}: expected a file")
        if found.st_size > limit:
            raise LorsError(f"{path}: expected at most {limit} bytes, got {found.st_size}")
        return path.read_bytes()
    except OSError as error:
        raise LorsError(f"cannot read {path}: {error.strerror or error}") from error


def read(path: Path) -> dict[str, Any]:
    """The JSON object in a file."""
    content = parse(read_bytes(path), str(path))
    if not isinstance(content, dict):
        raise LorsError(f"{path}: expected a JSON object, got {shown(content)}")
    return content


def parse(text: str | bytes, where: str) -> Any:
    """One JSON value, in UTF-8, without a key twice and without NaN; LorsError that begins with `where`."""
    if len(text) > MAX_BYTES:
        raise LorsError(f"{where}: expected JSON of at most {MAX_BYTES} bytes, got {len(text)}")
    try:
        text = text if isinstance(text, str) else text.decode("utf-8")
        if sum(map(text.count, ",[{")) > MAX_VALUES:
            raise LorsError(f"{where}: more than {MAX_VALUES:,} values")
        return json.loads(text, object_pairs_hook=_unique, parse_constant=_constant)
    except UnicodeDecodeError as error:
        raise LorsError(f"{where}: not UTF-8 (byte {error.start})") from None
    except RecursionError:
        raise LorsError(f"{where}: not JSON that can be read: nested too deep") from None
    except ValueError as error:
        raise LorsError(f"{where}: not JSON: {error}") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(found := dict(pairs)) < len(pairs):
        twice = next(name for name, count in collections.Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"it has the key {shown(twice)} twice")
    return found


def _constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")
