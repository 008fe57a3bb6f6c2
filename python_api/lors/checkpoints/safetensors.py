"""Tables of contents of safetensors files: which tensor lies where, without reading any weights.

8 bytes header length, a JSON header, then the data, little-endian: every tensor is one run of bytes. A file may lie about
itself in every field: each is checked here, once, and an error says which one is wrong. What reading a table of contents
takes is bounded by its size.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import LorsError, shown
from ..files import strict_json
from .tensor_info import DTYPES, MAX_HEADER, TensorInfo, bytes_of, checked_name, is_size

__all__ = ["read_safetensors_header"]


# ---------------------------------------------------------------------------------------------- safetensors


def read_safetensors_header(
    stream: BinaryIO, path: Path, file: int = 0
) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Tensors by name, in the order of the data, and the ``__metadata__`` strings of a safetensors file.

    Raises LorsError when the header is not valid or the data are not exactly what it describes: every byte after the
    header belongs to one tensor.
    """
    size = os.fstat(stream.fileno()).st_size
    if size < 8:
        raise LorsError(f"{path}: not a safetensors file: expected at least 8 bytes, got {size}")
    stream.seek(0)
    (length,) = struct.unpack("<Q", stream.read(8))
    if length > MAX_HEADER:
        raise LorsError(f"{path}: not a safetensors file: header length {length} is over the limit of {MAX_HEADER}")
    if length > size - 8:
        raise LorsError(
            f"{path}: truncated: the header takes {length} bytes, the file has {size - 8} after its length field"
        )
    header = strict_json.parse(stream.read(length), f"{path}: the safetensors header")
    if not isinstance(header, dict):
        raise LorsError(f"{path}: the safetensors header must be a JSON object, got {shown(header)}")
    metadata = _check_metadata(header.pop("__metadata__", {}), path)
    data = 8 + length
    tensors = [_check_entry(name, entry, path, file, data) for name, entry in header.items()]
    tensors.sort(key=lambda info: (info.offset, info.nbytes))
    _check_layout(tensors, path, data, size)
    return {info.name: info for info in tensors}, metadata


def _check_metadata(metadata: Any, path: Path) -> dict[str, str]:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise LorsError(f"{path}: __metadata__ of the safetensors header must be an object of strings")
    return metadata


def _check_entry(name: str, entry: Any, path: Path, file: int, data: int) -> TensorInfo:
    """One entry of the header, on its own; how the entries lie together is _check_layout's concern."""
    where = f"{path}: tensor {checked_name(name, path)!r}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        got = ", ".join(sorted(entry)) if isinstance(entry, dict) else shown(entry)
        raise LorsError(f"{where}: expected an object with dtype, shape and data_offsets, got {got}")
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(code, str) or code not in DTYPES or code == "C128":
        raise LorsError(f"{where}: unknown dtype {shown(code)}")
    if not isinstance(shape, list):
        raise LorsError(f"{where}: the shape must be a list of non-negative whole numbers, got {shown(shape)}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(is_size, offsets)):
        raise LorsError(f"{where}: data_offsets must be two non-negative whole numbers, got {shown(offsets)}")
    nbytes = bytes_of(code, shape, where)
    begin, end = offsets
    if end - begin != nbytes:
        raise LorsError(f"{where}: {code} {shape} takes {nbytes} bytes, data_offsets {offsets} give {end - begin}")
    return TensorInfo(name, DTYPES[code], tuple(shape), file, data + begin, nbytes)


def _check_layout(tensors: list[TensorInfo], path: Path, data: int, size: int) -> None:
    expected = data
    previous = "the header"
    for info in tensors:
        if info.offset != expected:
            kind = "overlaps" if info.offset < expected else "leaves a hole after"
            raise LorsError(
                f"{path}: tensor {info.name!r} {kind} {previous}: it should begin at data offset {expected - data}, "
                f"got {info.offset - data}"
            )
        expected, previous = info.offset + info.nbytes, repr(info.name)
    if size < expected:
        raise LorsError(f"{path}: truncated: the header describes {expected} bytes, the file has {size}")
    if size > expected:
        raise LorsError(
            f"{path}: {size - expected} bytes follow the last tensor: expected a file of {expected}, got {size}"
        )
