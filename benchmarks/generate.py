"""Whisper-shaped checkpoints in the Hugging Face format: a base and fine-tuned experts, deterministic, any size.

The delta of each two-dimensional weight [m, n] of an expert is

    powerlaw:  c * U diag(i^-0.5) V^T + noise      the spectrum of fine-tuning: few strong directions, a long tail
    buried:    the same in 25 times the noise      a cut inside noise: two to six directions stand out, the seventh and
                                                   the eighth singular value differ by a few thousandths
    flat:      Gaussian noise                      the worst case for a truncated SVD: no gap anywhere

with orthonormal U [m, min(m, n)] and V [n, min(m, n)]: one random orthonormal basis per (length, width), whose rows
are permuted and sign-flipped for every matrix (still orthonormal, and hundreds of times cheaper than a QR each).
Root mean square of an entry: 5e-4, of the power law's noise: 1e-4. Other weights change by noise of 1e-4.

Writing streams tensor by tensor: memory stays at a few tensors whatever the size.
"""

from __future__ import annotations

import json
import shutil
import struct
import zlib
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np
import numpy.typing as npt

from .errors import BenchmarkError
from .shapes import LANGUAGES, SIZES, WhisperSize

Array = npt.NDArray[np.float32]

DTYPES: dict[str, tuple[str, npt.DTypeLike]] = {
    "float32": ("F32", np.float32),
    "float16": ("F16", np.float16),
    "bfloat16": ("BF16", ml_dtypes.bfloat16),
}
BASE_SCALE, DELTA_SCALE, NOISE_SCALE = 3e-2, 5e-4, 1e-4
DELTAS = {"powerlaw": NOISE_SCALE, "buried": 25 * NOISE_SCALE, "flat": DELTA_SCALE}  # of a matrix -> its noise
MARKER = "generated.json"
VERSION = 1  # of what the numbers look like: raise it when a change here makes old files stale


@dataclass(frozen=True)
class Spec:
    """What is in one generated directory; `deltas` is one of DELTAS."""

    size: str
    dtype: str = "float32"
    deltas: str = "powerlaw"
    seed: int = 0
    version: int = VERSION

    @property
    def folder(self) -> str:
        return f"{self.size}-{self.dtype}-{self.deltas}-{self.seed}"


@dataclass(frozen=True)
class Checkpoints:
    """Paths of the base directory and of the experts' directories by language."""

    base: Path
    experts: dict[str, Path]

    @property
    def directories(self) -> list[Path]:
        return [self.base, *self.experts.values()]

    @property
    def files(self) -> list[Path]:
        return [directory / "model.safetensors" for directory in self.directories]


def generate(root: Path, spec: Spec, experts: int) -> Checkpoints:
    """Make what is missing of base and `experts` experts under `root`, reuse what is there, return the paths."""
    if not 1 <= experts <= len(LANGUAGES):
        raise BenchmarkError(f"experts: expected 1 to {len(LANGUAGES)}, got {experts}")
    for value, allowed, what in (
        (spec.size, SIZES, "size"),
        (spec.dtype, DTYPES, "dtype"),
        (spec.deltas, DELTAS, "deltas"),
    ):
        if value not in allowed:
            raise BenchmarkError(f"{what}: expected one of {', '.join(allowed)}, got {value}")
    home = root / spec.folder
    checkpoints = Checkpoints(home / "base", {name: home / name for name in LANGUAGES[:experts]})
    missing = [number for number, path in enumerate(checkpoints.directories) if not is_generated(path, spec)]
    if missing:
        write_checkpoints(spec, [(number, checkpoints.directories[number]) for number in missing])
    return checkpoints


def is_generated(directory: Path, spec: Spec) -> bool:
    marker = directory / MARKER
    return marker.exists() and json.loads(marker.read_text()) == asdict(spec)


def write_checkpoints(spec: Spec, targets: list[tuple[int, Path]]) -> None:
    """Write the numbered checkpoints (0: the base) tensor by tensor, side by side; visible only when complete."""
    shapes = tensor_shapes(spec.size)
    header = safetensors_header(shapes, DTYPES[spec.dtype][0])
    dtype = np.dtype(DTYPES[spec.dtype][1])
    needed = len(targets) * (len(header) + sum(int(np.prod(shape)) for shape in shapes.values()) * dtype.itemsize)
    home = targets[0][1].parent
    home.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(home).free
    if needed * 1.05 + 1e9 > free:
        raise BenchmarkError(
            f"{home.name}: needs {needed / 1e9:.1f} GB of disk and 1 GB to spare, got {free / 1e9:.1f} GB"
        )
    partial = {number: path.with_name(path.name + ".partial") for number, path in targets}
    streams: dict[int, BinaryIO] = {}
    try:
        for number, directory in partial.items():
            shutil.rmtree(directory, ignore_errors=True)
            directory.mkdir()
            streams[number] = (directory / "model.safetensors").open("wb")
            streams[number].write(header)
        for name, shape in shapes.items():
            base = base_tensor(spec.seed, name, shape)
            for number, stream in streams.items():
                tensor = base if number == 0 else base + delta_tensor(spec, number, name, shape)
                stream.write(tensor.astype(dtype, copy=False).view(np.uint8).data)
    finally:
        for stream in streams.values():
            stream.close()
    for number, path in targets:
        write_sidecars(partial[number], spec)
        (partial[number] / MARKER).write_text(json.dumps(asdict(spec)))
        shutil.rmtree(path, ignore_errors=True)
        partial[number].rename(path)


def safetensors_header(shapes: dict[str, tuple[int, ...]], dtype: str) -> bytes:
    """Length and JSON of a safetensors file that holds these tensors, in this order, without gaps."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position, itemsize = 0, 4 if dtype == "F32" else 2
    for name, shape in shapes.items():
        end = position + int(np.prod(shape)) * itemsize
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def random(seed: int, number: int, name: str) -> np.random.Generator:
    """A generator of its own for each tensor of each checkpoint: what is made does not depend on what else is."""
    return np.random.default_rng([seed, number, zlib.crc32(name.encode())])


def base_tensor(seed: int, name: str, shape: tuple[int, ...]) -> Array:
    values = random(seed, 0, name).standard_normal(shape, dtype=np.float32) * np.float32(BASE_SCALE)
    return values + np.float32(1) if name.endswith("layer_norm.weight") else values


def delta_tensor(spec: Spec, number: int, name: str, shape: tuple[int, ...]) -> Array:
    generator = random(spec.seed, number, name)
    matrix = len(shape) == 2 and "embed" not in name
    scale = DELTAS[spec.deltas] if matrix else NOISE_SCALE
    delta: Array = generator.standard_normal(shape, dtype=np.float32) * np.float32(scale)
    return delta + power_law(generator, *shape) if matrix and spec.deltas != "flat" else delta


def power_law(generator: np.random.Generator, m: int, n: int) -> Array:
    """c * U diag(i^-0.5) V^T with random orthonormal U, V; c makes the root mean square entry DELTA_SCALE."""
    sigma = np.arange(1, min(m, n) + 1, dtype=np.float64) ** -0.5
    sigma *= DELTA_SCALE * np.sqrt(m * n) / np.linalg.norm(sigma)
    left, right = shuffled_basis(generator, m, min(m, n)), shuffled_basis(generator, n, min(m, n))
    product: Array = (left * sigma.astype(np.float32)) @ right.T
    return product


def shuffled_basis(generator: np.random.Generator, length: int, width: int) -> Array:
    signs = generator.choice(np.array([-1, 1], np.float32), size=(length, 1))
    shuffled: Array = orthonormal_basis(length, width)[generator.permutation(length)] * signs
    return shuffled


@lru_cache(maxsize=4)
def orthonormal_basis(length: int, width: int) -> Array:
    """Orthonormal columns [length, width], random but the same in every run."""
    basis: Array = np.linalg.qr(random(0, length, "basis").standard_normal((length, width)))[0].astype(np.float32)
    return basis


@lru_cache(maxsize=8)
def tensor_shapes(size: str) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every stored tensor, from transformers' own model class (no memory is allocated for it)."""
    import torch
    from transformers import WhisperForConditionalGeneration

    with torch.device("meta"):
        model = WhisperForConditionalGeneration(whisper_config(SIZES[size]))
    state = model.state_dict()
    del state["proj_out.weight"]  # tied to the token embedding, hence not stored
    return {name: tuple(state[name].shape) for name in sorted(state)}


def whisper_config(size: WhisperSize, dtype: str = "float32") -> Any:
    """The configuration of the released multilingual model of this size."""
    from transformers import WhisperConfig

    return WhisperConfig(
        architectures=["WhisperForConditionalGeneration"],
        dtype=dtype,
        d_model=size.width,
        encoder_layers=size.encoder_layers,
        decoder_layers=size.decoder_layers,
        encoder_attention_heads=size.heads,
        decoder_attention_heads=size.heads,
        encoder_ffn_dim=4 * size.width,
        decoder_ffn_dim=4 * size.width,
        num_mel_bins=size.mel_bins,
        vocab_size=size.vocabulary,
        bos_token_id=50257,
        eos_token_id=50257,
        pad_token_id=50257,
        decoder_start_token_id=50258,
        begin_suppress_tokens=[220, 50257],
    )


def write_sidecars(directory: Path, spec: Spec) -> None:
    """config.json, generation_config.json, tokenizer and processor: what from_pretrained and pipeline() load."""
    from transformers import GenerationConfig, WhisperFeatureExtractor, WhisperProcessor, WhisperTokenizer

    size = SIZES[spec.size]
    config = whisper_config(size, spec.dtype)
    config.save_pretrained(directory)
    tokens = special_tokens(size)
    GenerationConfig(
        bos_token_id=50257,
        eos_token_id=50257,
        pad_token_id=50257,
        decoder_start_token_id=50258,
        begin_suppress_tokens=[220, 50257],
        max_length=448,
        max_initial_timestamp_index=50,
        is_multilingual=True,
        return_timestamps=False,
        no_timestamps_token_id=tokens["<|notimestamps|>"],
        prev_sot_token_id=tokens["<|startofprev|>"],
        task_to_id={task: tokens[f"<|{task}|>"] for task in ("transcribe", "translate")},
        lang_to_id={token: tokens[token] for token in list(tokens)[2 : 2 + size.languages]},
    ).save_pretrained(directory)
    vocabulary, merges = byte_pairs()
    special = list(tokens)
    tokenizer = WhisperTokenizer(
        vocab=vocabulary | tokens, merges=merges, additional_special_tokens=special[1:-1501], pad_token=special[0]
    )
    features = WhisperFeatureExtractor(feature_size=size.mel_bins)
    WhisperProcessor(feature_extractor=features, tokenizer=tokenizer).save_pretrained(directory)


def special_tokens(size: WhisperSize) -> dict[str, int]:
    """Token -> id, in Whisper's order, from 50257 on."""
    from transformers.models.whisper.tokenization_whisper import LANGUAGES as CODES

    tasks = ["translate", "transcribe", "startoflm", "startofprev", "nospeech", "notimestamps"]
    names = ["endoftext", "startoftranscript", *list(CODES)[: size.languages], *tasks]
    names += [f"{step * 0.02:.2f}" for step in range(1501)]
    return {f"<|{name}|>": number for number, name in enumerate(names, start=50257)}


@lru_cache(maxsize=1)
def byte_pairs() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A byte-pair vocabulary of Whisper's size (50257 tokens): the 256 bytes, then pairs of bytes.

    It tokenizes any text and decodes any id, which is all that loading and generating need.
    """
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = list(bytes_to_unicode().values())
    merges = [(first, second) for first in letters for second in letters][: 50257 - 256]
    words = letters + [first + second for first, second in merges]
    return {word: number for number, word in enumerate(words)}, merges
