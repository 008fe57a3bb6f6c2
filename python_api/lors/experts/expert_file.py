"""Expert files: a decomposed expert on disk, a fraction of the checkpoint it was made from.

    W_t - W0  ~  L + S  for decomposed matrices        L = left @ right.T,  S = the kept entries of delta - L
              ~  delta  for all other tensors          at lower precision, or left out

One safetensors file; docs/expert-files.md describes every byte. Per decomposed matrix there are ``NAME:left`` and
``NAME:right`` (float32), ``NAME:mask`` (a bit per entry) or ``NAME:gaps`` (a byte per kept entry), ``NAME:values``; per
other tensor ``NAME:delta``, or ``NAME:int8`` with ``NAME:scales``. The metadata say what was decomposed and how, and name
base and expert by SHA-256. Every 2^19 elements have a CRC-32, so that a damaged file is refused rather than merged.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from pydantic import Field

from ..checkpoints.reader import Checkpoint
from ..checkpoints.tensor_info import FLOATS
from ..errors import LorsError
from ..files.documents import Digest, Document

__all__ = ["CHUNK", "Layout", "Part", "is_expert_file"]

KEY = "lors.expert"  # of the metadata
FORMAT = 1
CHUNK = 1 << 19  # elements under one checksum
BLOCK = 256  # elements under one scale of an int8 remainder
CHECKS, EXPONENTS, ENERGIES = ":checks", ":exponents", ":energies"  # tables at the end of the file
F32 = FLOATS["float32"]


class Part(NamedTuple):
    """How one tensor is stored."""

    name: str
    shape: tuple[int, ...]
    rank: int = 0
    kept: int = -1  # entries of S; -1: the tensor is not decomposed

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def matrix(self) -> bool:
        return self.kept >= 0


class Stored(NamedTuple):
    """One array of the file."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]
    first: int  # its first chunk in the table of checksums

    @property
    def chunks(self) -> int:
        return -(-math.prod(self.shape) // CHUNK)


@dataclass(frozen=True)
class Layout:
    """Everything about an expert file that is known before any value is computed."""

    name: str
    base: Mapping[str, str]  # weight file -> SHA-256
    expert: Mapping[str, str]
    origin: str  # what the expert is called: a hub id or the name of a directory
    rank: float
    density: float
    seed: int
    values: Literal["float32", "float16", "bfloat16"]
    index: Literal["mask", "gaps"]
    remainder: Literal["float32", "float16", "int8", "none"]
    parts: Sequence[Part]
    stored: dict[str, Stored] = field(init=False)

    def __post_init__(self) -> None:
        stored: dict[str, Stored] = {}
        first = 0
        for name, dtype, shape in self._arrays():
            stored[name] = Stored(name, dtype, shape, first)
            first += stored[name].chunks
        for name, dtype, shape in (
            (ENERGIES, np.dtype(np.float64), (sum(part.matrix for part in self.parts), 3)),
            (EXPONENTS, np.dtype(np.int16), (first,)),
        ):
            stored[name] = Stored(name, dtype, shape, first)
            first += stored[name].chunks
        stored[CHECKS] = Stored(CHECKS, np.dtype(np.uint32), (first + 1,), first)
        object.__setattr__(self, "stored", stored)

    def _arrays(self) -> Iterator[tuple[str, np.dtype[Any], tuple[int, ...]]]:
        for part in self.parts:
            if part.matrix:
                if part.rank:
                    yield f"{part.name}:left", F32, (part.shape[0], part.rank)
                    yield f"{part.name}:right", F32, (part.shape[1], part.rank)
                if part.kept:
                    size = (part.numel + 7) // 8 if self.index == "mask" else part.kept + part.numel // 255
                    yield f"{part.name}:{self.index}", np.dtype(np.uint8), (size,)
                    yield f"{part.name}:values", FLOATS[self.values], (part.kept,)
            elif self.remainder == "int8":
                yield f"{part.name}:int8", np.dtype(np.int8), part.shape
                yield f"{part.name}:scales", F32, (-(-part.numel // BLOCK),)
            elif self.remainder != "none":
                yield f"{part.name}:delta", FLOATS[self.remainder], part.shape

    def specs(self) -> list[tuple[str, np.dtype[Any], tuple[int, ...]]]:
        """As `WeightWriter` takes them."""
        return [(stored.name, stored.dtype, stored.shape) for stored in self.stored.values()]

    def to_json(self) -> str:
        plain = {key: getattr(self, key) for key in _KEYS}
        parts = [list(part._replace(shape=list(part.shape))) for part in self.parts]  # type: ignore[arg-type]
        return json.dumps({"format": FORMAT, **plain, "parts": parts}, separators=(",", ":"), ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str, where: str) -> Layout:
        """LorsError, which begins with `where`, when it is not what `to_json` writes."""
        data = _LayoutText.parse(text, where)
        parts = [Part(name, tuple(shape), rank, kept) for name, shape, rank, kept in data.parts]
        if len({part.name for part in parts}) < len(parts):
            raise LorsError(f"{where}: a tensor is in it twice")
        for part in parts:
            matrix = part.matrix and len(part.shape) == 2
            if not (part.rank <= min(part.shape) and part.kept <= part.numel if matrix else part[2:] == (0, -1)):
                raise LorsError(f"{where}: impossible part {part.name!r}")
        return cls(**{key: getattr(data, key) for key in _KEYS}, parts=parts)


_Count = Annotated[int, Field(ge=0, lt=2**62)]


class _LayoutText(Document):
    """The metadata as they stand in the file."""

    format: Literal[1]
    name: Annotated[str, Field(min_length=1, max_length=255)]
    base: Annotated[dict[str, Digest], Field(min_length=1)]
    expert: Annotated[dict[str, Digest], Field(min_length=1)]
    origin: str
    rank: Annotated[float, Field(ge=0)]
    density: Annotated[float, Field(ge=0, le=1)]
    seed: Annotated[int, Field(ge=0, lt=2**63)]
    values: Literal["float32", "float16", "bfloat16"]
    index: Literal["mask", "gaps"]
    remainder: Literal["float32", "float16", "int8", "none"]
    parts: list[tuple[str, list[_Count], _Count, Annotated[int, Field(ge=-1, lt=2**62)]]]


_KEYS = ("name", "base", "expert", "origin", "rank", "density", "seed", "values", "index", "remainder")


def is_expert_file(checkpoint: Checkpoint) -> bool:
    """Whether an opened file is an expert file rather than a checkpoint."""
    return KEY in checkpoint.metadata


def checksums(array: np.ndarray) -> list[int]:
    """CRC-32 of every chunk."""
    flat = array.reshape(-1)
    return [zlib.crc32(flat[at : at + CHUNK].view(np.uint8).data) for at in range(0, flat.size, CHUNK)]


def seal(checks: np.ndarray, text: str) -> int:
    """The checksum of the table of checksums and of the metadata: last entry of the table."""
    return zlib.crc32(text.encode(), zlib.crc32(np.ascontiguousarray(checks).view(np.uint8).data))


def encode_gaps(mask: np.ndarray, numel: int, size: int) -> np.ndarray:
    """A byte per set bit: zeros before it, 255 standing for "255 zeros and no entry"; padded with 255 to `size`."""
    positions = np.flatnonzero(np.unpackbits(mask, count=numel, bitorder="little"))
    gaps = np.diff(positions, prepend=-1) - 1
    ends = np.cumsum(gaps // 255 + 1)
    coded = np.full(size, 255, np.uint8)
    coded[ends - 1] = gaps % 255
    return coded


def decode_gaps(coded: np.ndarray, numel: int) -> np.ndarray:
    """The mask of `encode_gaps`; ValueError when an entry lies outside."""
    entry = coded != 255
    positions = np.cumsum(coded.astype(np.int64) + entry)[entry] - 1
    if positions.size and positions[-1] >= numel:
        raise ValueError(f"an entry at {positions[-1]}, expected below {numel}")
    bits = np.zeros(numel, np.uint8)
    bits[positions] = 1
    return np.packbits(bits, bitorder="little")
