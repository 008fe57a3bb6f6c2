"""whisper.cpp's file: one of 32-bit integers, floats and names, in the order in which its loader reads them.

    magic, hparams, mel filters, text tokens, then for each tensor: dimensions, name length, type, shape (last first), name, values

Matrices and convolutions are float16, all others float32. int8 is ggml's q8_0: blocks of 32 entries of
a matrix' row, each a float16 d and q in int8 with value = d * q, d = max|value| / 127; convolutions are float16 then.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import BinaryIO, NamedTuple

import numpy as np

from ..errors import LorsError
from ..files.directory import OutputDirectory
from ..files.writing import writing
from .model import Stored, Whisper, require_tied
from .vocabulary import require_openai_vocabulary, text_tokens

__all__ = ["DTYPES", "write"]

FILE = "ggml-model.bin"
MAGIC = 0x67676D6C
F32, F16, Q8_0 = 0, 1, 8  # of a tensor
BLOCK = 32  # entries of q8_0
BLOCK_OF = np.dtype([("d", "<f2"), ("q", "i1", BLOCK)])
_RATE, _WINDOW = 16000, 400  # samples a second, and of one spectrum


class _Kind(NamedTuple):
    """What is written for a `--dtype`: the file's type, that of matrices and that of convolutions."""

    file: int
    matrix: int
    convolution: int


# 2000: the version of ggml's blocks, times 1000; 7: mostly q8_0. None for float32: whisper.cpp 1.8 aborts on convolutions in it
_KINDS = {"float16": _Kind(1, F16, F16), "int8": _Kind(2007, Q8_0, F16)}
DTYPES = tuple(_KINDS)


def write(whisper: Whisper, output: OutputDirectory, dtype: str, notices: list[str]) -> None:
    """Writes ggml-model.bin. LorsError for a vocabulary or a model that whisper.cpp does not know."""
    dims, kind = whisper.dims, _KINDS[dtype]
    require_tied(whisper)
    if dims.n_audio_state != dims.n_text_state:
        raise LorsError(f"{whisper.name}: expected one width of encoder and decoder, as whisper.cpp does")
    if dtype == "int8" and dims.n_text_state % BLOCK:
        raise LorsError(
            f"{whisper.name}: int8: expected a width that is a multiple of {BLOCK}, got {dims.n_text_state}"
        )
    tokenizer = require_openai_vocabulary(whisper, "whisper.cpp")
    if tokenizer is None:
        raise LorsError(
            f"{whisper.name}: expected tokenizer.json or vocab.json beside the weights, whose tokens the file holds"
        )
    tokens = text_tokens(whisper, tokenizer)
    path = output.path / FILE
    with writing(path), path.open("xb") as stream:
        stream.write(struct.pack("<I", MAGIC))
        stream.write(struct.pack("<11i", *_hparams(whisper), kind.file))
        filters = mel_filters(dims.n_mels)
        stream.write(struct.pack("<2i", *filters.shape) + filters.astype("<f4").tobytes())
        stream.write(struct.pack("<i", len(tokens)))
        for token in tokens:
            stream.write(struct.pack("<i", len(token)) + token)
        for stored in whisper.weights:
            _write_tensor(stream, whisper, stored, kind)


def _hparams(whisper: Whisper) -> tuple[int, ...]:
    d = whisper.dims
    audio = (d.n_audio_ctx, d.n_audio_state, d.n_audio_head, d.n_audio_layer)
    return (d.n_vocab, *audio, d.n_text_ctx, d.n_text_state, d.n_text_head, d.n_text_layer, d.n_mels)


def _write_tensor(stream: BinaryIO, whisper: Whisper, stored: Stored, kind: _Kind) -> None:
    name, shape = stored.weight.openai, stored.weight.shape
    of_type = F32
    if len(shape) > 1 and not name.endswith("positional_embedding"):
        of_type = kind.matrix if len(shape) == 2 else kind.convolution
    if name.endswith(("conv1.bias", "conv2.bias")):
        shape = (*shape, 1)  # added to a matrix of channels x time
    encoded = name.encode()
    stream.write(struct.pack("<3i", len(shape), len(encoded), of_type))
    stream.write(struct.pack(f"<{len(shape)}i", *reversed(shape)) + encoded)
    dtype, encode = _ENCODERS[of_type]
    for values in whisper.slabs(stored, dtype):
        stream.write(encode(values).tobytes())


def quantized(values: np.ndarray) -> np.ndarray:
    """q8_0 of float32 values, flat, a multiple of BLOCK: an array of BLOCK_OF.

    q = value / d to the nearest, halves away from zero, by the d that is not yet rounded to float16: as ggml does.
    """
    blocks = values.reshape(-1, BLOCK)
    d = np.abs(blocks).max(axis=1) / np.float32(127)
    inverse = np.divide(np.float32(1), d, out=np.zeros_like(d), where=d > 0)
    scaled = blocks * inverse[:, None]
    made = np.empty(len(blocks), BLOCK_OF)
    made["d"], made["q"] = d, np.copysign(np.floor(np.abs(scaled) + np.float32(0.5)), scaled)
    return made


_ENCODERS: dict[int, tuple[str, Callable[[np.ndarray], np.ndarray]]] = {
    F32: ("float32", lambda values: values),
    F16: ("float16", lambda values: values),
    Q8_0: ("int8", quantized),
}


def mel_filters(count: int) -> np.ndarray:
    """Whisper's mel filters [count, 201]: triangles of area 1 in Hz over the frequencies of a spectrum, on Slaney's scale.

    mel = 3 f / 200 below 1000 Hz, 15 + 27 log(f / 1000) / log 6.4 above; `count` + 2 points in equal steps from 0 to 8000 Hz.
    """
    step = np.log(6.4) / 27
    top = 15 + np.log(_RATE / 2 / 1000) / step
    mels = np.linspace(0, top, count + 2)
    edges = np.where(mels < 15, mels * 200 / 3, 1000 * np.exp(step * (mels - 15)))
    frequencies = np.linspace(0, _RATE / 2, _WINDOW // 2 + 1)
    low, middle, high = edges[:-2, None], edges[1:-1, None], edges[2:, None]
    rising, falling = (frequencies - low) / (middle - low), (high - frequencies) / (high - middle)
    return np.maximum(0, np.minimum(rising, falling)) * 2 / (high - low)
