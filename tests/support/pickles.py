"""Pickles and torch archives written by hand: what torch would write, and what it never would."""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path

HEAD, MARK, STOP = b"\x80\x02", b"(", b"."
NONE, EMPTY_TUPLE, EMPTY_LIST, EMPTY_DICT = b"N", b")", b"]", b"}"
TUPLE, TUPLE1, TUPLE2, APPEND, SETITEM, SETITEMS, REDUCE, BUILD, PERSISTENT = (
    b"t", b"\x85", b"\x86", b"a", b"s", b"u", b"R", b"b", b"Q",
)  # fmt: skip
REBUILD = "torch._utils _rebuild_tensor_v2"


def text(value: str) -> bytes:
    data = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(data)) + data


def number(value: int) -> bytes:
    if -(2**31) <= value < 2**31:
        return b"J" + struct.pack("<i", value)
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def name(path: str) -> bytes:
    module, _, attribute = path.partition(" ")
    return b"c" + f"{module}\n{attribute}\n".encode()


def numbers(values: tuple[int, ...]) -> bytes:
    return MARK + b"".join(map(number, values)) + TUPLE


def storage(key: str = "0", kind: str = "FloatStorage", count: int = 4) -> bytes:
    parts = text("storage") + name(f"torch {kind}") + text(key) + text("cpu") + number(count)
    return MARK + parts + TUPLE + PERSISTENT


def tensor(
    shape: tuple[int, ...] | bytes = (4,),
    stride: tuple[int, ...] = (1,),
    start: int = 0,
    source: bytes | None = None,
) -> bytes:
    hooks = name("collections OrderedDict") + EMPTY_TUPLE + REDUCE
    size = shape if isinstance(shape, bytes) else numbers(shape)
    content = (source or storage()) + number(start) + size + numbers(stride) + b"\x89" + hooks
    return name(REBUILD) + MARK + content + TUPLE + REDUCE


def state(**tensors: bytes) -> bytes:
    """A whole pickle: a state dict."""
    items = b"".join(text(key) + value for key, value in tensors.items())
    return HEAD + EMPTY_DICT + MARK + items + SETITEMS + STOP


def archived(stem: str, pickle: bytes, members: Mapping[str, bytes] | None = None) -> bytes:
    """A torch archive of a pickle and its storages (by default one of four float32)."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as file:
        file.writestr(f"{stem}/data.pkl", pickle)
        file.writestr(f"{stem}/version", b"3\n")
        file.writestr(f"{stem}/byteorder", b"little")
        for key, content in ({"data/0": bytes(16)} if members is None else members).items():
            file.writestr(f"{stem}/{key}", content)
    return stream.getvalue()


def archive(path: Path, pickle: bytes, members: Mapping[str, bytes] | None = None) -> Path:
    """The same in a file."""
    path.write_bytes(archived(path.stem, pickle, members))
    return path
