"""Where one tensor lies in a file, its dtype by safetensors' code, and how many bytes it takes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from ..errors import LorsError, shown

__all__ = ["DTYPES", "FLOATS", "TensorInfo", "dtype_code"]

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
FLOATS = {"float32": DTYPES["F32"], "float16": DTYPES["F16"], "bfloat16": DTYPES["BF16"]}  # what is merged, by name
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_PACKED_BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}

MAX_HEADER = 32 << 20  # bytes: some 250,000 tensors
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


def is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value <= _MAX_NUMEL


def checked_name(name: str, path: Path) -> str:
    if len(name) > _MAX_NAME or not name.isprintable():
        raise LorsError(
            f"{path}: tensor {name[:_MAX_NAME]!r}: expected a printable name of at most {_MAX_NAME} characters"
        )
    return name


def bytes_of(code: str, shape: Sequence[Any], where: str) -> int:
    """Bytes of a tensor; LorsError for a shape that no array can have."""
    if len(shape) > _MAX_DIMENSIONS:
        raise LorsError(f"{where}: expected at most {_MAX_DIMENSIONS} dimensions, got {len(shape)}")
    if not all(map(is_size, shape)):
        raise LorsError(f"{where}: the shape must be a list of non-negative whole numbers, got {shown(list(shape))}")
    bits = _PACKED_BITS.get(code, 8 * DTYPES[code].itemsize)
    # Without its zeros too, as numpy asks for: 2^62 x 0 has no bytes, and no numpy array has that shape.
    if bits * math.prod(length or 1 for length in shape) > 8 * _MAX_NUMEL:
        raise LorsError(f"{where}: the size of shape {list(shape)} overflows")
    if (total := bits * math.prod(shape)) % 8:
        raise LorsError(f"{where}: {code} {list(shape)} does not fill whole bytes")
    return total // 8
