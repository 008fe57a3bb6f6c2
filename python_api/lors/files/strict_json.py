"""JSON text to plain data, with a one-line error for anything but one sane value.

Sane is: of bounded size, no key twice, no NaN, no half of a surrogate pair.
"""

from __future__ import annotations

import collections
import json
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from ..errors import LorsError, shown

__all__ = ["MAX_BYTES", "MAX_VALUES", "parse", "read", "read_bytes", "text_of"]

MAX_BYTES = 32 << 20  # the index of a model of 300,000 tensors
MAX_VALUES = 1_500_000  # an empty list takes 3 bytes of text and 64 of memory


def read_bytes(path: Path, limit: int = MAX_BYTES) -> bytes:
    """A file of at most `limit` bytes; LorsError when it is larger, no file, or cannot be read."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a named pipe would be waited for
            raise LorsError(f"{path}: expected a file")
        with path.open("rb") as stream:
            content = stream.read(limit + 1)
    except OSError as error:
        raise LorsError(f"cannot read {path}: {error.strerror or error}") from error
    if len(content) > limit:
        raise LorsError(f"{path}: expected at most {limit} bytes, got more")
    return content


def read(path: Path, *, values: int = MAX_VALUES, infinite: bool = False) -> dict[str, Any]:
    """The JSON object in a file."""
    content = parse(read_bytes(path), str(path), values=values, infinite=infinite)
    if not isinstance(content, dict):
        raise LorsError(f"{path}: expected a JSON object, got {shown(content)}")
    return content


def parse(text: str | bytes, where: str, *, values: int = MAX_VALUES, infinite: bool = False) -> Any:
    """One JSON value; LorsError that begins with `where`.

    values: at most so many numbers, strings, lists and objects. infinite: Infinity and NaN are numbers.
    """
    if len(text) > MAX_BYTES:
        raise LorsError(f"{where}: expected JSON of at most {MAX_BYTES} bytes, got {len(text)}")
    try:
        text = text if isinstance(text, str) else text.decode("utf-8")
        if sum(map(text.count, ",[{")) > values:
            raise LorsError(f"{where}: more than {values:,} values")
        content = json.loads(text, object_pairs_hook=_unique, parse_constant=float if infinite else _refused)
        if "\\u" in text:
            _require_whole_characters(content)
        return content
    except UnicodeDecodeError as error:
        raise LorsError(f"{where}: not UTF-8 (byte {error.start})") from None
    except RecursionError:
        raise LorsError(f"{where}: not JSON that can be read: nested too deep") from None
    except ValueError as error:
        raise LorsError(f"{where}: not JSON: {error}") from None


def text_of(content: Mapping[str, Any]) -> str:
    """An object as the files beside a model have it."""
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(found := dict(pairs)) < len(pairs):
        twice = next(name for name, count in collections.Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"it has the key {shown(twice)} twice")
    return found


def _require_whole_characters(content: Any) -> None:
    """ValueError when a string cannot be encoded: JSON spells characters as surrogate pairs, and can spell half of one."""
    waiting = [content]
    while waiting:
        item = waiting.pop()
        if isinstance(item, dict):
            waiting += item.keys()
            waiting += item.values()
        elif isinstance(item, list):
            waiting += item
        elif isinstance(item, str) and not item.isascii():
            try:
                item.encode("utf-8")
            except UnicodeEncodeError:
                raise ValueError(f"{shown(item)} has half of a surrogate pair") from None


def _refused(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")
