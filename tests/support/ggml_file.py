"""whisper.cpp's file read back, by its loader's order and types: what `lors export --to ggml` wrote."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import NamedTuple

import numpy as np

HPARAMS = ("n_vocab", "n_audio_ctx", "n_audio_state", "n_audio_head", "n_audio_layer") + (
    *("n_text_ctx", "n_text_state", "n_text_head", "n_text_layer", "n_mels", "ftype"),
)
F32, F16, Q8_0 = 0, 1, 8


class GgmlFile(NamedTuple):
    """`tensors` in float32 and in row-major shape, as their types stand for; `types` as stored."""

    hparams: dict[str, int]
    filters: np.ndarray
    tokens: list[bytes]
    tensors: dict[str, np.ndarray]
    types: dict[str, int]


def read(path: Path) -> GgmlFile:
    data, at = path.read_bytes(), 0

    def take(form: str) -> tuple[int, ...]:
        nonlocal at
        found = struct.unpack_from(f"<{form}", data, at)
        at += struct.calcsize(f"<{form}")
        return found

    def values(dtype: object, count: int) -> np.ndarray:
        nonlocal at
        found = np.frombuffer(data, dtype, count, at)
        at += found.nbytes
        return found

    assert take("I") == (0x67676D6C,)
    hparams = dict(zip(HPARAMS, take("11i"), strict=True))
    rows, columns = take("2i")
    filters = values("<f4", rows * columns).reshape(rows, columns)
    tokens = [values("u1", take("i")[0]).tobytes() for _ in range(take("i")[0])]
    tensors, types = {}, {}
    while at < len(data):
        dims, length, kind = take("3i")
        shape = take(f"{dims}i")[::-1]
        name = values("u1", length).tobytes().decode()
        count = int(np.prod(shape))
        if kind == Q8_0:
            blocks = values(np.dtype([("d", "<f2"), ("q", "i1", 32)]), count // 32)
            found = blocks["d"].astype(np.float32)[:, None] * blocks["q"]
        else:
            found = values("<f2" if kind == F16 else "<f4", count).astype(np.float32)
        assert name not in tensors
        tensors[name], types[name] = found.reshape(shape), kind
    return GgmlFile(hparams, filters, tokens, tensors, types)
