"""Tables of contents of torch archives (``.pt``, ``.bin`` as written by ``torch.save`` since 1.6), without torch.

A zip file with one pickle that describes the tensors (`torch_pickle`) and one stored member per storage. No code of the
file is run. It may lie about itself in every field: each is checked here, once, and an error says which one is wrong.
"""

from __future__ import annotations

import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import LorsError
from .extent import Extent
from .tensor_info import DTYPES, TensorInfo, bytes_of, checked_name, is_size
from .torch_pickle import Tensor, read_pickle

__all__ = ["read_torch_archive"]

_MAX_PICKLE = 32 << 20  # bytes; of Whisper's largest it takes 150 kB
_MAX_DIRECTORY = 8 << 20  # bytes of the zip file's directory: the zipfile module takes about 20 times as much
_MAX_SHARING = 16  # all tensors together may be this many times the file, where several have one storage
_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # torch's magic number before 1.6, pickled

Members = dict[str, zipfile.ZipInfo]


def read_torch_archive(
    stream: BinaryIO | Extent, path: Path, file: int = 0
) -> tuple[dict[str, TensorInfo], dict[str, int] | None]:
    """Tensors by name of a ``torch.save`` archive, and openai-whisper's ``dims`` (None in a plain state dict).

    stream: the file, or the part of it that is the archive. Accepted are a state dict and ``{"dims": {...}, "model_state_dict": {...}}``. Raises LorsError for an archive that
    is damaged, compressed, big-endian, of torch before 1.6, that needs more than tensors and plain values, or that
    holds tensors which are not contiguous.
    """
    extent = stream if isinstance(stream, Extent) else Extent(stream)
    members = _members(extent, path)
    content = _unpickle(members, extent, path)
    state, dims = content, None
    if isinstance(content, dict) and "model_state_dict" in content:
        state, dims = content["model_state_dict"], content.get("dims")
        if dims is not None and not (isinstance(dims, dict) and all(map(is_size, dims.values()))):
            raise LorsError(f"{path}: dims: expected a dictionary of whole numbers")
    if not isinstance(state, dict) or not state:
        got = "an empty one" if isinstance(state, dict) else type(state).__name__
        raise LorsError(f"{path}: expected a state dict (tensor names to tensors), got {got}")
    tensors = {name: _locate(name, value, members, extent, path, file) for name, value in state.items()}
    total, size = sum(info.nbytes for info in tensors.values()), extent.size
    if total > _MAX_SHARING * size:
        raise LorsError(f"{path}: its tensors take {total} bytes, {total // size} times as much as the file")
    return tensors, dims


def _members(stream: Extent, path: Path) -> Members:
    """The archive's members by their names without the first directory, none of them compressed or encrypted."""
    if stream.at(0, len(_LEGACY)) == _LEGACY:
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


def _directory_size(stream: Extent, path: Path) -> int:
    """Bytes of the zip file's directory, by the records at the very end of the file, where torch and zipfile put them.

    zipfile would look for them elsewhere too, where an archive has a comment: there they might say something else.
    """
    size = stream.size
    tail = stream.at(max(0, size - 98), 98).rjust(98, b"\0")
    record, locator, end = tail[:56], tail[56:76], tail[76:]
    whole = end[:4] == b"PK\x05\x06" and end[20:] == b"\0\0"
    (taken,) = struct.unpack("<L", end[12:16])
    if locator[:4] == b"PK\x06\x07":  # zip64
        whole = whole and record[:4] == b"PK\x06\x06" and locator[8:16] == struct.pack("<Q", size - 98)
        (taken,) = struct.unpack("<Q", record[40:48])
    if not whole:
        raise LorsError(f"{path}: not a torch archive, or a damaged one: it does not end with a zip file's directory")
    return int(taken)


def _unpickle(members: Members, stream: Extent, path: Path) -> Any:
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


def _content(member: zipfile.ZipInfo, stream: Extent, path: Path, limit: int) -> bytes:
    """A member's first `limit` bytes; of a whole one the checksum is right."""
    count = min(member.file_size, limit)
    content = stream.at(_member_offset(member, stream, path), count)
    if len(content) == member.file_size and zlib.crc32(content) != member.CRC:
        raise LorsError(f"{path}: damaged: the checksum of {member.filename!r} is wrong")
    return content


def _locate(name: str, value: Any, members: Members, stream: Extent, path: Path, file: int) -> TensorInfo:
    where = f"{path}: tensor {checked_name(name, path)!r}"
    if not isinstance(value, Tensor):
        raise LorsError(f"{path}: expected a state dict of tensors, got {type(value).__name__} under {name!r}")
    code, start, shape, stride = value.code, value.start, value.shape, value.stride
    if not isinstance(shape, tuple) or not isinstance(stride, tuple) or len(shape) != len(stride) or code not in DTYPES:
        raise LorsError(f"{where}: unreadable description: expected a dtype, and a shape and strides of one length")
    if not all(map(is_size, (start, *stride))):
        raise LorsError(f"{where}: unreadable description: expected a start and strides of non-negative whole numbers")
    nbytes = bytes_of(code, shape, where)
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
    return TensorInfo(name, DTYPES[code], shape, file, stream.start + offset + begin, nbytes)


def _contiguous(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    expected = 1
    for length, step in zip(reversed(shape), reversed(stride), strict=True):
        if length != 1 and step != expected:
            return False
        expected *= length
    return True


def _member_offset(member: zipfile.ZipInfo, stream: Extent, path: Path) -> int:
    """Where a stored member's bytes begin: behind its local header, whose length only the header itself gives."""
    local = stream.at(member.header_offset, 30)
    if len(local) < 30 or local[:4] != b"PK\x03\x04":
        raise LorsError(f"{path}: damaged archive: no local header for {member.filename!r}")
    name_length, extra_length = struct.unpack("<HH", local[26:30])
    offset = member.header_offset + 30 + name_length + extra_length
    if offset + member.file_size > stream.size:
        raise LorsError(f"{path}: truncated: {member.filename!r} reaches over the end of the file")
    return int(offset)
