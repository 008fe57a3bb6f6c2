"""Tables of contents of weight files: which tensor lies where, without reading any weights.

Two formats are understood, both little-endian and uncompressed, so that every tensor is one run of bytes in its file:

* **safetensors**: 8 bytes header length, a JSON header, then the data;
* **torch archives** (``.pt``, ``.bin`` as written by ``torch.save`` since 1.6): a zip file with one pickle that
  describes the tensors (`torch_pickle`) and one stored member per storage. No code of the file is run and torch is not
  needed.

A file may lie about itself in every field: each is checked here, once, and an error says which one is wrong. What
reading a table of contents takes is bounded by its size.
"""

from __future__ import annotations

import math
import os
import struct
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from ..errors import LorsError, shown
from ..files import strict_json
from .torch_pickle import Tensor, read_pickle

__all__ = ["DTYPES", "TensorInfo", "dtype_code", "read_safetensors_header", "read_torch_archive"]

# safetensors' dtype codes. F4 and F6 are packed below a byte: numpy has a type for the value, not for the packing.
DTYPES: dict[str, np.dtype[Any]] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
    "C64": np.dtype(np.complex64),
    "C128": np.dtype(np.complex128),  # torch archives only
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "F8_E4M3FNUZ": np.dtype(ml_dtypes.float8_e4m3fnuz),
    "F8_E5M2FNUZ": np.dtype(ml_dtypes.float8_e5m2fnuz),
    "F8_E8M0": np.dtype(ml_dtypes.float8_e8m0fnu),
    "F6_E2M3": np.dtype(ml_dtypes.float6_e2m3fn),
    "F6_E3M2": np.dtype(ml_dtypes.float6_e3m2fn),
    "F4": np.dtype(ml_dtypes.float4_e2m1fn),
}
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_PACKED_BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}

_MAX_HEADER = 32 << 20  # bytes: some 250,000 tensors
_MAX_NUMEL = 2**63 - 1
_MAX_DIMENSIONS = 32  # as many as every numpy has
_MAX_NAME = 255  # characters


def dtype_code(dtype: np.dtype[Any]) -> str:
    """safetensors' code of a numpy dtype (``float32`` -> ``"F32"``); KeyError for one the format has no code for."""
    return _CODES[np.dtype(dtype)]


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: ``nbytes`` bytes, row-major, little-endian, from byte ``offset`` of file ``file``."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    file: int  # index into Checkpoint.files
    offset: int  # bytes from the start of that file
    nbytes: int

    @property
    def code(self) -> str:
        """The dtype as safetensors spells it: "F32", "BF16", "F8_E4M3" ..."""
        return _CODES[self.dtype]

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def packed(self) -> bool:
        """Values smaller than a byte (F4, F6): numpy cannot address them in the file."""
        return self.code in _PACKED_BITS


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
    if length > _MAX_HEADER:
        raise LorsError(f"{path}: not a safetensors file: header length {length} is over the limit of {_MAX_HEADER}")
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


def _whole(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _MAX_NUMEL


def _check_entry(name: str, entry: Any, path: Path, file: int, data: int) -> TensorInfo:
    """One entry of the header, on its own; how the entries lie together is _check_layout's concern."""
    where = f"{path}: tensor {_checked_name(name, path)!r}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        got = ", ".join(sorted(entry)) if isinstance(entry, dict) else shown(entry)
        raise LorsError(f"{where}: expected an object with dtype, shape and data_offsets, got {got}")
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(code, str) or code not in DTYPES or code == "C128":
        raise LorsError(f"{where}: unknown dtype {shown(code)}")
    if not isinstance(shape, list):
        raise LorsError(f"{where}: the shape must be a list of non-negative whole numbers, got {shown(shape)}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_whole, offsets)):
        raise LorsError(f"{where}: data_offsets must be two non-negative whole numbers, got {shown(offsets)}")
    nbytes = _nbytes(code, shape, where)
    begin, end = offsets
    if end - begin != nbytes:
        raise LorsError(f"{where}: {code} {shape} takes {nbytes} bytes, data_offsets {offsets} give {end - begin}")
    return TensorInfo(name, DTYPES[code], tuple(shape), file, data + begin, nbytes)


def _checked_name(name: str, path: Path) -> str:
    if len(name) > _MAX_NAME or not name.isprintable():
        raise LorsError(
            f"{path}: tensor {name[:_MAX_NAME]!r}: expected a printable name of at most {_MAX_NAME} characters"
        )
    return name


def _nbytes(code: str, shape: Sequence[Any], where: str) -> int:
    """Bytes of a tensor; LorsError for a shape that no array can have."""
    if len(shape) > _MAX_DIMENSIONS:
        raise LorsError(f"{where}: expected at most {_MAX_DIMENSIONS} dimensions, got {len(shape)}")
    if not all(map(_whole, shape)):
        raise LorsError(f"{where}: the shape must be a list of non-negative whole numbers, got {shown(list(shape))}")
    bits = _PACKED_BITS.get(code, 8 * DTYPES[code].itemsize)
    # Without its zeros too, as numpy asks for: 2^62 x 0 has no bytes, and no numpy array has that shape.
    if bits * math.prod(length or 1 for length in shape) > 8 * _MAX_NUMEL:
        raise LorsError(f"{where}: the size of shape {list(shape)} overflows")
    if (total := bits * math.prod(shape)) % 8:
        raise LorsError(f"{where}: {code} {list(shape)} does not fill whole bytes")
    return total // 8


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


# ------------------------------------------------------------------------------------------- torch archives

_MAX_PICKLE = 32 << 20  # bytes; of Whisper's largest it takes 150 kB
_MAX_DIRECTORY = 8 << 20  # bytes of the zip file's directory: the zipfile module takes about 20 times as much
_MAX_SHARING = 16  # all tensors together may be this many times the file, where several have one storage
_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # torch's magic number before 1.6, pickled

Members = dict[str, zipfile.ZipInfo]


def read_torch_archive(
    stream: BinaryIO, path: Path, file: int = 0
) -> tuple[dict[str, TensorInfo], dict[str, int] | None]:
    """Tensors by name of a ``torch.save`` archive, and openai-whisper's ``dims`` (None in a plain state dict).

    Accepted are a state dict and ``{"dims": {...}, "model_state_dict": {...}}``. Raises LorsError for an archive that
    is damaged, compressed, big-endian, of torch before 1.6, that needs more than tensors and plain values, or that
    holds tensors which are not contiguous.
    """
    members = _members(stream, path)
    content = _unpickle(members, stream, path)
    state, dims = content, None
    if isinstance(content, dict) and "model_state_dict" in content:
        state, dims = content["model_state_dict"], content.get("dims")
        if dims is not None and not (isinstance(dims, dict) and all(map(_whole, dims.values()))):
            raise LorsError(f"{path}: dims: expected a dictionary of whole numbers")
    if not isinstance(state, dict) or not state:
        got = "an empty one" if isinstance(state, dict) else type(state).__name__
        raise LorsError(f"{path}: expected a state dict (tensor names to tensors), got {got}")
    tensors = {name: _locate(name, value, members, stream, path, file) for name, value in state.items()}
    total, size = sum(info.nbytes for info in tensors.values()), os.fstat(stream.fileno()).st_size
    if total > _MAX_SHARING * size:
        raise LorsError(f"{path}: its tensors take {total} bytes, {total // size} times as much as the file")
    return tensors, dims


def _members(stream: BinaryIO, path: Path) -> Members:
    """The archive's members by their names without the first directory, none of them compressed or encrypted."""
    if os.pread(stream.fileno(), len(_LEGACY), 0) == _LEGACY:
        raise LorsError(f"{path}: written by torch before 1.6: load it with torch and save it again")
    if (size := _directory_size(stream, path)) > _MAX_DIRECTORY:
        raise LorsError(f"{path}: the archive's directory takes {size} bytes, the limit is {_MAX_DIRECTORY}")
    try:
        with zipfile.ZipFile(stream) as archive:
            infos = archive.infolist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error, OverflowError) as error:
        raise LorsError(f"{path}: not a torch archive, or a damaged one: {error}") from error
    members: Members = {}
    for info in infos:
        name = info.filename.partition("/")[2]
        if name in members:
            raise LorsError(f"{path}: the archive has the member {name!r} twice")
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size:
            raise LorsError(f"{path}: the archive member {name!r} is compressed; torch stores without compression")
        if info.flag_bits & 0b1100001:  # bits 0, 5 and 6
            raise LorsError(f"{path}: the archive member {name!r} is encrypted or a patch")
        members[name] = info
    return members


def _directory_size(stream: BinaryIO, path: Path) -> int:
    """Bytes of the zip file's directory, by the records at the very end of the file, where torch and zipfile put them.

    zipfile would look for them elsewhere too, where an archive has a comment: there they might say something else.
    """
    size = os.fstat(stream.fileno()).st_size
    tail = os.pread(stream.fileno(), 98, max(0, size - 98)).rjust(98, b"\0")
    record, locator, end = tail[:56], tail[56:76], tail[76:]
    whole = end[:4] == b"PK\x05\x06" and end[20:] == b"\0\0"
    (taken,) = struct.unpack("<L", end[12:16])
    if locator[:4] == b"PK\x06\x07":  # zip64
        whole = whole and record[:4] == b"PK\x06\x06" and locator[8:16] == struct.pack("<Q", size - 98)
        (taken,) = struct.unpack("<Q", record[40:48])
    if not whole:
        raise LorsError(f"{path}: not a torch archive, or a damaged one: it does not end with a zip file's directory")
    return int(taken)


def _unpickle(members: Members, stream: BinaryIO, path: Path) -> Any:
    if "data.pkl" not in members:
        raise LorsError(f"{path}: not a torch archive: it has no data.pkl")
    if members["data.pkl"].file_size > _MAX_PICKLE:
        raise LorsError(f"{path}: data.pkl takes {members['data.pkl'].file_size} bytes, the limit is {_MAX_PICKLE}")
    if "byteorder" in members and (order := _content(members["byteorder"], stream, path, 8)) != b"little":
        raise LorsError(f"{path}: expected little-endian tensors, got byte order {order!r}")
    try:
        return read_pickle(_content(members["data.pkl"], stream, path, _MAX_PICKLE))
    except LorsError as error:
        raise LorsError(f"{path}: {error}") from None
    except ValueError as error:
        raise LorsError(f"{path}: the pickle in it cannot be read: {error}") from error


def _content(member: zipfile.ZipInfo, stream: BinaryIO, path: Path, limit: int) -> bytes:
    """A member's first `limit` bytes; of a whole one the checksum is right."""
    count = min(member.file_size, limit)
    content = os.pread(stream.fileno(), count, _member_offset(member, stream, path))
    if len(content) == member.file_size and zlib.crc32(content) != member.CRC:
        raise LorsError(f"{path}: damaged: the checksum of {member.filename!r} is wrong")
    return content


def _locate(name: str, value: Any, members: Members, stream: BinaryIO, path: Path, file: int) -> TensorInfo:
    where = f"{path}: tensor {_checked_name(name, path)!r}"
    if not isinstance(value, Tensor):
        raise LorsError(f"{path}: expected a state dict of tensors, got {type(value).__name__} under {name!r}")
    code, start, shape, stride = value.code, value.start, value.shape, value.stride
    if not isinstance(shape, tuple) or not isinstance(stride, tuple) or len(shape) != len(stride) or code not in DTYPES:
        raise LorsError(f"{where}: unreadable description: expected a dtype, and a shape and strides of one length")
    if not all(map(_whole, (start, *stride))):
        raise LorsError(f"{where}: unreadable description: expected a start and strides of non-negative whole numbers")
    nbytes = _nbytes(code, shape, where)
    if nbytes and not _contiguous(shape, stride):
        raise LorsError(f"{where}: not contiguous (shape {shape}, strides {stride}); save it again with .contiguous()")
    member = members.get(f"data/{value.storage.key}")
    if member is None:
        raise LorsError(f"{where}: its data (data/{value.storage.key}) are not in the archive")
    begin = start * DTYPES[code].itemsize
    if begin + nbytes > member.file_size:
        raise LorsError(
            f"{where}: takes bytes {begin} to {begin + nbytes} of {member.filename}, which has {member.file_size}"
        )
    offset = _member_offset(member, stream, path)
    return TensorInfo(name, DTYPES[code], shape, file, offset + begin, nbytes)


def _contiguous(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    expected = 1
    for length, step in zip(reversed(shape), reversed(stride), strict=True):
        if length != 1 and step != expected:
            return False
        expected *= length
    return True


def _member_offset(member: zipfile.ZipInfo, stream: BinaryIO, path: Path) -> int:
    """Where a stored member's bytes begin: behind its local header, whose length only the header itself gives."""
    size = os.fstat(stream.fileno()).st_size
    local = os.pread(stream.fileno(), 30, member.header_offset) if 0 <= member.header_offset < size else b""
    if len(local) < 30 or local[:4] != b"PK\x03\x04":
        raise LorsError(f"{path}: damaged archive: no local header for {member.filename!r}")
    name_length, extra_length = struct.unpack("<HH", local[26:30])
    offset = member.header_offset + 30 + name_length + extra_length
    if offset + member.file_size > size:
        raise LorsError(f"{path}: truncated: {member.filename!r} reaches over the end of the file")
    return int(offset)
