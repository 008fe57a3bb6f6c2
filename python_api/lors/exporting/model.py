"""The Whisper that is exported: complete, of openai's architecture, its values read a slab at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..checkpoints.compatibility import dtype_kind
from ..checkpoints.layers import HEAD, HF_WHISPER, OPENAI_WHISPER
from ..checkpoints.reader import Checkpoint, open_checkpoint
from ..checkpoints.tensor_info import TensorInfo
from ..checkpoints.whisper import Dims, Weight, weights
from ..errors import LorsError, shown

__all__ = ["Stored", "Whisper", "opened"]

SLAB = 1 << 22  # entries; a multiple of every block that values are quantized in
_HALF = float(np.finfo(np.float16).max)
LARGEST = {"float32": float(np.finfo(np.float32).max), "float16": _HALF, "int8": 127 * _HALF}  # int8: times a float16


class Stored(NamedTuple):
    """A weight, and where the checkpoint has it."""

    weight: Weight
    info: TensorInfo


class Whisper:
    """An opened checkpoint that is a whole Whisper, in transformers' or openai-whisper's names."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint, self.name = checkpoint, checkpoint.name
        self.dims = _dims(checkpoint)
        self.weights = _stored(checkpoint, self.dims)

    @cached_property
    def dtype(self) -> str:
        """The narrowest type of float16 and float32 that holds every stored value."""
        return "float16" if all(stored.info.code == "F16" for stored in self.weights) else "float32"

    @property
    def directory(self) -> Path:
        """For tools that read the files themselves; LorsError where they are not in transformers' format."""
        checkpoint = self.checkpoint
        if checkpoint.naming != HF_WHISPER or checkpoint.directory != checkpoint.path:
            raise LorsError(
                f"{checkpoint.path}: expected a directory in transformers' format, as its converter reads it"
            )
        return checkpoint.path

    def slabs(self, stored: Stored, dtype: str) -> Iterator[np.ndarray]:
        """A weight's values in row-major order, flat, in float16 for that `dtype`, else in float32.

        LorsError for one that `dtype` cannot hold.
        """
        info = stored.info
        for start in range(0, info.numel, SLAB):
            found = self.checkpoint.read(info.name, None, start, min(info.numel, start + SLAB)).reshape(-1)
            values = found.astype(np.float32)
            largest = float(np.abs(values).max(initial=0))
            if not largest <= LARGEST[dtype]:
                expected = f"at most {LARGEST[dtype]:g} for {dtype}" if np.isfinite(largest) else "finite values"
                raise LorsError(f"{self.name}: tensor {info.name!r}: expected {expected}, got {largest:g}")
            yield values.astype(np.float16) if dtype == "float16" else values

    def require_values(self, dtype: str) -> None:
        """LorsError unless `dtype` holds every value: for tools that would write infinity."""
        for stored in self.weights:
            for _ in self.slabs(stored, dtype):
                pass


@contextmanager
def opened(source: str | os.PathLike[str]) -> Iterator[Whisper]:
    """The Whisper in a directory, a file, at a hub id or URL; LorsError for anything else."""
    with open_checkpoint(source) as checkpoint:
        yield Whisper(checkpoint)
        checkpoint.require_unchanged()


def _dims(checkpoint: Checkpoint) -> Dims:
    kind = (checkpoint.config or {}).get("model_type", "whisper")
    if checkpoint.adapter is not None:
        raise LorsError(f"{checkpoint.path}: expected a model, got a LoRA adapter; merge it first")
    if checkpoint.naming not in (HF_WHISPER, OPENAI_WHISPER) or kind != "whisper":
        told = "its tensors are not named as a Whisper's" if kind == "whisper" else f"got model_type {shown(kind)}"
        raise LorsError(f"{checkpoint.path}: expected a Whisper, {told}; other models are not exported")
    if checkpoint.naming == OPENAI_WHISPER:
        if checkpoint.dims is None:
            raise LorsError(f"{checkpoint.path}: expected openai-whisper's dims, as its .pt files have them")
        return Dims.check(checkpoint.dims, f"{checkpoint.path}: dims")
    if checkpoint.config is None:
        raise LorsError(f"{checkpoint.path}: expected config.json beside the weights")
    return Dims.of_config(checkpoint.config, f"{checkpoint.path}: config.json")


def _stored(checkpoint: Checkpoint, dims: Dims) -> list[Stored]:
    found, missing = [], []
    for weight in weights(dims):
        name = weight.openai if checkpoint.naming == OPENAI_WHISPER else weight.transformers
        info = checkpoint.tensors.get(name)
        if info is None:
            missing.append(name)
            continue
        if info.shape != weight.shape or dtype_kind(info) != "float":
            raise LorsError(
                f"{checkpoint.name}: tensor {name!r}: expected float32, float16 or bfloat16 of shape "
                f"{list(weight.shape)}, got {info.code} {list(info.shape)}"
            )
        found.append(Stored(weight, info))
    extra = checkpoint.tensors.keys() - {stored.info.name for stored in found} - {HEAD}
    for kind, names in (("lacks", missing), ("has beyond it", sorted(extra))):
        if names:
            raise LorsError(
                f"{checkpoint.name}: expected the tensors of a Whisper, it {kind} {len(names)}: {names[0]!r} ..."
            )
    return found


def require_tied(whisper: Whisper) -> None:
    """LorsError where the output projection is another matrix than the token embedding, which openai's format cannot say."""
    checkpoint = whisper.checkpoint
    if checkpoint.naming == HF_WHISPER and not checkpoint.head_is_tied:
        raise LorsError(
            f"{whisper.name}: its output projection differs from its token embedding; expected one matrix for both"
        )
