"""Tables of contents of weight files: which tensor lies where, without reading any weights.

Two formats are understood, both little-endian and uncompressed, so that every tensor is one run of bytes in its file:

* **safetensors**: 8 bytes header length, a JSON header, then the data;
* **torch archives** (``.pt``, ``.bin`` as written by ``torch.save`` since 1.6): a zip file with one pickle that
  describes the tensors and one stored member per storage. The pickle is read by an unpickler that knows only what
  describing tensors takes; anything else it asks for is refused by name and never called, so no code of the file is
  run and torch is not needed.

A file may lie about itself in every field: each is checked here, once, and an error says which one is wrong.
"""

from __future__ import annotations

import collections
import json
import math
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, NoReturn

import ml_dtypes
import numpy as np

from .errors import LorsError

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

_MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors format itself
_MAX_NUMEL = 2**63 - 1


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
        raise LorsError(
            f"{path}: not a safetensors file: header length {length} is over the format's limit of {_MAX_HEADER}"
        )
    if length > size - 8:
        raise LorsError(
            f"{path}: truncated: the header takes {length} bytes, the file has {size - 8} after its length field"
        )
    header = _parse_header(stream.read(length), path)
    metadata = _check_metadata(header.pop("__metadata__", {}), path)
    data = 8 + length
    tensors = [_check_entry(name, entry, path, file, data) for name, entry in header.items()]
    tensors.sort(key=lambda info: (info.offset, info.nbytes))
    _check_layout(tensors, path, data, size)
    return {info.name: info for info in tensors}, metadata


def _parse_header(text: bytes, path: Path) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(found := dict(pairs)) < len(pairs):
            twice = next(name for name, count in collections.Counter(key for key, _ in pairs).items() if count > 1)
            raise LorsError(f"{path}: the safetensors header has the key {twice!r} twice")
        return found

    def constant(name: str) -> NoReturn:
        raise ValueError(f"{name} is not JSON")

    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=unique, parse_constant=constant)
    except UnicodeDecodeError as error:
        raise LorsError(f"{path}: the safetensors header is not UTF-8 (byte {error.start})") from error
    except (ValueError, RecursionError) as error:
        raise LorsError(f"{path}: the safetensors header is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise LorsError(f"{path}: the safetensors header must be a JSON object, got {type(header).__name__}")
    return header


def _check_metadata(metadata: Any, path: Path) -> dict[str, str]:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise LorsError(f"{path}: __metadata__ of the safetensors header must be an object of strings")
    return metadata


def _whole(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _MAX_NUMEL


def _check_entry(name: str, entry: Any, path: Path, file: int, data: int) -> TensorInfo:
    """One entry of the header, on its own; how the entries lie together is _check_layout's concern."""
    where = f"{path}: tensor {name!r}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        got = sorted(entry) if isinstance(entry, dict) else type(entry).__name__
        raise LorsError(f"{where}: expected an object with dtype, shape and data_offsets, got {got}")
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(code, str) or code not in DTYPES or code == "C128":
        raise LorsError(f"{where}: unknown dtype {code!r}")
    if not isinstance(shape, list) or not all(map(_whole, shape)):
        raise LorsError(f"{where}: the shape must be a list of non-negative whole numbers, got {shape!r}")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_whole, offsets)):
        raise LorsError(f"{where}: data_offsets must be two non-negative whole numbers, got {offsets!r}")
    nbytes = _nbytes(code, shape, where)
    begin, end = offsets
    if end - begin != nbytes:
        raise LorsError(f"{where}: {code} {shape} takes {nbytes} bytes, data_offsets {offsets} give {end - begin}")
    return TensorInfo(name, DTYPES[code], tuple(shape), file, data + begin, nbytes)


def _nbytes(code: str, shape: list[int], where: str) -> int:
    bits = math.prod(shape) * _PACKED_BITS.get(code, 8 * DTYPES[code].itemsize)
    if bits > 8 * _MAX_NUMEL:
        raise LorsError(f"{where}: the size of shape {shape} overflows")
    if bits % 8:
        raise LorsError(f"{where}: {code} {shape} does not fill whole bytes")
    return bits // 8


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

_STORAGES = {
    "FloatStorage": "F32", "HalfStorage": "F16", "BFloat16Storage": "BF16", "DoubleStorage": "F64",
    "LongStorage": "I64", "IntStorage": "I32", "ShortStorage": "I16", "CharStorage": "I8", "ByteStorage": "U8",
    "BoolStorage": "BOOL", "ComplexFloatStorage": "C64", "ComplexDoubleStorage": "C128",
}  # fmt: skip
_TORCH_DTYPES = {
    "float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64", "int64": "I64", "int32": "I32",
    "int16": "I16", "int8": "I8", "uint8": "U8", "uint16": "U16", "uint32": "U32", "uint64": "U64", "bool": "BOOL",
    "complex64": "C64", "complex128": "C128", "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2",
    "float8_e4m3fnuz": "F8_E4M3FNUZ", "float8_e5m2fnuz": "F8_E5M2FNUZ", "float8_e8m0fnu": "F8_E8M0",
}  # fmt: skip


class _Storage(NamedTuple):
    code: str  # "" when untyped: the tensor says
    key: str


class _Tensor(NamedTuple):
    code: str
    key: str
    start: int  # elements
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def _tensor(storage: _Storage, start: int, shape: tuple[int, ...], stride: tuple[int, ...], *rest: Any) -> _Tensor:
    return _Tensor(storage.code, storage.key, start, shape, stride)


def _tensor_of_dtype(
    storage: _Storage,
    start: int,
    shape: tuple[int, ...],
    stride: tuple[int, ...],
    grad: bool,
    hooks: Any,
    code: str,
    *rest: Any,
) -> _Tensor:
    return _Tensor(code, storage.key, start, shape, stride)


def _parameter(tensor: _Tensor, *rest: Any) -> _Tensor:
    return tensor


# Everything a pickle of tensors may name. Types and dtypes become plain strings: nothing here does harm when called.
_KNOWN: dict[str, Callable[..., Any] | str] = {
    "collections.OrderedDict": collections.OrderedDict,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_tensor_v3": _tensor_of_dtype,
    "torch._utils._rebuild_parameter": _parameter,
    "torch.storage.UntypedStorage": "",
    **{f"torch.{name}": code for name, code in _STORAGES.items()},
    **{f"torch.{name}": code for name, code in _TORCH_DTYPES.items()},
}


class _Unpickler(pickle.Unpickler):
    """Reads a pickle of tensors and plain values. Whatever else it names is refused before it is looked up."""

    def __init__(self, stream: BinaryIO, path: Path) -> None:
        super().__init__(stream)
        self._path = path

    def find_class(self, module: str, name: str) -> Any:
        found = _KNOWN.get(f"{module}.{name}")
        if found is None:
            raise LorsError(
                f"{self._path}: refused: its pickle asks for {module}.{name}, which could run code; only plain tensors "
                f"are read (save the state dict alone, or convert it to safetensors)"
            )
        return found

    def persistent_load(self, identity: Any) -> _Storage:
        kind, code, key, _location, _numel = identity
        if kind != "storage" or not isinstance(code, str) or not isinstance(key, str):
            raise pickle.UnpicklingError(f"unknown persistent id {identity!r}")
        return _Storage(code, key)


def read_torch_archive(
    stream: BinaryIO, path: Path, file: int = 0
) -> tuple[dict[str, TensorInfo], dict[str, Any] | None]:
    """Tensors by name of a ``torch.save`` archive, and openai-whisper's ``dims`` (None in a plain state dict).

    Accepted are a state dict and ``{"dims": {...}, "model_state_dict": {...}}``. Raises LorsError for an archive that
    is damaged, compressed, big-endian, of torch before 1.6, that needs more than tensors and plain values, or that
    holds tensors which are not contiguous.
    """
    try:
        with zipfile.ZipFile(stream) as archive:
            members = {info.filename.partition("/")[2]: info for info in archive.infolist()}
            content = _unpickle(archive, members, path)
    except zipfile.BadZipFile as error:
        raise LorsError(f"{path}: not a torch archive (damaged, or written by torch before 1.6): {error}") from error
    state, dims = content, None
    if isinstance(content, dict) and "model_state_dict" in content:
        state, dims = content["model_state_dict"], content.get("dims")
        if dims is not None and not isinstance(dims, dict):
            raise LorsError(f"{path}: dims must be a dictionary, got {type(dims).__name__}")
    if not isinstance(state, dict) or not state:
        raise LorsError(f"{path}: expected a state dict (tensor names to tensors), got {type(state).__name__}")
    return {name: _locate(name, value, members, stream, path, file) for name, value in state.items()}, dims


def _unpickle(archive: zipfile.ZipFile, members: dict[str, zipfile.ZipInfo], path: Path) -> Any:
    if "data.pkl" not in members:
        raise LorsError(f"{path}: not a torch archive: it has no data.pkl")
    packed = [name for name, info in members.items() if info.compress_type != zipfile.ZIP_STORED]
    if packed:
        raise LorsError(f"{path}: the archive member {packed[0]!r} is compressed; torch stores without compression")
    if members["data.pkl"].file_size > _MAX_HEADER:
        raise LorsError(f"{path}: data.pkl takes {members['data.pkl'].file_size} bytes, the limit is {_MAX_HEADER}")
    if "byteorder" in members and (order := archive.read(members["byteorder"])) != b"little":
        raise LorsError(f"{path}: expected little-endian tensors, got byte order {order!r}")
    try:
        with archive.open(members["data.pkl"]) as stream:
            return _Unpickler(stream, path).load()  # type: ignore[arg-type]
    except (LorsError, zipfile.BadZipFile, OSError):
        raise
    except Exception as error:  # a damaged pickle fails in the unpickler in any way at all
        raise LorsError(f"{path}: the pickle in it cannot be read: {type(error).__name__}: {error}") from error


def _locate(
    name: Any, value: Any, members: dict[str, zipfile.ZipInfo], stream: BinaryIO, path: Path, file: int
) -> TensorInfo:
    where = f"{path}: tensor {name!r}"
    if not isinstance(name, str) or not isinstance(value, _Tensor):
        raise LorsError(f"{path}: expected a state dict of tensors, got {type(value).__name__} under {name!r}")
    code, key, start, shape, stride = value
    lists = isinstance(shape, tuple) and isinstance(stride, tuple) and len(shape) == len(stride)
    if not lists or not isinstance(code, str) or code not in DTYPES or not all(map(_whole, (start, *shape, *stride))):
        raise LorsError(f"{where}: unreadable description {tuple(value)!r}")
    nbytes = _nbytes(code, list(shape), where)
    if nbytes and not _contiguous(shape, stride):
        raise LorsError(f"{where}: not contiguous (shape {shape}, strides {stride}); save it again with .contiguous()")
    member = members.get(f"data/{key}")
    if member is None:
        raise LorsError(f"{where}: its data (data/{key}) are not in the archive")
    begin = start * DTYPES[code].itemsize
    if begin + nbytes > member.file_size:
        raise LorsError(f"{where}: takes bytes {begin} to {begin + nbytes} of data/{key}, which has {member.file_size}")
    offset = _member_offset(member, stream, path)
    return TensorInfo(name, DTYPES[code], tuple(shape), file, offset + begin, nbytes)


def _contiguous(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    expected = 1
    for length, step in zip(reversed(shape), reversed(stride), strict=True):
        if length != 1 and step != expected:
            return False
        expected *= length
    return True


def _member_offset(member: zipfile.ZipInfo, stream: BinaryIO, path: Path) -> int:
    """Where a stored member's bytes begin: behind its local header, whose length only the header itself gives."""
    stream.seek(member.header_offset)
    local = stream.read(30)
    if len(local) < 30 or local[:4] != b"PK\x03\x04":
        raise LorsError(f"{path}: damaged archive: no local header for {member.filename!r}")
    name_length, extra_length = struct.unpack("<HH", local[26:30])
    offset = member.header_offset + 30 + name_length + extra_length
    if offset + member.file_size > os.fstat(stream.fileno()).st_size:
        raise LorsError(f"{path}: truncated: {member.filename!r} reaches over the end of the file")
    return int(offset)
