"""Where the engine reads tensors from: a checkpoint's files, or a state dict in memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from lors_kernels import SparsePart, UpdateStats
from lors_kernels.arrays import BFLOAT16, dtype_name, is_torch

from ..checkpoints.reader import Checkpoint
from ..errors import LorsError
from .factors import Factors

COLUMNS = 4096


def rows_of(flat: Any) -> list[Any]:
    """Flat values, an array or a tensor, as matrices: rows of COLUMNS entries and one shorter row."""
    body = len(flat) // COLUMNS * COLUMNS
    parts = (flat[:body].reshape(-1, COLUMNS), flat[body:].reshape(1, -1))
    return [part for part in parts if 0 not in part.shape]


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
    """The first axis against all others; a vector is one row."""
    if len(shape) < 2:
        return 1, int(np.prod(shape, dtype=np.int64))
    return shape[0], int(np.prod(shape[1:], dtype=np.int64))


class Slot:
    """One reusable buffer of a worker. Growing only, so that after a few tensors reading allocates nothing."""

    def __init__(self) -> None:
        self._bytes = np.empty(0, np.uint8)

    def array(self, count: int, dtype: np.dtype[Any]) -> np.ndarray:
        """A flat array of `count` elements, 64-byte aligned, contents undefined."""
        nbytes = count * dtype.itemsize
        if self._bytes.size < nbytes:
            self._bytes = np.empty(0, np.uint8)  # let the old one go first
            whole = np.empty(nbytes + 64, np.uint8)
            skip = -whole.ctypes.data % 64
            self._bytes = whole[skip : skip + nbytes]
        return self._bytes[:nbytes].view(dtype)


@dataclass(frozen=True)
class Spec:
    """dtype and shape of one tensor, and whether it can be merged."""

    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def floating(self) -> bool:
        return self.dtype in (np.float32, np.float16, BFLOAT16)


class Source(Protocol):
    """Named tensors that can be read a flat range at a time, from several threads."""

    name: str

    @property
    def tensors(self) -> Mapping[str, Spec]:
        """Names in order, with dtypes and shapes."""
        ...

    def fetch(self, name: str, start: int, stop: int, slot: Slot) -> np.ndarray:
        """Elements [start, stop) of a tensor, row-major; valid until the slot is used again, not to be written to."""
        ...

    def prefetch(self, name: str) -> None:
        """A hint that the tensor is wanted soon."""
        ...

    def factors(self, name: str) -> Factors | None:
        """The difference to the base as factors, where it is known so (an adapter); None where it is not."""
        ...

    @property
    def parts(self) -> Decomposed | None:
        """Where the difference to the base is stored as L + S (an expert file): what that can do; None where it is not."""
        ...


class StoredPart(NamedTuple):
    """L + S of a matrix as a file holds it."""

    left: Any  # [m, r] float32; None: L = 0
    right: Any  # [n, r]
    sparse: SparsePart
    scale: float  # of the values of S


class Decomposed(Protocol):
    """L + S of every decomposed matrix and delta of all else, of any smaller rank and density."""

    def read(self, name: str) -> StoredPart:
        """What the file holds of a decomposed matrix, checked."""
        ...

    def add(
        self, name: str, start: int, total: Any, weight: float, rank: float, density: float, backend: str | None,
        stored: StoredPart | None = None,
    ) -> UpdateStats:  # fmt: skip
        """total += weight * (L + S), or for a tensor that is not decomposed weight * delta[start : start + size].

        A whole matrix may be a tensor on a device, with what has been read of it (`stored`) beside it."""
        ...

    def update(self, name: str) -> np.ndarray:
        """All that is known of the difference, float32 in the tensor's shape."""
        ...

    def stored(self, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
        """(left, right, S) in float64; None where nothing is known of the tensor."""
        ...

    def stored_bytes(self, name: str) -> int:
        """Bytes of the file that belong to a tensor."""
        ...

    def require_base(self, digests: Mapping[str, str]) -> None:
        """LorsError unless it was made from the base with these digests."""
        ...

    def require(self, name: str, matrix: bool, rank: float, density: float) -> None:
        """LorsError unless it holds `rank` and `density` of a tensor that the recipe decomposes, or not."""
        ...

    def stands_in(self, name: str) -> bool:
        """Whether L + S is less than the whole difference of a tensor."""
        ...

    def approximates(self, name: str, rank: float, density: float) -> bool:
        """Whether S of a smaller rank is chosen from less than the whole difference."""
        ...

    def notices(self, partly: bool, approximated: bool) -> list[str]:
        """What a merge has to say of it that asks for whole differences somewhere, or for smaller ranks."""
        ...


class FileSource:
    """A checkpoint; a tied output projection that only other checkpoints store is read from the embedding."""

    parts = None

    def __init__(self, checkpoint: Checkpoint, names: list[str] | None = None) -> None:
        self.name, self._checkpoint = checkpoint.name, checkpoint
        self._stored = {name: checkpoint.resolve(name) or name for name in (names or checkpoint.tensors)}
        infos = {name: checkpoint.info(stored) for name, stored in self._stored.items()}
        self.tensors: dict[str, Spec] = {name: Spec(info.dtype, info.shape) for name, info in infos.items()}

    def fetch(self, name: str, start: int, stop: int, slot: Slot) -> np.ndarray:
        out = slot.array(stop - start, self.tensors[name].dtype)
        return self._checkpoint.read(self._stored[name], out, start, stop)

    def prefetch(self, name: str) -> None:
        self._checkpoint.prefetch(self._stored[name])

    def factors(self, name: str) -> None:
        return None


class MemorySource:
    """A state dict of numpy arrays or CPU torch tensors, read in place."""

    parts = None

    def __init__(self, name: str, state: Mapping[str, Any]) -> None:
        self.name = name
        self._flat = {key: _flat(name, key, value) for key, value in state.items()}
        self.tensors: dict[str, Spec] = {
            key: Spec(self._flat[key].dtype, tuple(value.shape)) for key, value in state.items()
        }

    def fetch(self, name: str, start: int, stop: int, slot: Slot) -> np.ndarray:
        return self._flat[name][start:stop]

    def prefetch(self, name: str) -> None:
        pass  # it is in memory

    def factors(self, name: str) -> None:
        return None


def _flat(source: str, key: str, value: Any) -> np.ndarray:
    if is_torch(value):
        if value.device.type != "cpu":
            raise LorsError(f"{source}: tensor {key!r}: expected a tensor in main memory, got one on {value.device}")
        import torch

        flat = value.detach().contiguous().reshape(-1)
        return flat.view(torch.uint16).numpy().view(BFLOAT16) if dtype_name(flat) == "bfloat16" else flat.numpy()  # type: ignore[no-any-return]
    return np.ascontiguousarray(value).reshape(-1)
