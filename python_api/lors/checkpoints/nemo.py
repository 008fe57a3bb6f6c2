"""NeMo's archives (``.nemo``): a tar file with weights as torch saves them, a configuration and a tokenizer.

Nothing is unpacked: the weights are read where they lie in the archive, and the other files are copied from one archive to
the next. What an archive says of itself is checked here, once: paths that lead elsewhere, links, devices, sizes beyond the
end of the file and headers without end are refused.
"""

from __future__ import annotations

import contextlib
import tarfile
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from ..errors import LorsError, shown
from .extent import Extent

__all__ = ["CONFIG", "WEIGHTS", "is_tar", "read_members", "write_archive"]

WEIGHTS, CONFIG = "model_weights.ckpt", "model_config.yaml"
_BLOCK = 512
_MAX_HEADERS = 20_000
_MAX_HEADER = 64 << 10  # bytes of the records before a member that say what its header has no room for
_FILE, _DIRECTORY, _RECORDS, _SHARED_RECORDS, _LONG_NAME = b"0\0", b"5", b"x", b"g", b"L"

Members = Mapping[str, Extent]


def is_tar(stream: BinaryIO) -> bool:
    """Whether a file begins as a tar file does."""
    start = Extent(stream).at(0, _BLOCK)
    return start[257:262] == b"ustar"


def read_members(stream: BinaryIO, path: Path) -> Members:
    """Name -> bytes of every file of an archive, in order. LorsError for one without weights, and whatever is refused."""
    archive = Extent(stream)
    members: dict[str, Extent] = {}
    offset, count, records = 0, 0, dict[str, str]()
    while (header := archive.at(offset, _BLOCK)).strip(b"\0"):
        count += 1
        size, kind = _checked(header, offset, path), header[156:157]
        offset += _BLOCK
        if kind in (_RECORDS, _SHARED_RECORDS, _LONG_NAME):
            if size > _MAX_HEADER:
                raise LorsError(f"{path}: a header of {size} bytes at byte {offset}: expected at most {_MAX_HEADER}")
            content = archive.at(offset, size)
            if kind == _LONG_NAME:
                records["path"] = content.rstrip(b"\0").decode("utf-8", "replace")
            elif kind == _RECORDS:
                records |= _records(content, path)
        else:
            name = _name(records.pop("path", "") or _short_name(header), path)
            size = _number(records.pop("size", str(size)), name, path)
            records.clear()
            if kind in _FILE:
                if name in members:
                    raise LorsError(f"{path}: the archive has the file {shown(name)} twice")
                if offset + size > archive.size:
                    raise LorsError(f"{path}: truncated: {shown(name)} reaches over the end of the file")
                members[name] = Extent(stream, offset, size)
            elif kind != _DIRECTORY:
                raise LorsError(f"{path}: {shown(name)}: expected files alone in the archive, got a link or a device")
        offset += -(-size // _BLOCK) * _BLOCK
        if count > _MAX_HEADERS:
            raise LorsError(f"{path}: the archive has more than {_MAX_HEADERS} headers")
    if WEIGHTS not in members:
        raise LorsError(
            f"{path}: expected a NeMo archive with {WEIGHTS}, got {', '.join(list(members)[:5]) or 'no file'}"
        )
    return members


def _checked(header: bytes, offset: int, path: Path) -> int:
    """The size in a header of which the checksum is right."""
    field = header[148:156]
    total = sum(header[:148]) + 8 * 32 + sum(header[156:])
    if len(header) < _BLOCK or _octal(field) != total:
        raise LorsError(f"{path}: not a tar file, or a damaged one: no header at byte {offset}")
    size = header[124:136]
    found = int.from_bytes(size[1:], "big") if size[0] == 0x80 else _octal(size)
    if found is None:
        raise LorsError(f"{path}: damaged: expected a size in the header at byte {offset}")
    return found


def _octal(field: bytes) -> int | None:
    digits = field.strip(b"\0 ")
    return int(digits, 8) if digits and not digits.strip(b"01234567") else None


def _number(text: str, name: str, path: Path) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 20):
        raise LorsError(f"{path}: {shown(name)}: expected a size, got {shown(text)}")
    return int(text)


def _short_name(header: bytes) -> str:
    name, prefix = (part.split(b"\0")[0].decode("utf-8", "replace") for part in (header[:100], header[345:500]))
    return f"{prefix}/{name}" if prefix else name


def _records(content: bytes, path: Path) -> dict[str, str]:
    """Records "LENGTH KEY=VALUE\\n"."""
    found = {}
    while content.strip(b"\0"):
        length, space, _ = content.partition(b" ")
        count = int(length) if length.isdigit() and len(length) < 8 else 0
        key, equals, value = content[len(length) + 1 : count - 1].partition(b"=")
        if not (space and equals and count <= len(content) and content[count - 1 : count] == b"\n"):
            raise LorsError(f"{path}: damaged: expected records LENGTH KEY=VALUE in a header of the archive")
        found[key.decode("utf-8", "replace")] = value.decode("utf-8", "replace")
        content = content[count:]
    return found


def _name(name: str, path: Path) -> str:
    """A member's name without "./"; LorsError for one that leads out of the archive or cannot be shown."""
    parts = PurePosixPath(name).parts
    if name.startswith("/") or ".." in parts or "\\" in name or not name.isprintable():
        raise LorsError(f"{path}: the archive has a file {shown(name)}: expected a path inside of it")
    return "/".join(parts)


def write_archive(out: Path, members: Members, weights: Path) -> None:
    """An archive with the files of another one, but the weights of a file, which goes. The same bytes for the same content."""
    with contextlib.ExitStack() as stack:
        archive = stack.enter_context(tarfile.open(out, "x:", format=tarfile.GNU_FORMAT))
        for name, extent in members.items():
            info = tarfile.TarInfo(name)
            source: BinaryIO = extent  # type: ignore[assignment]
            info.size = extent.size
            if name == WEIGHTS:
                source = stack.enter_context(weights.open("rb"))
                info.size = weights.stat().st_size
            else:
                extent.seek(0)
            archive.addfile(info, source)
    weights.unlink()
